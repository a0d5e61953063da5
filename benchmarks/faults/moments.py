"""The instants of a process that a fault can be put at: each file that it opens to write, renames
or deletes, and each folder that it makes. Counted, and so the same in every run of the same job.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR


@dataclass(kw_only=True)
class Moments:
    """Counts what this process does under `root`, and acts at the moments that it is told.

    Attributes:
        actions: what to do right before the moment of that number, counted from 1.
        only: part of a path; moments at other paths are not counted.
    """

    root: Path
    actions: Mapping[int, Callable[[], None]] = field(default_factory=dict)
    only: str = ""
    seen: list[str] = field(default_factory=list)
    _is_acting: bool = False

    def install(self) -> None:
        """For the rest of this process: an audit hook cannot be taken away."""
        sys.addaudithook(self._on)

    def _on(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_acting or event not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        if event == "open" and not is_written(arguments):
            return
        path = str(arguments[1 if event == "os.rename" else 0])
        if not path.startswith(f"{self.root}/") or self.only not in path:
            return
        self.seen.append(f"{event} {path.removeprefix(f'{self.root}/')}")
        if action := self.actions.get(len(self.seen)):
            self._is_acting = True
            try:
                action()
            finally:
                self._is_acting = False


def is_written(arguments: tuple[Any, ...]) -> bool:
    """Whether a file that is opened, by the arguments of the audit event, is opened to write."""
    return isinstance(arguments[2], int) and bool(arguments[2] & _WRITES)
