"""Schedules, absorbing kernel, MDLM objective, bound and sampler, against brute force."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.builders import TableDenoiser
from tests.oracles import (
    chi_square,
    conditional,
    entropy,
    order_mean_nll,
    total_variation,
    toy_language,
)
from tokendiff.evaluation.bound import row_bounds, summarize
from tokendiff.interfaces import TokenBatch
from tokendiff.kernels import AbsorbingKernel
from tokendiff.objectives.chunked import token_losses
from tokendiff.objectives.mdlm import MDLM
from tokendiff.random import RowGenerator, key_from, strata_of
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.categorical import draw, filtered_probabilities
from tokendiff.schedules import Cosine, Geometric, Linear, LogLinear, NoiseSchedule, make_schedule

V, L, MASK = 4, 3, 2
SCHEDULES: list[NoiseSchedule] = [LogLinear(), Linear(), Cosine(), Geometric()]


def rows_of(table: np.ndarray) -> torch.Tensor:
    """Every row that the language has."""
    return torch.tensor([r for r in itertools.product(*map(range, table.shape)) if table[r] > 0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_alpha_prime_is_the_derivative_and_the_ends_are_right(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.alpha_prime(t), derivative, rtol=1e-10, atol=1e-12)
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert 1.0 - 2e-3 <= float(ends[0]) <= 1.0
    assert 0.0 < float(ends[1]) <= 2e-3
    assert bool((schedule.alpha(t).diff() < 0).all())


def test_bad_parameters_are_refused() -> None:
    for make in (
        lambda: LogLinear(eps=0.0),
        lambda: Cosine(eps=0.5),
        lambda: Geometric(sigma_min=2.0, sigma_max=1.0),
        lambda: make_schedule("sigmoid", eps=0.1, sigma_min=0.1, sigma_max=1.0),
        lambda: AbsorbingKernel(schedule=LogLinear(), mask_token_id=-1),
        lambda: MDLM(kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=0), min_time=0.0),
        lambda: AncestralSampler(
            kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=0), num_inference_steps=0
        ),
    ):
        with pytest.raises(ValueError, match=r"must|need"):
            make()


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=lambda s: type(s).__name__)
def test_corrupt_masks_with_probability_one_minus_alpha(schedule: NoiseSchedule) -> None:
    kernel = AbsorbingKernel(schedule=schedule, mask_token_id=MASK)
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    x_0 = torch.tensor([[0, 1, 3, 0]]).expand(3, 4)
    is_noisable = torch.tensor([[True, True, True, False]]).expand(3, 4)
    counts, draws = torch.zeros(3), 4000
    for index in range(draws):
        uniform = RowGenerator.for_rows(index, torch.arange(3)).uniform(4)
        x_t = kernel.corrupt(x_0, times, uniform=uniform, is_noisable=is_noisable)
        assert bool((x_t[:, 3] == 0).all())
        assert bool(((x_t == x_0) | (x_t == MASK)).all())
        counts += (x_t[:, :3] == MASK).sum(1)
    masked = 1.0 - schedule.alpha(times)
    for observed, share in zip(counts.tolist(), masked.tolist(), strict=True):
        n = 3 * draws
        statistic = chi_square(
            np.array([observed, n - observed]), np.array([n * share, n * (1 - share)])
        )
        assert statistic < 10.8  # the 0.1 % point with one degree of freedom


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_reveal_probability_is_bayes_rule(schedule: NoiseSchedule) -> None:
    kernel = AbsorbingKernel(schedule=schedule, mask_token_id=MASK)
    s = torch.tensor([0.2, 0.05], dtype=torch.float64)
    t = torch.tensor([0.7, 0.1], dtype=torch.float64)
    alpha_s, alpha_t = schedule.alpha(s), schedule.alpha(t)
    # p(clean at s | masked at t): clean at s, then masked between s and t.
    joint = alpha_s * (1.0 - alpha_t / alpha_s)
    torch.testing.assert_close(kernel.reveal_probability(s, t), joint / (1.0 - alpha_t))
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(kernel.reveal_probability(zero, zero + 0.3)) == 1.0
    with pytest.raises(ValueError, match="s < t"):
        kernel.reveal_probability(t, s)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_mdlm_loss_of_the_exact_denoiser_integrates_to_the_entropy(schedule: NoiseSchedule) -> None:
    """Summed over rows, noise and a fine time grid, nothing drawn."""
    table = toy_language(V, L, MASK, seed=1)
    rows = rows_of(table)
    probability = torch.tensor([table[tuple(row)] for row in rows.tolist()])
    model = TableDenoiser(torch.tensor(table), MASK)
    objective = MDLM(kernel=AbsorbingKernel(schedule=schedule, mask_token_id=MASK), min_time=1e-4)
    # Midpoints in u, t = min + (1 - min) u^4, crowd towards t = 0, where the weight is large.
    u = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    times, jacobian = 1e-4 + (1 - 1e-4) * u**4, 4 * u**3
    total = 0.0
    for pattern in itertools.product([False, True], repeat=L):
        is_masked = torch.tensor(pattern)
        if not any(pattern):
            continue
        x_t = rows.masked_fill(is_masked, MASK)
        for row, noisy, p in zip(rows, x_t, probability, strict=True):
            batch = TokenBatch(tokens=row[None], is_valid=torch.ones(1, L, dtype=torch.bool))
            at_one_time = (
                objective.loss_at(
                    model, batch, noisy[None], torch.tensor([0.5], dtype=torch.float64)
                ).loss_sum.double()
                / objective.kernel.loss_weight(torch.tensor([0.5])).double()
            )
            alpha = schedule.alpha(times)
            noise = (1 - alpha) ** sum(pattern) * alpha ** (L - sum(pattern))
            weight = objective.kernel.loss_weight(times)
            total += float(p * at_one_time * (noise * weight * jacobian).mean())
    # What is missing: the reconstruction below min_time and the prior at alpha_1 > 0, both small.
    assert total == pytest.approx(entropy(table), rel=6e-3)


def test_mdlm_loss_is_an_unbiased_draw_of_its_integral() -> None:
    table = toy_language(V, L, MASK, seed=2)
    rows = rows_of(table)
    weights = torch.tensor([table[tuple(row)] for row in rows.tolist()])
    model = TableDenoiser(torch.tensor(table), MASK)
    objective = MDLM(kernel=AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK))
    drawn = torch.multinomial(weights, 4096, True, generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens=rows[drawn], is_valid=torch.ones(4096, L, dtype=torch.bool))
    ids = torch.arange(4096)
    generator = RowGenerator.for_rows(key_from(0), ids, strata=strata_of(key_from(1), ids, 4096))
    output = objective.loss(model, batch, generator)
    assert float(output.loss_sum / 4096) == pytest.approx(entropy(table), rel=0.05)
    assert int(output.num_tokens) == 4096 * L


class LinearDenoiser(torch.nn.Module):
    """An embedding and a linear head: enough of a model to take gradients through."""

    def __init__(self, vocab_size: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.linear = torch.nn.Linear(width, vocab_size)

    def encode(self, tokens: torch.Tensor, is_valid: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens) + self.embedding(tokens).mean(1, keepdim=True)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


def dense_loss(
    model: LinearDenoiser, objective: MDLM, batch: TokenBatch, x_t: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """The published way: logits at every position, then masked out, one row at a time."""
    logits = model.head(model.encode(x_t, batch.is_valid)).clone()
    logits[..., MASK] = -torch.inf
    total = torch.zeros(())
    for row in range(len(x_t)):
        weight = float(objective.kernel.loss_weight(t[row])) * (1 - objective.min_time)
        entropies = []
        for position in range(x_t.shape[1]):
            if not batch.is_valid[row, position] or x_t[row, position] != MASK:
                continue
            target = batch.tokens[row, position]
            total = total + weight * functional.cross_entropy(logits[row, position], target)
            p = (logits[row, position] / objective.conf_temperature).softmax(-1)
            if logits[row, position].argmax() == target:
                entropies.append(-(p[p > 0] * p[p > 0].log()).sum())
        if entropies and objective.lambda_conf:
            row_tokens = int(batch.is_valid[row].sum())
            total = total + objective.lambda_conf * row_tokens * torch.stack(entropies).mean()
    return total


@pytest.mark.parametrize("lambda_conf", [0.0, 2.0])
def test_masked_only_loss_equals_the_dense_one_with_gradients(lambda_conf: float) -> None:
    torch.manual_seed(0)
    model = LinearDenoiser(V)
    objective = MDLM(
        kernel=AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK),
        lambda_conf=lambda_conf,
        conf_temperature=0.5,
    )
    tokens = torch.tensor([0, 1, 3])[torch.randint(0, 3, (6, 10))]
    is_valid = torch.arange(10) < torch.tensor([10, 10, 7, 10, 3, 10])[:, None]
    t = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    uniform = RowGenerator.for_rows(4, torch.arange(6)).uniform(10)
    x_t = objective.kernel.corrupt(tokens, t, uniform=uniform, is_noisable=is_valid)
    batch = TokenBatch(tokens=tokens, is_valid=is_valid)
    expected = dense_loss(model, objective, batch, x_t, t)
    expected_grad = torch.autograd.grad(expected, list(model.parameters()))
    output = objective.loss_at(model, batch, x_t, t)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(output.loss_sum, list(model.parameters())), expected_grad, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_chunks_change_nothing() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden, targets = torch.randn(37, 8, requires_grad=True), torch.randint(1, 50, (37,))
    results = []
    for chunk_tokens in (37, 5):
        losses = token_losses(
            head,
            hidden,
            targets,
            mask_token_id=0,
            entropy_temperature=0.7,
            chunk_tokens=chunk_tokens,
        )
        assert losses.entropy is not None
        loss = losses.nll.sum() + losses.entropy.sum()
        results.append((losses, torch.autograd.grad(loss, [hidden, *head.parameters()])))
    (whole, whole_grad), (parts, parts_grad) = results
    torch.testing.assert_close(whole.nll, parts.nll)
    torch.testing.assert_close(whole.entropy, parts.entropy)
    assert torch.equal(whole.is_correct, parts.is_correct)
    for a, b in zip(whole_grad, parts_grad, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_padding_prompt_and_literal_masks_are_never_noised_or_counted() -> None:
    model = TableDenoiser(torch.tensor(toy_language(V, 5, MASK, seed=3)), MASK)
    objective = MDLM(kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK))
    tokens = torch.tensor([[0, 1, 3, MASK, 0]])
    is_valid = torch.tensor([[True, True, True, True, False]])
    batch = TokenBatch(tokens=tokens, is_valid=is_valid)
    output = objective.loss(
        model, batch, RowGenerator.for_rows(0, torch.arange(1), strata=torch.tensor([0.999]))
    )
    assert int(output.num_tokens) == 3
    assert int(output.metrics["masked_nll"][1]) <= 3
    assert math.isfinite(float(output.loss_sum))


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
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        RowGenerator.for_rows(0, torch.arange(len(tokens))),
        mask_token_id=MASK,
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
        tokens.where(
            is_valid, MASK
        ),  # the toy model has no attention mask to leave padding out with
        is_valid,
        RowGenerator.for_rows(0, torch.arange(1)),
        mask_token_id=MASK,
        num_mask_samples=3,
    )
    assert num_tokens.tolist() == [1]
    assert float(nats[0]) == pytest.approx(-math.log(conditional(table, {}, 0, 0)), rel=1e-6)


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


@pytest.mark.parametrize(("schedule", "steps"), [(LogLinear(), 64), (Cosine(), 64)])
def test_sampler_draws_the_language(schedule: NoiseSchedule, steps: int) -> None:
    table = toy_language(V, L, MASK, seed=7)
    model = TableDenoiser(torch.tensor(table), MASK)
    kernel = AbsorbingKernel(schedule=schedule, mask_token_id=MASK)
    sampler = AncestralSampler(kernel=kernel, num_inference_steps=steps)
    count = 6000
    nothing = torch.zeros(count, L, dtype=torch.int64)
    samples = sampler.sample(
        model, nothing, nothing.bool(), RowGenerator.for_rows(key_from(1), torch.arange(count))
    )
    drawn = Counter(map(tuple, samples.tokens.tolist()))
    # 27 outcomes: 6000 exact draws are expected about 0.02 away; two tokens revealed in one step of
    # 64 are drawn independently, which adds less than 0.01.
    assert total_variation(drawn, table) < 0.045
    assert not bool((samples.tokens == MASK).any())
    assert model.num_encoded_rows == int(samples.num_model_calls.sum()) <= count * L


def test_given_positions_stay_and_condition_the_rest() -> None:
    table = toy_language(V, L, MASK, seed=8)
    model = TableDenoiser(torch.tensor(table), MASK)
    kernel = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
    count = 4000
    tokens = torch.tensor([[9, 3, 9]]).repeat(count, 1)
    is_given = torch.tensor([[False, True, False]]).repeat(count, 1)
    before = tokens.clone()
    samples = AncestralSampler(kernel=kernel, num_inference_steps=64).sample(
        model, tokens, is_given, RowGenerator.for_rows(key_from(2), torch.arange(count))
    )
    assert torch.equal(tokens, before)
    assert bool((samples.tokens[:, 1] == 3).all())
    for value in (0, 1, 3):
        expected = conditional(table, {1: 3}, 0, value)
        share = float((samples.tokens[:, 0] == value).double().mean())
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count) + 0.01


def test_a_sample_depends_on_its_row_alone_and_calls_only_where_something_changes() -> None:
    table = toy_language(V, L, MASK, seed=9)
    model = TableDenoiser(torch.tensor(table), MASK)
    kernel = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
    sampler = AncestralSampler(kernel=kernel, num_inference_steps=500)
    nothing = torch.zeros(32, L, dtype=torch.int64)
    whole = sampler.sample(
        model, nothing, nothing.bool(), RowGenerator.for_rows(0, torch.arange(32))
    )
    for row in (0, 13, 31):
        alone = sampler.sample(
            model, nothing[:1], nothing[:1].bool(), RowGenerator.for_rows(0, torch.tensor([row]))
        )
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        assert int(alone.num_model_calls[0]) == int(whole.num_model_calls[row]) <= L
    all_given = sampler.sample(
        model, nothing, torch.ones_like(nothing).bool(), RowGenerator.for_rows(0, torch.arange(32))
    )
    assert int(all_given.num_model_calls.sum()) == 0


def test_every_step_is_reported_once_and_time_falls_to_zero() -> None:
    model = TableDenoiser(torch.tensor(toy_language(V, L, MASK, seed=9)), MASK)
    kernel = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
    frames: list[tuple[float, int]] = []
    nothing = torch.zeros(1, L, dtype=torch.int64)
    AncestralSampler(kernel=kernel, num_inference_steps=10).sample(
        model,
        nothing,
        nothing.bool(),
        RowGenerator.for_rows(0, torch.arange(1)),
        on_step=lambda t, x_t: frames.append((t, int((x_t == MASK).sum()))),
    )
    assert [t for t, _ in frames] == pytest.approx([1 - k / 10 for k in range(11)])
    assert frames[0][1] == L
    assert frames[-1][1] == 0


def test_a_model_that_loves_the_mask_still_never_returns_it() -> None:
    class MaskLover:
        def encode(self, tokens: torch.Tensor, is_valid: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, V)

        def head(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = hidden.clone()
            logits[:, MASK] = 1e4
            return logits

    kernel = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
    nothing = torch.zeros(8, 20, dtype=torch.int64)
    for temperature in (0.0, 1.0):
        sampler = AncestralSampler(kernel=kernel, num_inference_steps=4, temperature=temperature)
        samples = sampler.sample(
            MaskLover(), nothing, nothing.bool(), RowGenerator.for_rows(0, torch.arange(8))
        )
        assert not bool((samples.tokens == MASK).any())


def test_filters_against_a_sort_in_plain_python() -> None:
    torch.manual_seed(1)
    logits = torch.randn(20, 11)
    kept = logits.clone()
    for top_k, top_p in ((None, None), (3, None), (None, 0.6), (5, 0.5), (100, 1.0)):
        filtered = filtered_probabilities(logits, temperature=0.7, top_k=top_k, top_p=top_p)
        for row in range(20):
            weights = [math.exp(float(value) / 0.7) for value in logits[row]]
            order = sorted(range(11), key=lambda v: -weights[v])[: top_k or 11]
            total, chosen, reached = sum(weights[v] for v in order), [], 0.0
            for value in order:
                if reached >= (top_p or 1.0):
                    break
                chosen.append(value)
                reached += weights[value] / total
            norm = sum(weights[v] for v in chosen)
            expected = [weights[v] / norm if v in chosen else 0.0 for v in range(11)]
            assert filtered[row].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(logits, kept)


def test_draw_inverts_the_distribution_and_reaches_the_tail() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.5 - 1e-12, 1e-12, 0.0], dtype=torch.float64)
    uniform = torch.tensor(
        [1e-16, 0.25, 0.5 - 1e-9, 0.5 + 1e-9, 1 - 1e-10, 1 - 1e-13, 1 - 2.0**-53],
        dtype=torch.float64,
    )
    drawn = draw(p.expand(7, 6), uniform)
    assert drawn.tolist() == [1, 1, 1, 3, 3, 4, 4]
