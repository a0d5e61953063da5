"""Samplers of every kernel against enumerated languages, dense steps and sums by hand."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.builders import ExactDenoiser, TableDenoiser
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.samplers import (
    AncestralConfig,
    BlockwiseConfig,
    FirstHittingConfig,
    RemaskingConfig,
)
from tokendiff.diffusion.interfaces import Samples
from tokendiff.diffusion.kernels import AbsorbingKernel, ForwardKernel, HybridKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import Cosine, LogLinear
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import InputError
from tokendiff.models.sampling import build_sampler
from tokendiff.samplers import categorical
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.base import Sampler
from tokendiff.samplers.blockwise import BlockwiseSampler
from tokendiff.samplers.categorical import draw, filter_logits, without_token
from tokendiff.samplers.first_hitting import FirstHittingSampler
from tokendiff.samplers.remasking import RemaskingSampler
from tokendiff.verification.oracles import chi_square, conditional, total_variation, toy_language

V, L, MASK = 4, 3, 2
ABSORBING = AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK)
UNIFORM = UniformKernel(schedule=Cosine(), vocab_size=V, mask_token_id=MASK)
UNIFORM_OVER_ALL = UniformKernel(
    schedule=LogLinear(), vocab_size=V, mask_token_id=MASK, exclude_mask=False
)
HYBRID = HybridKernel(vocab_size=V, mask_token_id=MASK, p_uniform=0.3, gamma=1.0)


def cosine(t: float) -> float:
    return (1 - 2e-3) * (1 - math.cos(math.pi / 2 * (1 - t))) + 1e-3


def absorbing_noising(t: float) -> np.ndarray:
    to_mask = np.zeros(V)
    to_mask[MASK] = 1.0
    return cosine(t) * np.eye(V) + (1 - cosine(t)) * to_mask


def uniform_noising(t: float) -> np.ndarray:
    others = np.array([1.0, 1.0, 0.0, 1.0]) / 3
    return cosine(t) * np.eye(V) + (1 - cosine(t)) * others


def uniform_over_all_noising(t: float) -> np.ndarray:
    alpha = 1 - (1 - 1e-3) * t
    return alpha * np.eye(V) + (1 - alpha) / 4


def hybrid_noising(t: float) -> np.ndarray:
    c = 2 * 0.3 / 0.7 * math.sqrt(t * (1 - t))
    noise = np.array([c / 3, c / 3, t, c / 3])
    return ((1 - t) * np.eye(V) + noise) / (1 + c)


KERNELS: dict[str, tuple[ForwardKernel, Callable[[float], np.ndarray]]] = {
    "absorbing": (ABSORBING, absorbing_noising),
    "uniform": (UNIFORM, uniform_noising),
    "uniform over all": (UNIFORM_OVER_ALL, uniform_over_all_noising),
    "hybrid": (HYBRID, hybrid_noising),
}


def sample_free(
    sampler: Sampler, model: Any, count: int, *, seed: int = 0, length: int = L, **kwargs: Any
) -> Samples:
    """Rows with nothing given."""
    nothing = torch.zeros(count, length, dtype=torch.int64)
    generator = RowGenerator.for_rows(key_from(seed), torch.arange(count))
    return sampler.sample(model, nothing, nothing.bool(), generator, **kwargs)


def distance(samples: Samples, table: np.ndarray) -> float:
    return total_variation(Counter(map(tuple, samples.tokens.tolist())), table)


class IndependentDenoiser:
    """The same belief at every position, whatever it is shown; mask and all."""

    def __init__(self, logits: list[float], *, is_time_conditioned: bool = False) -> None:
        self.logits = torch.tensor(logits)
        self.is_time_conditioned = is_time_conditioned

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        return self.logits.expand(*tokens.shape, -1)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


class MixingDenoiser:
    """Random weights through which every position depends on every other, and, where it is
    conditioned on it, on the time. Keeps what it was called with.
    """

    def __init__(
        self, *, size: int = 50, length: int = 12, is_time_conditioned: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(size, 8, generator=generator)
        self.mixing = torch.randn(length, length, generator=generator)
        self.output = 2.0 * torch.randn(8, size, generator=generator)
        self.is_time_conditioned = is_time_conditioned
        self.num_encoded_rows = self.num_head_positions = 0
        self.times: list[Tensor] = []

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        self.num_encoded_rows += len(tokens)
        self.times.append(time)
        return torch.tanh(self.mixing @ self.embedding[tokens])

    def head(self, hidden: Tensor) -> Tensor:
        self.num_head_positions += len(hidden)
        return hidden @ self.output


# The ancestral sampler draws the language.


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["loo", "posterior"])
@pytest.mark.parametrize("name", KERNELS)
def test_ancestral_samples_are_the_language(name: str, prediction: str) -> None:
    kernel, noising = KERNELS[name]
    table = toy_language(V, L, MASK, seed=7)
    model = ExactDenoiser(table, noising, prediction=prediction)
    # 27 outcomes: 6000 exact draws are expected about 0.02 away. Positions that change in the same
    # step do so independently, which adds less than 0.01; hybrid noise, of which the last step
    # removes a share like the root of its length, takes more of them for that.
    steps = 400 if name == "hybrid" else 96
    sampler = AncestralSampler(kernel=kernel, prediction=prediction, num_inference_steps=steps)
    assert distance(sample_free(sampler, model, 6000), table) < 0.04


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uniform", "uniform over all", "hybrid"])
def test_a_posterior_taken_for_leave_one_out_draws_something_else(name: str) -> None:
    kernel, noising = KERNELS[name]
    table = toy_language(V, L, MASK, seed=7)
    model = ExactDenoiser(table, noising, prediction="posterior")
    sampler = AncestralSampler(kernel=kernel, prediction="loo", num_inference_steps=96)
    assert distance(sample_free(sampler, model, 6000), table) > 0.08


@pytest.mark.parametrize("name", KERNELS)
def test_every_step_has_the_frequencies_of_the_dense_reverse_step(name: str) -> None:
    kernel, _ = KERNELS[name]
    logits = [0.3, 2.0, 3.0, -0.7]
    belief = torch.tensor(logits, dtype=torch.float64).index_fill(
        0, torch.tensor([MASK]), -torch.inf
    )
    x_theta = belief.softmax(0).expand(1, V, V)
    frames: list[tuple[float, Tensor]] = []
    sampler = AncestralSampler(kernel=kernel, num_inference_steps=3)
    sample_free(
        sampler,
        IndependentDenoiser(logits),
        4000,
        length=8,
        on_step=lambda t, x_t: frames.append((t, x_t)),
    )
    compared = 0
    for (t, x_t), (s, x_s) in itertools.pairwise(frames):
        times = {"s": torch.tensor([s]).double(), "t": torch.tensor([t]).double()}
        dense = kernel.reverse(x_theta, torch.arange(V)[None], **times)[0]
        for z in range(V):
            came_from_z = x_s[x_t == z]
            if len(came_from_z) < 500:
                continue
            expected = len(came_from_z) * dense[z].numpy()
            observed = torch.bincount(came_from_z, minlength=V).numpy()
            possible = expected > 0
            assert observed[~possible].sum() == 0
            if possible.sum() > 1:
                # The 0.01 % point is below 10 for one to three degrees of freedom, each.
                assert chi_square(observed[possible], expected[possible]) < 10, (t, z)
                compared += 1
    # From the mask at each of the 3 steps; from each other id after the first; all where possible.
    assert compared >= {"absorbing": 3, "uniform": 9, "uniform over all": 12, "hybrid": 9}[name]


# What is given, and rows apart.


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": lambda **kw: AncestralSampler(num_inference_steps=40, **kw),
    "blockwise": lambda **kw: BlockwiseSampler(num_inference_steps=20, block_size=5, **kw),
    "remdm": lambda **kw: RemaskingSampler(num_inference_steps=20, eta=0.3, **kw),
    "first_hitting": lambda **kw: FirstHittingSampler(**kw),
}
CASES = [
    *((name, ABSORBING) for name in SAMPLERS),
    *(("ancestral", kernel) for kernel in (UNIFORM, UNIFORM_OVER_ALL, HYBRID)),
]
GUIDED = [case for case in CASES if not isinstance(case[1], UniformKernel)]


def of_size(kernel: ForwardKernel, size: int) -> ForwardKernel:
    if isinstance(kernel, AbsorbingKernel):
        return kernel
    assert isinstance(kernel, UniformKernel | HybridKernel)
    return dataclasses.replace(kernel, vocab_size=size)


@pytest.mark.parametrize("is_given", ["000000000000", "111110000011", "111111111100", "1" * 12])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_number_of_steps_is_known_beforehand(name: str, is_given: str) -> None:
    """Of rows that differ: the second is given a whole block more."""
    sampler = SAMPLERS[name](kernel=AbsorbingKernel(schedule=Cosine(), mask_token_id=49))
    rows = (is_given, "1" * 5 + is_given[5:])
    given = torch.tensor([[mark == "1" for mark in row] for row in rows])
    frames: list[float] = []
    sampler.sample(
        MixingDenoiser(), torch.zeros(2, 12, dtype=torch.int64), given,
        RowGenerator.for_rows(0, torch.arange(2)), on_step=lambda time, _: frames.append(time),
    )  # fmt: skip
    assert len(frames) - 1 == sampler.num_steps(given)


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_given_positions_stay_and_condition_the_rest(name: str, kernel: ForwardKernel) -> None:
    table = toy_language(V, L, MASK, seed=8)
    noising = next(noising for other, noising in KERNELS.values() if other is kernel)
    count = 3000
    tokens = torch.tensor([[9, 3, 9]]).repeat(count, 1)
    is_given = torch.tensor([[False, True, False]]).repeat(count, 1)
    before = tokens.clone(), is_given.clone()

    model: Any = TableDenoiser(torch.tensor(table), MASK)
    if kernel is not ABSORBING:
        # It takes what is given for noisy as well; a table that holds nothing else says the same.
        kept = table.copy()
        kept[:, [0, 1, 2]] = 0.0
        model = ExactDenoiser(kept / kept.sum(), noising)
    if name == "blockwise":
        sampler: Sampler = BlockwiseSampler(kernel=ABSORBING, num_inference_steps=64, block_size=2)
    elif name == "ancestral":
        sampler = AncestralSampler(kernel=kernel, num_inference_steps=64)
    else:
        sampler = SAMPLERS[name](kernel=kernel)
    frames: list[Tensor] = []
    samples = sampler.sample(
        model,
        tokens,
        is_given,
        RowGenerator.for_rows(key_from(2), torch.arange(count)),
        on_step=lambda _, x_t: frames.append(x_t),
    )
    assert torch.equal(tokens, before[0])
    assert torch.equal(is_given, before[1])
    assert all(bool((frame[:, 1] == 3).all()) for frame in frames)
    assert torch.equal(frames[-1], samples.tokens)
    for value in (0, 1, 3):
        expected = conditional(table, {1: 3}, 0, value)
        share = float((samples.tokens[:, 0] == value).double().mean())
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count) + 0.015


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kernel", "scale"),
    [(*case, 1.0) for case in CASES] + [(*case, 1.7) for case in GUIDED],
)
def test_a_row_alone_is_what_it_is_in_a_batch(
    name: str, kernel: ForwardKernel, scale: float
) -> None:
    model = MixingDenoiser()
    sampler = SAMPLERS[name](kernel=of_size(kernel, 50), guidance_scale=scale, top_p=0.9)
    tokens = torch.arange(8 * 12).view(8, 12) % 47 + 3
    is_given = torch.arange(12) < torch.arange(8)[:, None]
    is_given[3] = True
    whole = sampler.sample(model, tokens, is_given, RowGenerator.for_rows(0, torch.arange(8)))
    assert torch.equal(whole.tokens[3], tokens[3])
    assert int(whole.num_model_calls[3]) == 0
    assert len(set(whole.num_model_calls.tolist())) > 2
    for row in range(8):
        one = slice(row, row + 1)
        alone = sampler.sample(
            model, tokens[one], is_given[one], RowGenerator.for_rows(0, torch.tensor([row]))
        )
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        assert torch.equal(alone.num_model_calls, whole.num_model_calls[one])


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_reused_hidden_states_change_nothing(name: str, kernel: ForwardKernel) -> None:
    """Against a model that says it is conditioned on time, so that nothing is reused."""
    sampler = SAMPLERS[name](kernel=of_size(kernel, 50), temperature=0.3)
    free, conditioned = MixingDenoiser(), MixingDenoiser(is_time_conditioned=True)
    reused = sample_free(sampler, free, 16, length=12)
    afresh = sample_free(sampler, conditioned, 16, length=12)
    assert torch.equal(reused.tokens, afresh.tokens)
    for model, samples in ((free, reused), (conditioned, afresh)):
        assert model.num_encoded_rows == int(samples.num_model_calls.sum())
        assert all(bool(((time >= 0) & (time <= 1)).all()) for time in model.times)
    if name != "remdm" and kernel is ABSORBING:
        # A row that is shown to the model is never the same again: a token of it is revealed.
        assert torch.equal(reused.num_model_calls, afresh.num_model_calls)
    else:
        assert bool((reused.num_model_calls <= afresh.num_model_calls).all())
        assert int(reused.num_model_calls.sum()) < int(afresh.num_model_calls.sum())


@pytest.mark.slow
def test_masked_positions_cost_what_is_revealed_and_no_more() -> None:
    model = MixingDenoiser()
    samples = sample_free(
        AncestralSampler(kernel=ABSORBING, num_inference_steps=500), model, 8, length=12
    )
    assert model.num_head_positions == 8 * 12
    assert bool((samples.num_model_calls <= 12).all())


def test_uniform_noise_needs_logits_at_few_positions() -> None:
    model = MixingDenoiser()
    kernel = UniformKernel(schedule=LogLinear(), vocab_size=50, mask_token_id=MASK)
    sample_free(AncestralSampler(kernel=kernel, num_inference_steps=100), model, 16, length=12)
    # A step from t to s needs a position with probability (t - s)/(t (1 - s)), whose sum over 100
    # steps is about twice the harmonic number 5.2.
    assert 9 < model.num_head_positions / (16 * 12) < 11.5


# Frames and ends.


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_every_step_is_reported_and_time_falls_to_zero(name: str, kernel: ForwardKernel) -> None:
    frames: list[tuple[float, Tensor]] = []
    samples = sample_free(
        SAMPLERS[name](kernel=of_size(kernel, 50)),
        MixingDenoiser(),
        4,
        length=12,
        on_step=lambda t, x_t: frames.append((t, x_t.clone())),
    )
    times = [t for t, _ in frames]
    assert times[0] == 1.0
    assert times[-1] == 0.0
    assert torch.equal(frames[-1][1], samples.tokens)
    if name == "blockwise":  # blocks of 5, 5 and 2
        assert times == pytest.approx([1.0, *[1 - k / 20 for k in range(1, 21)] * 3])
    elif name == "first_hitting":
        assert len(times) == 13
        assert all(s < t for t, s in itertools.pairwise(times))
    else:
        steps = 40 if name == "ancestral" else 20
        assert times == pytest.approx([1 - k / steps for k in range(steps + 1)])


@pytest.mark.parametrize(("name", "kernel"), CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_loves_the_mask_still_never_returns_it(
    name: str, kernel: ForwardKernel, temperature: float
) -> None:
    model = IndependentDenoiser([0.0, 0.5, 1e4, 0.2])
    sampler = SAMPLERS[name](kernel=kernel, temperature=temperature)
    samples = sample_free(sampler, model, 50, length=20)
    assert not bool((samples.tokens == MASK).any())


@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_temperature_zero_is_the_argmax(name: str, kernel: ForwardKernel) -> None:
    model = IndependentDenoiser([0.0, 0.5, 0.0, 0.4])
    samples = sample_free(SAMPLERS[name](kernel=kernel, temperature=0.0), model, 50, length=20)
    assert bool((samples.tokens == 1).all())
    dropped = SAMPLERS[name](kernel=kernel, top_k=2)
    assert set(sample_free(dropped, model, 50, length=20).tokens.unique().tolist()) == {1, 3}


# Remasking, first hitting, blocks.


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cap", "rescale"])
def test_remasking_keeps_the_marginals_and_the_language(schedule: Any) -> None:
    table = toy_language(V, L, MASK, seed=7)
    sampler = RemaskingSampler(
        kernel=ABSORBING, num_inference_steps=96, eta=0.2, remasking_schedule=schedule
    )
    shares: list[tuple[float, float]] = []
    frames: list[Tensor] = []

    def keep(t: float, x_t: Tensor) -> None:
        shares.append((t, float((x_t == MASK).double().mean())))
        frames.append(x_t)

    samples = sample_free(sampler, TableDenoiser(torch.tensor(table), MASK), 6000, on_step=keep)
    assert distance(samples, table) < 0.04
    for t, share in shares[1:-1]:
        # The noise at t = 1 is all masks, alpha_1 = 0.001 of which remasking may carry along.
        assert share == pytest.approx(1 - cosine(t), abs=4 * 0.5 / math.sqrt(3 * 6000) + 1e-3)
    remasked = sum(
        int(((later == MASK) & (earlier != MASK)).sum())
        for earlier, later in itertools.pairwise(frames)
    )
    expected = 0.0
    for (t, share), (s, _) in itertools.pairwise(shares[:-1]):
        sigma_max = min(1.0, (1 - cosine(s)) / cosine(t))
        sigma = min(0.2, sigma_max) if schedule == "cap" else 0.2 * sigma_max
        expected += 3 * 6000 * (1 - share) * sigma
    assert remasked == pytest.approx(expected, rel=0.03)


def test_remasking_with_eta_zero_is_the_ancestral_sampler() -> None:
    model = MixingDenoiser()
    plain = sample_free(
        AncestralSampler(kernel=ABSORBING, num_inference_steps=30), model, 32, length=12
    )
    for schedule in ("cap", "rescale"):
        sampler = RemaskingSampler(
            kernel=ABSORBING, num_inference_steps=30, eta=0.0, remasking_schedule=schedule
        )
        samples = sample_free(sampler, model, 32, length=12)
        assert torch.equal(samples.tokens, plain.tokens)
        assert torch.equal(samples.num_model_calls, plain.num_model_calls)


def test_first_hitting_is_exact_with_one_call_per_token() -> None:
    table = toy_language(V, L, MASK, seed=7)
    model = TableDenoiser(torch.tensor(table), MASK)
    samples = sample_free(FirstHittingSampler(kernel=ABSORBING), model, 12000)
    assert distance(samples, table) < 0.025
    assert samples.num_model_calls.tolist() == [L] * 12000
    assert model.num_encoded_rows == 12000 * L


def test_first_hitting_times_are_those_of_the_process() -> None:
    """The k-th of n masked tokens' reveals, in masked share, is an order statistic of uniforms."""
    model = MixingDenoiser(length=4, is_time_conditioned=True)
    sample_free(FirstHittingSampler(kernel=ABSORBING), model, 8000, length=4)
    for step, times in enumerate(model.times):
        share = torch.tensor([1 - cosine(t) for t in times.tolist()])
        expected = (4 - step) / 5  # mean of the largest, second largest, ... of four uniforms
        assert float(share.mean()) == pytest.approx(expected * (1 - 1e-3), abs=0.01)


def test_first_hitting_order_is_uniform() -> None:
    frames: list[Tensor] = []
    sample_free(
        FirstHittingSampler(kernel=ABSORBING),
        MixingDenoiser(length=4),
        6000,
        length=4,
        on_step=lambda _, x_t: frames.append(x_t != MASK),
    )
    for earlier, later in itertools.pairwise(frames):
        counts = (later & ~earlier).sum(0)
        assert int(counts.sum()) == 6000
        assert chi_square(counts.numpy(), np.full(4, 1500.0)) < 7


@pytest.mark.slow
def test_blocks_are_filled_from_left_to_right_and_draw_the_language() -> None:
    table = toy_language(V, L, MASK, seed=7)
    frames: list[Tensor] = []
    sampler = BlockwiseSampler(kernel=ABSORBING, num_inference_steps=64, block_size=2)
    samples = sample_free(
        sampler,
        TableDenoiser(torch.tensor(table), MASK),
        6000,
        on_step=lambda _, x_t: frames.append(x_t),
    )
    assert distance(samples, table) < 0.04
    assert len(frames) == 1 + 2 * 64
    for frame in frames[:65]:
        assert bool((frame[:, 2] == MASK).all())
    for frame in frames[64:]:
        assert torch.equal(frame[:, :2], samples.tokens[:, :2])


def test_one_block_of_the_whole_row_is_the_ancestral_sampler() -> None:
    tokens = torch.arange(8 * 12).view(8, 12) % 47 + 3
    is_given = torch.arange(12) < torch.arange(8)[:, None]
    generator = RowGenerator.for_rows(0, torch.arange(8))
    conditioned = [MixingDenoiser(is_time_conditioned=True) for _ in range(2)]
    whole = BlockwiseSampler(kernel=ABSORBING, num_inference_steps=9, block_size=12).sample(
        conditioned[0], tokens, is_given, generator
    )
    plain = AncestralSampler(kernel=ABSORBING, num_inference_steps=9).sample(
        conditioned[1], tokens, is_given, generator.fold_in(0)
    )
    assert torch.equal(whole.tokens, plain.tokens)
    for ours, theirs in zip(conditioned[0].times, conditioned[1].times, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_blocks_that_are_given_cost_nothing_and_the_model_hears_of_the_masks_there_are() -> None:
    tokens = torch.full((6, 12), 5)
    is_given = (torch.arange(12) < 4).expand(6, 12)
    model = MixingDenoiser(is_time_conditioned=True)
    frames: list[Tensor] = []
    BlockwiseSampler(kernel=ABSORBING, num_inference_steps=10, block_size=4).sample(
        model,
        tokens,
        is_given,
        RowGenerator.for_rows(0, torch.arange(6)),
        on_step=lambda _, x_t: frames.append(x_t),
    )
    assert len(frames) == 1 + 2 * 10
    # Of 8 open positions the first block's 4 are sampled while the other 4 are masks, and then
    # those: a share of masks of (4 m + 4)/8 and then 4 m/8, m from 1 to that of the last step.
    times = torch.cat(model.times)
    shares = [1 - cosine(float(t)) for t in times]
    assert max(shares) == pytest.approx(1 - 1e-3)
    m = 1 - cosine(0.1)
    assert min(shares) == pytest.approx(m / 2)
    assert not any(0.5 < share < (m + 1) / 2 - 1e-9 for share in shares)


# Guidance.


def test_guidance_of_scale_one_changes_nothing_and_costs_nothing() -> None:
    tokens = torch.full((6, 12), 5)
    is_given = (torch.arange(12) < 4).expand(6, 12)
    generator = RowGenerator.for_rows(0, torch.arange(6))
    sampler = AncestralSampler(kernel=ABSORBING, num_inference_steps=10)
    plain = sampler.sample(MixingDenoiser(), tokens, is_given, generator)
    one = AncestralSampler(kernel=ABSORBING, num_inference_steps=10, guidance_scale=1.0 + 1e-12)
    guided = one.sample(MixingDenoiser(), tokens, is_given, generator)
    assert torch.equal(guided.tokens, plain.tokens)
    assert torch.equal(guided.num_model_calls, 2 * plain.num_model_calls)
    # With nothing given there is nothing to be guided towards.
    strong = AncestralSampler(kernel=ABSORBING, num_inference_steps=10, guidance_scale=3.0)
    free = [sample_free(which, MixingDenoiser(), 6, length=12) for which in (sampler, strong)]
    assert torch.equal(free[0].tokens, free[1].tokens)
    assert torch.equal(free[0].num_model_calls, free[1].num_model_calls)


@pytest.mark.parametrize(
    ("kernel", "noising"), [(ABSORBING, absorbing_noising), (HYBRID, hybrid_noising)]
)
@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_guidance_against_a_sum_by_hand(
    kernel: ForwardKernel, noising: Callable[[float], np.ndarray], scale: float
) -> None:
    """One open position, one step: a single draw from the guided belief."""
    table = toy_language(V, 2, MASK, seed=11)
    count = 20000
    samples = AncestralSampler(kernel=kernel, num_inference_steps=1, guidance_scale=scale).sample(
        TableDenoiser(torch.tensor(table), MASK),
        torch.tensor([[3, 0]]).repeat(count, 1),
        torch.tensor([[True, False]]).repeat(count, 1),
        RowGenerator.for_rows(5, torch.arange(count)),
    )
    values = (0, 1, 3)
    weights = [
        table.sum(0)[v] ** (1 - scale) * conditional(table, {0: 3}, 1, v) ** scale for v in values
    ]
    expected = count * np.array(weights) / sum(weights)
    observed = np.array([int((samples.tokens[:, 1] == v).sum()) for v in values])
    assert chi_square(observed, expected) < 7
    assert samples.num_model_calls.tolist() == [2] * count


# Filters.


def test_filters_against_a_sort_in_plain_python() -> None:
    logits = torch.randn(20, 11, generator=torch.Generator().manual_seed(1))
    kept = logits.clone()
    for top_k, top_p in ((None, None), (3, None), (None, 0.6), (5, 0.5), (100, 1.0)):
        filtered = filter_logits(logits, temperature=0.7, top_k=top_k, top_p=top_p).softmax(-1)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token", [None, 2, 9])
def test_a_token_is_taken_away_in_float32_and_from_a_copy(
    token: int | None, dtype: torch.dtype
) -> None:
    logits = torch.arange(4.0).to(dtype)[None]
    found = without_token(logits, token)
    assert found.dtype == torch.float32
    assert found.tolist() == [[0.0, 1.0, -math.inf if token == 2 else 2.0, 3.0]]
    assert logits.tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_looking_at_the_likeliest_first_drops_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Peaked rows are settled by the first few, flat ones are not, and both stand in one batch. Few
    of the flat ones are sorted at once.
    """
    topk, num_sorted = Tensor.topk, []

    def noted(logits: Tensor, k: int) -> Any:
        if k == 200:
            num_sorted.append(len(logits))
        return topk(logits, k)

    monkeypatch.setattr(categorical, "_SORTED_AT_ONCE", 4)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(30, 200, generator=generator) * torch.linspace(0.0, 6.0, 30)[:, None]
    logits[5:, 17] = -torch.inf
    for top_p in (0.05, 0.5, 0.9, 0.999999):
        monkeypatch.setattr(categorical._smallest_in_nucleus, "__defaults__", (200,))
        whole = filter_logits(logits, top_p=top_p)
        monkeypatch.setattr(categorical._smallest_in_nucleus, "__defaults__", (8,))
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "topk", noted)
            assert torch.equal(filter_logits(logits, top_p=top_p), whole)
    assert max(num_sorted) == 4
    assert sum(num_sorted) > 4
    assert int((whole[0] > -torch.inf).sum()) == 200


def test_draw_inverts_the_distribution_and_reaches_the_tail() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.5 - 1e-12, 1e-12, 0.0], dtype=torch.float64)
    uniform = torch.tensor(
        [1e-16, 0.25, 0.5 - 1e-9, 0.5 + 1e-9, 1 - 1e-10, 1 - 1e-13, 1 - 2.0**-53],
        dtype=torch.float64,
    )
    drawn = draw(p.expand(7, 6), uniform)
    assert drawn.tolist() == [1, 1, 1, 3, 3, 4, 4]


# Bad input.


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AncestralSampler(kernel=ABSORBING, num_inference_steps=0), "num_inference_steps"),
        (lambda: AncestralSampler(kernel=ABSORBING, temperature=-0.1), "temperature"),
        (lambda: AncestralSampler(kernel=ABSORBING, temperature=math.nan), "temperature"),
        (lambda: AncestralSampler(kernel=ABSORBING, top_k=0), "top_k"),
        (lambda: AncestralSampler(kernel=ABSORBING, top_p=0.0), "top_p"),
        (lambda: AncestralSampler(kernel=ABSORBING, top_p=1.1), "top_p"),
        (lambda: AncestralSampler(kernel=ABSORBING, guidance_scale=-1.0), "guidance_scale"),
        (lambda: AncestralSampler(kernel=ABSORBING, prediction="x"), "prediction"),
        (lambda: AncestralSampler(kernel=UNIFORM, guidance_scale=2.0), "uniform noise"),
        (lambda: AncestralSampler(kernel=UNIFORM_OVER_ALL, guidance_scale=2.0), "uniform noise"),
        (lambda: BlockwiseSampler(kernel=ABSORBING, block_size=0), "block_size"),
        (lambda: SAMPLERS["blockwise"](kernel=HYBRID), "absorbing kernel, got Hybrid"),
        (lambda: SAMPLERS["remdm"](kernel=UNIFORM), "absorbing kernel, got Uniform"),
        (lambda: RemaskingSampler(kernel=ABSORBING, eta=1.1), "eta"),
        (lambda: SAMPLERS["remdm"](kernel=ABSORBING, remasking_schedule="c"), "cap, rescale"),
        (lambda: SAMPLERS["first_hitting"](kernel=HYBRID), "absorbing kernel, got Hybrid"),
    ],
)
def test_bad_parameters_are_refused(make: Callable[[], Sampler], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_a_block_longer_than_the_row_is_refused() -> None:
    sampler = BlockwiseSampler(kernel=ABSORBING, block_size=L + 1)
    model = TableDenoiser(torch.tensor(toy_language(V, L, MASK, seed=7)), MASK)
    with pytest.raises(ValueError, match="block_size 4 must not exceed seq_len 3"):
        sample_free(sampler, model, 1)


def process_of(forward_process: str, prediction: str = "loo") -> NoiseProcess:
    return NoiseProcess(
        forward_process=forward_process,
        vocab_size=V,
        mask_token_id=MASK,
        max_length=16,
        prediction=prediction,
    )


def test_a_config_becomes_the_sampler_of_the_checkpoints_process() -> None:
    process = process_of("absorbing")
    kernel: Any = process.kernel()
    assert build_sampler(
        BlockwiseConfig(block_size=4, top_p=0.9, guidance_scale=2.0), process
    ) == BlockwiseSampler(
        kernel=kernel, num_inference_steps=64, block_size=4, top_p=0.9, guidance_scale=2.0
    )
    assert build_sampler(
        RemaskingConfig(eta=0.5, remasking_schedule="rescale"), process
    ) == RemaskingSampler(kernel=kernel, eta=0.5, remasking_schedule="rescale")
    assert build_sampler(FirstHittingConfig(), process) == FirstHittingSampler(kernel=kernel)
    hybrid = process_of("hybrid", "posterior")
    assert build_sampler(AncestralConfig(temperature=0.5), hybrid) == AncestralSampler(
        kernel=hybrid.kernel(), prediction="posterior", temperature=0.5
    )


@pytest.mark.parametrize(
    ("config", "forward_process", "seq_len", "says"),
    [
        (BlockwiseConfig(block_size=4), "uniform", None, "'blockwise'.*'uniform'.*use sampler"),
        (RemaskingConfig(), "hybrid", None, "'remdm'.*'hybrid'.*use sampler"),
        (FirstHittingConfig(), "uniform", None, "'first_hitting'.*'uniform'.*use sampler"),
        (AncestralConfig(guidance_scale=2.0), "uniform", None, "set guidance_scale to 1"),
        (BlockwiseConfig(block_size=17), "absorbing", None, "block_size 17.*seq_len 16"),
        (BlockwiseConfig(block_size=16), "absorbing", 8, "block_size 16.*seq_len 8"),
    ],
)
def test_a_sampler_that_the_checkpoint_does_not_go_with_is_refused(
    config: Any, forward_process: str, seq_len: int | None, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        build_sampler(config, process_of(forward_process), seq_len=seq_len)


def test_draws_are_the_same_however_many_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, 50, generator=generator)
    uniform = torch.rand(7, generator=generator)
    expected = categorical.draw_by_logits(logits, uniform)
    monkeypatch.setattr(categorical, "_DRAWN_AT_ONCE", 3)
    made = mock.Mock(wraps=draw)
    monkeypatch.setattr(categorical, "draw", made)
    assert torch.equal(categorical.draw_by_logits(logits, uniform), expected)
    assert [len(call.args[0]) for call in made.call_args_list] == [3, 3, 1]
