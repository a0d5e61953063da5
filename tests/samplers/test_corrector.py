"""The leave-one-out corrector against sums over every row of an enumerated language."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.builders import ExactDenoiser
from tests.samplers.test_samplers import (
    ABSORBING,
    HYBRID,
    KERNELS,
    MASK,
    UNIFORM,
    L,
    MixingDenoiser,
    V,
    of_size,
    process_of,
    sample_free,
)
from tokendiff.config.samplers import AncestralConfig
from tokendiff.diffusion.kernels import ForwardKernel, HybridKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.errors import InputError
from tokendiff.models.sampling import build_sampler
from tokendiff.samplers import base
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.corrector import (
    SELECTIONS,
    Corrector,
    chances,
    check_correctable,
    choose,
)
from tokendiff.verification.oracles import chi_square, toy_language

CORRECTABLE = ["uniform", "uniform over all", "hybrid"]
ROWS = np.array(list(np.ndindex(*(V,) * L)))
TABLE = toy_language(V, L, MASK, seed=7)


def noised(name: str, t: float) -> np.ndarray:
    """[V] * L: the distribution of the language's rows at time t."""
    table, q = TABLE, KERNELS[name][1](t)
    for axis in range(L):
        table = np.moveaxis(np.tensordot(table, q, axes=([axis], [0])), -1, axis)
    return table


def conditionals(name: str, t: float) -> np.ndarray:
    """[V^L, L, V]: of each row and position, p(token there | the other tokens) at time t, from the
    table of that distribution alone.
    """
    table = noised(name, t)
    found = np.empty((len(ROWS), L, V))
    for index, row in enumerate(ROWS):
        for position in range(L):
            line: Any = [*row]
            line[position] = slice(None)
            found[index, position] = table[tuple(line)] / max(table[tuple(line)].sum(), 1e-300)
    return found


class Spread:
    """In place of a RowGenerator: for each purpose, numbers that fill (0, 1) evenly over the rows,
    and together the cube; the choice is `place`.
    """

    def __init__(self, choice: Tensor, row: Tensor) -> None:
        self._purpose, self._choice, self._row = 0, choice, row

    def fold_in(self, purpose: int) -> "Spread":
        other = Spread(self._choice, self._row)
        other._purpose = purpose
        return other

    def uniform(self, length: int) -> Tensor:
        if self._purpose == 0:
            return self._choice
        step = 1.2207440846057596**-self._purpose  # R3, a sequence of low discrepancy
        return ((self._row * step + 0.5) % 1.0)[:, None].expand(-1, length)


def beliefs_of(model: Any, x_s: Tensor, s: Tensor, is_needed: Tensor) -> Iterator[Any]:
    row, position = is_needed.nonzero(as_tuple=True)
    logits = model.encode(x_s, torch.ones_like(is_needed), s)[row, position]
    half = len(row) // 2
    for part in (slice(None, half), slice(half, None)):  # chunks must not matter
        yield row[part], position[part], logits[part].index_fill(-1, torch.tensor(MASK), -torch.inf)


@pytest.mark.parametrize(
    ("name", "selection"),
    [*((name, "random") for name in CORRECTABLE), ("hybrid", "lowest_current_prob")],
)
def test_a_sweep_draws_from_the_distribution_given_all_other_tokens(
    name: str, selection: str
) -> None:
    """And so leaves the distribution at that time as it is, the mask of hybrid noise included."""
    kernel, noising = KERNELS[name]
    t, count = 0.4, 1500
    model = ExactDenoiser(TABLE, noising)
    sampler = AncestralSampler(kernel=kernel)
    x_s = torch.from_numpy(ROWS).repeat_interleave(count, 0)
    s = torch.full((len(x_s),), t, dtype=torch.float64)
    expected, at_t = conditionals(name, t), noised(name, t).reshape(-1)
    possible = at_t > 0
    after = np.zeros_like(noised(name, t))
    for position in range(L):
        # Its number alone is near 1: it is chosen, whatever the scores say.
        choice = torch.full((len(x_s), L), 0.5, dtype=torch.float64)
        choice[:, position] = 1.0 - 1e-15
        drawn = Corrector(k=1, selection=selection).sweep(
            kernel,
            x_s,
            torch.ones_like(x_s, dtype=torch.bool),
            partial(beliefs_of, model, x_s, s),
            sampler._draw,
            Spread(choice, torch.arange(count).repeat(len(ROWS))),  # type: ignore[arg-type]
            s=s,
        )
        others = [other for other in range(L) if other != position]
        assert torch.equal(drawn[:, others], x_s[:, others])
        tokens = torch.nn.functional.one_hot(drawn[:, position], V).view(len(ROWS), count, V)
        share = tokens.double().mean(1).numpy()
        assert np.abs(share - expected[:, position])[possible].max() < 0.02
        for row, weight, shares in zip(ROWS, at_t, share, strict=True):
            line: Any = [*row]
            line[position] = slice(None)
            after[tuple(line)] += weight / L * shares
    assert 0.5 * np.abs(after.reshape(-1) - at_t).sum() < 0.005
    # A distribution that is not the one at that time moves: the test can tell.
    assert 0.5 * np.abs(TABLE.reshape(-1) - at_t).sum() > 0.1


@pytest.mark.parametrize("name", CORRECTABLE)
def test_chances_are_those_of_the_dense_distribution(name: str) -> None:
    kernel = of_size(KERNELS[name][0], 7)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 7, generator=generator) * 3.0
    logits[:, MASK] = -torch.inf
    logits[::5, 4] = -torch.inf  # as a filter leaves them
    tokens = torch.arange(40) % 7
    if name == "uniform":
        tokens = tokens.where(tokens != MASK, 4)  # its noise has no mask
    s = torch.linspace(0.05, 0.95, 40, dtype=torch.float64)
    dense = kernel.marginal(logits.double().softmax(-1)[:, None], s)[:, 0]
    found = chances(kernel, logits, tokens, s)
    for row in range(40):
        others = [float(p) for v, p in enumerate(dense[row]) if v != tokens[row]]
        assert float(found.current[row].exp()) == pytest.approx(
            float(dense[row, tokens[row]]), rel=1e-5
        )
        assert float(found.other[row].exp()) == pytest.approx(max(others), rel=1e-5)


def test_a_mask_beyond_the_logits_has_its_noise_alone() -> None:
    kernel = HybridKernel(vocab_size=8, mask_token_id=7, p_uniform=0.3)
    s = torch.full((2,), 0.6, dtype=torch.float64)
    found = chances(kernel, torch.zeros(2, 7), torch.tensor([7, 0]), s)
    noise, alpha = kernel.noise(s), kernel.alpha(s)
    token = alpha / 7 + noise.token
    torch.testing.assert_close(found.current.exp(), torch.stack([noise.mask[0], token[0]]))
    torch.testing.assert_close(
        found.other.exp(), torch.stack([token[0], torch.maximum(token, noise.mask)[0]])
    )


def test_positions_are_chosen_in_proportion_to_their_scores_without_putting_back() -> None:
    count = 20000
    weights = {0: 1.0, 2: 5.0, 3: 2.0}  # position 1 is not open
    score = torch.tensor([1.0, 9.0, 5.0, 2.0]).double().log().repeat(count, 1)
    is_open = torch.tensor([True, False, True, True]).repeat(count, 1)
    uniform = RowGenerator.for_rows(4, torch.arange(count)).uniform(4)
    total = sum(weights.values())
    by_k: dict[int, dict[tuple[int, ...], float]] = {
        1: {(i,): w / total for i, w in weights.items()},
        2: {
            (i, j): weights[i] / total * weights[j] / (total - weights[i])
            + weights[j] / total * weights[i] / (total - weights[j])
            for i, j in itertools.combinations(weights, 2)
        },
        3: {(0, 2, 3): 1.0},
        9: {(0, 2, 3): 1.0},
    }
    for k, expected in by_k.items():
        chosen = choose(score, is_open, k=k, uniform=uniform)
        seen = Counter(tuple(row.nonzero()[:, 0].tolist()) for row in chosen)
        assert set(seen) == set(expected)
        if len(expected) > 1:
            frequencies = np.array([seen[key] for key in expected])
            assert chi_square(frequencies, count * np.array(list(expected.values()))) < 7


# The sampler.


def exact_samples(
    name: str, steps: int, *, corrector_steps: int = 0, selection: str = "random"
) -> np.ndarray:
    """[V^L]: the distribution of the ancestral sampler's rows with one redrawn position a sweep, by
    matrices over all rows.
    """
    noising = KERNELS[name][1]
    q_1 = noising(1.0)
    prior = np.where(np.arange(V) == MASK, q_1[0, MASK], q_1[0, 1])
    p = np.prod(prior[ROWS] / prior.sum(), axis=1)
    for t, s in itertools.pairwise(np.linspace(1.0, 0.0, steps + 1)):
        step = np.ones((len(ROWS), 1))
        x_theta = beliefs_at(name, t)
        for position in range(L):
            at_s = x_theta[:, position] @ (noising(s) if s > 0 else np.eye(V))
            between = np.linalg.solve(noising(s), noising(t)) if s > 0 else noising(t)
            joint = at_s * between[:, ROWS[:, position]].T
            joint = joint / joint.sum(1, keepdims=True).clip(1e-300)
            step = (step[:, :, None] * joint[:, None]).reshape(len(ROWS), -1)
        p = p @ step
        for _ in range(corrector_steps if s > 0 else 0):
            p = p @ exact_sweep(name, s, selection)
    return p


def beliefs_at(name: str, t: float) -> np.ndarray:
    """[V^L, L, V] x_loo."""
    time = torch.full((len(ROWS),), t, dtype=torch.float64)
    rows = torch.from_numpy(ROWS)
    return ExactDenoiser(TABLE, KERNELS[name][1]).encode(rows, rows >= 0, time).exp().numpy()


def exact_sweep(name: str, s: float, selection: str) -> np.ndarray:
    """[V^L, V^L]: what a sweep makes of each row."""
    dense = beliefs_at(name, s) @ KERNELS[name][1](s)
    transition = np.zeros((len(ROWS), len(ROWS)))
    for index, row in enumerate(ROWS):
        now = np.array([dense[index, i, row[i]] for i in range(L)])
        rest = np.array([np.delete(dense[index, i], row[i]).max() for i in range(L)])
        weight = {
            "random": np.ones(L),
            "lowest_current_prob": 1 / now.clip(1e-300),
            "lowest_maxprob": 1 / np.maximum(now, rest),
            "lowest_log_margin": rest / now.clip(1e-300),
        }[selection]
        for position, token in itertools.product(range(L), range(V)):
            to = [*row]
            to[position] = token
            share = weight[position] / weight.sum() * dense[index, position, token]
            transition[index, np.ravel_multi_index(to, (V,) * L)] += share
    return transition


def distance(p: np.ndarray) -> float:
    return 0.5 * float(np.abs(p - TABLE.reshape(-1)).sum())


@pytest.mark.parametrize(
    ("name", "selection", "prediction"),
    [
        *((name, "random", "loo") for name in CORRECTABLE),
        ("hybrid", "random", "posterior"),
        ("hybrid", "lowest_current_prob", "loo"),
        ("uniform", "lowest_maxprob", "loo"),
        ("uniform over all", "lowest_log_margin", "posterior"),
    ],
)
def test_samples_have_the_distribution_of_the_corrected_chain(
    name: str, selection: str, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few steps, where the corrector makes a difference that the samples can show."""
    monkeypatch.setattr(base, "positions_at_once", lambda device: 2**20)  # faster for V = 4
    kernel, noising = KERNELS[name]
    expected = exact_samples(name, 4, corrector_steps=2, selection=selection)
    plain = exact_samples(name, 4)
    sampler = AncestralSampler(
        kernel=kernel, prediction=prediction, num_inference_steps=4, corrector_steps=2,
        corrector_selection=selection,
    )  # fmt: skip
    # With hybrid noise half of the error is the last step's, which no sweep follows.
    count = 40000 if name == "hybrid" else 20000
    model = ExactDenoiser(TABLE, noising, prediction=prediction)
    samples = sample_free(sampler, model, count)
    codes = np.ravel_multi_index(tuple(samples.tokens.T.numpy()), (V,) * L)
    observed = np.bincount(codes, minlength=V**L)
    possible = expected > 1e-9
    assert observed[~possible].sum() == 0
    # 27 outcomes: the 0.01 % point of chi-square over 26 degrees of freedom is at 2.3 of each.
    assert chi_square(observed[possible], count * expected[possible]) < 2.3
    assert chi_square(observed[possible], count * plain[possible]) > 2.3
    assert samples.num_model_calls.max() <= 4 + 3 * 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CORRECTABLE)
def test_the_corrector_lowers_the_error_of_few_steps(name: str) -> None:
    for steps in (4, 8):
        errors = [
            distance(exact_samples(name, steps, corrector_steps=sweeps)) for sweeps in (0, 1, 4)
        ]
        assert errors[0] > errors[1] > errors[2]
        assert errors[1] < 0.97 * errors[0]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kernel", [UNIFORM, HYBRID])
def test_rows_do_not_depend_on_their_batch_and_given_tokens_stay(
    kernel: ForwardKernel, selection: str
) -> None:
    sampler = AncestralSampler(
        kernel=of_size(kernel, 50), num_inference_steps=6, temperature=0.5, top_k=5,
        corrector_steps=2, corrector_k=3, corrector_selection=selection,
    )  # fmt: skip
    tokens = torch.arange(8 * 12).view(8, 12) % 47 + 3
    is_given = torch.arange(12) < 2 * torch.arange(8)[:, None]
    frames: list[Tensor] = []
    whole = sampler.sample(
        MixingDenoiser(), tokens, is_given, RowGenerator.for_rows(0, torch.arange(8)),
        on_step=lambda _, x_t: frames.append(x_t),
    )  # fmt: skip
    assert len(frames) == 1 + sampler.num_steps(is_given)
    assert all(torch.equal(frame[is_given], tokens[is_given]) for frame in frames)
    for row in (0, 3, 7):
        one = slice(row, row + 1)
        alone = sampler.sample(
            MixingDenoiser(), tokens[one], is_given[one],
            RowGenerator.for_rows(0, torch.tensor([row])),
        )  # fmt: skip
        assert torch.equal(alone.tokens[0], whole.tokens[row])
        assert torch.equal(alone.num_model_calls, whole.num_model_calls[one])


def test_a_sweep_takes_one_pass_and_reads_what_it_needs() -> None:
    """Random positions are known before the model is asked; the others take all positions' logits,
    and no second pass.
    """
    for selection, least, most in (("random", 0, 2), ("lowest_maxprob", 12, 12)):
        model = MixingDenoiser(is_time_conditioned=True)
        x_s = torch.arange(12)[None] + 3
        sampler = AncestralSampler(
            kernel=of_size(UNIFORM, 50), corrector_steps=1, corrector_k=2,
            corrector_selection=selection,
        )  # fmt: skip
        is_given = torch.zeros_like(x_s, dtype=torch.bool)
        predictor = sampler._predictor(model, is_given, None)
        kept = x_s.clone()
        generator = RowGenerator.for_rows(0, torch.tensor([5]))
        s = torch.tensor(0.3, dtype=torch.float64)
        corrected = sampler._corrected(x_s, ~is_given, predictor, generator, s=s)
        assert torch.equal(x_s, kept)
        assert 1 <= int((corrected != x_s).sum()) <= 2
        assert model.num_encoded_rows == 1
        assert least <= model.num_head_positions <= most


# Bad input.


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"corrector_steps": -1}, "corrector_steps must not be negative, got -1"),
        ({"corrector_k": 0}, "corrector_k must be at least 1, got 0"),
        ({"corrector_selection": "worst"}, "one of random, lowest_current_prob.*got 'worst'"),
    ],
)
def test_bad_parameters_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AncestralSampler(kernel=UNIFORM, **fields)


def test_masks_alone_allow_no_corrector() -> None:
    for kernel in (ABSORBING, dataclasses.replace(HYBRID, p_uniform=0.0)):
        AncestralSampler(kernel=kernel)
        with pytest.raises(ValueError, match="needs noise that replaces tokens"):
            AncestralSampler(kernel=kernel, corrector_steps=1)
    check_correctable(UNIFORM)
    with pytest.raises(InputError, match=r"'ancestral'.*set corrector_steps to 0"):
        build_sampler(AncestralConfig(corrector_steps=1), process_of("absorbing"))
    bare = dataclasses.replace(process_of("hybrid"), p_uniform=0.0)
    with pytest.raises(InputError, match=r"'ancestral'.*set corrector_steps to 0"):
        build_sampler(AncestralConfig(corrector_steps=1), bare)


def test_a_config_becomes_a_corrected_sampler_and_old_keys_stay() -> None:
    config = AncestralConfig(corrector_steps=2, corrector_k=3, corrector_selection="random")
    uniform = process_of("uniform")
    assert build_sampler(config, uniform) == AncestralSampler(
        kernel=uniform.kernel(), corrector_steps=2, corrector_k=3
    )
    assert AncestralConfig().result_fields().keys() & config.result_fields().keys() == {
        "name", "num_inference_steps", "temperature", "top_k", "top_p", "guidance_scale",
    }  # fmt: skip
    with pytest.raises(ValueError, match="corrector_k 2 has no effect with corrector_steps 0"):
        AncestralConfig(corrector_k=2)
    with pytest.raises(ValueError, match="corrector_selection 'lowest_maxprob' has no effect"):
        AncestralConfig(corrector_selection="lowest_maxprob")
