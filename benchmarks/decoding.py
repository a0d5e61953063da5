"""What the cache and the batch save in decoding, and ours against the released diffusers pipeline.

    python -m benchmarks.decoding [--rounds 3] [--new_tokens 64] [--only batch] [--threads N]

Both sides of each pair write the same tokens, which is checked first: the exit status is 1 where
they do not. Then they run in turn. A small Qwen3 with new weights; texts of 512 tokens. The pair
with diffusers needs it on the path (it is no dependency); without it the line says so. Nothing else
should be running on the machine.
"""

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.builders import tiny_causal
from tokendiff.diffusion.attention_masks import MaskRule
from tokendiff.diffusion.interfaces import Request
from tokendiff.models.causal import CausalModel
from tokendiff.models.ragged_cache import RaggedCache
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.block_refinement import BlockRefinementSampler
from tokendiff.samplers.open_ended import OpenEndedSampler
from tokendiff.samplers.sdar import SDARSampler

VOCAB_SIZE, MASK, TEXT_LENGTH, BLOCK_LENGTH = 8192, 1, 512, 16


class ReencodingModel(CausalModel):
    """Keeps tokens, not keys and values: each call encodes the whole text anew."""

    def new_cache(self, num_rows: int) -> RaggedCache:
        cache = super().new_cache(num_rows)
        self._kept: Tensor = torch.zeros(num_rows, 2 * TEXT_LENGTH, dtype=torch.int64)
        return cache

    def encode(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: Any,
        rows: Tensor,
        rule: MaskRule,
        **kwargs: Any,
    ) -> Tensor:
        lengths, width = cache.lengths[rows], tokens.shape[1]
        at = lengths[:, None] + torch.arange(width)
        self._kept[rows[:, None], at] = tokens
        whole = self._kept[rows, : int(at.max()) + 1]
        fresh = super().new_cache(len(rows))
        every = torch.arange(len(rows))
        hidden = super().encode(whole, lengths + num_tokens, fresh, every, rule, **kwargs)
        return hidden[every[:, None], at]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two ways to the same tokens."""

    before: Callable[[], list[list[int]]]
    ours: Callable[[], list[list[int]]]


def qwen3() -> Any:
    """4 layers of width 256, float32, whose output embedding gives the mask no probability."""
    model = tiny_causal(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        initializer_range=0.08,
    ).float()
    head = model.lm_head.forward
    mask = torch.tensor([MASK])
    model.lm_head.forward = lambda hidden: head(hidden).index_fill(-1, mask, -1e9)
    return model


def requests_of(rows: int, new_tokens: int) -> list[Request]:
    generator = torch.Generator().manual_seed(0)
    length = TEXT_LENGTH - new_tokens
    tokens = torch.randint(2, VOCAB_SIZE, (rows, length), generator=generator).tolist()
    return [Request(id=index, prompt=tuple(prompt)) for index, prompt in enumerate(tokens)]


def completions(
    sampler: OpenEndedSampler, model: CausalModel, requests: Sequence[Request], num_slots: int
) -> list[list[int]]:
    done = {c.id: c.tokens for c in sampler.complete(model, requests, key=0, num_slots=num_slots)}
    return [done[request.id] for request in requests]


def samplers_of(new_tokens: int) -> dict[str, OpenEndedSampler]:
    common: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": 0.0}
    block = {**common, "mask_token_id": MASK, "block_length": BLOCK_LENGTH}
    refine = BlockRefinementSampler(**block, num_inference_steps=BLOCK_LENGTH, threshold=0.9)
    return {
        "ar": AutoregressiveSampler(**common),
        "sdar": SDARSampler(**block, denoising_steps=BLOCK_LENGTH),
        "block_refinement 2d": refine,
        "block_refinement 4d": replace(refine, attention_mask_mode="4d"),
    }


def cache_pair(name: str, new_tokens: int) -> Pair:
    sampler, model = samplers_of(new_tokens)[name], qwen3()
    requests = requests_of(1, new_tokens)
    cached = CausalModel(model, vocab_size=VOCAB_SIZE)
    reencoding = ReencodingModel(model, vocab_size=VOCAB_SIZE)
    return Pair(
        before=lambda: completions(sampler, reencoding, requests, 1),
        ours=lambda: completions(sampler, cached, requests, 1),
    )


def batch_pair(name: str, new_tokens: int) -> Pair:
    sampler = samplers_of(new_tokens)[name]
    model = CausalModel(qwen3(), vocab_size=VOCAB_SIZE)
    requests = requests_of(8, new_tokens)
    return Pair(
        before=lambda: completions(sampler, model, requests, 1),
        ours=lambda: completions(sampler, model, requests, 8),
    )


def diffusers_pair(rows: int, new_tokens: int) -> Pair:
    diffusers: Any = importlib.import_module("diffusers")
    sampler = samplers_of(new_tokens)["block_refinement 2d"]
    assert isinstance(sampler, BlockRefinementSampler)
    model, requests = qwen3(), requests_of(rows, new_tokens)
    ours = CausalModel(model, vocab_size=VOCAB_SIZE)
    pipeline: Any = diffusers.LLaDA2Pipeline(
        model=model, scheduler=diffusers.BlockRefinementScheduler(block_length=BLOCK_LENGTH)
    )
    pipeline.set_progress_bar_config(disable=True)

    def published() -> list[list[int]]:
        output = pipeline(
            input_ids=torch.tensor([request.prompt for request in requests]),
            gen_length=new_tokens,
            block_length=BLOCK_LENGTH,
            num_inference_steps=BLOCK_LENGTH,
            threshold=sampler.threshold,
            editing_threshold=None,
            mask_token_id=MASK,
            output_type="seq",
        )
        tokens: list[list[int]] = output.sequences.tolist()
        return tokens

    return Pair(before=published, ours=lambda: completions(sampler, ours, requests, rows))


PAIRS: dict[str, tuple[str, Callable[[int], Pair]]] = {
    **{f"cache: {name}": ("no cache", partial(cache_pair, name)) for name in samplers_of(1)},
    **{f"batch of 8: {name}": ("one by one", partial(batch_pair, name)) for name in ("ar", "sdar")},
    "diffusers: 1 row": ("its pipeline", partial(diffusers_pair, 1)),
    "diffusers: 4 rows": ("its pipeline", partial(diffusers_pair, 4)),
}


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new_tokens", type=int, default=64, help="of texts of 512")
    parser.add_argument("--only", help="pairs whose name holds this")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"the last {args.new_tokens} tokens of {TEXT_LENGTH}, {args.threads} torch threads")
    print(f"{'median (min..max)':28}{'before, s':>26}{'ours, s':>24}{'ratio':>24}", flush=True)
    status = 0
    for name, (against, make) in PAIRS.items():
        if args.only and args.only not in name:
            continue
        if name.startswith("diffusers") and importlib.util.find_spec("diffusers") is None:
            print(f"{name:28}  left out: diffusers is not installed")
            continue
        pair = make(args.new_tokens)
        if pair.before() != pair.ours():
            print(f"{name:28}  the two sides write different tokens")
            status = 1
            continue
        timed = [(seconds_of(pair.before), seconds_of(pair.ours)) for _ in range(args.rounds)]
        before, ours = (list(side) for side in zip(*timed, strict=True))
        ratios = [a / b for a, b in timed]
        print(
            f"{name:28}{spread(before):>26}{spread(ours):>24}{spread(ratios):>24}  x {against}",
            flush=True,
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
