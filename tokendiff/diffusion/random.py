"""Randomness that belongs to the row: a function of (seed, row, purpose, index), not of a hidden
state.

A `torch.Generator` hands out numbers in the order in which they are asked for, so what a row gets
depends on the rows beside it: on the batch size, the worker, the restart. Here every number is
computed from the row's own 64-bit key and an index, the same on any device and in any batch.

The generator is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014; passes BigCrush), read at an index
instead of stepped: its n-th output is mix(seed + n * gamma).
"""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_GAMMA = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_TIME = -7  # apart from what `uniform` gives for the noise of the row's positions
_UNIFORM_BITS = 52  # (k + 1/2) / 2^52 is exact in float64 and never 0 or 1


def _shift_right(z: Tensor, n: int) -> Tensor:
    """Logical shift; `>>` on int64 copies the sign bit."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def mix(z: Tensor) -> Tensor:
    """SplitMix64's output function, a bijection of int64 (products wrap)."""
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def key_from(*parts: int | str) -> int:
    """A signed 64-bit key from a seed and names, say `key_from(seed, "train")`."""
    digest = hashlib.blake2b("\x1f".join(map(repr, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


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
        root = torch.tensor(key, dtype=torch.int64, device=row_ids.device)
        return cls(keys=_fold(root, row_ids), strata=strata)

    def fold_in(self, data: int | Tensor) -> "RowGenerator":
        """Independent generators for another purpose or step; `data` is an int or [B] int64."""
        data = torch.as_tensor(data, dtype=torch.int64, device=self.keys.device)
        return RowGenerator(keys=_fold(self.keys, data), strata=self.strata)

    def select(self, rows: Tensor) -> "RowGenerator":
        """The generators of some rows; `rows` is an index or a bool mask over B."""
        return RowGenerator(
            keys=self.keys[rows], strata=None if self.strata is None else self.strata[rows]
        )

    def uniform(self, *shape: int) -> Tensor:
        """[B, *shape] float64 in the open interval (0, 1); the same call gives the same numbers."""
        index = torch.arange(1, math.prod(shape) + 1, device=self.keys.device)
        bits = mix(self.keys[:, None] + index * _GAMMA)
        fraction = (_shift_right(bits, 64 - _UNIFORM_BITS).double() + 0.5) * 2.0**-_UNIFORM_BITS
        return fraction.reshape(-1, *shape)

    def stratified(self) -> Tensor:
        """[B] float64 in [0, 1): one draw per row, stratified over the global batch."""
        return self.fold_in(_TIME).uniform(1)[:, 0] if self.strata is None else self.strata


def strata_of(key: int, positions: Tensor, batch_size: int) -> Tensor:
    """Stratified times of rows at `positions` ([B] int64) in a global batch: (u + i)/batch_size mod
    1.

    One u per key, so each row's time is uniform on [0, 1) while the batch covers the interval
    evenly. Source: MDLM (arXiv 2406.07524), low-discrepancy sampler; VDM (arXiv 2107.00630).
    """
    root = torch.tensor([key], dtype=torch.int64, device=positions.device)
    u = RowGenerator(keys=root).uniform(1)[0, 0]
    return torch.remainder((u + positions.double()) / batch_size, 1.0)


def _fold(keys: Tensor, data: Tensor) -> Tensor:
    return mix(keys ^ mix(data + _GAMMA))


def permutation(key: int, n: int) -> Tensor:
    """[n] int64: a permutation of 0..n-1 that depends on `key` and n alone, on any platform and
    version.
    """
    order = mix(torch.tensor(key, dtype=torch.int64) + torch.arange(1, n + 1) * _GAMMA)
    return torch.argsort(order, stable=True)
