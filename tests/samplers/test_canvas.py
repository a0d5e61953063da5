"""Sampler `canvas`: an enumerated language, and the released pipeline with the same draws."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.builders import tiny_causal
from tests.objectives.test_block_objectives import MASK
from tests.samplers.canvas_reference import SameNumbers, by_pipeline
from tokendiff.diffusion.attention_masks import MaskRule
from tokendiff.diffusion.interfaces import Request
from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.models.causal import CausalModel
from tokendiff.samplers.canvas import CanvasSampler
from tokendiff.samplers.canvas_rules import posterior_chances

V, BLOCK, KEY = 24, 4, 5
# No id of the model is the mask: all V are noise, as in the released code.
KERNEL = UniformKernel(schedule=LogLinear(eps=1e-12), vocab_size=V + 1, mask_token_id=V)


def canvas(**changes: Any) -> CanvasSampler:
    fields: dict[str, Any] = {
        "kernel": KERNEL,
        "mask_token_id": V,
        "block_length": BLOCK,
        "max_new_tokens": 3 * BLOCK,
        "num_inference_steps": 6,
        "prediction": "posterior",
    }
    return CanvasSampler(**{**fields, **changes})


# Against an enumerated language.


class _ToyCache:
    def __init__(self, num_rows: int, length: int) -> None:
        self.tokens = torch.zeros(num_rows, length, dtype=torch.int64)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64)

    def extend(self, rows: Tensor, counts: Tensor) -> None:
        self.lengths[rows] += counts

    def crop(self, rows: Tensor, lengths: Tensor) -> None:
        self.lengths[rows] = lengths

    def move(self, source: int, target: int) -> None:
        self.tokens[target], self.lengths[target] = self.tokens[source], self.lengths[source]


class ExactDecoder:
    """The exact belief about rows that all take the same steps, and sweeps between them, at once:
    given all other positions, or given all ("posterior").
    """

    device = torch.device("cpu")

    def __init__(
        self,
        table: np.ndarray,
        kernel: UniformKernel,
        *,
        num_steps: int,
        num_sweeps: int = 0,
        prediction: str = "loo",
        block: int = 2,
    ) -> None:
        self.block = block
        self.table = torch.from_numpy(table)
        self.kernel, self.prediction = kernel, prediction
        grid = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)[:-1]
        self.times = grid[:1].tolist()
        for t in grid[1:].tolist():
            self.times += [t] * num_sweeps + [t]
        self.num_calls = 0

    def new_cache(self, num_rows: int) -> _ToyCache:
        return _ToyCache(num_rows, self.table.dim())

    def encode(
        self, tokens: Tensor, num_tokens: Tensor, cache: Any, rows: Tensor, rule: MaskRule
    ) -> Tensor:
        t = torch.tensor(self.times[self.num_calls % len(self.times)]).double()
        self.num_calls += 1
        begin, count = int(cache.lengths[rows[0]]), int(num_tokens[0])
        cache.tokens[rows, begin : begin + count] = tokens
        unique, index = cache.tokens[rows, : begin + count].unique(dim=0, return_inverse=True)
        beliefs = torch.stack([self._beliefs(row, float(self.kernel.alpha(t))) for row in unique])
        return beliefs[index, begin:]

    def _beliefs(self, row: Tensor, alpha: float) -> Tensor:
        """[T, V] logarithms; the first token and all blocks before the last are clean."""
        factors = torch.zeros(len(row), self.table.shape[0], dtype=torch.float64)
        for at, token in enumerate(row.tolist()):
            is_noisy = at > 0 and at >= len(row) - self.block
            factors[at, 1:] = (1.0 - alpha) / 3 if is_noisy else 0.0
            factors[at, token] += alpha if is_noisy else 1.0
        found = [torch.zeros(self.table.shape[0]).double()] * (len(row) - self.block)
        for own in range(len(row) - self.block, len(row)):
            joint = self.table
            for at in range(len(row)):
                if at != own:
                    shape = [-1 if axis == at else 1 for axis in range(joint.dim())]
                    joint = joint * factors[at].reshape(shape)
            belief = joint.sum([axis for axis in range(joint.dim()) if axis != own])
            if self.prediction == "posterior":
                belief = belief * factors[own]
            found.append((belief / belief.sum()).log())
        return torch.stack(found)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def language() -> np.ndarray:
    """Four tokens out of 1, 2, 3; neighbours are often equal, above all in the last block."""
    x = np.indices((4, 4, 4, 4))
    table = np.exp(2.0 * (x[2] == x[3]) + 1.0 * (x[1] == x[2]) + 0.3 * x[3] + 0.2 * x[1])
    table[(x == MASK).any(0)] = 0.0
    total: np.ndarray = table / table.sum()
    return total


SMALL = UniformKernel(schedule=LogLinear(eps=1e-9), vocab_size=4, mask_token_id=MASK)


def counted(count: int, *, block: int = 2, prediction: str = "loo", **fields: Any) -> np.ndarray:
    """[3, 3, 3]: how often which three tokens follow a 1 in samples of the exact model."""
    sampler = CanvasSampler(
        kernel=SMALL,
        mask_token_id=MASK,
        block_length=block,
        max_new_tokens=3,
        confidence_threshold=None,
        prediction=prediction,
        **fields,
    )
    model: Any = ExactDecoder(
        language(),
        SMALL,
        num_steps=sampler.num_inference_steps,
        num_sweeps=sampler.corrector_steps,
        prediction=prediction,
        block=block,
    )
    requests = [Request(id=index, prompt=(1,)) for index in range(count)]
    found = np.zeros((4, 4, 4))
    for completion in sampler.complete(model, requests, key=KEY, num_slots=count):
        found[tuple(completion.tokens)] += 1
    assert found[1:, 1:, 1:].sum() == count
    # The first block holds the prompt: every block takes all steps and sweeps.
    assert model.num_calls == 4 // block * len(model.times)
    return found[1:, 1:, 1:]


def p_value(found: np.ndarray, shares: np.ndarray) -> float:
    expected = found.sum() * shares / shares.sum()
    chi_square = torch.tensor(float(((found - expected) ** 2 / expected).sum()))
    return float(torch.special.gammaincc(torch.tensor((27 - 1) / 2), chi_square / 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "num_sweeps", "prediction"),
    [
        ("ancestral", 0, "loo"),
        ("ddim", 0, "loo"),
        ("ancestral", 2, "loo"),
        ("ddim", 2, "posterior"),
    ],
)
def test_samples_of_an_exact_model_have_the_distribution_of_the_language(
    rule: str, num_sweeps: int, prediction: str
) -> None:
    found = counted(
        2500,
        num_inference_steps=32,
        corrector_steps=num_sweeps,
        prediction=prediction,
        canvas_rule=rule,
    )
    assert p_value(found, language()[1, 1:, 1:, 1:]) > 1e-3


def exact_shares(num_steps: int, num_sweeps: int) -> np.ndarray:
    """[27]: what the three tokens after a 1 are in samples of the exact model, of one block, by
    matrices over its states.
    """
    model = ExactDecoder(language(), SMALL, num_steps=num_steps, block=4)
    states = list(itertools.product((1, 2, 3), repeat=3))
    p = np.full(27, 1.0 / 27.0)
    grid = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    for t, s in zip(grid[:-1, None], grid[1:, None], strict=True):
        step, sweep = np.zeros((27, 27)), np.zeros((27, 27))
        for index, state in enumerate(states):
            row = torch.tensor([1, *state])
            loo = [model._beliefs(row, float(SMALL.alpha(time))).exp()[None, 1:] for time in (t, s)]
            one, two, three = SMALL.reverse(loo[0], row[None, 1:], s=s, t=t)[0].numpy()[:, 1:]
            step[index] = np.einsum("i,j,k->ijk", one, two, three).reshape(-1)
            at_s = SMALL.marginal(loo[1], s)[0].numpy()
            for place, token in itertools.product(range(3), (1, 2, 3)):
                after = (*state[:place], token, *state[place + 1 :])
                sweep[index, states.index(after)] += at_s[place, token] / 3.0
        p = p @ step
        for _ in range(num_sweeps if float(s) > 0.0 else 0):
            p = p @ sweep
    return p


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "prediction"), [("ancestral", "posterior"), ("ddim", "loo")])
def test_samples_of_few_steps_are_those_of_the_corrected_chain(rule: str, prediction: str) -> None:
    found = counted(
        12000,
        block=4,
        num_inference_steps=3,
        corrector_steps=3,
        prediction=prediction,
        canvas_rule=rule,
    ).reshape(-1)
    assert p_value(found, exact_shares(3, 3)) > 1e-3
    assert p_value(found, exact_shares(3, 1)) < 1e-2
    assert p_value(found, exact_shares(3, 0)) < 1e-6


@pytest.mark.slow
def test_the_corrector_lowers_the_error_of_few_steps() -> None:
    table = language()[1, 1:, 1:, 1:].reshape(-1)
    for num_steps in (2, 4, 8):
        errors = [
            0.5 * np.abs(exact_shares(num_steps, sweeps) - table / table.sum()).sum()
            for sweeps in (0, 1, 4)
        ]
        assert errors[1] < 0.95 * errors[0]
        assert errors[2] < 0.95 * errors[1]


# Against the released pipeline.


class WithoutCache(torch.nn.Module):
    """What the pipeline asks of a model, over the whole text at each step; blocks see themselves
    and all before them, in the prompt too.
    """

    def __init__(self, model: Any, prompt_length: int, numbers: SameNumbers) -> None:
        super().__init__()
        self.inner, self.prompt_length, self.numbers = model, prompt_length, numbers
        text = model.config
        self.config = SimpleNamespace(canvas_length=BLOCK, get_text_config=lambda decoder: text)
        self.model = SimpleNamespace(
            encoder=self._read,
            decoder=SimpleNamespace(create_diffusion_decoder_attention_mask=lambda **kwargs: None),
        )

    def _read(self, *, input_ids: Tensor, **kwargs: Any) -> None:
        self.context, self.numbers.is_start = input_ids, True  # a canvas follows

    def forward(self, *, decoder_input_ids: Tensor, **kwargs: Any) -> Any:
        tokens = torch.cat([self.context, decoder_input_ids], dim=1)
        place = torch.arange(tokens.shape[1])
        answer = -(-self.prompt_length // BLOCK) + (place - self.prompt_length) // BLOCK
        block = torch.where(place < self.prompt_length, place // BLOCK, answer)
        is_seen = (block[None] <= block[:, None])[None, None]
        output = self.inner(input_ids=tokens, attention_mask=is_seen)
        return SimpleNamespace(logits=output.logits[:, -BLOCK:].float())


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"canvas_rule": "ddim", "temperature": 0.0, "confidence_threshold": None},
        {"canvas_rule": "ddim", "temperature": 0.7, "confidence_threshold": None},
        {"canvas_rule": "ddim", "temperature": 0.0, "confidence_threshold": 2.0},
        {
            "canvas_rule": "ddim",
            "temperature": 0.0,
            "confidence_threshold": 2.0,
            "stability_threshold": 2,
        },
        {"canvas_rule": "block_refinement", "temperature": 0.0, "confidence_threshold": None},
        {
            "canvas_rule": "block_refinement",
            "temperature": 0.7,
            "threshold": 0.12,
            "editing_threshold": 0.06,
            "confidence_threshold": None,
        },
        {
            "canvas_rule": "block_refinement",
            "temperature": 0.0,
            "threshold": 0.2,
            "confidence_threshold": 3.1,
        },
        {"entropy_bound": 1.0, "confidence_threshold": None},
        {"entropy_bound": 0.3, "t_min": 0.1, "t_max": 0.3, "confidence_threshold": 3.0},
    ],
)
def test_tokens_are_those_of_the_released_pipeline(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = canvas(**{"num_inference_steps": 10, **fields})
    model = tiny_causal(vocab_size=V, seed=3)
    requests = [
        Request(id=index, prompt=tuple(range(2, 2 + length)), block_starts=(length,))
        for index, length in enumerate((3, 9, 8))
    ]
    done = {
        completion.id: completion
        for completion in sampler.complete(
            CausalModel(model, vocab_size=V), requests, key=KEY, num_slots=2
        )
    }
    for request in requests:
        numbers = SameNumbers(request.id, key=KEY, kernel=KERNEL, block=BLOCK)
        wrapped = WithoutCache(model, len(request.prompt), numbers)
        theirs = by_pipeline(wrapped, request.prompt, sampler, numbers, monkeypatch)
        assert done[request.id].tokens == theirs
    calls = [completion.num_model_calls for completion in done.values()]
    is_early = min(calls) < 3 * sampler.num_inference_steps
    assert is_early == (sampler.confidence_threshold is not None)


@pytest.mark.slow
def test_rows_depend_on_neither_batch_nor_place() -> None:
    model = CausalModel(tiny_causal(vocab_size=V, seed=3), vocab_size=V)
    requests = [Request(id=i, prompt=tuple(range(1, 2 + i))) for i in range(5)]
    sampler = canvas(canvas_rule="ancestral", stop_token_ids=(7,), prediction="loo")
    found, alone = (
        {
            done.id: (done.tokens, done.finish_reason)
            for done in sampler.complete(model, rows, key=KEY, num_slots=num_slots)
        }
        for rows, num_slots in ((requests, 3), (reversed(requests), 1))
    )
    assert found == alone
    for tokens, reason in found.values():
        assert all(token < V for token in tokens)
        assert (7 in tokens) == (reason == "stop")
        assert 7 not in tokens[:-1]
    assert len(set(map(str, found.values()))) == len(found)


def test_a_reverse_step_by_route_is_that_of_bayes() -> None:
    """Rule ddim with candidates from the posterior is the kernel's reverse step with the
    leave-one-out posterior: summed over the candidates.
    """
    kernel = UniformKernel(schedule=LogLinear(), vocab_size=4, mask_token_id=MASK)
    loo = torch.tensor([[0.0, 0.5, 0.2, 0.3]], dtype=torch.float64)
    s, t = torch.tensor([0.3]).double(), torch.tensor([0.7]).double()
    for z in (1, 2, 3):
        x_t = torch.tensor([[z]])
        posterior = kernel.posterior_logits(loo.log(), x_t[0], t).softmax(-1)
        back = kernel.loo_logits(posterior.log(), x_t[0], t).softmax(-1)
        torch.testing.assert_close(back, loo)
        x_s = torch.zeros(4, dtype=torch.float64)
        for x in (1, 2, 3):
            chances = posterior_chances(kernel, x_t, torch.tensor([[x]]), s=s, t=t)
            clean, noise = (float(chance) for chance in chances)
            weight = float(posterior[0, x])
            x_s[x] += weight * clean
            x_s[1:] += weight * noise / 3
            x_s[z] += weight * (1.0 - clean - noise)
        expected = kernel.reverse(loo[None], x_t, s=s, t=t)[0, 0]
        torch.testing.assert_close(x_s, expected)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"canvas_rule": "sharp"}, "canvas_rule must be one of .*'sharp'"),
        ({"prediction": "own"}, "prediction must be loo or posterior"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"t_min": 0.9}, "need 0 < t_min <= t_max, got t_min 0.9, t_max 0.8"),
        ({"entropy_bound": -1.0}, "must not be negative, got -1.0 and 1"),
        ({"block_length": 0}, "block_length must be at least 1, got 0"),
        ({"threshold": -0.1}, "threshold and editing_threshold must not be negative, got -0.1"),
        ({"corrector_k": 0}, "corrector_k must be at least 1, got 0"),
        ({"corrector_steps": 1}, "corrector_steps 1 goes with canvas_rule ddim or ancestral"),
    ],
)
def test_bad_parameters_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        canvas(**fields)
