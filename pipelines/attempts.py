"""Trying a stage again after failures that may pass, and stopping one that takes too long."""

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pipelines.interrupt import Interrupt
from tokendiff.artifacts.store_errors import is_store_down
from tokendiff.errors import CorruptFileError, InputError, first_line, is_unanswered

T = TypeVar("T")

_LONGEST_WAIT_SECONDS = 600.0
_RESEND_SECONDS = 10.0
# What no other attempt would get around, however it is wrapped.
_LASTING = (InputError, CorruptFileError, FloatingPointError, MemoryError, PermissionError)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PASSING_ERRNOS = {
    *(errno.EAGAIN, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH),
    *(errno.EINTR, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH, errno.EPIPE, errno.ESTALE),
    errno.ETIMEDOUT,
}
# By name: importing ray takes seconds, and not every stage needs it.
_PASSING_RAY_ERRORS = {
    *("GetTimeoutError", "LocalRayletDiedError", "NodeDiedError", "ObjectLostError"),
    *("ObjectReconstructionFailedError", "OutOfMemoryError", "RayActorError", "RaySystemError"),
    *("RpcError", "TrainingFailedError", "WorkerCrashedError"),
}
_LASTING_RAY_ERRORS = {"OutOfDiskError", "AuthenticationError", "RuntimeEnvSetupError"}
_BROKEN_ACTOR = "creation task"  # Ray's words for an actor whose constructor raised


def with_retries(
    work: Callable[[], T],
    *,
    max_retries: int,
    wait_s: float,
    on_retry: Callable[[str, float], None],
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[T, int]:
    """What `work` returns, and how often it was called.

    After a failure that may pass it is called again, `max_retries` times at most, with a wait that
    doubles. `work` must go on where it was cut off.

    Args:
        on_retry: told the reason and the seconds of the wait.
    """
    for attempt in range(max_retries + 1):
        try:
            return work(), attempt + 1
        except Exception as error:
            if attempt == max_retries or not may_pass(error):
                raise
            wait = min(wait_s * 2**attempt, _LONGEST_WAIT_SECONDS)
            on_retry(first_line(error), wait)
            sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: something was lost on the way, a node or a connection.

    Not after bad input, numbers that are not finite, a full disk or a bug; nor after the stage's
    own timeout. An error of an unknown kind is not tried again.
    """
    chain = _causes(error)
    return not any(map(_lasts, chain)) and any(map(_passes, chain))


def _lasts(error: BaseException) -> bool:
    if isinstance(error, (*_LASTING, StageTimeout)) or _is_of_ray(error, _LASTING_RAY_ERRORS):
        return True
    if _is_of_ray(error, {"RayActorError"}) and _BROKEN_ACTOR in str(error):
        return True
    return isinstance(error, OSError) and error.errno in _FULL_DISK


def _passes(error: BaseException) -> bool:
    if is_unanswered(error):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNOS:
        return True
    if isinstance(error, OSError) and is_store_down(error):
        return True
    return _is_of_ray(error, _PASSING_RAY_ERRORS)


def _is_of_ray(error: BaseException, names: set[str]) -> bool:
    kinds = type(error).__mro__
    return any(kind.__module__.split(".")[0] == "ray" and kind.__name__ in names for kind in kinds)


def _causes(error: BaseException) -> list[BaseException]:
    """The error, and all that led to it; Ray keeps what a task raised in `cause`."""
    found: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and current not in found:
            found.append(current)
            inner = getattr(current, "cause", None)
            waiting += [current.__cause__, inner if isinstance(inner, BaseException) else None]
    return found


class StageTimeout(TimeoutError):
    """A stage took longer than it may."""


@contextmanager
def deadline(seconds: float | None, *, what: str) -> Iterator[None]:
    """Stop what runs in this block, on the main thread, after some time.

    Raises:
        StageTimeout: the time is up.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise InputError("timeout_s: only a run in a process's main thread can be timed out")

    is_up, is_over = threading.Event(), threading.Event()

    def expire() -> None:
        if is_over.wait(min(seconds, threading.TIMEOUT_MAX)):
            return
        is_up.set()
        while not is_over.is_set():  # again, where a library kept the first one to itself
            interrupt.send()
            is_over.wait(_RESEND_SECONDS)

    clock = threading.Thread(target=expire, name=f"deadline of {what}", daemon=True)
    try:
        with Interrupt() as interrupt:
            clock.start()
            try:
                yield
            finally:
                is_over.set()
                clock.join()
    except KeyboardInterrupt:
        if not is_up.is_set():
            raise
        raise StageTimeout(
            f"{what} took longer than timeout_s = {seconds:g}; raise it, or run the same command "
            "again: it goes on where it was stopped"
        ) from None
