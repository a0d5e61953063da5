"""The lines of a binary file: LF, CRLF or a lone CR, as old Macs wrote it, ends one.

Files are read in blocks, so that memory holds one line and not the file, whichever end its lines
have.
"""

import re
from collections.abc import Iterator
from typing import IO

_BLOCK_BYTES = 1 << 16
_LINE_END = re.compile(rb"\r\n|\r|\n")


MAX_LINE_BYTES = 256 << 20


class LineTooLongError(OSError):
    """A line that memory might not hold."""


def lines_in(file: IO[bytes], *, max_bytes: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """The lines from where the file stands on, with their ends; the last one may have none.

    Raises:
        LineTooLongError: a line goes on for more than `max_bytes`, which are all that was read of
            it: of a compressed file a few bytes may be any number.
    """
    held: list[bytes] = []  # the parts of a line whose end is yet to come
    while block := file.read(_BLOCK_BYTES):
        if len(held) * _BLOCK_BYTES > max_bytes:
            raise LineTooLongError(
                f"a line is longer than {max_bytes:,} bytes; split it, one document a line"
            )
        if held and held[-1].endswith(b"\r"):
            # The last block ended in a CR: alone, or the first half of a CRLF.
            is_half = block.startswith(b"\n")
            yield b"".join(held) + block[:is_half]
            held, block = [], block[is_half:]
        if not block:
            continue
        *whole, last = block.splitlines(keepends=True)
        if whole:
            yield b"".join([*held, whole[0]])
            yield from whole[1:]
            held = []
        held.append(last)
        if last.endswith(b"\n"):
            yield b"".join(held)
            held = []
    if held:
        yield b"".join(held)


def first_line(file: IO[bytes], start: int, stop: int) -> int:
    """Where the first line begins that begins at byte `start` (above 0) or behind it.

    At `stop` or behind it where none begins before; nothing is read that lies further.
    """
    at = start - 1  # a line begins at `start` where one ends right before it
    file.seek(at)
    while at < stop and (block := file.read(min(_BLOCK_BYTES, stop - at))):
        if end := _LINE_END.search(block):
            is_cut = end.group() == b"\r" and end.end() == len(block)
            return at + end.end() + (is_cut and file.read(1) == b"\n")
        at += len(block)
    return stop


def num_lines_before(file: IO[bytes], offset: int) -> int:
    """How many lines end in the first `offset` bytes of a file that stands at its beginning."""
    count, left, is_behind_cr = 0, offset, False
    while left > 0 and (block := file.read(min(left, _BLOCK_BYTES))):
        count += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
        count -= is_behind_cr and block.startswith(b"\n")
        is_behind_cr = block.endswith(b"\r")
        left -= len(block)
    return count
