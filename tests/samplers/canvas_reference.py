"""The released code that denoises canvases, made to draw the random numbers that ours draws."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.canvas import MOVE, NOISE, START, TOKEN, CanvasSampler
from tokendiff.samplers.categorical import draw


class SameNumbers:
    """`torch.randint` and `torch.multinomial` as a row's own generator has them."""

    def __init__(self, row: int, *, key: int, kernel: UniformKernel, block: int) -> None:
        self.generator = RowGenerator.for_rows(key, torch.tensor([row]))
        self.kernel, self.block = kernel, block
        self.step, self.is_start = 0, True

    def uniform(self, purpose: int) -> Tensor:
        return self.generator.fold_in(self.step).fold_in(purpose).uniform(self.block)[0]

    def randint(self, *args: Any, **kwargs: Any) -> Tensor:
        one = torch.ones((), dtype=torch.float64)
        uniform = self.uniform(START if self.is_start else NOISE)
        tokens = self.kernel.draw_noise(one, uniform)[None]
        self.step += not self.is_start
        self.is_start = not self.is_start and self.is_start
        return tokens

    def multinomial(self, probabilities: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if probabilities.shape[-1] != 3:
            return draw(probabilities, self.uniform(TOKEN))[:, None]
        u, (clean, _, noise) = self.uniform(MOVE), probabilities.double().unbind(-1)
        return torch.where(u < clean, 0, torch.where(u < clean + noise, 2, 1))[:, None]

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch, "randint", self.randint)
        patch.setattr(torch, "multinomial", self.multinomial)


def scheduler_of(sampler: CanvasSampler) -> tuple[Any, dict[str, Any]]:
    """The scheduler of diffusers that has the sampler's rule, and the pipeline's options."""
    diffusers = pytest.importorskip("diffusers", reason="an optional test dependency")
    options: dict[str, Any] = {
        "num_inference_steps": sampler.num_inference_steps,
        "stability_threshold": sampler.stability_threshold,
        "confidence_threshold": sampler.confidence_threshold,
    }
    if sampler.canvas_rule == "entropy_bound":
        scheduler = diffusers.EntropyBoundScheduler(
            entropy_bound=sampler.entropy_bound, t_max=sampler.t_max, t_min=sampler.t_min
        )
        return scheduler, options
    options["temperature"] = sampler.temperature
    if sampler.canvas_rule == "ddim":
        return diffusers.DiscreteDDIMScheduler(), options
    scheduler = diffusers.BlockRefinementScheduler(
        threshold=sampler.threshold, editing_threshold=sampler.editing_threshold
    )
    return scheduler, options


def by_pipeline(
    model: Any,
    prompt: tuple[int, ...],
    sampler: CanvasSampler,
    numbers: SameNumbers,
    patch: pytest.MonkeyPatch,
) -> list[int]:
    """The new tokens; what the last step finds likeliest is written, with rule entropy_bound, as
    `generate` of transformers does: the pipeline writes random tokens where that step keeps no
    candidate.
    """
    diffusers = pytest.importorskip("diffusers", reason="an optional test dependency")
    ids = torch.tensor([prompt])
    scheduler, options = scheduler_of(sampler)
    writes_likeliest = sampler.canvas_rule == "entropy_bound"

    def at_step_end(pipeline: Any, _: int, step: int, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        is_last = step == sampler.num_inference_steps - 1
        return {"canvas": kept["logits"].argmax(-1)} if is_last and writes_likeliest else {}

    decoder = model.model.decoder
    mask_of = decoder.create_diffusion_decoder_attention_mask

    def mask_by_either_name(**inputs: Any) -> Any:
        """diffusers 0.42 calls the cache as transformers did before 5.24."""
        if "cache" in inspect.signature(mask_of).parameters and "past_key_values" in inputs:
            inputs["cache"] = inputs.pop("past_key_values")
        return mask_of(**inputs)

    with patch.context() as patched:
        patched.setattr(decoder, "create_diffusion_decoder_attention_mask", mask_by_either_name)
        # Its constructor wants a processor, which only reads prompts.
        cls: Any = type("Bare", (diffusers.DiffusionGemmaPipeline,), {})
        patched.setattr(cls, "_execution_device", torch.device("cpu"), raising=False)
        patched.setattr(cls, "_prepare_inputs", lambda self, **kw: (ids, ids * 0 + 1, {}))
        pipeline = cls.__new__(cls)
        object.__setattr__(pipeline, "model", model)
        pipeline.__dict__.update(scheduler=scheduler, processor=object(), eos_token_id=None)
        pipeline.set_progress_bar_config(disable=True)
        numbers.patch(patched)
        output = pipeline(
            prompt="",
            gen_length=sampler.max_new_tokens,
            output_type="seq",
            eos_early_stop=False,
            callback_on_step_end=at_step_end,
            callback_on_step_end_tensor_inputs=["logits"],
            **options,
        )
    tokens: list[int] = output.sequences[0].tolist()
    return tokens
