"""Quality against speed of `cache: none | prefix | dual`, of a trained model of a known language.

    python -m benchmarks.caches [--steps 1000] [--rows 128]

Trains a small bidirectional Llama with MDLM on a language of which every row's probability is
known, and lets sampler `blockwise` write rows with each cache. Of each it prints

- the samples' mean -ln p of a token, which for exact samples is the language's own;
- the total variation between the triples (x[i - 4], x[i - 1], x[i]) of samples and language;
- how many positions the model read for each token that was written, and the time that it took.

The settings take turns on one batch after the other, so that none has the quieter machine. Minutes
on one core.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.diffusion.splitmix import key_from
from tokendiff.models.denoiser import TransformersDenoiser, attend_both_ways
from tokendiff.objectives.mdlm import MDLM
from tokendiff.samplers.blockwise import BlockwiseSampler

NUM_STATES, LAG, LENGTH, BLOCK = 6, 4, 96, 12
MASK = NUM_STATES
RULES = (("sequential", 12), ("low_confidence_static", 12), ("low_confidence_static", 4))
CACHES: tuple[tuple[str, int | None], ...] = (
    ("none", None),
    ("prefix", None),
    ("dual", None),
    ("dual", 4),
)


@dataclass(frozen=True, kw_only=True)
class Language:
    """A token depends on the one before it and on the one LAG before it; in front of a row all
    tokens count as 0.

    Attributes:
        table: [S, S, S], p(x[i] | x[i - LAG], x[i - 1]).
    """

    table: np.ndarray

    @classmethod
    def random(cls, seed: int) -> "Language":
        size = (NUM_STATES, NUM_STATES)
        return cls(table=np.random.default_rng(seed).dirichlet([0.4] * NUM_STATES, size=size))

    def rows(self, count: int, seed: int, length: int = LENGTH) -> np.ndarray:
        """[count, length] tokens."""
        uniform = np.random.default_rng(seed).random((count, length))
        rows = np.zeros((count, LAG + length), dtype=np.int64)
        for at in range(LAG, LAG + length):
            cumulative = self.table[rows[:, at - LAG], rows[:, at - 1]].cumsum(-1)
            below = (uniform[:, at - LAG, None] >= cumulative).sum(1)
            rows[:, at] = np.minimum(below, NUM_STATES - 1)  # a sum that rounds below 1
        return rows[:, LAG:]

    def nats(self, rows: np.ndarray) -> np.ndarray:
        """[n, length] -ln p of each token given those before it."""
        padded = np.concatenate([np.zeros((len(rows), LAG), dtype=np.int64), rows], axis=1)
        return -np.log(self.table[padded[:, :-LAG], padded[:, LAG - 1 : -1], rows])


def triples(rows: np.ndarray) -> np.ndarray:
    """[S^3] how often each (x[i - LAG], x[i - 1], x[i]) occurs in rows, as shares."""
    index = (rows[:, :-LAG] * NUM_STATES + rows[:, LAG - 1 : -1]) * NUM_STATES + rows[:, LAG:]
    counts = np.bincount(index.ravel(), minlength=NUM_STATES**3)
    return counts / counts.sum()


def new_denoiser(seed: int = 0) -> TransformersDenoiser:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUM_STATES + 1,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=None,
        eos_token_id=None,
    )
    attend_both_ways(config)
    return TransformersDenoiser(LlamaForCausalLM(config), vocab_size=NUM_STATES + 1)


def train(language: Language, *, steps: int, rows_per_step: int = 32) -> TransformersDenoiser:
    """The denoiser after so many steps of AdamW, the rate falling to 0."""
    denoiser = new_denoiser()
    objective = MDLM(kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=3e-3, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1.0) * (1.0 - step / steps)
    )
    for step in range(steps):
        tokens = torch.from_numpy(language.rows(rows_per_step, seed=1000 + step))
        batch = TokenBatch(tokens=tokens, is_valid=torch.ones_like(tokens, dtype=torch.bool))
        keys = RowGenerator.for_rows(key_from(0, "train", step), torch.arange(rows_per_step))
        output = objective.loss(denoiser, batch, keys)
        optimizer.zero_grad()
        (output.loss_sum / output.num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return denoiser


@dataclass(kw_only=True)
class Finding:
    """What one cache came to under one rule."""

    rule: str
    steps: int
    cache: str
    refresh: int | None
    rows: np.ndarray
    num_read: int = 0
    seconds: float = 0.0


class _Counted(TransformersDenoiser):
    """Counts the positions that it reads."""

    num_read = 0

    def encode(self, tokens: Tensor, *rest: Any, **fields: Any) -> Tensor:
        self.num_read += tokens.numel()
        return super().encode(tokens, *rest, **fields)

    def encode_window(self, tokens: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        self.num_read += positions.numel()
        return super().encode_window(tokens, positions, *rest)


def compare(denoiser: TransformersDenoiser, *, num_rows: int, batch: int = 32) -> list[Finding]:
    counted = _Counted(denoiser.model, vocab_size=NUM_STATES + 1).eval()
    kernel = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
    findings = [
        Finding(
            rule=rule, steps=steps, cache=cache, refresh=refresh,
            rows=np.empty((0, LENGTH), dtype=np.int64),
        )
        for rule, steps in RULES
        for cache, refresh in CACHES
        if (refresh or 1) < steps  # else it is never renewed within a block
    ]  # fmt: skip
    nothing = torch.zeros(batch, LENGTH, dtype=torch.int64)
    for first in range(0, num_rows, batch):
        ids = torch.arange(first, first + batch)
        for found in findings:
            sampler = BlockwiseSampler(
                kernel=kernel,
                block_size=BLOCK,
                num_inference_steps=found.steps,
                remasking_strategy=found.rule,
                cache=found.cache,
                cache_refresh_steps=found.refresh,
            )
            counted.num_read, start = 0, time.perf_counter()
            generator = RowGenerator.for_rows(key_from(0, "caches"), ids)
            samples = sampler.sample(counted, nothing, nothing.bool(), generator)
            found.seconds += time.perf_counter() - start
            found.num_read += counted.num_read
            found.rows = np.concatenate([found.rows, samples.tokens.numpy()])
    return findings


def report(language: Language, findings: Sequence[Finding]) -> str:
    expected = triples(language.rows(20_000, seed=2))
    exact = language.rows(len(findings[0].rows), seed=3)
    entropy = language.nats(language.rows(20_000, seed=2)).mean()
    lines = [
        f"language: {entropy:.3f} nats a token; {len(exact)} exact rows: "
        f"{_quality(language, exact, expected)}",
        f"{'rule':<22} {'steps':>5} {'cache':<8} {'renewed':<8} {'nats':>14} {'triples':>8} "
        f"{'read':>6} {'seconds':>8} {'speed':>6}",
    ]
    for found in findings:
        if found.cache == "none":
            whole = found
        renewed = "block" if found.refresh is None else f"{found.refresh}"
        lines.append(
            f"{found.rule:<22} {found.steps:>5} {found.cache:<8} "
            f"{'-' if found.cache == 'none' else renewed:<8} "
            f"{_quality(language, found.rows, expected)} "
            f"{found.num_read / found.rows.size:>6.1f} {found.seconds:>8.1f} "
            f"{whole.seconds / found.seconds:>6.2f}"
        )
    return "\n".join(lines)


def _quality(language: Language, rows: np.ndarray, expected: np.ndarray) -> str:
    nats = language.nats(rows).mean(1)
    error = nats.std(ddof=1) / len(rows) ** 0.5
    distance = 0.5 * float(np.abs(triples(rows) - expected).sum())
    return f"{nats.mean():>6.3f} +- {error:.3f} {distance:>8.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.caches", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=128, help="rows written with each cache")
    options = parser.parse_args(argv)
    language = Language.random(seed=0)
    start = time.perf_counter()
    denoiser = train(language, steps=options.steps)
    print(f"trained {options.steps} steps in {time.perf_counter() - start:.0f} s", flush=True)
    print(report(language, compare(denoiser, num_rows=options.rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
