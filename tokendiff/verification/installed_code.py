"""The installed mathematics against brute force, over languages that are small enough to be
enumerated: what `jobs.evaluate --verify` certifies of the code. All in float64.

The oracles (`tokendiff.verification.oracles`) know a process by the fields of its
scheduler_config.json alone, so a kernel with a wrong number in it differs from them.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.diffusion.interfaces import Denoiser, LossOutput, TokenBatch
from tokendiff.diffusion.kernels import LEAST_TIME, AbsorbingKernel, ForwardKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.evaluation.bound import row_bounds
from tokendiff.objectives.block_uniform import UniformBlockDiffusion
from tokendiff.objectives.blocks import block_rows
from tokendiff.objectives.chunked import without_mask
from tokendiff.objectives.mdlm import MDLM
from tokendiff.objectives.token_noise import TokenNoiseDiffusion
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.verification import oracles
from tokendiff.verification.certificate import Check, Rule, apply, rule
from tokendiff.verification.toys import (
    BLOCKS,
    LENGTH,
    MASK,
    TOYS,
    VOCAB_SIZE,
    BlockLanguage,
    ExactBlockDenoiser,
    ExactDenoiser,
    ToyLanguage,
)

TIMES = (0.1, 0.5, 0.9)
STEPS = ((0.2, 0.5), (0.6, 0.7), (0.05, 0.95), (0.0, 0.3))  # s, t
BELIEF = np.array([0.5, 0.2, 0.0, 0.3])
_QUADRATURE_NODES = 160
_BLOCK_NODES = 32
_UNIFORM_GRID = 50_000


def num_code_checks() -> int:
    return len(TOYS) * len(RULES) + len(BLOCK_RULES)


def verify_code() -> Iterator[Check]:
    """Every rule for every kernel, and those of blocks."""
    for name, toy in TOYS.items():
        yield from apply(RULES, name, toy)
    yield from apply(BLOCK_RULES, "uniform_blocks", BLOCKS)


# What is checked.


@rule(
    claim="alpha' and b' are the derivatives of alpha and b",
    oracle="automatic differentiation",
    tolerance=1e-9,
)
def derivative(toy: ToyLanguage) -> float:
    t = torch.linspace(0.02, 0.98, 97, dtype=torch.float64, requires_grad=True)
    kernel = toy.kernel
    worst = 0.0
    for value, prime in (
        (kernel.alpha(t), kernel.alpha_prime(t)),
        *zip(kernel.noise(t), kernel.noise_prime(t), strict=True),
    ):
        # A noise that is 0 throughout does not depend on t.
        (slope,) = torch.autograd.grad(value.sum() + 0.0 * t.sum(), t, retain_graph=True)
        worst = max(worst, _distance(prime, slope) / (1.0 + float(slope.abs().max())))
    return worst


@rule(
    claim="q_t(z | x), both ends of time included",
    oracle="its definition, V x V",
    tolerance=1e-12,
)
def forward(toy: ToyLanguage) -> float:
    one_hot = torch.eye(VOCAB_SIZE, dtype=torch.float64)[None]
    return max(
        _distance(
            toy.kernel.marginal(one_hot, _scalar(t))[0], oracles.forward_matrix(toy.fields, t)
        )
        for t in (0.0, *TIMES, 1.0)
    )


@rule(
    claim="noisy tokens are drawn from q_t",
    oracle="shares over an even grid of uniform numbers",
    tolerance=1e-4,
)
def corrupt(toy: ToyLanguage) -> float:
    """With an even grid in place of random numbers, shares are probabilities."""
    grid = (torch.arange(_UNIFORM_GRID, dtype=torch.float64)[None] + 0.5) / _UNIFORM_GRID
    worst = 0.0
    for t in TIMES:
        for token in (0, VOCAB_SIZE - 1):
            x_0 = torch.full(grid.shape, token)
            is_noisable = torch.ones_like(x_0, dtype=torch.bool)
            x_t = toy.kernel.corrupt(x_0, _scalar(t), uniform=grid, is_noisable=is_noisable)
            share = torch.bincount(x_t[0], minlength=VOCAB_SIZE) / _UNIFORM_GRID
            worst = max(worst, _distance(share, oracles.forward_matrix(toy.fields, t)[token]))
    return worst


@rule(
    claim="rows of the reverse step sum to 1 and are p(x_s | x_t)",
    oracle="Bayes over all V x V pairs",
    tolerance=1e-10,
)
def reverse(toy: ToyLanguage) -> float:
    worst = 0.0
    for s, t in STEPS:
        expected = oracles.bayes_reverse(toy.fields, BELIEF, s, t)
        x_t = torch.from_numpy(np.flatnonzero(expected.sum(1)))
        rows = toy.kernel.reverse(_beliefs(x_t), x_t[None], s=_scalar(s), t=_scalar(t))[0]
        worst = max(worst, _distance(rows, expected[x_t]), _distance(rows.sum(-1), 1.0))
    return worst


@rule(
    claim="the reverse step as the samplers take it: clean, noise or stay",
    oracle="Bayes over all V x V pairs",
    tolerance=1e-10,
)
def mixture(toy: ToyLanguage) -> float:
    worst = 0.0
    belief = torch.from_numpy(BELIEF)
    for s, t in STEPS:
        expected = oracles.bayes_reverse(toy.fields, BELIEF, s, t)
        x_t = torch.from_numpy(np.flatnonzero(expected.sum(1)))
        to_clean, to_noise = toy.kernel.move_probability(
            x_t, belief[x_t], s=_scalar(s), t=_scalar(t)
        )
        stay = torch.nn.functional.one_hot(x_t, VOCAB_SIZE) * (1.0 - to_clean - to_noise)[:, None]
        share = 1.0 - oracles.alpha(toy.fields, s)
        at_mask, at_token = oracles.noise(toy.fields, s)
        of_noise = torch.full((VOCAB_SIZE,), at_token, dtype=torch.float64)
        of_noise[MASK] = at_mask
        of_noise /= share if share > 0.0 else 1.0
        moved = to_clean[:, None] * belief + to_noise[:, None] * of_noise + stay
        worst = max(worst, _distance(moved, expected[x_t]))
    return worst


@rule(
    claim="p(x_0 | x_t) is converted to the leave-one-out posterior",
    oracle="sums of the joint table",
    tolerance=1e-10,
)
def posterior(toy: ToyLanguage) -> float:
    worst = 0.0
    for t in TIMES:
        q = oracles.forward_matrix(toy.fields, t)
        noisy = toy.noisy.numpy()
        loo = oracles.leave_one_out(toy.table, q, noisy)
        joint = loo * np.moveaxis(q[:, noisy], 0, -1)  # times q_t(x_t | x_0)
        # Where the token can come from one x_0 alone nothing is left of the others' belief.
        is_told = (q[:, noisy] > 0).sum(0) >= VOCAB_SIZE - 1
        is_told &= joint.sum(-1) > 0
        logits = torch.from_numpy(joint[is_told]).log()
        tokens = torch.from_numpy(noisy[is_told])
        ours = toy.kernel.loo_logits(logits, tokens, _scalar(t).expand(len(tokens))).softmax(-1)
        worst = max(worst, _distance(ours, loo[is_told]))
    return worst


@rule(
    claim="the bound of the exact denoiser, its ends included, is the entropy; nats",
    oracle="the entropy of an enumerated language",
    tolerance=1e-5,
)
def bound(toy: ToyLanguage) -> float:
    """Every sequence, every noisy one, and Gauss-Legendre nodes for the time: nothing is drawn."""
    nodes, weights = np.polynomial.legendre.leggauss(_QUADRATURE_NODES)
    times, slopes = toy.kernel.warped_time(torch.from_numpy(0.5 * (nodes + 1.0)))
    num_noisy = len(toy.noisy)
    x_0 = toy.clean.repeat_interleave(num_noisy, 0)
    x_t = toy.noisy.repeat(len(toy.clean), 1)

    def expectation(t: float, nats: Tensor) -> float:
        q = torch.from_numpy(oracles.forward_matrix(toy.fields, t))
        weight = toy.probability.repeat_interleave(num_noisy) * q[x_0, x_t].prod(1)
        return float((weight * torch.where(weight > 0.0, nats.sum(1), 0.0)).sum())

    def belief(t: float) -> Tensor:
        q = oracles.forward_matrix(toy.fields, t)
        exact = oracles.leave_one_out(toy.table, q, toy.noisy.numpy())
        return torch.from_numpy(exact).repeat(len(toy.clean), 1, 1)

    total = 0.0
    for t, slope, weight in zip(times, slopes, 0.5 * weights, strict=True):
        nats = toy.kernel.nelbo(belief(float(t)), x_0, x_t, t.expand(len(x_0)))
        total += expectation(float(t), nats) * float(slope) * weight
    if not isinstance(toy.kernel, AbsorbingKernel):
        first = belief(LEAST_TIME)
        of_x_0, of_x_t = (first.gather(-1, x[..., None])[..., 0] for x in (x_0, x_t))
        nats = toy.kernel.reconstruction_nats(of_x_0, of_x_t, x_0, x_t, _scalar(LEAST_TIME))
        total += expectation(LEAST_TIME, nats)
        total += LENGTH * toy.kernel.prior_nats()
    return abs(total - oracles.least_bound(toy.table, toy.fields))


@rule(
    claim="the training loss, value and gradient; relative",
    oracle="the general formula over the whole vocabulary",
    tolerance=1e-9,
)
def closed_form(toy: ToyLanguage) -> float:
    rows = torch.arange(32)
    generator = RowGenerator.for_rows(0, rows)
    x_0 = toy.clean[rows % len(toy.clean)]
    t = (rows + 0.5).double() / len(rows)
    x_t = toy.kernel.corrupt(
        x_0, t, uniform=generator.uniform(LENGTH), is_noisable=torch.ones_like(x_0).bool()
    )
    logits = generator.fold_in(1).uniform(LENGTH, VOCAB_SIZE).mul(4.0).requires_grad_()
    model = _LogitsDenoiser(logits)
    batch = TokenBatch(tokens=x_0, is_valid=torch.ones_like(x_0).bool())
    ours = closed_form_loss(model, toy.kernel, batch, x_t, t).loss_sum
    general = toy.kernel.nelbo(without_mask(logits, MASK).softmax(-1), x_0, x_t, t).sum()
    return loss_distance(ours, general, [logits])


@rule(
    claim="the bound as it is estimated for the report is the entropy; nats",
    oracle="the entropy of an enumerated language",
    tolerance=0.05,
)
def estimate(toy: ToyLanguage) -> float:
    """The bound as it is reported, with evenly spread numbers in place of random ones."""
    num_points = 4096
    points = torch.quasirandom.SobolEngine(1 + LENGTH).draw(num_points, dtype=torch.float64)
    rows = toy.clean.repeat_interleave(num_points, 0)
    nats, _ = row_bounds(
        ExactDenoiser(toy),
        TokenBatch(tokens=rows, is_valid=torch.ones_like(rows).bool()),
        _EvenNumbers(
            keys=torch.zeros(len(rows), dtype=torch.int64),
            points=(points + 0.5 / num_points).repeat(len(toy.clean), 1),
        ),
        kernel=toy.kernel,
        num_mask_samples=1,
    )
    mean = float((toy.probability * nats.reshape(-1, num_points).mean(1)).sum())
    return abs(mean - oracles.least_bound(toy.table, toy.fields))


@rule(
    claim="4,096 ancestral samples of the exact denoiser follow the language; total variation",
    oracle="the joint table",
    tolerance=0.04,
)
def sampler(toy: ToyLanguage) -> float:
    num_rows = 4096
    tokens = torch.zeros(num_rows, LENGTH, dtype=torch.int64)
    samples = AncestralSampler(kernel=toy.kernel, num_inference_steps=32).sample(
        ExactDenoiser(toy),
        tokens,
        torch.zeros_like(tokens).bool(),
        RowGenerator.for_rows(2, torch.arange(num_rows)),
    )
    return oracles.total_variation(Counter(map(tuple, samples.tokens.tolist())), toy.table)


RULES: tuple[Rule[ToyLanguage], ...] = (
    derivative,
    forward,
    corrupt,
    reverse,
    mixture,
    posterior,
    bound,
    closed_form,
    estimate,
    sampler,
)


@rule(
    claim="the training loss of the exact denoiser, over all noise of all blocks, is the entropy; "
    "nats",
    oracle="the entropy of an enumerated language",
    tolerance=1e-5,
)
@torch.no_grad()
def block_loss(language: BlockLanguage) -> float:
    """Every sequence with every noise of both blocks at once, and Gauss-Legendre nodes for the time
    that they share.
    """
    table, kernel, length = language.table, language.kernel, language.process.block_length
    assert length is not None
    clean = torch.from_numpy(np.argwhere(table > 0))
    ids = [token for token in range(VOCAB_SIZE) if token != MASK]
    noise = torch.tensor(list(itertools.product(ids, repeat=length))).repeat(1, 2)
    x_0, x_t = clean.repeat_interleave(len(noise), 0), noise.repeat(len(clean), 1)
    probability = torch.from_numpy(table)[tuple(x_0.T)]
    batch = TokenBatch(tokens=x_0, is_valid=torch.ones_like(x_0).bool())
    rows = block_rows(batch, block_length=length, fill_token_id=None)
    objective = UniformBlockDiffusion(
        kernel=kernel, block_length=length, eos_token_id=None, min_time=1e-9
    )
    nodes, weights = np.polynomial.legendre.leggauss(_BLOCK_NODES)
    times, slopes = kernel.warped_time(torch.from_numpy(0.5 * (nodes + 1.0)), min_time=1e-9)
    total = 0.0
    for t, slope, weight in zip(times, slopes, 0.5 * weights, strict=True):
        q = torch.from_numpy(oracles.forward_matrix(asdict(language.process), float(t)))
        of_blocks = q[x_0, x_t].view(len(x_0), -1, length).prod(-1)
        share = of_blocks.repeat_interleave(length, 1) * probability[:, None]
        model = ExactBlockDenoiser(language, float(t))
        output = objective.loss_at(model, rows, x_t, t.expand(x_t.shape), slope * share)
        total += weight * float(output.loss_sum)
    return abs(total - oracles.entropy(table))


BLOCK_RULES: tuple[Rule[BlockLanguage], ...] = (block_loss,)


# Helpers.


@dataclass(frozen=True, kw_only=True)
class _EvenNumbers(RowGenerator):
    """The points of a [B, 1 + L] grid: a number of its own for a row, and one for each position."""

    points: Tensor

    def fold_in(self, data: int | Tensor) -> "_EvenNumbers":
        return self

    def uniform(self, *shape: int) -> Tensor:
        return self.points[:, :1] if shape == (1,) else self.points[:, 1:]


class _LogitsDenoiser:
    """Logits [B, L, V] that stand for a model."""

    is_time_conditioned = False

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        return self._logits

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def closed_form_loss(
    model: Denoiser, kernel: ForwardKernel, batch: TokenBatch, x_t: Tensor, t: Tensor
) -> LossOutput:
    """The loss of the objective that belongs to a kernel, at given noise."""
    least_time = 1e-15  # what an objective leaves out next to t = 0
    if isinstance(kernel, AbsorbingKernel):
        return MDLM(kernel=kernel, min_time=least_time).loss_at(model, batch, x_t, t)
    objective = TokenNoiseDiffusion(kernel=kernel, min_time=least_time)
    return objective.loss_at(model, batch, x_t, t, torch.ones_like(t))


def loss_distance(ours: Tensor, expected: Tensor, parameters: list[Tensor]) -> float:
    """The largest difference of the two values and of their gradients, each relative to its
    largest.
    """
    gradients = [
        torch.autograd.grad(x, parameters, materialize_grads=True) for x in (ours, expected)
    ]
    of_value = _distance(ours, expected.detach()) / float(expected.detach().abs())
    scale = max(float(gradient.abs().max()) for gradient in gradients[1])
    return max(of_value, *(_distance(a, b) / scale for a, b in zip(*gradients, strict=True)))


def _distance(ours: Tensor, expected: Any) -> float:
    return float((ours.detach() - torch.as_tensor(expected)).abs().max())


def _scalar(t: float) -> Tensor:
    return torch.tensor([t], dtype=torch.float64)


def _beliefs(x_t: Tensor) -> Tensor:
    return torch.from_numpy(BELIEF).expand(1, len(x_t), VOCAB_SIZE)
