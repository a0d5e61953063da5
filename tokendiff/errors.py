"""The project's two exception classes. Each message names the place, the value and the remedy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_REASON_CHARS = 300
_NO_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "not enough memory", "bad_alloc"),
    # Of CUDA itself and cuBLAS, for what torch does not allocate.
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)


class InputError(ValueError):
    """What the user gave cannot be used as it stands: a config, a file, a column, a model.

    Never retried: the same input fails the same way.
    """


class CorruptFileError(OSError):
    """A file does not match the manifest that vouches for it."""


@contextmanager
def input_errors(problem: str, remedy: str) -> Iterator[None]:
    """What a library raises in this block, at a thing that the user named, becomes an InputError:
    the problem, what the library said, the remedy.

    Libraries that read models raise whatever comes of a file that is not what it should be: a
    TypeError or AttributeError of their own code, and classes that nobody can list.
    """
    try:
        yield
    except (InputError, CorruptFileError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{problem} ({reason_of(error)}); {remedy}") from error


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
