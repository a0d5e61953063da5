"""Rows of the input that cannot be used: left out, named in `errors/`, counted, and too many.

`jobs.preprocess` and `jobs.generate` write a file `errors/part-NNNNN.jsonl` for each part of their
input that has such rows. It depends on the input alone, as the part's other files do.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from tokendiff.artifacts.locations import Location
from tokendiff.artifacts.manifest import sha256_of
from tokendiff.errors import InputError

ERRORS = "errors"
SHOWN_CHARS = 200
_NAMED = 3  # bad rows that the error of a job quotes


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used.

    Attributes:
        place: `file:line`, or `file: row N` where there are no lines.
        reason: what is wrong with it, and the remedy if there is one.
        row: how it begins.
    """

    place: str
    reason: str
    row: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


Document = str | BadRow | None
"""What a source gives for a row: its text, why it has none, or None where the cell is null."""


def errors_file(part: int, *, digits: int = 5) -> str:
    """The path of a partition's bad rows, relative to the job's output folder."""
    return f"{ERRORS}/part-{part:0{digits}}.jsonl"


def error_line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "replace")


@dataclass(frozen=True, kw_only=True)
class ErrorStats:
    """The rows that one partition could not use.

    Attributes:
        num_rows: one more than `max_errors` where the partition was given up.
        first: its first bad rows, in words.
        path: of its errors file, relative to the output folder.
    """

    num_rows: int
    first: tuple[str, ...]
    path: str
    sha256: str


def bad_rows_in_words(num_rows: int, first: str) -> str:
    """The bad rows of a corpus, as an error about the whole of it names them."""
    return f"{num_rows} bad rows" + (f", the first: {first}" if num_rows else "")


_Good = TypeVar("_Good")


class BadRowSieve:
    """Holds back the bad rows among documents, and counts them."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.first: list[str] = []

    @property
    def is_too_many(self) -> bool:
        return False

    def sift(self, documents: Iterable[_Good | BadRow]) -> Iterator[_Good]:
        """The documents without the bad rows; they end where those are too many."""
        for document in documents:
            if isinstance(document, BadRow):
                self.refuse(document)
            if self.is_too_many:
                return
            if not isinstance(document, BadRow):
                yield document

    def refuse(self, bad: BadRow) -> None:
        """Count a row that turned out to be bad."""
        self._add(bad)

    def _add(self, bad: BadRow) -> None:
        self.num_rows += 1
        if len(self.first) < _NAMED:
            self.first.append(str(bad))


class BadRowFile(BadRowSieve):
    """The bad rows of one partition, written as they come: a file holds at most max_errors + 1."""

    def __init__(self, output_dir: Path, part: int, *, max_errors: int | None) -> None:
        super().__init__()
        self._name = errors_file(part)
        self._path = output_dir / self._name
        # Its own name for every attempt: a task that is thought lost may still be writing.
        self._temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex[:8]}.tmp")
        self._max_errors = max_errors
        self._file: IO[bytes] | None = None

    @property
    def is_too_many(self) -> bool:
        return self._max_errors is not None and self.num_rows > self._max_errors

    def finish(self) -> ErrorStats | None:
        """Give the file its name; None where there is no bad row."""
        if self._file is None:
            self._path.unlink(missing_ok=True)
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digest = sha256_of(self._temporary)
        os.replace(self._temporary, self._path)
        return ErrorStats(
            num_rows=self.num_rows, first=tuple(self.first), path=self._name, sha256=digest
        )

    def close(self) -> None:
        """Leave nothing unfinished behind."""
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _add(self, bad: BadRow) -> None:
        super()._add(bad)
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("wb")
        self._file.write(error_line({"place": bad.place, "reason": bad.reason, "row": bad.row}))


class ErrorCount:
    """The bad rows of a whole job; raises once they are more than there may be.

    Args:
        what: the rows, as in "101 rows cannot be used".
        folder: where all of them are named.
        remedy: what to do, once they are too many.
    """

    def __init__(self, max_errors: int, *, what: str, folder: Location, remedy: str) -> None:
        self._max_errors, self._what = max_errors, what
        self._folder, self._remedy = folder, remedy
        self._first: list[tuple[int, int, str]] = []
        self.num_rows = 0

    @property
    def first(self) -> str:
        """The first one of those counted, in words."""
        return self._first[0][-1] if self._first else ""

    def add(self, part: int, num_rows: int, first: Sequence[str]) -> None:
        """Count those of a part, of which some are named.

        Raises:
            InputError: there are too many.
        """
        self.num_rows += num_rows
        named = ((part, index, text) for index, text in enumerate(first))
        self._first = sorted([*self._first, *named])[:_NAMED]
        if self.num_rows > self._max_errors:
            raise InputError(
                f"{self.num_rows} {self._what} cannot be used, more than max_errors "
                f"{self._max_errors}; the first: {'; '.join(text for *_, text in self._first)}. "
                f"{self._folder} names them; {self._remedy}"
            )
