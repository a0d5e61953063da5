"""Trains MDLM, UDLM and hybrid on a Markov chain of which everything is known, and holds their
bounds and samples against it.

    python -m benchmarks.toy_chain [--steps 2500] [--objectives mdlm udlm hybrid] [--optimizer muon]

The bound must not lie below the chain's entropy by more than three standard errors, and not far
above it; the pairs of neighbours in the samples must be distributed as the chain's. Exits with 1
otherwise. Minutes on one core.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tests.builders import letter_tokenizer, token_folder
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.splitmix import key_from
from tokendiff.evaluation.bound import row_bounds
from tokendiff.models.checkpoints import load_for_inference
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.training.run import train_in_process

# By objective; masks tell the time themselves, other noise does not.
MODELS = {
    "mdlm": "builtin:bert-tiny",
    "udlm": "builtin:dit-tiny",
    "hybrid": "builtin:dit-tiny",
}
MAX_GAP, MAX_PAIR_DISTANCE = 0.03, 0.04  # stated bounds; 10,000 exact draws have about 0.007
NUM_STATES, LENGTH = 8, 16
FIRST_STATE = 4  # the tokenizer's special tokens come before it, and never occur
VOCAB_SIZE = FIRST_STATE + NUM_STATES
NUM_TRAIN_ROWS = 2**17


@dataclass(frozen=True, kw_only=True)
class MarkovChain:
    """A stationary chain; its states are the token ids from FIRST_STATE on.

    Attributes:
        transition: [S, S], row: the state before.
        start: [S], stationary.
    """

    transition: np.ndarray
    start: np.ndarray

    @classmethod
    def random(cls, seed: int) -> "MarkovChain":
        """Each state is mostly followed by two or three others."""
        transition = np.random.default_rng(seed).dirichlet([0.5] * NUM_STATES, size=NUM_STATES)
        values, vectors = np.linalg.eig(transition.T)
        start = np.real(vectors[:, np.argmax(values.real)])
        return cls(transition=transition, start=start / start.sum())

    def rows(self, count: int, seed: int) -> np.ndarray:
        """[count, LENGTH] token ids."""
        uniform = np.random.default_rng(seed).random((count, LENGTH))
        states = np.empty((count, LENGTH), dtype=np.int64)
        cumulative = np.broadcast_to(self.start.cumsum(), (count, NUM_STATES))
        for position in range(LENGTH):
            below = (uniform[:, position, None] >= cumulative).sum(1)
            states[:, position] = np.minimum(below, NUM_STATES - 1)  # a sum that rounds below 1
            cumulative = self.transition.cumsum(1)[states[:, position]]
        return FIRST_STATE + states

    def nats(self, rows: np.ndarray) -> np.ndarray:
        """-ln p of each row."""
        states = rows - FIRST_STATE
        steps = np.log(self.transition)[states[:, :-1], states[:, 1:]]
        return -np.log(self.start)[states[:, 0]] - steps.sum(1)

    @property
    def entropy(self) -> float:
        """H(start) + (LENGTH - 1) h, nats of a row."""
        rate = -(self.start[:, None] * self.transition * np.log(self.transition)).sum()
        return float(-(self.start * np.log(self.start)).sum() + (LENGTH - 1) * rate)

    @property
    def unigram_gap(self) -> float:
        """By how much of the entropy a model of independent tokens lies above it."""
        unigram = -LENGTH * float((self.start * np.log(self.start)).sum())
        return unigram / self.entropy - 1.0

    @property
    def pairs(self) -> np.ndarray:
        """[V, V] probabilities of two neighbouring tokens."""
        table = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
        table[FIRST_STATE:, FIRST_STATE:] = self.start[:, None] * self.transition
        return table

    def pair_distance(self, rows: np.ndarray) -> float:
        """Total variation between the pairs of neighbours in rows [n, LENGTH] and the chain's."""
        index = rows[:, :-1] * VOCAB_SIZE + rows[:, 1:]
        counts = np.bincount(index.ravel(), minlength=VOCAB_SIZE**2)
        return float(0.5 * np.abs(counts / counts.sum() - self.pairs.ravel()).sum())


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to train and how much to draw."""

    steps: int = 2500
    rows_per_step: int = 128
    learning_rate: float = 3e-3
    optimizer: Literal["adamw", "muon"] = "adamw"
    eval_rows: int = 4096
    noise_levels: int = 32  # per row of the bound
    samples: int = 10_000
    inference_steps: int = 128
    seed: int = 0


# For a test: enough to see that each objective learns the chain, not how well it can.
SHORT = Effort(
    steps=400,
    rows_per_step=48,
    learning_rate=2e-3,  # from 5e-3 on, rounding alone decides how well it ends
    eval_rows=256,
    noise_levels=8,
    samples=500,
    inference_steps=24,
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Nats are those of a row.

    Attributes:
        gap_nats: bound minus entropy; estimated as the mean of bound + ln p(x), which has the same
            expectation and a fraction of the variance.
        pair_distance: of the samples.
    """

    objective: str
    bound_nats: float
    bound_error: float
    gap_nats: float
    gap_error: float
    pair_distance: float
    model_calls: float
    seconds: tuple[float, float, float]  # training, bound, sampling


def chain_folder(chain: MarkovChain, folder: Path) -> TokenData:
    rows = chain.rows(NUM_TRAIN_ROWS, seed=1)
    token_folder(
        folder,
        files=[rows.tolist()],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(VOCAB_SIZE),
        row_group_rows=4096,
    )
    return TokenData.open(folder, split="train")


def try_objectives(
    objectives: Sequence[str], chain: MarkovChain, folder: Path, effort: Effort
) -> list[Finding]:
    """Train, evaluate and sample each objective; `folder` gets data and checkpoints."""
    data = chain_folder(chain, folder / "data")
    return [
        try_objective(objective, chain, data, folder / objective, effort)
        for objective in objectives
    ]


def try_objective(
    objective: str, chain: MarkovChain, data: TokenData, output_dir: Path, effort: Effort
) -> Finding:
    config = TrainConfig(
        model_name_or_path=MODELS[objective],
        objective=objective,  # type: ignore[arg-type]  # a name is expanded
        max_train_steps=effort.steps,
        per_device_train_batch_size=effort.rows_per_step,
        learning_rate=effort.learning_rate,
        optimizer=effort.optimizer,
        lr_warmup_steps=effort.steps // 20,
        adam_beta2=0.98,
        ema_decay=0.99,
        checkpointing_steps=effort.steps,
        seed=effort.seed,
    )
    marks = [time.perf_counter()]
    checkpoint = load_for_inference(train_in_process(config, data, output_dir))
    marks.append(time.perf_counter())
    bound, gap = _bounds(chain, checkpoint, effort)
    marks.append(time.perf_counter())
    samples, model_calls = _samples(checkpoint, effort)
    marks.append(time.perf_counter())
    training, evaluation, sampling = np.diff(marks).tolist()
    return Finding(
        objective=objective,
        bound_nats=float(bound.mean()),
        bound_error=_standard_error(bound),
        gap_nats=float(gap.mean()),
        gap_error=_standard_error(gap),
        pair_distance=chain.pair_distance(samples),
        model_calls=model_calls,
        seconds=(training, evaluation, sampling),
    )


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _bounds(
    chain: MarkovChain, checkpoint: tuple[Any, Any, Any], effort: Effort
) -> tuple[np.ndarray, np.ndarray]:
    """Of fresh rows: the bound, and the bound minus -ln p."""
    denoiser, _, process = checkpoint
    rows = chain.rows(effort.eval_rows, seed=2)
    generator = RowGenerator.for_rows(key_from(effort.seed, "bound"), torch.arange(len(rows)))
    tokens = torch.from_numpy(rows)
    bound = torch.cat(
        [
            row_bounds(
                denoiser,
                TokenBatch(tokens=tokens[part], is_valid=torch.ones_like(tokens[part]).bool()),
                generator.select(part),
                kernel=process.kernel(),
                prediction=process.prediction,
                num_mask_samples=effort.noise_levels,
            )[0]
            for part in torch.arange(len(rows)).split(512)
        ]
    ).numpy()
    return bound, bound - chain.nats(rows)


def _samples(checkpoint: tuple[Any, Any, Any], effort: Effort) -> tuple[np.ndarray, float]:
    """Sampled rows, and the mean number of model calls of a row."""
    denoiser, _, process = checkpoint
    sampler = AncestralSampler(
        kernel=process.kernel(),
        prediction=process.prediction,
        num_inference_steps=effort.inference_steps,
    )
    key = key_from(effort.seed, "sample")
    drawn = [
        sampler.sample(
            denoiser,
            torch.zeros(len(part), LENGTH, dtype=torch.int64),
            torch.zeros(len(part), LENGTH, dtype=torch.bool),
            RowGenerator.for_rows(key, part),
        )
        for part in torch.arange(effort.samples).split(512)
    ]
    calls = torch.cat([samples.num_model_calls for samples in drawn]).double().mean()
    return torch.cat([samples.tokens for samples in drawn]).numpy(), float(calls)


def violations(
    findings: list[Finding], chain: MarkovChain, *, max_gap: float, max_pair_distance: float
) -> list[str]:
    """What the findings do that they must not, in words.

    Args:
        max_gap: of the bound above the entropy, as a share of it.
    """
    found = []
    for finding in findings:
        name = finding.objective
        if finding.gap_nats < -3.0 * finding.gap_error:
            below = -finding.gap_nats / finding.gap_error
            found.append(f"{name}: the bound is {below:.1f} standard errors below the entropy")
        if not finding.gap_nats <= max_gap * chain.entropy:
            above = finding.gap_nats / chain.entropy
            found.append(f"{name}: the bound is {above:.2%} above the entropy, over {max_gap:.1%}")
        if not finding.pair_distance <= max_pair_distance:
            found.append(
                f"{name}: total variation {finding.pair_distance:.4f}, over {max_pair_distance}"
            )
    return found


def report(findings: list[Finding], chain: MarkovChain, effort: Effort) -> str:
    exact = [chain.pair_distance(chain.rows(effort.samples, seed=100 + i)) for i in range(20)]
    lines = [
        f"entropy of {LENGTH} tokens {chain.entropy:.4f} nats ({chain.entropy / LENGTH:.4f} a "
        f"token); a model of independent tokens would lie {chain.unigram_gap:.0%} above",
        f"pairs in {effort.samples:,} exact draws: total variation {np.mean(exact):.4f} "
        f"(at most {np.max(exact):.4f} in {len(exact)} trials)",
        f"{'':8}{'bound, nats':>18}{'gap':>9}{'gap, nats':>19}{'in s.e.':>9}"
        f"{'pair TV':>9}{'calls':>8}   seconds: train, bound, sample",
    ]
    for f in findings:
        lines.append(
            f"{f.objective:8}{f.bound_nats:9.4f} +- {f.bound_error:.4f}"
            f"{f.gap_nats / chain.entropy:9.2%}{f.gap_nats:10.4f} +- {f.gap_error:.4f}"
            f"{f.gap_nats / f.gap_error:9.1f}{f.pair_distance:9.4f}{f.model_calls:8.1f}   "
            + ", ".join(f"{seconds:.0f}" for seconds in f.seconds)
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--objectives", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--steps", type=int, default=Effort.steps)
    parser.add_argument("--learning_rate", type=float, default=Effort.learning_rate)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default=Effort.optimizer)
    parser.add_argument("--eval_rows", type=int, default=Effort.eval_rows)
    parser.add_argument("--samples", type=int, default=Effort.samples)
    parser.add_argument("--inference_steps", type=int, default=Effort.inference_steps)
    parser.add_argument("--seed", type=int, default=Effort.seed)
    parser.add_argument("--threads", type=int, default=1, help="torch's; 1 is the fastest here")
    args = vars(parser.parse_args())
    torch.set_num_threads(args.pop("threads"))
    objectives = args.pop("objectives")
    effort = Effort(**args)
    chain = MarkovChain.random(seed=7)
    with tempfile.TemporaryDirectory() as name:
        findings = try_objectives(objectives, chain, Path(name), effort)
    print(report(findings, chain, effort))
    broken = violations(findings, chain, max_gap=MAX_GAP, max_pair_distance=MAX_PAIR_DISTANCE)
    for line in broken:
        print(line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
