"""SplitMix64 (Steele, Lea, Flood, OOPSLA 2014; passes BigCrush), read at an index instead of
stepped: its n-th output is mix(seed + n * GAMMA).

It needs no torch, unlike `random`, and works on NumPy arrays too: processes that only read rows
compute their order from it.
"""

import hashlib
from typing import Any

GAMMA = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def shift_right(z: Any, n: int) -> Any:
    """Logical shift of int64; `>>` copies the sign bit."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def mix(z: Any) -> Any:
    """SplitMix64's output function, a bijection of int64 (products wrap): of a tensor or an array,
    of whatever shape.
    """
    z = (z ^ shift_right(z, 30)) * _MIX_1
    z = (z ^ shift_right(z, 27)) * _MIX_2
    return z ^ shift_right(z, 31)


def key_from(*parts: int | str) -> int:
    """A signed 64-bit key from a seed and names, say `key_from(seed, "train")`."""
    digest = hashlib.blake2b("\x1f".join(map(repr, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
