"""Bringing outboxes to their tracker: a thread for each live run; and to MLflow what dead runs left
behind.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tokendiff.secrets import without_credentials
from tokendiff.tracking.mlflow_outbox import STATE_NAME, Outbox, load_state, lock_folder
from tokendiff.tracking.mlflow_store import describe, make_client
from tokendiff.tracking.run_log import LOG_NAME

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LAST_TRY_SECONDS = 15.0
_MAX_BACKOFF_SECONDS = 60.0
_REPLAY_SECONDS = 60.0
_SEARCH_DEPTH = 4
logger = logging.getLogger(__name__)


class AnyOutbox(Protocol):
    """What one run has yet to send, wherever that goes: `Outbox`, or one of `log_sinks`."""

    @property
    def name(self) -> str: ...

    @property
    def place(self) -> str: ...

    @property
    def is_delivered(self) -> bool: ...

    def add(self, items: list[list[Any]]) -> None: ...

    def finish(self, status: str, end_seconds: float) -> None: ...

    def deliver(self, client: Any) -> None: ...


AnOutbox = TypeVar("AnOutbox", bound=AnyOutbox)


class Delivery(Generic[AnOutbox]):
    """The thread that brings one run's outbox to its tracker."""

    def __init__(self, outbox: AnOutbox, client: "MlflowClient | None", lock: int) -> None:
        self.outbox = outbox
        self._client = client
        self._lock = lock
        self._news = threading.Event()
        self._closing = threading.Event()
        self._failures = 0
        name = f"{outbox.place.split()[0]} {outbox.name}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._news.set()
        self._thread.start()

    def wake(self) -> None:
        self._news.set()

    def add(self, items: list[list[Any]]) -> None:
        self.outbox.add(items)
        self._news.set()

    def close(self, status: str, end_seconds: float, seconds: float | None = None) -> bool:
        """End the run with one more try, given up after `seconds` (by default 15): whether all was
        delivered.
        """
        self.outbox.finish(status, end_seconds)
        self._closing.set()
        self._news.set()
        self._thread.join(_LAST_TRY_SECONDS if seconds is None else seconds)
        if self._thread.is_alive() or not self.outbox.is_delivered:
            logger.warning(
                "%s does not have all of run %r yet; the next start delivers the rest",
                self.outbox.place,
                self.outbox.name,
            )
            return False
        return True

    def _run(self) -> None:
        is_last = False
        while not is_last:
            if self._failures:
                self._closing.wait(min(2.0 ** (self._failures - 1), _MAX_BACKOFF_SECONDS))
            else:
                self._news.wait()
            self._news.clear()
            is_last = self._closing.is_set()
            self._try_once()
        os.close(self._lock)

    def _try_once(self) -> None:
        place, name = self.outbox.place, self.outbox.name
        try:
            self.outbox.deliver(self._client)
        except Exception as error:  # whatever a store, a network or a disk may raise
            self._failures += 1
            if self._failures == 1:
                logger.warning(
                    "%s fails on run %r (%s); the run goes on, and is sent again later",
                    place,
                    name,
                    describe(error),
                )
        else:
            if self._failures:
                logger.info("%s has run %r up to date again", place, name)
            self._failures = 0


def replay_pending(root: Path, uri: str) -> int:
    """Deliver what runs under `root` could not; `MlflowMirror.open` begins with it.

    A run whose process is gone without having ended it becomes KILLED. Runs that are alive, and
    runs of another store, are left alone. After a minute the rest is left for the next start.

    Returns:
        How many runs were brought up to date.
    """
    deadline = time.monotonic() + _REPLAY_SECONDS
    delivered = 0
    for folder in _folders_with_state(root):
        if time.monotonic() > deadline:
            break
        try:
            delivered += _replay(folder, uri)
        except FileNotFoundError:
            if folder.exists():
                raise  # else somebody has deleted it, perhaps the retention of another pipeline
    return delivered


def _replay(folder: Path, uri: str) -> bool:
    """Whether the run of a folder needed to be brought up to date, and now is."""
    if _pending(folder, uri) is None:
        return False
    sign_of_life = _last_sign_of_life(folder)
    if (lock := lock_folder(folder, is_free_without_locks=False)) is None:
        return False
    if (outbox := _pending(folder, uri)) is None:  # its process has ended it meanwhile
        os.close(lock)
        return False
    status, end = outbox.state.status, (outbox.state.end_time or 0) / 1000
    if status == "RUNNING":
        status, end = "KILLED", sign_of_life
    return Delivery(outbox, make_client(uri), lock).close(status, end)


def _pending(folder: Path, uri: str) -> Outbox | None:
    """The outbox of a folder, where this store does not have all of it."""
    state = load_state(folder)
    if state is None or state.uri != without_credentials(uri):
        return None
    outbox = Outbox(folder, state)
    return None if outbox.is_delivered and state.status != "RUNNING" else outbox


def _last_sign_of_life(folder: Path) -> float:
    log = folder / LOG_NAME
    return (log if log.exists() else folder / STATE_NAME).stat().st_mtime


def _folders_with_state(root: Path) -> Iterator[Path]:
    """Folders that hold a run's state; not looked for inside checkpoints, nor far down."""
    for place, folders, files in os.walk(root):
        depth = len(Path(place).relative_to(root).parts)
        folders[:] = sorted(
            name
            for name in folders
            if depth < _SEARCH_DEPTH
            and not name.startswith("checkpoint-")
            and name != "mlartifacts"
        )
        if STATE_NAME in files:
            yield Path(place)
