"""Attention under the `[x_t ; x_0]` mask of block diffusion: tiles against one call with the whole
mask, forward and backward, side by side in one run.

    python -m benchmarks.attention
"""

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokendiff.diffusion.attention_masks import block_diffusion, dense
from tokendiff.models.tiled_attention import tiled_attention, tiles_of

BATCH, HEADS, DIM, REPEATS = 2, 4, 64, 5


def seconds(mask: Tensor, states: list[Tensor], *, is_tiled: bool) -> float:
    query, key, value = (part.detach().requires_grad_() for part in states)
    start = time.perf_counter()
    if is_tiled:
        out, _ = tiled_attention(nn.Module(), query, key, value, mask, tiles=tiles_of(mask))
    else:
        attend = functional.scaled_dot_product_attention
        out = attend(query, key, value, attn_mask=mask).transpose(1, 2)
    out.square().sum().backward()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    print(f"batch {BATCH}, {HEADS} heads of {DIM}, float32, one thread; dense over tiles")
    for length, block_length in ((128, 4), (512, 32), (1024, 32)):
        document = torch.zeros(BATCH, length, dtype=torch.long)
        block = torch.arange(length).expand(BATCH, -1) // block_length
        mask = dense(block_diffusion(document, block), BATCH, 2 * length, 2 * length)
        generator = torch.Generator().manual_seed(0)
        shape = (BATCH, HEADS, 2 * length, DIM)
        states = [torch.randn(shape, generator=generator) for _ in range(3)]
        ratios = []
        for _ in range(REPEATS + 1):
            whole = seconds(mask, states, is_tiled=False)
            ratios.append(whole / seconds(mask, states, is_tiled=True))
        low, *_, high = sorted(ratios[1:])  # the first warms up
        middle = statistics.median(ratios[1:])
        what = f"2 x {length} positions, blocks of {block_length}"
        print(f"  {what}: {middle:.2f}x ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    main()
