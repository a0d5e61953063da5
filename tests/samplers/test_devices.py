"""Decoding on a device, which is emulated: the same tokens, and one wait per forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.device_reads import count_waits, emulated_device
from tests.models import diffusion_gemma as gemma
from tests.models.test_windows import V as ROW_VOCABULARY
from tests.models.test_windows import denoiser_of
from tests.samplers import test_dflash as drafts
from tests.samplers import test_self_speculation as own_drafts
from tests.samplers.test_decoding import STOPS, causal_model, completed, requests_of
from tests.samplers.test_decoding import V as CAUSAL_V
from tokendiff.diffusion.interfaces import Request
from tokendiff.diffusion.kernels import AbsorbingKernel, HybridKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.diffusion.splitmix import key_from
from tokendiff.models.causal import CausalModel
from tokendiff.models.diffusion_gemma import EncoderDecoder, uniform_noise
from tokendiff.samplers import base
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.base import Sampler
from tokendiff.samplers.block_refinement import BlockRefinementSampler
from tokendiff.samplers.blockwise import BlockwiseSampler
from tokendiff.samplers.canvas import CanvasSampler
from tokendiff.samplers.continuous import ContinuousSampler, FilledRow, RowToFill
from tokendiff.samplers.dflash import DFlashSampler
from tokendiff.samplers.first_hitting import FirstHittingSampler
from tokendiff.samplers.open_ended import OpenEndedSampler
from tokendiff.samplers.remasking import RemaskingSampler
from tokendiff.samplers.sdar import SDARSampler

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0, "stop_token_ids": STOPS}
DRAWN = {**GREEDY, "temperature": 0.9, "top_k": 20}
BLOCKS: dict[str, Any] = {"mask_token_id": 3, "block_length": 4}
SAMPLERS: dict[str, OpenEndedSampler] = {
    "ar": AutoregressiveSampler(**GREEDY),
    "ar, drawn": AutoregressiveSampler(**DRAWN, never_token_id=3),
    "sdar": SDARSampler(**DRAWN, **BLOCKS),
    "sdar, next": SDARSampler(**GREEDY, **BLOCKS, predicts_next=True),
    "sdar, causal context": SDARSampler(**GREEDY, **BLOCKS, context_is_causal=True),
    "block_refinement": BlockRefinementSampler(**GREEDY, **BLOCKS),
    "block_refinement 4d": BlockRefinementSampler(
        **DRAWN, **BLOCKS, attention_mask_mode="4d", editing_threshold=0.1
    ),
    "dflash": DFlashSampler(**GREEDY),
    "dflash, drawn": DFlashSampler(**DRAWN),
    "self_speculation": own_drafts.sampler(draft_steps=2, max_new_tokens=5),
    "self_speculation, ahead": own_drafts.sampler(
        draft_ahead=True, temperature=0.8, draft_temperature=0.8, max_new_tokens=5
    ),
}


class CountingTarget(CausalModel):
    """Counts the passes of a target, which gives its layers' outputs too."""

    num_calls = 0

    def encode_layers(self, *args: Any, **kwargs: Any) -> Any:
        self.num_calls += 1
        return super().encode_layers(*args, **kwargs)


def model_of(name: str) -> tuple[Any, list[Any]]:
    """A model, and the modules that it consists of."""
    if "dflash" in name:
        drafted = drafts.drafted_model()
        drafted.target = CountingTarget(drafted.target.model, vocab_size=drafts.SIZE)
        return drafted, [drafted.target, drafted._draft]
    model: Any = causal_model() if "self" not in name else own_drafts.model()
    return model, [model]


@pytest.mark.parametrize("name", SAMPLERS)
def test_tokens_are_those_of_the_cpu_with_one_wait_per_pass(name: str) -> None:
    sampler, requests = SAMPLERS[name], requests_of((1, 9, 4))
    model, _ = model_of(name)
    expected = completed(sampler, model, requests, num_slots=2)
    model, modules = model_of(name)
    device = emulated_device()
    with count_waits() as waits:
        for module in modules:
            module.to(device)
        waits.sent.clear()
        found = completed(sampler, model, requests, num_slots=2)
    assert found == expected
    assert waits.sends == 0, waits.places()
    num_passes = getattr(model, "target", model).num_calls
    assert 0 < waits.reads <= num_passes, waits.places()


CANVAS_RULES: dict[str, dict[str, Any]] = {
    "entropy_bound": {"entropy_bound": 1.0, "confidence_threshold": 1.9},
    "block_refinement": {"canvas_rule": "block_refinement", "threshold": 0.3},
    "ddim, corrected": {"canvas_rule": "ddim", "corrector_steps": 2},
    "ancestral, corrected where unsure": {
        "canvas_rule": "ancestral",
        "corrector_steps": 1,
        "corrector_k": 2,
        "corrector_selection": "lowest_log_margin",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", CANVAS_RULES)
@pytest.mark.parametrize("kind", ["causal", "encoder and decoder"])
def test_canvases_on_a_device_are_those_of_the_cpu(rule: str, kind: str, tmp_path: Path) -> None:
    """There rows at the first step of a canvas and rows at later ones share a pass."""
    kernel = UniformKernel(schedule=LogLinear(), vocab_size=CAUSAL_V, mask_token_id=3)
    if kind != "causal":
        kernel = uniform_noise(gemma.V)
    sampler = CanvasSampler(
        kernel=kernel,
        mask_token_id=kernel.mask_token_id,
        prediction="posterior",
        block_length=4,
        max_new_tokens=7,
        num_inference_steps=3,
        context_is_causal=kind != "causal",
        **CANVAS_RULES[rule],
    )
    model: Any = causal_model()
    if kind != "causal":
        reference = gemma.diffusion_gemma(tmp_path)
        reference.set_experts_implementation("eager")  # the emulated device has no grouped products
        model = EncoderDecoder(reference, vocab_size=gemma.V)
    requests = [
        Request(id=row, prompt=tuple(range(4, 4 + length)), block_starts=(length,))
        for row, length in enumerate((3, 9, 8))
    ]
    expected = completed(sampler, model, requests, num_slots=2)
    device = emulated_device()
    with count_waits():
        model.to(device)
        found = completed(sampler, model, requests, num_slots=2)
    assert [found[row].tokens for row in found] == [expected[row].tokens for row in found]
    assert len(found) == len(requests)


def test_logits_of_a_large_vocabulary_come_in_more_parts_and_are_waited_for_no_oftener(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a canvas, whose parts of 4,096 places would hold 4 GiB for 262,144 tokens."""
    assert base.positions_at_once(torch.device("cuda"), 262_144) == 1024
    assert base.positions_at_once(torch.device("cuda"), 2**40) == 1
    assert base.positions_at_once(torch.device("cuda"), 30_522) == 4096
    kernel = UniformKernel(schedule=LogLinear(), vocab_size=CAUSAL_V, mask_token_id=3)
    sampler = CanvasSampler(
        kernel=kernel,
        mask_token_id=3,
        prediction="posterior",
        block_length=4,
        max_new_tokens=4,
        num_inference_steps=3,
    )
    found, num_waits = list[Any](), list[int]()
    for most in (CAUSAL_V * 4096, CAUSAL_V * 3):
        monkeypatch.setattr(base, "_GPU_LOGITS", most)
        model, device = causal_model(), emulated_device()
        with count_waits() as waits:
            model.to(device)
            waits.sent.clear()
            ended = completed(sampler, model, requests_of((3, 2)), num_slots=2)
        found.append([ended[row].tokens for row in ended])
        num_waits.append(waits.reads)
    assert found[0] == found[1]
    assert num_waits[0] == num_waits[1]


def test_a_prompt_that_is_read_in_pieces_is_waited_for_once() -> None:
    model = causal_model(max_position_embeddings=2048)
    device = emulated_device()
    sampler = AutoregressiveSampler(max_new_tokens=1, temperature=0.0)
    with count_waits() as waits:
        model.to(device)
        completed(sampler, model, requests_of((1300,)))
    assert model.num_calls == 3
    assert waits.reads == 1, waits.places()


# Whole rows.

MASK = 1
ABSORBING = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
HYBRID = HybridKernel(vocab_size=ROW_VOCABULARY, mask_token_id=MASK, p_uniform=0.3, gamma=1.0)
OF_ROWS: dict[str, tuple[Sampler, int]] = {  # with the most waits of a step
    "ancestral": (AncestralSampler(kernel=ABSORBING, num_inference_steps=4), 1),
    "ancestral, guided": (
        AncestralSampler(kernel=ABSORBING, num_inference_steps=4, guidance_scale=2.0, top_k=9),
        1,
    ),
    # What is drawn depends on how likely the token is that stands there.
    "ancestral, hybrid": (
        AncestralSampler(kernel=HYBRID, num_inference_steps=4, prediction="posterior"),
        2,
    ),
    # A sweep reads how sure the model is, and what it draws.
    "ancestral, corrected where unsure": (
        AncestralSampler(
            kernel=HYBRID,
            num_inference_steps=4,
            corrector_steps=1,
            corrector_k=2,
            corrector_selection="lowest_log_margin",
        ),
        4,
    ),
    "remasking": (RemaskingSampler(kernel=ABSORBING, eta=0.3, num_inference_steps=4), 1),
    "first_hitting": (FirstHittingSampler(kernel=ABSORBING, temperature=0.0), 1),
    "blockwise": (
        BlockwiseSampler(
            kernel=ABSORBING,
            num_inference_steps=2,
            block_size=3,
            remasking_strategy="low_confidence_dynamic",
            cache="dual",
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_rows_are_those_of_the_cpu_and_a_step_waits_for_what_it_draws(name: str) -> None:
    sampler, most = OF_ROWS[name]
    tokens = torch.randint(2, ROW_VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    is_given = torch.arange(9).expand(3, -1) < torch.tensor([[2], [3], [0]])
    is_valid = torch.arange(9).expand(3, -1) < torch.tensor([[9], [7], [9]])
    generator = RowGenerator.for_rows(key_from(3), torch.arange(3))

    def sampled(model: Any) -> tuple[Any, int]:
        steps: list[float] = []
        done = sampler.sample(
            model,
            tokens,
            is_given,
            generator,
            is_valid=is_valid,
            on_step=lambda time, x_t: steps.append(time),
        )
        return done, len(steps)

    def model() -> Any:
        return denoiser_of("llama", predicts_next=False)

    expected, _ = sampled(model())
    there, device = model(), emulated_device()
    with count_waits() as waits:
        there.to(device)
        waits.sent.clear()
        found, num_steps = sampled(there)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.num_model_calls, expected.num_model_calls)
    assert waits.sends == 0, waits.places()
    assert 0 < waits.reads <= most * num_steps, waits.places()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_hitting", "blockwise"])
def test_rows_in_flight_are_those_of_the_cpu_and_a_step_waits_for_what_it_draws(name: str) -> None:
    sampler, most = OF_ROWS[name]
    assert isinstance(sampler, ContinuousSampler)
    generator = torch.Generator().manual_seed(1)
    rows = [
        RowToFill(
            id=number,
            tokens=torch.randint(2, ROW_VOCABULARY, (length,), generator=generator),
            is_given=torch.arange(length) < number % 3,
        )
        for number, length in enumerate((9, 7, 8, 9, 6))
    ]

    def streamed(model: Any) -> tuple[list[FilledRow], int]:
        steps: list[Any] = []
        stream = sampler.stream(model, rows, key=key_from(3), num_slots=2, on_step=steps.append)
        return [row for done in stream for row in done], len(steps)

    expected, _ = streamed(denoiser_of("llama", predicts_next=False))
    there, device = denoiser_of("llama", predicts_next=False), emulated_device()
    with count_waits() as waits:
        there.to(device)
        waits.sent.clear()
        found, num_steps = streamed(there)
    assert found == expected
    assert waits.sends == 0, waits.places()
    assert 0 < waits.reads <= most * num_steps, waits.places()
