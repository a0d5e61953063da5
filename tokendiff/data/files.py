"""Text, JSON Lines and Parquet files: found, cut into pieces, and read piece by piece."""

import codecs
import glob
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from tokendiff.artifacts.locations import glob_files, is_uri, location, open_binary, size_of
from tokendiff.data.partition import Piece
from tokendiff.data.streams import (
    BUFFER_BYTES,
    is_compressed,
    open_stream,
    refuse_unreadable,
)
from tokendiff.errors import InputError

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
        refuse_unreadable(path)
    return sorted(found)


def _remote_files(pattern: str) -> list[str]:
    try:
        files = glob_files(pattern)
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


def read_lines(piece: Piece) -> Iterator[str]:
    """The lines that begin inside the piece, without their line ends."""
    for offset, line in _lines(piece):
        yield _decode(line, piece.path, offset)


def read_whole(piece: Piece) -> Iterator[str]:
    """The file as one document."""
    with open_stream(piece.path) as file:
        data = file.read()
    yield _decode(data.removeprefix(codecs.BOM_UTF8), piece.path, 0)


def read_jsonl(piece: Piece, column: str) -> Iterator[Any]:
    """The value under `column` in each line that begins inside the piece; blank lines are none."""
    for offset, line in _lines(piece):
        if not line.strip():
            continue
        try:
            row = json.loads(_decode(line, piece.path, offset))
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{_place(piece.path, offset)}: not a JSON value ({error}); "
                "a jsonl file holds one object a line"
            ) from error
        if not isinstance(row, dict):
            raise InputError(
                f"{_place(piece.path, offset)}: expected an object like {{{column!r}: ...}}, "
                f"got {type(row).__name__} {line[:40]!r}"
            )
        if column not in row:
            raise missing_column(_place(piece.path, offset), column, row)
        yield row[column]


def parquet_pieces(path: str, column: str) -> Iterator[Piece]:
    """One piece per row group, sized by the text column alone."""
    with _opened_parquet(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise missing_column(path, column, names)
        leaves = [file.schema.column(i).path for i in range(len(file.schema))]
        of_column = [
            i for i, leaf in enumerate(leaves) if leaf == column or leaf.startswith(f"{column}.")
        ]
        for group in range(file.num_row_groups):
            metadata = file.metadata.row_group(group)
            num_bytes = sum(metadata.column(i).total_uncompressed_size for i in of_column)
            yield Piece(path=path, start=group, stop=group + 1, num_bytes=num_bytes)


def read_parquet(piece: Piece, column: str) -> Iterator[Any]:
    """The cells of `column` in the piece's row groups."""
    with _opened_parquet(piece.path) as file:
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=[column]):
            yield from batch.column(0).to_pylist()


def missing_column(place: str, column: str, columns: Any) -> InputError:
    there = ", ".join(repr(str(name)) for name in list(columns)[:20]) or "none"
    return InputError(
        f"{place}: no column {column!r}; set text_column to one of those there: {there}"
    )


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that begins in [start, stop); a range may begin in mid-line."""
    # The sizes that ranges are made of are those of the compressed bytes; such a file is one range.
    stop = math.inf if is_compressed(piece.path) else piece.stop
    with open_stream(piece.path) as file:
        offset = piece.start
        if offset > 0:
            # A line begins in the piece where one ends in it or right before it. Looking no further
            # keeps a file of one huge line from being read once per piece.
            file.seek(offset - 1)
            before = file.readline(piece.stop - piece.start)
            if not before.endswith(b"\n"):
                return
            offset += len(before) - 1
        while offset < stop and (line := file.readline()):
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
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from error


def _decode(data: bytes, path: str, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place(path, offset + error.start)
        raise InputError(
            f"{place}: not UTF-8 (byte {data[error.start]:#04x}: {error.reason}); "
            "convert the file, for example with iconv -f latin1 -t utf-8"
        ) from error


def _place(path: str, offset: int) -> str:
    """file:line of a byte, counted from the file's beginning: a piece starts anywhere."""
    line, left = 1, offset
    with open_stream(path) as file:
        while left > 0 and (block := file.read(min(left, BUFFER_BYTES))):
            line += block.count(b"\n")
            left -= len(block)
    return f"{path}:{line}"
