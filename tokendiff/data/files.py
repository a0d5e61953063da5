"""Text, JSON Lines and Parquet files: found, cut into pieces, and read piece by piece.

A reader yields a row's texts, or a `BadRow` in place of a row that has none to give; what is wrong
with a file as a whole it raises.
"""

import codecs
import glob
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from tokendiff.artifacts.locations import glob_files, is_uri, location, open_binary, size_of
from tokendiff.data.bad_rows import BadRow, Document
from tokendiff.data.columns import (
    Row,
    arrow_cells,
    arrow_path,
    documents_in,
    not_utf8,
    row_place,
    shown,
    texts_of,
)
from tokendiff.data.lines import first_line, lines_in, num_lines_before
from tokendiff.data.partition import Piece
from tokendiff.data.streams import (
    BUFFER_BYTES,
    is_compressed,
    open_stream,
    refuse_unreadable,
)
from tokendiff.errors import InputError

_ARRAY = re.compile(rb"\s*\[\s*\{")
_LINES = "a jsonl file holds one object a line"
_PARQUET_BATCH_ROWS = 256  # rows in memory at once; a row may be a whole book


def find_files(patterns: Sequence[str]) -> list[str]:
    """Absolute paths or URIs of the files and globs, each once, sorted.

    Raises:
        InputError: a pattern matches no file, or one that nothing here reads.
    """
    found: set[str] = set()
    for pattern in patterns:
        if is_uri(pattern):
            found.update(_remote_files(pattern))
            continue
        path = os.path.abspath(os.path.expanduser(pattern))
        if os.path.isdir(path):
            raise InputError(
                f"data_files {pattern!r} is a folder; name its files, like {pattern.rstrip('/')}/*"
            )
        matches = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
        files = [match for match in matches if os.path.isfile(match)]
        if not files:
            raise InputError(f"data_files {pattern!r} matches no file (looked for {path})")
        found.update(files)
    for path in found:
        _refuse_nameless(path)
        refuse_unreadable(path)
    return sorted(found)


def _refuse_nameless(path: str) -> None:
    """Raise InputError where a name is not UTF-8: neither a manifest nor a log can hold it."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"data_files: the name of {os.fsencode(path)!r} is not UTF-8; rename the file"
        ) from error


def _remote_files(pattern: str) -> list[str]:
    try:
        files = glob_files(pattern)
    except ConnectionError:
        raise
    except OSError as error:
        raise InputError(f"data_files {pattern!r}: cannot be listed ({error})") from error
    if not files:
        raise InputError(f"data_files {pattern!r} matches no file; a folder needs a /* behind it")
    return files


def text_pieces(path: str, *, max_bytes: int | None) -> Iterator[Piece]:
    """Byte ranges of a text or jsonl file; a single one without `max_bytes`, or if compressed."""
    size = size_of(location(path))
    step = size if max_bytes is None or is_compressed(path) else max_bytes
    for start in range(0, size, max(step, 1)):
        stop = min(start + step, size)
        yield Piece(path=path, start=start, stop=stop, num_bytes=stop - start)


def read_lines(piece: Piece) -> Iterator[Document]:
    """The lines that begin inside the piece, without their line ends."""
    lines = _PlacedLines(piece)
    for number, line in lines:
        text = _decode(line)
        if isinstance(text, str):
            yield text
        else:
            yield BadRow(place=lines.place(number), reason=not_utf8(text), row=shown(line))


def read_whole(piece: Piece) -> Iterator[Document]:
    """The file as one document."""
    with open_stream(piece.path) as file:
        data = file.read()
    text = _decode(data.removeprefix(codecs.BOM_UTF8))
    if isinstance(text, str):
        yield text
        return
    offset = text.start + len(data) - len(text.object)
    place = f"{piece.path}:{_line_number(piece.path, offset)}"
    yield BadRow(place=place, reason=not_utf8(text), row=shown(data))


def read_jsonl(piece: Piece, column: str) -> Iterator[Document]:
    """What stands under `column` in each line that begins inside the piece; blank lines are none.

    A CR ends a line here too, though to JSON it is white space: strings spell it as an escape, so
    that a raw one stands between two values, or in one that is spread over lines: a bad row.

    Raises:
        InputError: no row of the file has the column, or the file is one JSON array.
    """

    def all_rows() -> Iterator[Row]:
        size = size_of(location(piece.path))
        return _json_rows(_PlacedLines(replace(piece, start=0, stop=size)))

    lines = _PlacedLines(piece)
    return documents_in(
        _json_rows(lines), column, path=piece.path, place=lines.place, all_rows=all_rows
    )


def jsonl_rows(piece: Piece) -> Iterator[tuple[Callable[[], str], dict[str, Any] | BadRow]]:
    """The objects in the lines that begin inside the piece, each with what says its place."""
    lines = _PlacedLines(piece)
    for number, row in _json_rows(lines):
        yield partial(lines.place, number), row


def parquet_columns(path: str) -> list[str]:
    with _opened_parquet(path) as file:
        return list(file.schema_arrow.names)


def parquet_rows(
    piece: Piece, columns: Sequence[str]
) -> Iterator[tuple[Callable[[], str], dict[str, Any]]]:
    """The rows in the piece's row groups, of those columns that are there."""
    with _opened_parquet(piece.path) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        number = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=there):
            for row in batch.to_pylist():
                number += 1
                yield partial(row_place, piece.path, number), row


def _json_rows(lines: "_PlacedLines") -> Iterator[Row]:
    has_bad = False
    for number, line in lines:
        if not line.strip():
            continue
        row, reason = _json_row(line)
        if row is not None:
            yield number, row
            continue
        if not has_bad:
            refuse_array(lines.path)
            has_bad = True
        yield number, BadRow(place=lines.place(number), reason=reason, row=shown(line))


def _json_row(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object of a line, or None and why there is none."""
    text = _decode(line)
    if not isinstance(text, str):
        return None, not_utf8(text)
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return None, f"not a JSON value ({error.msg}: column {error.colno}); {_LINES}"
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        return None, f"not a JSON value ({error}); {_LINES}"
    if not isinstance(row, dict):
        return None, f"expected an object like {{...}}, got {type(row).__name__} {shown(row)}"
    return row, ""


def refuse_array(path: str) -> None:
    """Raise InputError where a file that should hold an object a line is one JSON array."""
    with open_stream(path) as file:
        head = file.read(BUFFER_BYTES).removeprefix(codecs.BOM_UTF8)
    if _ARRAY.match(head):
        raise InputError(
            f"{path}: is one JSON array, not an object a line; data_files take it with "
            "dataset_name json, prompts once it is converted: jq -c '.[]' FILE.json > FILE.jsonl"
        )


def parquet_pieces(path: str, *columns: str, holds_text: bool = True) -> Iterator[Piece]:
    """One piece per row group, sized by these columns alone.

    Args:
        holds_text: of the one column, which must be there.
    """
    with _opened_parquet(path) as file:
        if holds_text:
            (column,) = columns
            arrow_path(file.schema_arrow, column, path)
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        of_column = [
            i
            for i, leaf in enumerate(leaves)
            if any(leaf == column or leaf.startswith(f"{column}.") for column in columns)
        ]
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            num_bytes = sum(metadata.column(i).total_uncompressed_size for i in of_column)
            yield Piece(path=path, start=group, stop=group + 1, num_bytes=num_bytes)


def read_parquet(piece: Piece, column: str) -> Iterator[Document]:
    """The cells of `column` in the piece's row groups."""

    place = partial(row_place, piece.path)
    with _opened_parquet(piece.path) as file:
        names = arrow_path(file.schema_arrow, column, piece.path)
        number = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=[column]):
            at = batch.schema.names.index(names[0])
            for cell in arrow_cells(batch.column(at), names):
                number += 1
                yield from texts_of(cell, column, number, place=place)


class _PlacedLines:
    """The lines that begin inside a piece, numbered from 0, and where they stand in the file."""

    def __init__(self, piece: Piece) -> None:
        self.path = piece.path
        self._piece = piece
        self._first_offset = 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        for number, (offset, line) in enumerate(_lines(self._piece)):
            if number == 0:
                self._first_offset = offset
            yield number, line

    def place(self, number: int) -> str:
        return f"{self.path}:{self._first_line + number}"

    @cached_property
    def _first_line(self) -> int:
        return _line_number(self.path, self._first_offset)


def _line_number(path: str, offset: int) -> int:
    """Of the line that a byte is in, counted from the file's beginning: a piece starts anywhere."""
    with open_stream(path) as file:
        return num_lines_before(file, offset) + 1


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that begins in [start, stop); a range may begin in mid-line."""
    # The sizes that ranges are made of are those of the compressed bytes; such a file is one range.
    stop = math.inf if is_compressed(piece.path) else piece.stop
    with open_stream(piece.path) as file:
        offset = piece.start
        if offset > 0:
            # No further than the piece: a file of one huge line is not read once per piece.
            offset = first_line(file, piece.start, piece.stop)
            file.seek(offset)
        lines = lines_in(file)
        while offset < stop and (line := next(lines, b"")):
            text = line.removeprefix(codecs.BOM_UTF8) if offset == 0 else line
            yield offset, text.removesuffix(b"\n").removesuffix(b"\r")
            offset += len(line)


@contextmanager
def _opened_parquet(path: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # By default the whole column of the row groups asked for is read at once.
        with (
            open_binary(location(path)) if is_uri(path) else nullcontext(path) as source,
            pq.ParquetFile(source, pre_buffer=False, buffer_size=BUFFER_BYTES) as file,
        ):
            yield file
    except ConnectionError:  # the store is down, and the file may be well
        raise
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from error


def _decode(data: bytes) -> str | UnicodeDecodeError:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error
