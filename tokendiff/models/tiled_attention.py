"""Attention under an explicit mask that computes only what the mask leaves.

scaled_dot_product_attention with a dense mask computes every score and throws the forbidden ones
away: three quarters of them under the `[x_t ; x_0]` mask of block diffusion. Here the queries are
cut into tiles, and each attends to those runs of keys that any of its rows may see. The keys
that are left out had weight exp(-inf) = 0, so the result is the same. `make bench` prints what this
saves.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NAME = "tokendiff_tiles"  # among transformers' attention functions
# About this many calls of the kernel in place of one, but none of fewer queries than these.
_NUM_TILES, _LEAST_TILE = 8, 64


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Queries [start, stop), the runs of keys that they see something of, and the mask there.

    Attributes:
        mask: [B, 1, stop - start, keys of all runs] bool, or floats that are added to scores; None
            where all is seen.
    """

    start: int
    stop: int
    key_runs: tuple[tuple[int, int], ...]
    mask: Tensor | None


def tiles_of(mask: Tensor, *, tile_size: int | None = None) -> tuple[Tile, ...]:
    """What is to be computed under a mask [B, 1, Q, KV] (bool); one plan serves all layers."""
    num_queries, num_keys = mask.shape[2:]
    if tile_size is None:
        tile_size = max(_LEAST_TILE, math.ceil(num_queries / _NUM_TILES))
    rows, columns = (math.ceil(size / tile_size) for size in (num_queries, num_keys))
    padding = (0, columns * tile_size - num_keys, 0, rows * tile_size - num_queries)
    seen = functional.pad(mask.any(0)[0], padding)
    is_seen = seen.view(rows, tile_size, columns, tile_size).any(3).any(1).tolist()
    tiles = []
    for row, columns_seen in enumerate(is_seen):
        start, stop = row * tile_size, min((row + 1) * tile_size, num_queries)
        runs: list[tuple[int, int]] = []
        for column in (column for column, some in enumerate(columns_seen) if some):
            first, last = column * tile_size, min((column + 1) * tile_size, num_keys)
            joins = bool(runs) and runs[-1][1] == first
            runs = [*runs[:-1], (runs[-1][0], last)] if joins else [*runs, (first, last)]
        part = _take(mask[:, :, start:stop], tuple(runs), dim=3)
        kept = None if bool(part.all()) else part.contiguous()
        tiles.append(Tile(start=start, stop=stop, key_runs=tuple(runs), mask=kept))
    return tuple(tiles)


def tiled_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    tiles: tuple[Tile, ...] = (),
    window_tiles: tuple[Tile, ...] = (),
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls it by (`ALL_ATTENTION_FUNCTIONS`).

    Args:
        query: [B, heads, Q, D].
        key, value: [B, key heads, KV, D].
        attention_mask: not read; the model is given one so that it makes none of its own.
        tiles: from `tiles_of`, a keyword argument of the model's forward.
        window_tiles: the same for its layers with a `sliding_window`, where they have other masks.

    Returns:
        [B, Q, heads, D], and no weights.
    """
    if window_tiles and sliding_window is not None:
        tiles = window_tiles
    # Only a mask-free kernel takes grouped keys on every device.
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    outputs = [
        functional.scaled_dot_product_attention(
            query[:, :, tile.start : tile.stop],
            _take(key, tile.key_runs, dim=2),
            _take(value, tile.key_runs, dim=2),
            attn_mask=tile.mask,
            dropout_p=dropout,
            scale=scaling,
        )
        for tile in tiles
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _take(states: Tensor, runs: tuple[tuple[int, int], ...], *, dim: int) -> Tensor:
    parts = [states.narrow(dim, start, stop - start) for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def register() -> None:
    """Make the function known to transformers by NAME."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, tiled_attention)
