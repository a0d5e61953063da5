"""The reported bound: against all orders, and against the entropy of an enumerated language."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.builders import PairDenoiser, TableDenoiser
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel, ForwardKernel, HybridKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import Cosine, Linear, LogLinear
from tokendiff.errors import InputError
from tokendiff.evaluation.bound import row_bounds, summarize
from tokendiff.objectives.mdlm import MDLM
from tokendiff.objectives.token_noise import TokenNoiseDiffusion
from tokendiff.verification.oracles import (
    conditional,
    entropy,
    least_bound,
    order_mean_nll,
    toy_language,
)

V, L, MASK = 4, 3, 2
UNIFORM = UniformKernel(schedule=Cosine(), vocab_size=V, mask_token_id=MASK)


def rows_of(table: np.ndarray) -> torch.Tensor:
    """Every row that the language has."""
    return torch.tensor([r for r in itertools.product(*map(range, table.shape)) if table[r] > 0])


def whole(tokens: torch.Tensor) -> TokenBatch:
    return TokenBatch(tokens=tokens, is_valid=torch.ones_like(tokens, dtype=torch.bool))


def test_bound_is_the_mean_over_all_orders() -> None:
    """With the model off the truth too: the oracle scores the model's table, not the language's."""
    length = 4
    model_table = toy_language(V, length, MASK, seed=5)
    model = TableDenoiser(torch.tensor(model_table), MASK)
    rows = rows_of(model_table)[::9]
    copies = 600
    tokens = rows.repeat_interleave(copies, 0)
    nats, num_tokens = row_bounds(
        model,
        whole(tokens),
        RowGenerator.for_rows(0, torch.arange(len(tokens))),
        kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK),
        num_mask_samples=length,
    )
    assert set(num_tokens.tolist()) == {length}
    estimates = nats.view(len(rows), copies)
    for row, drawn in zip(rows.tolist(), estimates, strict=True):
        expected = order_mean_nll(model_table, tuple(row))
        error = float(drawn.std()) / copies**0.5
        assert abs(float(drawn.mean()) - expected) < 4 * error + 1e-9


def test_bound_of_padded_rows_counts_valid_tokens_alone() -> None:
    table = toy_language(V, 3, MASK, seed=6)
    model = TableDenoiser(torch.tensor(table), MASK)
    tokens = torch.tensor([[0, 1, 0]])
    is_valid = torch.tensor([[True, False, False]])
    nats, num_tokens = row_bounds(
        model,
        # The toy model has no attention mask to leave padding out with.
        TokenBatch(tokens=tokens.where(is_valid, MASK), is_valid=is_valid),
        RowGenerator.for_rows(0, torch.arange(1)),
        kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK),
        num_mask_samples=3,
    )
    assert num_tokens.tolist() == [1]
    assert float(nats[0]) == pytest.approx(-math.log(conditional(table, {}, 0, 0)), rel=1e-6)


KERNELS: dict[str, ForwardKernel] = {
    "uniform": UniformKernel(schedule=LogLinear(), vocab_size=V, mask_token_id=MASK),
    # Ends far from 0 and 1: leaving one of their terms out shows.
    "uniform-linear": UniformKernel(schedule=Linear(eps=0.3), vocab_size=V, mask_token_id=MASK),
    "uniform-with-mask": UniformKernel(
        schedule=Cosine(), vocab_size=V, mask_token_id=MASK, exclude_mask=False
    ),
    "hybrid": HybridKernel(vocab_size=V, mask_token_id=MASK, p_uniform=0.2, gamma=1.0),
}


UNIFORM_LINEAR = {
    "forward_process": "uniform",
    "alpha_schedule": "linear",
    "eps": 0.3,
    "exclude_mask_from_uniform": True,
    "vocab_size": V,
    "mask_token_id": MASK,
}


@pytest.mark.parametrize("prediction", ["loo", "posterior"])
@pytest.mark.parametrize("name", KERNELS)
def test_bound_of_the_exact_denoiser_is_the_entropy(name: str, prediction: str) -> None:
    """Of any noise, whichever way the model states its belief; and the wrong way shows. Beyond the
    entropy there is what the two ends cost, which is nothing where alpha goes from 1 to 0.
    """
    kernel, table = KERNELS[name], toy_language(V, 2, MASK, seed=1, concentration=2.0)
    exact = least_bound(table, UNIFORM_LINEAR) if name == "uniform-linear" else entropy(table)
    rows = rows_of(table)
    p = torch.tensor([table[tuple(row)] for row in rows.tolist()])

    def estimate(told: str) -> tuple[float, float]:
        """Every row of the language, weighted; its noise is drawn. (mean, standard error)."""
        copies = 2000
        tokens = rows.repeat_interleave(copies, 0)
        nats, num_tokens = row_bounds(
            PairDenoiser(table, kernel, prediction=prediction),
            whole(tokens),
            RowGenerator.for_rows(0, torch.arange(len(tokens))),
            kernel=kernel,
            prediction=told,
            num_mask_samples=8,
        )
        assert set(num_tokens.tolist()) == {2}
        drawn = nats.view(len(rows), copies)
        variance = (p**2 * drawn.var(1) / copies).sum()
        return float((p * drawn.mean(1)).sum()), float(variance.sqrt())

    mean, error = estimate(prediction)
    assert error < 0.02 * entropy(table)
    assert -4 * error < mean - exact < 4 * error + 0.001 * entropy(table)
    wrong, wrong_error = estimate("loo" if prediction == "posterior" else "posterior")
    assert wrong > exact + 4 * wrong_error


def test_a_time_conditioned_model_sees_the_time_of_its_noise() -> None:
    """l masked of n: 1 - alpha is distributed as Beta(l, n - l + 1)."""
    seen: list[tuple[int, float]] = []

    class Spy(TableDenoiser):
        is_time_conditioned = True

        def encode(
            self,
            tokens: torch.Tensor,
            is_valid: torch.Tensor,
            time: torch.Tensor,
            document: torch.Tensor | None = None,
        ) -> torch.Tensor:
            seen.extend(zip((tokens == MASK).sum(1).tolist(), time.tolist(), strict=True))
            return super().encode(tokens, is_valid, time)

    length, schedule = 6, Cosine()
    model = Spy(torch.tensor(np.full((V,) * length, 1.0)), MASK)
    tokens = torch.zeros(3000, length, dtype=torch.int64)
    row_bounds(
        model,
        whole(tokens),
        RowGenerator.for_rows(0, torch.arange(3000)),
        kernel=AbsorbingKernel(schedule=schedule, mask_token_id=MASK),
        num_mask_samples=1,
    )
    for masked in (1, 3, length):
        times = torch.tensor([t for count, t in seen if count == masked], dtype=torch.float64)
        shares = 1.0 - schedule.alpha(times)
        mean = masked / (length + 1)
        deviation = math.sqrt(mean * (1 - mean) / (length + 2))
        assert abs(float(shares.mean()) - mean) < 4 * deviation / len(times) ** 0.5
        assert float(shares.std()) == pytest.approx(deviation, rel=0.15)


def test_summary_has_the_standard_error_of_a_ratio() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 100, size=400)
    true = []
    for _ in range(300):
        nats = tokens * 2.0 + rng.normal(size=400) * 30
        true.append(nats.sum() / tokens.sum())
    bound = summarize(nats, tokens, tokens * 3)
    assert bound.standard_error == pytest.approx(np.std(true), rel=0.15)
    assert bound.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / (tokens * 3).sum())
    assert bound.perplexity == pytest.approx(math.exp(bound.nats_per_token))


def test_the_standard_error_of_few_rows_counts_that_they_are_few() -> None:
    one = np.ones(2, dtype=np.int64)
    assert summarize(np.array([1.0, 3.0]), one, one).standard_error == pytest.approx(1.0)
    # Of a prompt's continuation no bytes are known, and no float holds exp(9000).
    far = summarize(np.array([8e3, 1e4]), one, 0 * one)
    assert (far.bits_per_byte, far.perplexity) == (None, math.exp(700.0))


@pytest.mark.parametrize("name", ["absorbing", "uniform", "hybrid"])
def test_a_mask_that_stands_in_the_text_is_given(name: str) -> None:
    """It has no likelihood: counted, it would make the bound infinite."""
    absorbing = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
    kernel = {**KERNELS, "absorbing": absorbing}[name]
    tokens = torch.tensor([[0, MASK, 1], [3, 1, MASK]])
    is_target = tokens != MASK

    class Flat:
        is_time_conditioned = False

        def encode(self, x_t: torch.Tensor, *_: object) -> torch.Tensor:
            assert bool((x_t == MASK)[~is_target].all())
            return torch.zeros(*x_t.shape, V, dtype=torch.float64)

        def head(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    batch, generator = whole(tokens), RowGenerator.for_rows(0, torch.arange(2))
    nats, counts = row_bounds(Flat(), batch, generator, kernel=kernel, num_mask_samples=2)
    assert counts.tolist() == [2, 2]
    given = replace(batch, is_target=is_target)
    expected, _ = row_bounds(Flat(), given, generator, kernel=kernel, num_mask_samples=2)
    assert bool(torch.isfinite(nats).all())
    assert torch.equal(nats, expected)


def test_rows_without_a_token_to_judge_are_bad_input() -> None:
    nothing = np.zeros(2, dtype=np.int64)
    with pytest.raises(InputError, match="none of the 2 rows has a token to judge"):
        summarize(np.zeros(2), nothing, nothing)


def test_a_token_that_no_state_stands_before_is_given() -> None:
    """Of two tokens that leaves one target, whose bound is its exact likelihood."""
    table = toy_language(V, 2, MASK, seed=6)
    model, tokens = TableDenoiser(torch.tensor(table), MASK), rows_of(table)
    kernel = AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK)
    generator = RowGenerator.for_rows(0, torch.arange(len(tokens)))
    expected = [-math.log(conditional(table, {0: a}, 1, b)) for a, b in tokens.tolist()]
    nats, counts = row_bounds(
        model, whole(tokens), generator, kernel=kernel, predicts_next=True, num_mask_samples=1
    )
    assert counts.tolist() == [1] * len(tokens)
    np.testing.assert_allclose(nats, expected)
    batch = whole(tokens)
    mdlm = MDLM(kernel=kernel, predicts_next=True)
    t = torch.full((len(tokens),), 0.3, dtype=torch.float64)
    x_t = tokens.clone()
    x_t[:, 1] = MASK
    output = mdlm.loss_at(model, batch, x_t, t)
    weight = (1.0 - mdlm.min_time) * kernel.masked_loss_weight(t)
    np.testing.assert_allclose(output.loss_sum, (weight * torch.tensor(expected)).sum())
    for objective in (mdlm, TokenNoiseDiffusion(kernel=UNIFORM, predicts_next=True)):
        assert int(objective.loss(model, batch, generator).num_tokens) == len(tokens)


def test_isolated_documents_each_begin_with_a_token_that_is_given() -> None:
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    lengths, is_start = torch.tensor([6, 5]), torch.zeros(2, 6, dtype=torch.bool)
    is_start[:, 0] = is_start[0, 2] = is_start[1, 4] = True
    for isolates, expected in (
        (True, [[0, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0]]),
        (False, [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]]),
    ):
        batch = TokenBatch.of_rows(tokens, lengths, is_start, isolates_documents=isolates)
        assert batch.without_first_tokens().is_target.long().tolist() == expected
