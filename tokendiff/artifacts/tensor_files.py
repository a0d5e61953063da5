"""Named tensors in safetensors files, written by one process or by several together.

    model.safetensors                     all of them, or
    model-00002-of-00004.safetensors      those that one of four processes wrote, and
    model.safetensors.index.json          which file has which: the layout of transformers

The bytes are those that the safetensors library writes. It is not used to write, since it hands
over a finished file: here a file is hashed while it is written, and other threads go on meanwhile.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendiff.errors import CorruptFileError, naming

_BLOCK_BYTES = 1 << 20  # small enough to be hashed out of the cache that it was written from
_ALIGNMENT = 8
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> str:
    """Write tensors of the CPU as one safetensors file; returns its sha256."""
    # As the library orders them: the widest type first, so that each is aligned.
    order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, tensor in order:
        stop = place + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, stop],
        }
        place = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with naming(path), open(path, "wb", buffering=0) as file:
        for part in (struct.pack("<Q", len(text)), text, *(_bytes_of(t) for _, t in order)):
            for start in range(0, len(part), _BLOCK_BYTES):
                block = part[start : start + _BLOCK_BYTES]
                while len(block):  # a raw file may take less than it is given
                    count = file.write(block)
                    digest.update(block[:count])
                    block = block[count:]
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    if not tensor.numel():
        return b""
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def file_name(stem: str, number: int, count: int) -> str:
    """The name of the file that process `number` of `count` writes, counted from 0."""
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def index_text(files: Mapping[str, Sequence[str]], total_size: int) -> str:
    """The index of files that hold so many bytes.

    Args:
        files: names of the tensors in each.
    """
    places = {name: file for file, names in files.items() for name in names}
    body = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(body, indent=2) + "\n"


class TensorFiles:
    """The tensors of a folder under one stem, read one by one, whole or in part.

    Raises:
        FileNotFoundError: there are none.
        CorruptFileError: an index that names no files.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        from safetensors import safe_open

        self._opened = ExitStack()
        index = folder / index_name(stem)
        names = [file_name(stem, 0, 1)]
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CorruptFileError(f"{index}: not an index of tensors ({error})") from error
        self._files: dict[str, Any] = {}
        for name in names:
            file = self._opened.enter_context(safe_open(folder / name, framework="pt"))
            self._files |= dict.fromkeys(file.keys(), file)

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str, part: Sequence[slice] | None = None) -> Tensor:
        """A tensor, or the part of it that slices of its dimensions leave."""
        if part is None:
            whole: Tensor = self._files[name].get_tensor(name)
            return whole
        some: Tensor = self._files[name].get_slice(name)[tuple(part)]
        return some


def has_tensors(folder: Path, stem: str) -> bool:
    return (folder / file_name(stem, 0, 1)).is_file() or (folder / index_name(stem)).is_file()


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...] | None]:
    """What this worker holds of a tensor, to be written to, and which part of it that is; None is
    all of it.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not isinstance(tensor, DTensor):
        return tensor.detach(), None
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    part = tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))
    return tensor.to_local().detach(), part


def lies_in_rows(tensor: Tensor) -> bool:
    """Whether workers hold rows of a tensor each, the same in every replica."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(tensor, DTensor):
        return False
    *outer, inner = tensor.placements
    return inner == Shard(0) and all(placement == Replicate() for placement in outer)


def with_row(tensor: Tensor, index: int, row: Tensor) -> Tensor:
    """A copy of a matrix with another row, in parts as the matrix is."""
    copy = tensor.detach().clone()
    local, part = local_part(copy)
    at = index - (part[0].start if part is not None else 0)
    if 0 <= at < len(local):
        local[at] = row
    return copy


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that lies in parts, on every worker, which all must ask for it; any other
    tensor is itself.
    """
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
