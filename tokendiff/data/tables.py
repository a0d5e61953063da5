"""CSV, TSV and JSON arrays: files that cannot be cut where a line ends, so that one task reads one.

A field in quotes may hold line ends, and so may an object of an array.
"""

import csv
import io
import json
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TextIO

from tokendiff.artifacts.locations import location, size_of
from tokendiff.data.bad_rows import BadRow, Document
from tokendiff.data.columns import (
    Row,
    documents_in,
    missing_column,
    row_place,
    shown,
    texts_of,
)
from tokendiff.data.partition import Piece
from tokendiff.data.streams import open_stream
from tokendiff.errors import InputError

_DELIMITERS = {"csv": ",", "tsv": "\t"}
# A quote that is never closed would take all that follows for its field.
_MAX_FIELD_CHARS = 64 << 20
_READ_CHARS = 1 << 20
_LONGEST_WORD = 16  # characters: an error in one that is cut may lie so far before the end
_SPACE = re.compile(r"[ \t\n\r]*")


def whole_piece(path: str) -> Iterator[Piece]:
    """A file as one piece; an empty one has none."""
    if size := size_of(location(path)):
        yield Piece(path=path, start=0, stop=size, num_bytes=size)


def csv_pieces(path: str, kind: str, column: str) -> Iterator[Piece]:
    """`whole_piece` of a file whose first row names the column.

    Raises:
        InputError: it does not.
    """
    header = csv_columns(path, kind)
    if header and column not in header:
        raise missing_column(path, column, header)
    if header:
        yield from whole_piece(path)


def read_csv(piece: Piece, kind: str, column: str) -> Iterator[Document]:
    """The fields of `column`, as csv.writer, pandas and spreadsheets write them."""

    place = partial(line_place, piece.path)
    for line, row in csv_rows(piece.path, kind):
        if isinstance(row, BadRow):
            yield row
        else:
            yield from texts_of(row[column], column, line, place=place)


def line_place(path: str, line: int) -> str:
    return f"{path}:{line}"


def csv_columns(path: str, kind: str) -> list[str]:
    """The names in the first row; none where the file is empty."""
    with _opened(path) as file:
        _, header, _ = next(_csv_rows(file, _DELIMITERS[kind]), (1, [], ""))
    return header


def csv_rows(path: str, kind: str) -> Iterator[Row]:
    """The rows behind the first, as objects of its names, each with the line that it begins in."""
    with _opened(path) as file:
        rows = _csv_rows(file, _DELIMITERS[kind])
        _, header, _ = next(rows)
        for line, fields, reason in rows:
            if not reason and len(fields) != len(header):
                reason = f"has {len(fields)} fields, but the first row names {len(header)}"
            if reason:
                row = shown(_DELIMITERS[kind].join(fields))
                yield line, BadRow(place=line_place(path, line), reason=reason, row=row)
            else:
                # Of two columns of one name the first is meant.
                yield line, dict(zip(reversed(header), reversed(fields), strict=True))


def read_json(piece: Piece, column: str) -> Iterator[Document]:
    """What stands under `column` in the objects of the array that a file is.

    Raises:
        InputError: it is no such array, is no JSON from some place on, or no object of it has the
            column.
    """

    return documents_in(
        json_rows(piece.path),
        column,
        path=piece.path,
        place=partial(row_place, piece.path),
        all_rows=partial(json_rows, piece.path),
    )


def json_rows(path: str) -> Iterator[Row]:
    """The objects of the array that a file is, numbered from 1.

    Raises:
        InputError: it is no such array, or is no JSON from some place on.
    """
    for number, item in _array_items(path):
        if isinstance(item, dict):
            yield number, item
            continue
        reason = f"expected an object like {{...}}, got {type(item).__name__} {shown(item)}"
        yield number, BadRow(place=row_place(path, number), reason=reason, row=shown(item))


@contextmanager
def _opened(path: str) -> Iterator[TextIO]:
    """A file as text; a byte that is not UTF-8 is a lone surrogate there, for its row to tell."""
    with (
        open_stream(path) as stream,
        io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        yield file


def _csv_rows(file: TextIO, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """(line that it begins in, fields, what is wrong with it) of every row that is not blank.

    A row that cannot be read is one line; the lines that it might have taken are read again.
    """
    csv.field_size_limit(_MAX_FIELD_CHARS)
    again: deque[str] = deque()
    taken: list[str] = []

    def lines() -> Iterator[str]:
        while line := again.popleft() if again else file.readline():
            taken.append(line)
            yield line

    first = 1
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    while True:
        reason = ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = csv.reader(lines(), delimiter=delimiter, strict=True)
            fields, reason = [taken[0].rstrip("\r\n")], f"not a row of CSV ({error})"
        if fields:
            yield first, fields, reason
        first += len(taken)
        taken.clear()


def _array_items(path: str) -> Iterator[tuple[int, Any]]:
    """(number from 1, value) of the items of a JSON array, of which one is in memory at once."""
    with _opened(path) as file:
        text = _Text(file)
        if text.next_char() != "[":
            raise InputError(
                f"{path}: expected one array of objects, as in [{{...}}, ...], but it begins with "
                f"{text.next_char()!r}; a file with an object a line is read with dataset_name "
                "jsonl; rows in a field, say data, are taken out by jq -c '.data[]' FILE.json > "
                "FILE.jsonl"
            )
        text.skip()
        number = 0
        while (char := text.next_char()) != "]":
            number += 1
            place = f"{path}: row {number}"
            if number > 1:
                if char != ",":
                    reason = "no comma before it" if char else "the array is cut off"
                    raise _not_json(place, reason, text.rest())
                text.skip()
                text.next_char()
            yield number, text.value(place)
        text.skip()
        if text.next_char():
            raise _not_json(f"{path}: behind row {number}", "the array has ended", text.rest())


class _Text:
    """A text that is read on where it must be."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._decoder = json.JSONDecoder()
        self._text, self._at = "", 0

    def next_char(self) -> str:
        """The next one that is no white space, which is passed over; "" at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def skip(self) -> None:
        """Pass over a character that `next_char` gave."""
        self._at += 1

    def rest(self) -> str:
        return self._text[self._at :]

    def value(self, place: str) -> Any:
        """The JSON value that begins here.

        Raises:
            InputError: none does.
        """
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                if _may_be_cut(error, len(self._text)) and self._read_on():
                    continue
                raise _not_json(place, getattr(error, "msg", str(error)), self.rest()) from error
            # A number might go on.
            if end < len(self._text) or not self._read_on():
                self._at = end
                return value

    def _read_on(self) -> bool:
        """Read at least as much as is left, so that a long value is tried a few times only."""
        left = self.rest()
        block = self._file.read(max(_READ_CHARS, len(left)))
        self._text, self._at = left + block, 0
        return bool(block)


def _may_be_cut(error: Exception, num_chars: int) -> bool:
    """Whether a value might be one with more text: no error far from the end is mended by that."""
    return isinstance(error, json.JSONDecodeError) and (
        error.msg.startswith("Unterminated string") or error.pos > num_chars - _LONGEST_WORD
    )


def _not_json(place: str, reason: str, rest: str) -> InputError:
    return InputError(
        f"{place}: not JSON ({reason}), at {shown(rest[:40])!r}; where the next row begins cannot "
        "be told, so mend the file, or write a row a line: a bad one then costs no other (jsonl)"
    )
