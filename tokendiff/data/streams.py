"""Files of text as streams of bytes: decompressed on the way, and refused by name where they are
no text.

A compressed file is told by the ending of its name and read from its beginning, so it is never cut
into pieces. What a name does not say, the first bytes do: a `.jsonl` that is gzip inside would
otherwise be read as rows that are all bad.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from tokendiff.artifacts.locations import location, open_binary
from tokendiff.errors import InputError

BUFFER_BYTES = 1 << 20
_ARROW_CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4", ".br": "brotli"}
_XZ_SUFFIXES = (".xz", ".lzma")
COMPRESSED_SUFFIXES = (*_ARROW_CODECS, *_XZ_SUFFIXES)

# What nothing here reads: an ending, what it is, and the command that makes files of it.
_UNREADABLE = {
    ".zip": ("a zip archive", "unzip"),
    ".7z": ("a 7z archive", "7z x"),
    ".rar": ("a rar archive", "unrar x"),
    ".tar": ("a tar archive", "tar xf"),
    ".tgz": ("a tar archive", "tar xf"),
    ".tbz2": ("a tar archive", "tar xf"),
    ".txz": ("a tar archive", "tar xf"),
    ".tzst": ("a tar archive", "tar xf"),
    ".z": ("compressed with compress", "uncompress"),
    ".lz": ("compressed with lzip", "lzip -d"),
    ".lzo": ("compressed with lzop", "lzop -d"),
    ".sz": ("compressed with snappy", "snzip -d"),
    ".snappy": ("compressed with snappy", "snzip -d"),
}
_HEAD_BYTES = 512
# (offset, bytes there, ending that such a file has)
_MAGIC = (
    (0, b"\x1f\x8b\x08", ".gz"),
    (0, b"\xfd7zXZ\0", ".xz"),
    (0, b"\x28\xb5\x2f\xfd", ".zst"),
    (0, b"\x04\x22\x4d\x18", ".lz4"),
    (4, b"1AY&SY", ".bz2"),
    (0, b"PK\x03\x04", ".zip"),
    (0, b"7z\xbc\xaf\x27\x1c", ".7z"),
    (0, b"Rar!\x1a\x07", ".rar"),
    (257, b"ustar", ".tar"),
    (0, b"\x1f\x9d", ".z"),
    (0, b"LZIP\x01", ".lz"),
    (0, b"\x89LZO\0", ".lzo"),
    (0, b"\xff\x06\0\0sNaPpY", ".sz"),
    (0, b"PAR1\x15", ".parquet"),
    (0, b"ARROW1\0\0", ".arrow"),
)
# UTF-32 before UTF-16, whose mark its own begins with.
_OTHER_ENCODINGS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def is_compressed(path: str) -> bool:
    return path.lower().endswith(COMPRESSED_SUFFIXES)


def plain_name(path: str) -> str:
    """The path without the ending of its compression: what is inside is told by the one before."""
    return os.path.splitext(path)[0] if is_compressed(path) else path


def suffix_of(path: str) -> str:
    """The ending that says what a file holds, without that of its compression; in small letters."""
    return os.path.splitext(plain_name(path))[1].lower()


def refuse_unreadable(path: str) -> None:
    """Raise InputError where a file's name says that nothing here reads it."""
    suffix = suffix_of(path)
    if suffix in _UNREADABLE:
        raise _unreadable(path, suffix)
    if suffix == ".parquet" and is_compressed(path):
        raise InputError(
            f"{path}: a Parquet file is compressed inside, and read from its end; unpack it"
        )


@contextmanager
def open_stream(path: str) -> Iterator["io.BufferedReader[Any]"]:
    """A text file's bytes, decompressed on the way; one that is not compressed may be sought in.

    Raises:
        InputError: it cannot be read, or its first bytes say that it is no text in UTF-8.
    """
    import lzma

    try:
        with _decompressed(path) as file:
            _refuse_no_text(_head_of(file, path), path)
            yield file
    except ConnectionError:  # the store is down, and the file may be well
        raise
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); copy the file here again, or leave it out"
        ) from error


def go_to(file: IO[bytes], path: str, offset: int) -> None:
    """Go to a byte of a stream that was just opened; in a compressed one by reading up to it."""
    if not is_compressed(path):
        file.seek(offset)
        return
    while offset > 0 and (block := file.read(min(offset, BUFFER_BYTES))):
        offset -= len(block)


def _head_of(file: "io.BufferedReader[Any]", path: str) -> bytes:
    """The first bytes of a stream, which stays where it is."""
    if is_compressed(path):
        return file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
    head = file.read(_HEAD_BYTES)  # a peek would copy the whole buffer
    file.seek(0)
    return head


@contextmanager
def _decompressed(path: str) -> Iterator["io.BufferedReader[Any]"]:
    suffix = os.path.splitext(path)[1].lower()
    with open_binary(location(path), buffer_bytes=BUFFER_BYTES) as packed:
        if suffix in _ARROW_CODECS:
            import pyarrow as pa

            with (
                pa.CompressedInputStream(packed, _ARROW_CODECS[suffix]) as stream,
                io.BufferedReader(stream, BUFFER_BYTES) as file,
            ):
                yield file
        elif suffix in _XZ_SUFFIXES:
            with io.BufferedReader(_Blocks(_xz_blocks(packed)), BUFFER_BYTES) as file:
                yield file
        else:
            assert isinstance(packed, io.BufferedReader)
            yield packed


def _xz_blocks(packed: IO[bytes]) -> Iterator[bytes]:
    """What the xz streams of a file hold, one behind the other.

    The lzma module's own reader takes what it cannot read behind a stream for the end of the file.
    """
    import lzma

    data = packed.read(BUFFER_BYTES)
    while data:
        decoder = lzma.LZMADecompressor()
        while not decoder.eof:
            if decoder.needs_input and not data and not (data := packed.read(BUFFER_BYTES)):
                raise EOFError("the compressed stream is cut off")
            yield decoder.decompress(data, BUFFER_BYTES)
            data = b""
        data = decoder.unused_data.lstrip(b"\0")  # zeros may lie between streams
        while not data and (block := packed.read(BUFFER_BYTES)):
            data = block.lstrip(b"\0")


class _Blocks(io.RawIOBase):
    """Blocks of bytes as a file to be read once."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


def _refuse_no_text(head: bytes, path: str) -> None:
    for offset, magic, suffix in _MAGIC:
        if head.startswith(magic, offset):
            raise _unreadable(path, suffix)
    for mark, name in _OTHER_ENCODINGS:
        if head.startswith(mark):
            raise InputError(
                f"{path}: begins with the byte order mark of {name}; convert it, for example with "
                f"iconv -f {name.lower()} -t utf-8"
            )


def _unreadable(path: str, suffix: str) -> InputError:
    if suffix in _UNREADABLE:
        what, command = _UNREADABLE[suffix]
        return InputError(f"{path}: is {what}, not text; unpack it, for example with {command}")
    if suffix not in COMPRESSED_SUFFIXES:
        return InputError(
            f"{path}: is no text but a {suffix} file; Parquet is read with dataset_name parquet "
            "(prompts: by the ending .parquet), Arrow files with their folder as dataset_name"
        )
    if is_compressed(path):
        return InputError(f"{path}: what is inside is compressed again ({suffix}); unpack it once")
    return InputError(
        f"{path}: is compressed, which its name does not say; rename it to "
        f"{os.path.basename(path)}{suffix}"
    )
