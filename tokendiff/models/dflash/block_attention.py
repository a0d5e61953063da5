"""Attention of blocks behind anchors, without a mask of all queries by all keys.

A block sees two runs of keys: tokens before its anchor, and itself (`AnchoredBlocks`). With A
anchors a mask of everything has A K (L + A K) entries a row, of which some 1 in 10 are seen at 512
anchors of 16 tokens in rows of 2,048. Here the runs say what is to be computed, and only what they
overlap in part is asked of the rule:

- for flex_attention, which tiles of 128 by 128 are seen whole, in part, or not at all;
- for scaled_dot_product_attention, a few neighbouring anchors at a time, whose queries attend to
  the tokens that any of them sees and to their own blocks.

`python -m benchmarks.attention` prints what it saves.
"""

import math

import torch
from torch.nn.attention.flex_attention import BlockMask

from tokendiff.diffusion.attention_masks import AnchoredBlocks, mask_mod
from tokendiff.models.block_masks import FLEX_TILE, seen_first
from tokendiff.models.tiled_attention import Tile

# Queries of one call: with fewer there are too many calls, with more too much is computed in vain.
_TILE_QUERIES = 256


def block_mask_of(blocks: AnchoredBlocks) -> BlockMask:
    """The mask that `create_block_mask` finds by asking the rule for each pair of query and key."""
    (batch, num_anchors), size = blocks.begin.shape, blocks.block_size
    num_queries = num_anchors * size
    num_keys = blocks.length + num_queries
    own = blocks.length + size * torch.arange(num_anchors, device=blocks.begin.device)
    of_row = (blocks.begin_of_queries().flatten(1), blocks.end.repeat_interleave(size, dim=1))
    own = own.expand(batch, -1).repeat_interleave(size, dim=1)
    runs = (of_row, (own, own + size))
    rows, columns = (math.ceil(count / FLEX_TILE) for count in (num_queries, num_keys))
    first = FLEX_TILE * torch.arange(columns, device=own.device)
    is_touched = torch.zeros(batch, num_queries, columns, dtype=torch.bool, device=own.device)
    is_inside = is_touched.clone()
    for begin, end in runs:
        begin, end = begin[:, :, None], end[:, :, None]
        is_touched |= (begin < end) & (begin < first + FLEX_TILE) & (end > first)
        is_inside |= (begin <= first) & (end >= first + FLEX_TILE)
    shape = (2, batch, rows * FLEX_TILE, columns)
    some, every = torch.zeros(shape, dtype=torch.bool, device=own.device)
    some[:, :num_queries] = is_touched
    every[:, :num_queries] = is_inside
    is_whole = every.unflatten(1, (rows, FLEX_TILE)).all(2)
    is_partial = some.unflatten(1, (rows, FLEX_TILE)).any(2) & ~is_whole
    return BlockMask.from_kv_blocks(
        *seen_first(is_partial),
        *seen_first(is_whole),
        BLOCK_SIZE=FLEX_TILE,
        mask_mod=mask_mod(blocks),
        seq_lengths=(num_queries, num_keys),
    )


def tiles_of_blocks(blocks: AnchoredBlocks, *, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Queries of neighbouring anchors, with the keys that any row of the batch has for them.

    Anchors rise along a row, so the runs of neighbours overlap. The masks are added to scores: one
    of booleans would be turned into such a one in every layer, and kept for its backward pass.

    Args:
        dtype: of queries and keys.
    """
    size, num_anchors = blocks.block_size, blocks.begin.shape[1]
    device, group = blocks.begin.device, max(1, _TILE_QUERIES // size)
    begin = blocks.begin_of_queries()[:, :, 0]
    is_empty = begin == blocks.end
    begins = begin.masked_fill(is_empty, blocks.length).amin(0).split(group)
    ends = blocks.end.masked_fill(is_empty, 0).amax(0).split(group)
    hulls = [torch.stack([b.amin(), e.amax()]) for b, e in zip(begins, ends, strict=True)]
    row = torch.arange(len(blocks.begin), device=device)[:, None, None]
    tiles = []
    for number, (first, last) in enumerate(torch.stack(hulls).tolist()):
        start, stop = number * group * size, min((number + 1) * group, num_anchors) * size
        own = (blocks.length + start, blocks.length + stop)
        runs = ((first, last), own) if first < last else (own,)
        keys = torch.cat([torch.arange(*run, device=device) for run in runs])
        query = torch.arange(start, stop, device=device)[:, None]
        mask = torch.zeros(len(row), 1, stop - start, len(keys), dtype=dtype, device=device)
        mask.masked_fill_(~blocks(row, query, keys)[:, None], -torch.inf)
        tiles.append(Tile(start=start, stop=stop, key_runs=runs, mask=mask))
    return tuple(tiles)
