"""Uniform noise block by block: an enumerated language, the dense bound of a tiny model."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.objectives.test_block_objectives import (
    CORPUS,
    EOS,
    MASK,
    V,
    empirical,
    entropy_nats,
    packed_batch,
    tiny_model,
    whole_rows,
)
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.attention_masks import MaskRule, dense
from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.diffusion.random import RowGenerator, strata_of
from tokendiff.diffusion.schedules import Cosine, LogLinear, NoiseSchedule
from tokendiff.evaluation.block_bound import block_row_bounds, sight_of
from tokendiff.objectives.autoregressive import Autoregressive
from tokendiff.objectives.block_diffusion import encode_noisy
from tokendiff.objectives.block_uniform import UniformBlockDiffusion
from tokendiff.objectives.blocks import block_rows


class NoisyTable:
    """The exact leave-one-out belief about each position of x_t, given what the rule lets it see of
    `[x_t ; x_0]` but itself, at a time that the test says.
    """

    def __init__(self, table: np.ndarray, kernel: UniformKernel) -> None:
        self.table, self.kernel = table, kernel
        self.alpha = 1.0
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def encode(self, tokens: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
        batch, both = tokens.shape
        seen = dense(rule, batch, both, both)[:, 0]
        states = torch.zeros(batch, both, self.table.shape[0], dtype=torch.float64)
        for row, query in itertools.product(range(batch), range(both // 2)):
            evidence = {
                (int(positions[row, key]), int(tokens[row, key]), bool(key < both // 2))
                for key in seen[row, query].nonzero()[:, 0].tolist()
                if key != query
            }
            known = (self.alpha, int(positions[row, query]), tuple(sorted(evidence)))
            if known not in self._known:
                self._known[known] = self._belief(*known[1:])
            states[row, query] = self._known[known]
        return states

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _belief(self, at: int, evidence: tuple[tuple[int, int, bool], ...]) -> Tensor:
        table, count = self.table, self.table.shape[0]
        for axis, token, is_noisy in evidence:
            likelihood = np.zeros(count)
            likelihood[token] = 1.0
            if is_noisy:
                likelihood = self.alpha * likelihood + (1.0 - self.alpha) / (count - 1)
            table = table * likelihood.reshape([-1 if a == axis else 1 for a in range(table.ndim)])
        belief = table.sum(axis=tuple(a for a in range(table.ndim) if a != at))
        with np.errstate(divide="ignore"):
            return torch.from_numpy(np.log(belief / belief.sum()))


def every_noise(corpus: Tensor, block_length: int) -> tuple[Tensor, Tensor]:
    """Clean and noisy rows: every row with every noise of its blocks, all blocks at once."""
    values = list(itertools.product((1, 2, 3), repeat=block_length))
    noise = torch.tensor(values).repeat(1, corpus.shape[1] // block_length)
    return corpus.repeat_interleave(len(noise), 0), noise.repeat(len(corpus), 1)


@pytest.mark.parametrize(
    ("schedule", "block_length"),
    [(LogLinear(eps=1e-9), 1), (LogLinear(eps=1e-9), 2), (Cosine(eps=1e-9), 2)],
)
def test_the_bound_of_an_exact_model_is_the_entropy(
    schedule: NoiseSchedule, block_length: int
) -> None:
    kernel = UniformKernel(schedule=schedule, vocab_size=4, mask_token_id=MASK)
    objective = UniformBlockDiffusion(
        kernel=kernel, block_length=block_length, eos_token_id=None, min_time=1e-9
    )
    model: Any = NoisyTable(empirical(CORPUS), kernel)
    x_0, x_t = every_noise(CORPUS, block_length)
    rows = block_rows(whole_rows(x_0), block_length=block_length, fill_token_id=None)
    nodes, shares = np.polynomial.legendre.leggauss(20)
    times, slopes = kernel.warped_time(torch.from_numpy(0.5 * (nodes + 1.0)), min_time=1e-9)
    total = 0.0
    for t, slope, share in zip(times, slopes, shares, strict=True):
        model.alpha = float(kernel.alpha(t))
        q = model.alpha * (x_t == x_0) + (1.0 - model.alpha) / 3
        chance = q.view(len(q), -1, block_length).prod(-1).repeat_interleave(block_length, 1)
        output = objective.loss_at(model, rows, x_t, t.expand(x_t.shape), slope * chance)
        total += 0.5 * share * float(output.loss_sum)
    assert total / len(CORPUS) == pytest.approx(entropy_nats(CORPUS), rel=1e-5)


def process(**changes: Any) -> NoiseProcess:
    fields: dict[str, Any] = {
        "forward_process": "uniform",
        "vocab_size": V,
        "mask_token_id": MASK,
        "max_length": 16,
        "block_length": 2,
        "attention_mask_mode": "4d",
    }
    return NoiseProcess(**{**fields, **changes})


def dense_bound(model: Any, row: Tensor, noise: NoiseProcess) -> float:
    """By the general formula over the whole vocabulary, for every noise of a row of two blocks."""
    kernel = noise.kernel()
    values = torch.tensor(list(itertools.product(range(1, V), repeat=2)))
    x_t, x_0 = values.repeat(1, 2), row.repeat(len(values), 1)
    rows = block_rows(whole_rows(x_0), block_length=2, fill_token_id=None)
    logits = model.head(encode_noisy(model, rows, x_t, sight=sight_of(noise))[0]).double()
    belief = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).softmax(-1)
    nodes, shares = np.polynomial.legendre.leggauss(30)
    times, slopes = kernel.warped_time(torch.from_numpy(0.5 * (nodes + 1.0)))
    total = 4 * kernel.prior_nats()
    for t, slope, share in zip(times, slopes, shares, strict=True):
        alpha, b = float(kernel.alpha(t)), float(1.0 - kernel.alpha(t)) / (V - 1)
        q = (alpha * (x_t == x_0) + b).view(len(values), 2, 2).prod(-1)
        nats = kernel.nelbo(belief, x_0, x_t, t.expand(len(values)))
        total += 0.5 * share * float(slope) * float((nats * q.repeat_interleave(2, 1)).sum())
    return total


@torch.no_grad()
def test_the_evaluated_bound_is_that_of_all_noise() -> None:
    model, row, noise = tiny_model(), torch.tensor([5, 3, 9, 2]), process()
    rows = row.repeat(1500, 1)
    generator = RowGenerator.for_rows(0, torch.arange(len(rows)))
    nats, num_tokens = block_row_bounds(
        model, whole_rows(rows), generator, process=noise, num_mask_samples=2
    )
    assert num_tokens.tolist() == [4] * len(rows)
    error = float(nats.std()) / len(rows) ** 0.5
    expected = dense_bound(model, row, noise)
    assert error < 0.03 * expected
    assert float(nats.mean()) == pytest.approx(expected, abs=3 * error)


@torch.no_grad()
def test_draws_of_the_loss_estimate_the_evaluated_bound() -> None:
    model, noise = tiny_model(), process(eps=1e-9)
    kernel = noise.kernel()
    assert isinstance(kernel, UniformKernel)
    row = torch.tensor([5, 3, 9, 2])
    count, losses = 1024, []
    for key in range(4):
        generator = RowGenerator.for_rows(
            key, torch.arange(count), strata=strata_of(key, torch.arange(count), count)
        )
        objective = UniformBlockDiffusion(
            kernel=kernel, block_length=2, eos_token_id=None, min_time=1e-9
        )
        output = objective.loss(model, whole_rows(row.repeat(count, 1)), generator)
        assert int(output.num_tokens) == 4 * count
        losses.append(float(output.loss_sum) / count)
    expected = dense_bound(model, row, noise)
    assert np.mean(losses) == pytest.approx(expected, abs=0.05 * expected)


@pytest.mark.parametrize("predicts_next", [False, True])
def test_the_next_token_loss_is_added_as_it_is_weighted(predicts_next: bool) -> None:
    batch, model = packed_batch(), tiny_model().double()
    generator = RowGenerator.for_rows(0, torch.arange(len(batch.tokens)))
    kernel = process().kernel()
    assert isinstance(kernel, UniformKernel)
    alone = Autoregressive().loss(model, batch, generator)
    found = []
    for ar, blocks in ((1.0, 1.0), (0.7, 0.3)):
        objective = UniformBlockDiffusion(
            kernel=kernel,
            block_length=4,
            eos_token_id=EOS,
            ar_loss_weight=ar,
            diffusion_loss_weight=blocks,
            predicts_next=predicts_next,
        )
        output = objective.loss(model, batch, generator)
        rest = (output.loss_sum - ar * alone.loss_sum) / blocks
        torch.testing.assert_close(rest.detach(), output.metrics["elbo"][0])
        torch.testing.assert_close(output.metrics["ar_nll"][0], alone.loss_sum.detach())
        found.append(rest)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"block_length": 0}, "block_length must be at least 1, got 0"),
        ({"ar_loss_weight": -1.0}, "got -1.0 and 1.0"),
        ({"diffusion_loss_weight": 0.0}, "got 0.0 and 0.0"),
        ({"min_time": 0.0}, "min_time"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], problem: str) -> None:
    kernel: Any = process().kernel()
    with pytest.raises(ValueError, match=problem):
        UniformBlockDiffusion(
            **{"kernel": kernel, "block_length": 4, "eos_token_id": None, **fields}
        )
