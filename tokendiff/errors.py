"""The project's two exception classes, whose messages name the place, the value and the remedy; and
what errors of others come to.
"""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_REASON_CHARS = 300
_NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "not enough memory", "bad_alloc"),
    # Of CUDA itself and cuBLAS, for what torch does not allocate.
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)
# Of httpx and requests, which clients of a hub ask with; found by name, to import neither.
_CLIENTS = ("httpx", "httpx2", "requests")
_UNANSWERED = {
    *("NetworkError", "TimeoutException", "RemoteProtocolError", "ProxyError"),
    *("ConnectionError", "Timeout", "ChunkedEncodingError"),
}
_NO_ANSWER = "the server does not answer as it should"


class InputError(ValueError):
    """What the user gave cannot be used as it stands: a config, a file, a column, a model.

    Never retried: the same input fails the same way.
    """


class CorruptFileError(OSError):
    """A file does not match the manifest that vouches for it."""


@contextmanager
def input_errors(problem: str, remedy: str) -> Iterator[None]:
    """What a library raises in this block, at a thing that the user named, becomes an InputError:
    the problem, what the library said, the remedy. Where a server did not answer it becomes a
    ConnectionError, because the same input may well do later.

    Libraries that read models raise whatever comes of a file that is not what it should be: a
    TypeError or AttributeError of their own code, and classes that nobody can list.
    """
    try:
        yield
    except (InputError, CorruptFileError, MemoryError):
        raise
    except Exception as error:
        raise_outage(error, problem)
        raise InputError(f"{problem} ({reason_of(error)}); {remedy}") from error


def raise_outage(error: BaseException, problem: str) -> None:
    """Raise a ConnectionError where a library failed because a server did not answer."""
    if (outage := outage_behind(error)) is not None:
        reason = first_line(outage)
        said = reason if _NO_ANSWER in reason else f"{_NO_ANSWER} ({reason})"
        raise ConnectionError(f"{problem}: {said}") from error


def outage_behind(error: BaseException) -> BaseException | None:
    """What says that a server was down, overloaded or cut off, among an error and all that led to
    it; None where nothing does.

    What was raised `from None` is looked at too: libraries say that a file is not there, and hide
    that they could not ask.
    """
    waiting: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    found = None
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.append(current)
        if "OfflineModeIsEnabled" in f"{type(current).__name__}: {current}":
            return None  # nobody was asked, nor will be
        if found is None and is_unanswered(current):
            found = current
        waiting += [current.__context__, current.__cause__]
    return found


def is_unanswered(error: BaseException) -> bool:
    """Whether an error itself says that a server was down, overloaded or cut off."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return status == 429 or status >= 500
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    kinds = type(error).__mro__
    return any(k.__module__.split(".")[0] in _CLIENTS and k.__name__ in _UNANSWERED for k in kinds)


def that_travels(error: BaseException) -> BaseException:
    """The error, or its words where a class of somebody else's cannot be sent to another
    process.
    """
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever that class makes of it
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, in short; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:_REASON_CHARS]


def reason_of(error: Exception) -> str:
    """What an exception says, on one line and in short."""
    text = " ".join(str(error).split())[:_REASON_CHARS]
    # What these say is no sentence: "'added_tokens'".
    is_bare = isinstance(error, KeyError | AttributeError | TypeError) or not text
    return f"{type(error).__name__}: {text}".removesuffix(": ") if is_bare else text


@contextmanager
def naming(path: object) -> Iterator[None]:
    """In this block an OSError that names no file, as of a write to a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def naming_memory(place: Callable[[], str], remedy: str) -> Iterator[None]:
    """Where memory runs out in this block, a MemoryError says at what.

    Args:
        place: asked when it has happened.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"{place()}: memory ran out ({first_line(error)}); {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is Python's MemoryError, or torch's: a class on a device, words on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
