"""Randomness that belongs to the row: a function of (seed, row, purpose, index), not of a hidden
state.

A `torch.Generator` hands out numbers in the order in which they are asked for, so what a row gets
depends on the rows beside it: on the batch size, the worker, the restart. Here every number is
computed from the row's own 64-bit key and an index, the same on any device and in any batch.

The generator is SplitMix64 (`splitmix`).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tokendiff.diffusion.splitmix import GAMMA, mix, shift_right

_TIME = -7  # apart from what `uniform` gives for the noise of the row's positions
_UNIFORM_BITS = 52  # (k + 1/2) / 2^52 is exact in float64 and never 0 or 1


@dataclass(frozen=True, kw_only=True)
class RowGenerator:
    """One key per row, and the rows' places in the stratification of the global batch.

    Attributes:
        keys: [B] int64.
        strata: [B] float64 in [0, 1), evenly spread over the global batch of which these rows are a
            part; None draws them independently.
    """

    keys: Tensor
    strata: Tensor | None = None

    @classmethod
    def for_rows(cls, key: int, row_ids: Tensor, *, strata: Tensor | None = None) -> "RowGenerator":
        """Keys for rows by their ids ([B] int64), under a common key."""
        root = torch.full_like(row_ids, key, dtype=torch.int64)
        return cls(keys=_folded(root, row_ids), strata=strata)

    def fold_in(self, data: int | Tensor) -> "RowGenerator":
        """Independent generators for another purpose or step; `data` is an int or [B] int64."""
        return RowGenerator(keys=_folded(self.keys, data), strata=self.strata)

    def select(self, rows: Tensor) -> "RowGenerator":
        """The generators of some rows; `rows` is an index or a bool mask over B."""
        return RowGenerator(
            keys=self.keys[rows], strata=None if self.strata is None else self.strata[rows]
        )

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] float64 in the open interval (0, 1); the same call gives the same numbers."""
        count = math.prod(shape)
        index = torch.arange(1, count + 1, device=self.keys.device)
        if _is_numpys(self.keys):
            bits = torch.from_numpy(_bits(self.keys.numpy(), index.numpy()))
        else:
            bits = _bits(self.keys, index)
        fraction = (bits.double() + 0.5) * 2.0**-_UNIFORM_BITS
        return fraction.reshape(-1, *shape)

    def stratified(self) -> Tensor:
        """[B] float64 in [0, 1): one draw per row, stratified over the global batch."""
        return self.fold_in(_TIME).uniform(1)[:, 0] if self.strata is None else self.strata


def strata_of(key: int, positions: Tensor, batch_size: int) -> Tensor:
    """Stratified times of rows at `positions` ([B] int64) in a global batch: (u + i)/batch_size mod
    1.

    One u per key, so the batch covers the interval evenly. A position has times of its own stratum
    alone; a row's time is uniform on [0, 1), as its position is drawn at random in each epoch.
    Source: MDLM (arXiv 2406.07524), low-discrepancy sampler; VDM (arXiv 2107.00630).
    """
    root = torch.tensor([key], dtype=torch.int64, device=positions.device)
    u = RowGenerator(keys=root).uniform(1)[0, 0]
    return torch.remainder((u + positions.double()) / batch_size, 1.0)


def _bits(keys: Any, index: Any) -> Any:
    """[B, N] of _UNIFORM_BITS bits, from [B] keys and [N] indices."""
    return shift_right(mix(keys[:, None] + index * GAMMA), 64 - _UNIFORM_BITS)


def _folded(keys: Tensor, data: int | Tensor) -> Tensor:
    """[B] keys of keys [B] and data, an int or [B]."""
    if isinstance(data, int) and _is_numpys(keys):
        return torch.from_numpy(mix(keys.numpy() ^ _mixed(data)))
    data = torch.as_tensor(data, dtype=torch.int64, device=keys.device)
    if data.dim() and _is_numpys(keys):
        return torch.from_numpy(mix(keys.numpy() ^ mix(data.numpy() + GAMMA)))
    return mix(keys ^ mix(data + GAMMA))


@lru_cache(maxsize=4096)
def _mixed(data: int) -> int:
    return int(mix(torch.tensor([data]).numpy() + GAMMA)[0])


def _is_numpys(values: Tensor) -> bool:
    """Whether NumPy can compute with a tensor where it is, by the view of it that torch gives. That
    takes a third of torch's time, and integers are the same.
    """
    return type(values) is Tensor and values.device.type == "cpu"
