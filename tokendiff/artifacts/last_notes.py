"""What a process was at when it was killed: a note in a file, which the system keeps whatever ends
its writer. Nobody else can say which rows memory did not suffice for.

A note costs microseconds, as nothing is flushed to the disk: a power cut loses it. Behind a URI it
would cost a request, and is not written.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tokendiff.artifacts.locations import Location
from tokendiff.artifacts.manifest import RECORD_FOLDER

_PREFIX = "at-"
_SIZE = 512  # of a note: one write, never half of one


class LastNote:
    """The note of one process, or of one worker's part of the work. As a context it is gone
    afterwards, however the block ends: only a process that was killed leaves it.

    Args:
        name: of the file, in the record of `folder`.
    """

    def __init__(self, folder: Location, name: str) -> None:
        self._path = _path(folder, name)
        self._file: int | None = None

    def write(self, what: str) -> None:
        """Say what is under way; "" where nothing is that could be named."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what is only looked at ends no run
                os.pwrite(self._file, what.encode()[:_SIZE].ljust(_SIZE), 0)

    def __enter__(self) -> Self:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None and self._path is not None:
            os.close(self._file)
            self._file = None
            self._path.unlink(missing_ok=True)


def take_note(folder: Location, name: str) -> str:
    """What a killed process was at, "" where it left no word; the note is deleted."""
    path = _path(folder, name)
    if path is None or not path.exists():
        return ""
    with contextlib.suppress(OSError):
        what = path.read_bytes().decode(errors="replace").strip()
        path.unlink(missing_ok=True)
        return what
    return ""


def take_notes(folder: Location) -> list[str]:
    """Of all that left one in a folder."""
    if not isinstance(folder, Path):
        return []
    names = sorted(path.name for path in (folder / RECORD_FOLDER).glob(f"{_PREFIX}*"))
    notes = [take_note(folder, name.removeprefix(_PREFIX)) for name in names]
    return [note for note in notes if note]


@contextlib.contextmanager
def without_notes(folder: Location) -> Iterator[None]:
    """Afterwards no note is left in the folder: what ended in this block is known to its caller."""
    try:
        yield
    finally:
        take_notes(folder)


def _path(folder: Location, name: str) -> Path | None:
    return folder / RECORD_FOLDER / f"{_PREFIX}{name}" if isinstance(folder, Path) else None
