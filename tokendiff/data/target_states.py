"""Hidden states of a draft's target for the rows of token shards: computed once, read row by row in
every epoch.

    MANIFEST.json                 what the states are of (`StatesOf`), and the files
    train/part-00000.safetensors  of each shard of the tokens, under its name:
        states [T, C]             of all tokens of its rows, end to end; padding has none
        row_id, stop, crc32 [n]   of each row: its id, where its tokens end, the checksum of its
                                  states

Rows are found by their ids, so that what a step reads depends on no order and on no worker, and
only the bytes of those rows are read, of a remote file too.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.artifacts.locations import (
    Location,
    fits_cache,
    has_copy,
    local_copy,
    location,
    open_binary,
)
from tokendiff.artifacts.manifest import Manifest, fingerprint, verify
from tokendiff.errors import CorruptFileError, InputError, naming

KIND = "target_states"
REMEDY = "run the stage of kind cache_target_states again, or leave target_states_path out"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INDEX = ("row_id", "stop", "crc32")
_MOST_HEADER_BYTES = 1 << 20
_NUMBER_BYTES = 8


def name_of_dtype(dtype: torch.dtype) -> str:
    """As safetensors calls it, and manifests here."""
    return _NAMES[dtype]


@dataclass(frozen=True, kw_only=True)
class StatesOf:
    """What decides hidden states, but for the device: where all of it is equal, so are they.

    Attributes:
        target: a digest of the target's weights, or its hub name.
        layers: whose outputs stand side by side; -1 is the embedding.
        mixed_precision: that the target was read with.
        data: the fingerprint of the token shards.
    """

    target: str
    layers: list[int]
    mixed_precision: str
    data: str

    @property
    def digest(self) -> str:
        return fingerprint(asdict(self))


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A file of states as it can be read: index of its rows, and where their bytes begin."""

    row_id: np.ndarray
    stop: np.ndarray
    crc32: np.ndarray
    begin: int


class TargetStates:
    """
    Attributes:
        dtype, width: of the states.
    """

    def __init__(self, folder: Location, manifest: Manifest) -> None:
        self._folder, self._files = folder, manifest.files
        self._shards: list[Mapping[str, Any]] = manifest.metadata["files"]
        self._first = np.asarray([shard["first_row_id"] for shard in self._shards], dtype=np.int64)
        self._num_bytes = sum(entry["size"] for entry in manifest.files.values())
        self.width = int(manifest.metadata["width"])
        self.dtype = _DTYPES[manifest.metadata["dtype"]]
        self._opened = lru_cache(maxsize=256)(self._open)

    @classmethod
    def open(cls, path: str | Location, wanted: StatesOf) -> "TargetStates":
        """Open states, and check that they are those that a run would compute.

        Raises:
            InputError: there are none, or they are of something else.
            CorruptFileError: a file is missing or cut short.
        """
        folder = location(path)
        try:
            manifest = verify(folder, kind=KIND, hashes=False)
        except FileNotFoundError as error:
            raise InputError(
                f"target_states_path {path}: no committed hidden states there (no MANIFEST.json); "
                f"{REMEDY}"
            ) from error
        check_states(path, manifest, wanted)
        return cls(folder, manifest)

    def read(self, row_ids: np.ndarray, lengths: np.ndarray, *, max_length: int) -> Tensor:
        """States [B, max_length, C] of rows of those lengths; 0 on padding.

        Raises:
            CorruptFileError: a row is not there, or its bytes are others than were written.
        """
        states = torch.zeros(len(row_ids), max_length, self.width, dtype=self.dtype)
        shards = np.searchsorted(self._first, row_ids, side="right") - 1
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            with self._file(max(shard, 0)) as (file, index, name):
                for place in places.tolist():
                    row, length = int(row_ids[place]), int(lengths[place])
                    self._read_row(file, index, name, row, states[place, :length])
        return states

    def _read_row(
        self, file: IO[bytes], index: _Shard, name: str, row_id: int, out: Tensor
    ) -> None:
        at = int(np.searchsorted(index.row_id, row_id))
        if at == len(index.row_id) or index.row_id[at] != row_id:
            raise CorruptFileError(f"{self._folder}: {name} has no row {row_id}; {REMEDY}")
        start = int(index.stop[at - 1]) if at else 0
        if (there := int(index.stop[at]) - start) != len(out):
            raise CorruptFileError(
                f"{self._folder}: row {row_id} in {name} has states of {there} tokens, and "
                f"{len(out)} tokens; {REMEDY}"
            )
        flat: Any = out.view(torch.uint8).reshape(-1).numpy()
        file.seek(index.begin + start * self.width * out.element_size())
        count = file.readinto(memoryview(flat))  # type: ignore[attr-defined]
        if count != len(flat) or zlib.crc32(flat) != index.crc32[at]:
            raise CorruptFileError(
                f"{self._folder}: the states of row {row_id} in {name} do not match their "
                f"checksum; {REMEDY}"
            )

    @contextmanager
    def _file(self, shard: int) -> Iterator[tuple[IO[bytes], _Shard, str]]:
        """A file to read from: a remote one as a copy, unless all of them would take more than a
        quarter of the cache's disk.
        """
        name = self._shards[shard]["path"]
        path, digest = self._folder / name, self._files[name]["sha256"]
        if has_copy(path, sha256=digest) or fits_cache(self._num_bytes):
            path = local_copy(path, sha256=digest)
        with open_binary(path, buffer_bytes=1 << 16) as file:
            yield file, self._opened(path, name), name

    def _open(self, path: Location, name: str) -> _Shard:
        try:
            with open_binary(path) as file:
                header, _, begin = _read_header(file)
                width, dtype = header["states"]["shape"][1], header["states"]["dtype"]
                if width != self.width or _DTYPES[dtype] != self.dtype:
                    raise ValueError(f"its states are {dtype} of width {width}")
                return _Shard(**_read_index(file, header, begin), begin=begin)
        except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error) as error:
            raise CorruptFileError(
                f"{self._folder}: {name} cannot be read ({error}); {REMEDY}"
            ) from error


def check_states(path: str | Location, manifest: Manifest, wanted: StatesOf) -> None:
    """Raise InputError where committed states are not those that are wanted, and say why."""
    found, here = manifest.metadata["of"], asdict(wanted)
    words = {
        "target": "another target",
        "layers": "other layers",
        "mixed_precision": "another mixed_precision",
        "data": "other rows",
    }
    differing = [
        f"of {words[name]} ({_short(found.get(name))} there, {_short(here[name])} here)"
        for name in words
        if found.get(name) != here[name]
    ]
    if differing:
        raise InputError(
            f"target_states_path {path} holds hidden states {', '.join(differing)}; {REMEDY}"
        )


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == hashlib.sha256().digest_size * 2 else text


def write_states(
    path: Path,
    parts: Iterable[tuple[np.ndarray, np.ndarray, Tensor]],
    *,
    num_rows: int,
    num_tokens: int,
    width: int,
    dtype: torch.dtype,
    of: StatesOf,
) -> str:
    """Write the states of a shard's rows as they are computed; returns the file's sha256.

    Args:
        parts: row ids [n] in rising order, lengths [n], and states [n, L, C] on the CPU.
        num_rows, num_tokens: of all parts.
    """
    size = num_tokens * width * dtype.itemsize
    header: dict[str, Any] = {
        "__metadata__": {"of": of.digest},
        "states": {
            "dtype": _NAMES[dtype],
            "shape": [num_tokens, width],
            "data_offsets": [0, size],
        },
    }
    for place, name in enumerate(_INDEX):
        begin = size + place * num_rows * _NUMBER_BYTES
        offsets = [begin, begin + num_rows * _NUMBER_BYTES]
        header[name] = {"dtype": "I64", "shape": [num_rows], "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _NUMBER_BYTES)
    index: dict[str, list[int]] = {name: [] for name in _INDEX}
    digest, stop = hashlib.sha256(), 0
    with naming(path), open(path, "wb") as file:

        def write(data: Any) -> None:
            file.write(data)
            digest.update(data)

        write(struct.pack("<Q", len(text)))
        write(text)
        for row_ids, lengths, states in parts:
            for row_id, length, row in zip(row_ids, lengths, states, strict=True):
                flat = row[:length].contiguous().view(torch.uint8).reshape(-1).numpy()
                write(memoryview(flat))
                stop += int(length)
                index["row_id"].append(int(row_id))
                index["stop"].append(stop)
                index["crc32"].append(zlib.crc32(flat))
        assert stop == num_tokens, f"{stop} tokens of {num_tokens}"
        assert len(index["stop"]) == num_rows, f"{len(index['stop'])} rows of {num_rows}"
        for name in _INDEX:
            write(np.asarray(index[name], dtype="<i8").tobytes())
    return digest.hexdigest()


def is_of(path: Location, of: StatesOf, *, width: int, dtype: torch.dtype) -> bool:
    """Whether a file is all of what `write_states` wrote of these states, in this dtype: an attempt
    on another kind of device may have left another one.
    """
    try:
        with open_binary(path) as file:
            header, written_of, begin = _read_header(file)
            end = begin + max(part["data_offsets"][1] for part in header.values())
            states = header["states"]
            found = (written_of, states["dtype"], states["shape"][1], file.seek(0, 2))
            return found == (of.digest, _NAMES[dtype], width, end)
    except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error):
        return False


def _read_header(file: IO[bytes]) -> tuple[dict[str, Any], str, int]:
    """What the file says of each tensor, the digest of what it is of, and where bytes begin."""
    (size,) = struct.unpack("<Q", file.read(_NUMBER_BYTES))
    if size > _MOST_HEADER_BYTES:
        raise ValueError(f"its header would have {size:,} bytes")
    header = json.loads(file.read(size))
    return header, header.pop("__metadata__")["of"], _NUMBER_BYTES + size


def _read_index(file: IO[bytes], header: Mapping[str, Any], begin: int) -> dict[str, np.ndarray]:
    found = {}
    for name in _INDEX:
        start, stop = header[name]["data_offsets"]
        file.seek(begin + start)
        found[name] = np.frombuffer(file.read(stop - start), dtype="<i8")
        if len(found[name]) != header[name]["shape"][0]:
            raise ValueError(f"it ends in the middle of {name}")
    return found
