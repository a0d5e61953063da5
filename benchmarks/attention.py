"""Attention under the `[x_t ; x_0]` mask of block diffusion, and of a draft's blocks behind their
anchors: tiles against one call with the whole mask, forward and backward, side by side in one run.

    python -m benchmarks.attention
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokendiff.diffusion.attention_masks import block_diffusion, dense, dflash_blocks
from tokendiff.models.dflash.block_attention import tiles_of_blocks
from tokendiff.models.tiled_attention import Tile, tiled_attention, tiles_of

BATCH, HEADS, DIM, REPEATS = 2, 4, 64, 5
DRAFTED = 16  # tokens of a draft's block


def seconds(mask: Callable[[], Tensor | tuple[Tile, ...]], states: list[Tensor]) -> float:
    """Of one pass there and back, the making of the mask included."""
    query, key, value = (part.detach().requires_grad_() for part in states)
    start = time.perf_counter()
    made = mask()
    if isinstance(made, tuple):
        out, _ = tiled_attention(nn.Module(), query, key, value, None, tiles=made)
    else:
        attend = functional.scaled_dot_product_attention
        out = attend(query, key, value, attn_mask=made).transpose(1, 2)
    out.square().sum().backward()
    return time.perf_counter() - start


def compare(
    what: str,
    whole: Callable[[], Tensor],
    tiles: Callable[[], tuple[Tile, ...]],
    num_queries: int,
    num_keys: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = (num_queries, num_keys, num_keys)
    states = [torch.randn(BATCH, HEADS, count, DIM, generator=generator) for count in counts]
    ratios = [seconds(whole, states) / seconds(tiles, states) for _ in range(REPEATS + 1)]
    low, *_, high = sorted(ratios[1:])  # the first warms up
    print(f"  {what}: {statistics.median(ratios[1:]):.2f}x ({low:.2f}-{high:.2f})", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    print(f"batch {BATCH}, {HEADS} heads of {DIM}, float32, one thread; dense over tiles")
    for length, block_length in ((128, 4), (512, 32), (1024, 32)):
        document = torch.zeros(BATCH, length, dtype=torch.long)
        block = torch.arange(length).expand(BATCH, -1) // block_length
        mask = dense(block_diffusion(document, block), BATCH, 2 * length, 2 * length)
        compare(
            f"2 x {length} positions, blocks of {block_length}",
            lambda mask=mask: mask,  # type: ignore[misc]
            lambda mask=mask: tiles_of(mask),  # type: ignore[misc]
            2 * length,
            2 * length,
        )
    for length, num_anchors in ((512, 64), (1024, 128), (1024, 512)):
        document = torch.zeros(BATCH, length, dtype=torch.long)
        generator = torch.Generator().manual_seed(0)
        places = [torch.randperm(length - 2, generator=generator) for _ in range(BATCH)]
        anchors = torch.stack([of[:num_anchors].sort().values + 1 for of in places])
        blocks = dflash_blocks(document, anchors, DRAFTED)
        num_queries = num_anchors * DRAFTED
        num_keys = length + num_queries
        compare(
            f"{num_anchors} anchors of {DRAFTED} tokens in {length}",
            lambda b=blocks, q=num_queries, k=num_keys: dense(b, BATCH, q, k),  # type: ignore[misc]
            lambda b=blocks: tiles_of_blocks(b, dtype=torch.float32),  # type: ignore[misc]
            num_queries,
            num_keys,
        )


if __name__ == "__main__":
    main()
