"""Flex attention's BlockMask of a rule that is known by its runs of keys.

`create_block_mask` asks a rule for each pair of query and key: [B, 2L, 2L] numbers, several times
over, for every micro-batch of block diffusion. Here [B, 2L, 2L / 128] are enough, and nothing is
asked of the device.
"""

import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tokendiff.diffusion.attention_masks import mask_mod
from tokendiff.diffusion.key_runs import KeyRun, RunRule

FLEX_TILE = 128


def block_mask_of_runs(rule: RunRule, num_keys: int) -> BlockMask:
    """The mask that `create_block_mask` finds by asking the rule for each pair of query and key."""
    runs = rule.runs()
    num_queries = runs[0].begin.shape[1]
    first, *others = (_keys_in_tiles(run, num_keys) for run in runs)
    counts = sum(others, first)
    missing = -num_queries % FLEX_TILE
    counts = torch.nn.functional.pad(counts, (0, 0, 0, missing)).unflatten(1, (-1, FLEX_TILE))
    is_whole = (counts == FLEX_TILE).all(2)
    is_partial = (counts > 0).any(2) & ~is_whole
    return BlockMask.from_kv_blocks(
        *seen_first(is_partial),
        *seen_first(is_whole),
        BLOCK_SIZE=FLEX_TILE,
        mask_mod=mask_mod(rule),
        seq_lengths=(num_queries, num_keys),
    )


def seen_first(is_seen: Tensor) -> tuple[Tensor, Tensor]:
    """Of [B, rows, columns]: how many columns of a row are seen [B, 1, rows], and which, those
    first [B, 1, rows, columns].
    """
    order = is_seen.int().argsort(dim=-1, descending=True, stable=True)
    return is_seen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def _keys_in_tiles(run: KeyRun, num_keys: int) -> Tensor:
    """[B, Q, tiles] how many keys of each tile of columns a query sees of a run."""
    edges = torch.arange(math.ceil(num_keys / FLEX_TILE) + 1, device=run.begin.device) * FLEX_TILE
    begin, end = run.begin[..., None], run.end[..., None]
    within = torch.minimum(torch.maximum(edges, begin), torch.maximum(begin, end))
    if run.is_seen is not None:
        before = torch.nn.functional.pad(run.is_seen.long().cumsum(1), (1, 0))
        within = before[:, None].expand(-1, within.shape[1], -1).gather(2, within)
    return within.diff(dim=2)
