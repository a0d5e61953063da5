"""Objectives against dense, general and enumerated computations of the same loss."""

import itertools
import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.builders import PairDenoiser, TableDenoiser
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel, ForwardKernel, HybridKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator, strata_of
from tokendiff.diffusion.schedules import Cosine, Geometric, Linear, LogLinear, NoiseSchedule
from tokendiff.diffusion.splitmix import key_from
from tokendiff.objectives import chunked
from tokendiff.objectives.chunked import (
    confidence_weights,
    is_likeliest,
    negative_log_likelihood,
    predict_through_head,
    reduce_through_head,
    tempered_entropy,
    without_mask,
)
from tokendiff.objectives.mdlm import MDLM
from tokendiff.objectives.token_noise import TokenNoiseDiffusion, nelbo_bracket
from tokendiff.verification.oracles import entropy, toy_language

V, L, MASK = 4, 3, 2
SCHEDULES: list[NoiseSchedule] = [LogLinear(), Linear(), Cosine(), Geometric()]
NOISY_KERNELS: dict[str, ForwardKernel] = {
    "uniform": UniformKernel(schedule=Cosine(), vocab_size=V, mask_token_id=MASK),
    "uniform-with-mask": UniformKernel(
        schedule=LogLinear(), vocab_size=V, mask_token_id=MASK, exclude_mask=False
    ),
    "hybrid": HybridKernel(vocab_size=V, mask_token_id=MASK, p_uniform=0.2, gamma=1.0),
    "hybrid-without-uniform": HybridKernel(vocab_size=V, mask_token_id=MASK, p_uniform=0.0),
}
noisy_kernels = pytest.mark.parametrize("kernel", NOISY_KERNELS.values(), ids=NOISY_KERNELS)


def rows_of(table: np.ndarray) -> torch.Tensor:
    """Every row that the language has."""
    return torch.tensor([r for r in itertools.product(*map(range, table.shape)) if table[r] > 0])


def test_bad_parameters_are_refused() -> None:
    absorbing = AbsorbingKernel(schedule=LogLinear(), mask_token_id=0)
    for make in (
        lambda: MDLM(kernel=absorbing, min_time=0.0),
        lambda: MDLM(kernel=absorbing, max_loss_weight=0.0),
        lambda: MDLM(kernel=absorbing, lambda_conf=-1.0),
        lambda: MDLM(kernel=absorbing, conf_temperature=0.0),
        lambda: TokenNoiseDiffusion(kernel=NOISY_KERNELS["hybrid"], loss_type="mse"),  # type: ignore[arg-type]
        lambda: TokenNoiseDiffusion(
            kernel=NOISY_KERNELS["hybrid"], loss_type="cross_entropy", max_loss_weight=1.0
        ),
    ):
        with pytest.raises(ValueError, match="must"):
            make()


@pytest.mark.parametrize("name", ["mdlm", *NOISY_KERNELS])
def test_padding_and_literal_masks_are_neither_noised_nor_counted(name: str) -> None:
    seen: list[torch.Tensor] = []

    class Spy(LinearDenoiser):
        def encode(
            self,
            tokens: torch.Tensor,
            is_valid: torch.Tensor,
            time: torch.Tensor,
            document: torch.Tensor | None = None,
        ) -> torch.Tensor:
            seen.append(tokens)
            return super().encode(tokens, is_valid, time)

    tokens = torch.zeros(64, 8, dtype=torch.int64)
    tokens[:, 2] = MASK
    is_valid = torch.arange(8).expand(64, -1) < 6
    objective = (
        MDLM(kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK))
        if name == "mdlm"
        else TokenNoiseDiffusion(kernel=NOISY_KERNELS[name])
    )
    batch = TokenBatch(tokens=tokens, is_valid=is_valid)
    output = objective.loss(Spy(V), batch, RowGenerator.for_rows(0, torch.arange(64)))
    assert int(output.num_tokens) == 64 * 5
    (x_t,) = seen
    is_target = is_valid & (tokens != MASK)
    assert torch.equal(x_t[~is_target], tokens[~is_target])
    assert bool((x_t != tokens)[is_target].any())


# MDLM


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
                / objective.kernel.masked_loss_weight(torch.tensor([0.5])).double()
            )
            alpha = schedule.alpha(times)
            noise = (1 - alpha) ** sum(pattern) * alpha ** (L - sum(pattern))
            weight = objective.kernel.masked_loss_weight(times)
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

    is_time_conditioned: bool = False

    def __init__(self, vocab_size: int, width: int = 8) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.linear = torch.nn.Linear(width, vocab_size)

    def encode(
        self,
        tokens: torch.Tensor,
        is_valid: torch.Tensor,
        time: torch.Tensor,
        document: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.embedding(tokens) + self.embedding(tokens).mean(1, keepdim=True)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.linear(hidden)


def dense_loss(
    model: LinearDenoiser, objective: MDLM, batch: TokenBatch, x_t: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """The published way: logits at every position, then masked out, one row at a time."""
    logits = model.head(model.encode(x_t, batch.is_valid, t)).clone()
    logits[..., MASK] = -torch.inf
    total = torch.zeros(())
    for row in range(len(x_t)):
        weight = float(objective.kernel.masked_loss_weight(t[row])) * (1 - objective.min_time)
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


# Noise that is other tokens


@noisy_kernels
def test_one_pass_bracket_is_the_general_formula_with_gradients(kernel: ForwardKernel) -> None:
    torch.manual_seed(0)
    count = 300
    x_0 = torch.tensor([0, 1, 3])[torch.randint(0, 3, (count,))]
    t = torch.rand(count, dtype=torch.float64) * 0.98 + 0.01
    uniform = torch.rand(count, 1, dtype=torch.float64)
    x_t = kernel.corrupt(
        x_0[:, None], t, uniform=uniform, is_noisable=torch.ones(count, 1, dtype=torch.bool)
    )[:, 0]
    logits = 3.0 * torch.randn(count, V, dtype=torch.float64)
    results = {}
    for dtype in (torch.float64, torch.float32):
        leaf = logits.to(dtype).requires_grad_()
        bracket = nelbo_bracket(kernel, without_mask(leaf, MASK), x_0, x_t, t)
        nats = kernel.loss_weight(x_0, x_t, t) * bracket
        results[dtype] = (nats.detach(), torch.autograd.grad(nats.sum(), leaf)[0])
    leaf = logits.requires_grad_()
    x_theta = without_mask(leaf, MASK).softmax(-1)[:, None]
    general = kernel.nelbo(x_theta, x_0[:, None], x_t[:, None], t)[:, 0]
    (gradient,) = torch.autograd.grad(general.sum(), leaf)
    torch.testing.assert_close(
        results[torch.float64], (general.detach(), gradient), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(
        results[torch.float32],
        (general.detach(), gradient.float()),
        rtol=1e-4,
        atol=1e-4,
        check_dtype=False,
    )


@noisy_kernels
def test_a_gradient_is_finite_however_sure_the_model_is_of_another_token(
    kernel: ForwardKernel,
) -> None:
    """Where all noise is masks, a token that is no mask counts nothing, however unlikely it is."""
    logits = torch.tensor([[0.0, 60.0, 0.0, 0.0]], requires_grad=True)
    x_0, t = torch.tensor([0]), torch.tensor([0.5], dtype=torch.float64)
    bracket = nelbo_bracket(kernel, without_mask(logits, MASK), x_0, x_0, t)
    (kernel.loss_weight(x_0, x_0, t) * bracket).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def noisy_batch(kernel: ForwardKernel) -> tuple[TokenBatch, torch.Tensor, torch.Tensor]:
    """Rows with padding and a literal mask, with times and noise."""
    torch.manual_seed(0)
    tokens = torch.tensor([0, 1, 3])[torch.randint(0, 3, (6, 10))]
    tokens[2, 4] = MASK
    is_valid = torch.arange(10) < torch.tensor([10, 10, 7, 10, 3, 10])[:, None]
    t = torch.linspace(0.2, 0.9, 6, dtype=torch.float64)
    uniform = RowGenerator.for_rows(4, torch.arange(6)).uniform(10)
    x_t = kernel.corrupt(tokens, t, uniform=uniform, is_noisable=is_valid & (tokens != MASK))
    return TokenBatch(tokens=tokens, is_valid=is_valid), x_t, t


@noisy_kernels
@pytest.mark.parametrize("loss_type", ["elbo", "cross_entropy"])
@pytest.mark.parametrize("lambda_conf", [0.0, 2.0])
def test_token_noise_loss_equals_the_dense_one_with_gradients(
    kernel: ForwardKernel, loss_type: Literal["elbo", "cross_entropy"], lambda_conf: float
) -> None:
    model = LinearDenoiser(V)
    objective = TokenNoiseDiffusion(
        kernel=kernel, loss_type=loss_type, lambda_conf=lambda_conf, conf_temperature=0.5
    )
    batch, x_t, t = noisy_batch(kernel)
    slope = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    output = objective.loss_at(model, batch, x_t, t, slope)

    logits = without_mask(model.head(model.encode(x_t, batch.is_valid, t)).double(), MASK)
    is_target = batch.is_valid & (batch.tokens != MASK)
    row_of = is_target.nonzero()[:, 0]
    x_0, z = batch.tokens[is_target], x_t[is_target]
    if loss_type == "elbo":
        x_theta = logits[is_target].softmax(-1)[:, None]
        nats = kernel.nelbo(x_theta, x_0[:, None], z[:, None], t[row_of])[:, 0] * slope[row_of]
    else:
        nats = -logits[is_target].log_softmax(-1).gather(-1, x_0[:, None])[:, 0]
    expected = nats.sum()
    for row in range(6):
        p = (logits[row][:, torch.arange(V) != MASK] / 0.5).softmax(-1)
        chosen = is_target[row] & (logits[row].argmax(-1) == batch.tokens[row])
        entropies = -(p * p.log()).sum(-1)[chosen]
        if lambda_conf and len(entropies):
            expected = expected + lambda_conf * is_target[row].sum() * entropies.mean()
    assert int(output.num_tokens) == int(is_target.sum()) == 49
    torch.testing.assert_close(output.loss_sum.double(), expected, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    theirs = torch.autograd.grad(expected, parameters)
    for ours, dense in zip(torch.autograd.grad(output.loss_sum, parameters), theirs, strict=True):
        torch.testing.assert_close(ours, dense, rtol=1e-4, atol=1e-5)


@noisy_kernels
def test_token_noise_loss_is_an_unbiased_draw_of_the_entropy(kernel: ForwardKernel) -> None:
    """The exact leave-one-out denoiser: the mean loss is the bound's integral, within its error."""
    table = toy_language(V, 2, MASK, seed=2, concentration=2.0)
    rows = rows_of(table)
    weights = torch.tensor([table[tuple(row)] for row in rows.tolist()])
    model, objective = PairDenoiser(table, kernel), TokenNoiseDiffusion(kernel=kernel)
    count, parts = 2000, []
    for part in range(60):
        ids = torch.arange(count) + part * count
        drawn = torch.multinomial(
            weights, count, True, generator=torch.Generator().manual_seed(part)
        )
        strata = strata_of(key_from(part), ids, count)
        generator = RowGenerator.for_rows(key_from(0), ids, strata=strata)
        batch = TokenBatch(tokens=rows[drawn], is_valid=torch.ones(count, 2, dtype=torch.bool))
        parts.append(float(objective.loss(model, batch, generator).loss_sum) / count)
    error = np.std(parts) / len(parts) ** 0.5
    # With alpha_1 = eps the prior term is left out of training: below 0.01 nats.
    assert error < 0.015 * entropy(table)
    assert abs(np.mean(parts) - entropy(table)) < 4 * error + 0.01


def test_the_posterior_minimises_cross_entropy_and_leave_one_out_the_bound() -> None:
    """A free table of logits per noisy token, fitted exactly: which belief each loss leads to."""
    kernel = NOISY_KERNELS["uniform"]
    prior = torch.tensor([0.6, 0.3, 0.0, 0.1], dtype=torch.float64)
    t = torch.tensor([0.5], dtype=torch.float64)
    q = kernel.marginal(torch.eye(V, dtype=torch.float64)[None], t)[0]
    z = torch.tensor([0, 1, 3])
    pairs = [(x, int(y)) for x in (0, 1, 3) for y in z]
    x_0, x_t = (torch.tensor(column) for column in zip(*pairs, strict=True))
    weight = prior[x_0] * q[x_0, x_t]
    fitted = {}
    for name in ("elbo", "cross_entropy"):
        logits = torch.zeros(V, V, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def closure(name: str = name, logits: torch.Tensor = logits) -> torch.Tensor:
            rows = without_mask(logits, MASK)[x_t]
            if name == "elbo":
                times = t.expand(len(pairs))
                loss = kernel.loss_weight(x_0, x_t, times) * nelbo_bracket(
                    kernel, rows, x_0, x_t, times
                )
            else:
                loss = negative_log_likelihood(rows, x_0)
            total = (weight * loss).sum()
            logits.grad = torch.autograd.grad(total, logits)[0]
            return total

        optimizer.step(closure)
        fitted[name] = without_mask(logits.detach(), MASK).softmax(-1)[z]
    # One position alone: without its own token nothing is known but the prior.
    torch.testing.assert_close(fitted["elbo"], prior.expand(3, V), rtol=1e-3, atol=1e-4)
    posterior = prior[:, None] * q
    posterior = (posterior / posterior.sum(0)).T[z]
    torch.testing.assert_close(fitted["cross_entropy"], posterior, rtol=1e-3, atol=1e-4)


def test_clipped_weights_change_the_loss_and_not_what_is_logged_as_the_bound() -> None:
    for kernel in (NOISY_KERNELS["uniform"], NOISY_KERNELS["hybrid"]):
        model = LinearDenoiser(V)
        batch, x_t, t = noisy_batch(kernel)
        slope = torch.full((6,), 3.0, dtype=torch.float64)
        plain, clipped = (
            TokenNoiseDiffusion(kernel=kernel, max_loss_weight=limit).loss_at(
                model, batch, x_t, t, slope
            )
            for limit in (None, 0.5)
        )
        is_target = batch.is_valid & (batch.tokens != MASK)
        x_0, z, times = batch.tokens[is_target], x_t[is_target], t[is_target.nonzero()[:, 0]]
        with torch.no_grad():
            logits = without_mask(model.head(model.encode(x_t, batch.is_valid, t)), MASK)[is_target]
        dense = kernel.nelbo(logits.softmax(-1)[:, None], x_0[:, None], z[:, None], times)[:, 0]
        weight = kernel.loss_weight(x_0, z, times)
        # The weight is clipped, not what it is multiplied with, nor the slope.
        expected = 3.0 * (dense * (weight.clamp(max=0.5) / weight)).sum()
        assert float(clipped.loss_sum) == pytest.approx(float(expected), rel=1e-5)
        assert float(clipped.loss_sum) < float(plain.loss_sum)
        assert float(clipped.metrics["elbo"][0]) == pytest.approx(float(plain.loss_sum), rel=1e-5)
        assert "elbo" not in plain.metrics
    mdlm = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
    batch, x_t, t = noisy_batch(mdlm)
    limits = (None, 1e9, 1.2)
    whole, same, less = (
        float(MDLM(kernel=mdlm, max_loss_weight=m).loss_at(model, batch, x_t, t).loss_sum)
        for m in limits
    )
    assert whole == same > less > 0.0
    halved = MDLM(kernel=mdlm, min_time=0.5, max_loss_weight=1.0)  # all weights, 1/t, are clipped
    output = halved.loss_at(model, batch, x_t, t)
    nats = float(output.metrics["masked_nll"][0])
    assert float(output.loss_sum) == pytest.approx(0.5 * nats, rel=1e-5)


# Through the head


class _FirstLogits(torch.nn.Linear):
    """A head with more logits than the vocabulary has ids."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden)[..., :50]


@pytest.mark.parametrize(
    "head",
    [
        torch.nn.Linear(8, 50),
        _FirstLogits(8, 56),
        # Its backward pass reads the logits, so their gradient must not take their place.
        torch.nn.Sequential(torch.nn.Linear(8, 50), torch.nn.Tanh()),
    ],
    ids=["linear", "padded", "tanh"],
)
def test_chunks_change_nothing(head: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(chunked, "_CPU_ELEMENTS", (20 * 50, 3 * 50))
    hidden, targets = torch.randn(37, 8, requires_grad=True), torch.randint(1, 50, (37,))

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = without_mask(logits, 0)
        nll = negative_log_likelihood(logits, targets)
        loss = nll.sum() + tempered_entropy(logits, 0.7).sum()
        return loss, nll.detach().sum()[None]

    logits = without_mask(head(hidden), 0)
    whole = (
        functional.cross_entropy(logits, targets, reduction="sum")
        + torch.distributions.Categorical(logits=logits[:, 1:] / 0.7).entropy().sum()
    )
    expected = torch.autograd.grad(whole, [hidden, *head.parameters()])
    for chunk_tokens in (None, 37, 5, 1):
        loss, metrics = reduce_through_head(
            head, hidden, (targets,), loss_of, chunk_tokens=chunk_tokens
        )
        torch.testing.assert_close(loss, whole.detach())
        assert float(metrics[0]) < float(loss)
        grads = torch.autograd.grad(3.0 * loss, [hidden, *head.parameters()])
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, 3.0 * theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(loss, hidden)
    with torch.no_grad():
        loss, _ = reduce_through_head(head, hidden, (targets,), loss_of)
    assert not loss.requires_grad
    predicted = predict_through_head(
        head, hidden, (targets,), lambda logits, targets: logits.argmax(-1), chunk_tokens=7
    )
    assert torch.equal(predicted, head(hidden).argmax(-1))


def test_in_bfloat16_the_head_is_trained_as_well() -> None:
    """Autocast keeps a weight's copy for the passes to come: one that was made where no gradient
    was asked for must not be used where one is.
    """
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 40)
    hidden, targets = torch.randn(30, 16, requires_grad=True), torch.randint(1, 40, (30,))
    row, row_tokens = torch.zeros_like(targets), torch.tensor([30])

    def loss_of(logits: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> Any:
        nll = negative_log_likelihood(without_mask(logits, 0), x)
        return ((1.0 + w.float()) * nll).sum(), torch.zeros(1)

    grads = []
    for is_bf16 in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            weight = confidence_weights(head, hidden, targets, row, row_tokens, mask_token_id=0)
            loss, _ = reduce_through_head(head, hidden, (targets, weight), loss_of)
        grads.append(torch.autograd.grad(loss, [hidden, *head.parameters()]))
    for exact, rounded in zip(*grads, strict=True):
        assert float((exact - rounded).norm()) < 0.05 * float(exact.norm())


def test_likeliest_is_the_only_argmax_and_logits_stay() -> None:
    torch.manual_seed(0)
    logits = torch.randint(0, 3, (500, 7)).float()
    kept, targets = logits.clone(), torch.randint(0, 7, (500,))
    expected = [
        all(row[target] > value for at, value in enumerate(row) if at != target)
        for row, target in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    assert is_likeliest(logits, targets).tolist() == expected
    assert 5 < sum(expected) < 100
    assert torch.equal(logits, kept)


def test_no_masked_token_still_reaches_every_weight_of_the_head() -> None:
    """Else DistributedDataParallel would wait for the gradient of a worker that has none."""
    head = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 5))
    hidden = torch.randn(0, 8, requires_grad=True)
    loss, _ = reduce_through_head(
        head,
        hidden,
        (torch.zeros(0, dtype=torch.int64),),
        lambda logits, x: (negative_log_likelihood(logits, x).sum(), torch.zeros(1)),
    )
    loss.backward()
    assert hidden.grad is not None
    assert all(p.grad is not None and bool((p.grad == 0).all()) for p in head.parameters())


def test_a_frozen_head_gets_no_gradient_and_the_states_do() -> None:
    head = torch.nn.Linear(8, 5).requires_grad_(False)
    hidden = torch.randn(4, 8, requires_grad=True)
    loss, _ = reduce_through_head(
        head,
        hidden,
        (torch.tensor([0, 1, 2, 3]),),
        lambda logits, x: (negative_log_likelihood(logits, x).sum(), torch.zeros(1)),
        chunk_tokens=3,
    )
    loss.backward()
    expected = torch.autograd.grad(
        functional.cross_entropy(head(hidden), torch.arange(4), reduction="sum"), hidden
    )[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert head.weight.grad is None
