"""Sampler `canvas`: an enumerated language, and the released pipeline with the same draws."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.builders import tiny_causal
from tests.objectives.test_block_objectives import MASK
from tokendiff.diffusion.attention_masks import MaskRule
from tokendiff.diffusion.interfaces import Request
from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.models.causal import CausalModel
from tokendiff.samplers.canvas import MOVE, NOISE, START, TOKEN, CanvasSampler
from tokendiff.samplers.canvas_rules import posterior_chances
from tokendiff.samplers.categorical import draw

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
    """The exact leave-one-out belief about rows that all take the same steps at once."""

    device = torch.device("cpu")

    def __init__(self, table: np.ndarray, kernel: UniformKernel, *, num_steps: int) -> None:
        self.table = torch.from_numpy(table)
        self.kernel, self.num_steps = kernel, num_steps
        self.num_calls = 0

    def new_cache(self, num_rows: int) -> _ToyCache:
        return _ToyCache(num_rows, self.table.dim())

    def encode(
        self, tokens: Tensor, num_tokens: Tensor, cache: Any, rows: Tensor, rule: MaskRule
    ) -> Tensor:
        t = torch.tensor(1.0 - self.num_calls % self.num_steps / self.num_steps).double()
        self.num_calls += 1
        begin, count = int(cache.lengths[rows[0]]), int(num_tokens[0])
        cache.tokens[rows, begin : begin + count] = tokens
        unique, index = cache.tokens[rows, : begin + count].unique(dim=0, return_inverse=True)
        beliefs = torch.stack([self._beliefs(row, float(self.kernel.alpha(t))) for row in unique])
        return beliefs[index, begin:]

    def _beliefs(self, row: Tensor, alpha: float) -> Tensor:
        """[T, V] logarithms; the first token and all blocks of two before the last are clean."""
        factors = torch.zeros(len(row), self.table.shape[0], dtype=torch.float64)
        for at, token in enumerate(row.tolist()):
            is_noisy = at > 0 and at >= len(row) - 2
            factors[at, 1:] = (1.0 - alpha) / 3 if is_noisy else 0.0
            factors[at, token] += alpha if is_noisy else 1.0
        found = [torch.zeros(self.table.shape[0]).double()] * (len(row) - 2)
        for own in range(len(row) - 2, len(row)):
            joint = self.table
            for at in range(len(row)):
                if at != own:
                    shape = [-1 if axis == at else 1 for axis in range(joint.dim())]
                    joint = joint * factors[at].reshape(shape)
            belief = joint.sum([axis for axis in range(joint.dim()) if axis != own])
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


@pytest.mark.parametrize("rule", ["ancestral", "ddim"])
def test_samples_of_an_exact_model_have_the_distribution_of_the_language(rule: str) -> None:
    count, steps = 2500, 32
    kernel = UniformKernel(schedule=LogLinear(eps=1e-9), vocab_size=4, mask_token_id=MASK)
    table = language()
    model: Any = ExactDecoder(table, kernel, num_steps=steps)
    sampler = CanvasSampler(
        kernel=kernel,
        mask_token_id=MASK,
        block_length=2,
        max_new_tokens=3,
        num_inference_steps=steps,
        canvas_rule=rule,
        confidence_threshold=None,
    )
    requests = [Request(id=index, prompt=(1,)) for index in range(count)]
    done = sampler.complete(model, requests, key=KEY, num_slots=count)
    found = np.zeros((4, 4, 4))
    for completion in done:
        found[tuple(completion.tokens)] += 1
    expected = count * table[1] / table[1].sum()
    found, expected = found[1:, 1:, 1:], expected[1:, 1:, 1:]
    assert found.sum() == count
    chi_square = torch.tensor(float(((found - expected) ** 2 / expected).sum()))
    assert float(torch.special.gammaincc(torch.tensor((27 - 1) / 2), chi_square / 2)) > 1e-3


# Against the released pipeline.


class SameNumbers:
    """`torch.randint` and `torch.multinomial` as the row's own generator has them."""

    def __init__(self, row: int) -> None:
        self.generator = RowGenerator.for_rows(KEY, torch.tensor([row]))
        self.step, self.is_start = 0, True

    def uniform(self, purpose: int) -> Tensor:
        return self.generator.fold_in(self.step).fold_in(purpose).uniform(BLOCK)[0]

    def randint(self, *args: Any, **kwargs: Any) -> Tensor:
        one = torch.ones((), dtype=torch.float64)
        tokens = KERNEL.draw_noise(one, self.uniform(START if self.is_start else NOISE))[None]
        self.step += not self.is_start
        self.is_start = not self.is_start and self.is_start
        return tokens

    def multinomial(self, probabilities: Tensor, **kwargs: Any) -> Tensor:
        if probabilities.shape[-1] != 3:
            return draw(probabilities, self.uniform(TOKEN))[:, None]
        u, (clean, _, noise) = self.uniform(MOVE), probabilities.double().unbind(-1)
        return torch.where(u < clean, 0, torch.where(u < clean + noise, 2, 1))[:, None]


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


def by_pipeline(
    model: Any, request: Request, scheduler: Any, patch: pytest.MonkeyPatch, **options: Any
) -> list[int]:
    """The new tokens; what the last step finds likeliest is written, with rule entropy_bound, as
    `generate` of transformers does: the pipeline writes random tokens where that step keeps no
    candidate.
    """
    diffusers = pytest.importorskip("diffusers", reason="an optional test dependency")
    numbers = SameNumbers(request.id)
    prompt = torch.tensor([request.prompt])
    wrapped = WithoutCache(model, prompt.shape[1], numbers)
    writes_likeliest = isinstance(scheduler, diffusers.EntropyBoundScheduler)

    def at_step_end(pipeline: Any, _: int, step: int, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        is_last = step == options["num_inference_steps"] - 1
        return {"canvas": kept["logits"].argmax(-1)} if is_last and writes_likeliest else {}

    with patch.context() as patched:
        # Its constructor wants a processor, which only reads prompts.
        cls: Any = type("Bare", (diffusers.DiffusionGemmaPipeline,), {})
        patched.setattr(cls, "_execution_device", torch.device("cpu"), raising=False)
        patched.setattr(cls, "_prepare_inputs", lambda self, **kw: (prompt, prompt * 0 + 1, {}))
        pipeline = cls.__new__(cls)
        object.__setattr__(pipeline, "model", wrapped)
        pipeline.__dict__.update(scheduler=scheduler, processor=object(), eos_token_id=None)
        pipeline.set_progress_bar_config(disable=True)
        patched.setattr(torch, "randint", numbers.randint)
        patched.setattr(torch, "multinomial", numbers.multinomial)
        output = pipeline(
            prompt="",
            gen_length=3 * BLOCK,
            output_type="seq",
            eos_early_stop=False,
            callback_on_step_end=at_step_end,
            callback_on_step_end_tensor_inputs=["logits"],
            **options,
        )
    tokens: list[int] = output.sequences[0].tolist()
    return tokens


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
        {"entropy_bound": 1.0, "confidence_threshold": None},
        {"entropy_bound": 0.3, "t_min": 0.1, "t_max": 0.3, "confidence_threshold": 3.0},
    ],
)
def test_tokens_are_those_of_the_released_pipeline(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="an optional test dependency")
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
    if sampler.canvas_rule == "ddim":
        scheduler = diffusers.DiscreteDDIMScheduler()
        options = {"temperature": sampler.temperature}
    else:
        scheduler = diffusers.EntropyBoundScheduler(
            entropy_bound=sampler.entropy_bound, t_max=sampler.t_max, t_min=sampler.t_min
        )
        options = {}
    for request in requests:
        theirs = by_pipeline(
            model,
            request,
            scheduler,
            monkeypatch,
            num_inference_steps=sampler.num_inference_steps,
            stability_threshold=sampler.stability_threshold,
            confidence_threshold=sampler.confidence_threshold,
            **options,
        )
        assert done[request.id].tokens == theirs
    calls = [completion.num_model_calls for completion in done.values()]
    is_early = min(calls) < 3 * sampler.num_inference_steps
    assert is_early == (sampler.confidence_threshold is not None)


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
    ],
)
def test_bad_parameters_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        canvas(**fields)
