"""Ending on SIGTERM, which `ray job stop`, Kubernetes and a spot market send before they kill.

It ends a process whatever that was started with: one that inherits SIGTERM ignored or blocked too.
SIGINT is left as it is, so that Ctrl-C spares what was started in the background.

Most work is cut off at once, since what it has written counts and the same command goes on from
there. Training first finishes its step and saves it; more SIGTERMs change nothing, since a process
may well get several (its group's, its parent's).
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

STOPPED = "stopped by SIGTERM"
_WATCH_SECONDS = 0.1

_requested = threading.Event()
_num_entered = 0  # blocks of `sigterm_stops`
_is_held = False  # whether SIGTERM leaves it to the work to end


def is_stop_requested() -> bool:
    """Whether a SIGTERM has come to this process since its last block of `sigterm_stops` began."""
    return _requested.is_set()


def words_of(error: BaseException) -> str:
    """The message of an error; for an interrupt that lost its message, what stopped it."""
    is_wordless = isinstance(error, KeyboardInterrupt) and not str(error)
    return STOPPED if is_wordless and is_stop_requested() else str(error).strip()


def check_stop() -> None:
    """Raise KeyboardInterrupt if a SIGTERM has come, though its own one may have been swallowed."""
    if is_stop_requested():
        raise KeyboardInterrupt(STOPPED)


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """In this block SIGTERM raises KeyboardInterrupt in the main thread, as SIGINT does.

    Ray's calls drop what the exception says: `is_stop_requested` tells it from a Ctrl-C. Outside of
    the main thread signals are not ours to handle, and nothing happens.
    """
    global _num_entered
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if _num_entered == 0:
        _requested.clear()
    before = signal.signal(signal.SIGTERM, _on_sigterm)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    _num_entered += 1
    try:
        yield
    finally:
        _num_entered -= 1
        signal.signal(signal.SIGTERM, before)


@contextmanager
def sigterm_held() -> Iterator[None]:
    """In this block, which waits for others to stop, one more SIGTERM changes nothing."""
    global _is_held
    before, _is_held = _is_held, True
    try:
        yield
    finally:
        _is_held = before


@contextmanager
def told_when_requested(tell: Callable[[], None]) -> Iterator[None]:
    """In this block, whose work goes on until it can stop, `tell` is called soon after a SIGTERM.

    A thread does so, and not the handler: that may have interrupted whatever `tell` itself does.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_WATCH_SECONDS):
            if _requested.is_set():
                tell()
                return

    watcher = threading.Thread(target=watch, name="sigterm-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


@contextmanager
def ray_starting() -> Iterator[None]:
    """For `ray.init`, which handles SIGTERM by an exit with another code, and leaves its handlers.

    What Ray starts then has SIGTERM neither ignored nor blocked.
    """
    with sigterm_stops():
        try:
            yield
        except SystemExit:
            _requested.set()
            raise KeyboardInterrupt(STOPPED) from None


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    _requested.set()
    if not _is_held:
        raise KeyboardInterrupt(STOPPED)


class _Messenger:
    """An actor on the driver's node: tells of its SIGTERM, and hands it the workers' events."""

    def __init__(self, on_event: Callable[..., None]) -> None:
        import asyncio

        self._is_stopping = asyncio.Event()
        self._on_event = on_event

    async def stop(self) -> None:
        self._is_stopping.set()

    async def wait_for_stop(self) -> None:
        await self._is_stopping.wait()

    async def emit(self, event: str, fields: dict[str, Any]) -> None:
        self._on_event(event, **fields)


@dataclass(frozen=True, kw_only=True)
class DriverLink:
    """A worker's line to its driver from any node: it hears when to stop, and reports events."""

    actor: Any

    def listen(self) -> Callable[[], bool]:
        """A function that says whether to stop; asking costs nothing."""
        future = self.actor.wait_for_stop.remote().future()
        # Where the actor is lost the driver is too, and Ray ends the workers.
        return lambda: future.done() and future.exception() is None

    def emit(self, event: str, /, **fields: Any) -> None:
        """Report an event where its log is on the driver's node alone; returns once it is there."""
        import ray

        ray.get(self.actor.emit.remote(event, fields))

    def tell(self, event: str, /, **fields: Any) -> None:
        """Report what nobody needs to wait for, and what may be lost."""
        self.actor.emit.remote(event, fields)


@contextmanager
def saving_first(on_event: Callable[..., None]) -> Iterator[DriverLink]:
    """In this block SIGTERM is passed on to workers, who save and return.

    Args:
        on_event: called in another process of this node, by pickle.
    """
    global _is_held
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(_Messenger)
    actor = actor.options(num_cpus=0, scheduling_strategy=here).remote(on_event)
    before = _is_held

    def pass_on() -> None:
        actor.stop.remote()
        on_event("stopping")

    try:
        with told_when_requested(pass_on):
            _is_held = True
            yield DriverLink(actor=actor)
    finally:
        _is_held = before
        ray.kill(actor)
