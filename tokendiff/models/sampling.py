"""A checkpoint ready to sample, in the process that calls it: what a generation actor, or a
notebook, holds.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tokendiff.checkpoint import NoiseProcess, load_for_inference
from tokendiff.data.prompts import GenerationRow
from tokendiff.errors import InputError
from tokendiff.interfaces import StepCallback
from tokendiff.random import RowGenerator, key_from
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.base import Sampler
from tokendiff.samplers.batch import prefix_batch
from tokendiff.samplers.blockwise import BlockwiseSampler
from tokendiff.samplers.first_hitting import FirstHittingSampler
from tokendiff.samplers.remasking import RemaskingSampler

if TYPE_CHECKING:
    from tokendiff.config import GenerateConfig, SamplerConfig


# The closed table behind `sampler: NAME`; a sampler's fields are those of its config.
SAMPLERS: dict[str, type[Sampler]] = {
    "ancestral": AncestralSampler,
    "blockwise": BlockwiseSampler,
    "remdm": RemaskingSampler,
    "first_hitting": FirstHittingSampler,
}


def build_sampler(
    config: "SamplerConfig", process: NoiseProcess, *, seq_len: int | None = None
) -> Sampler:
    """The sampler that a config asks for, of a checkpoint's process.

    Args:
        seq_len: tokens of a sample; by default the trained max_length.

    Raises:
        InputError: the process does not go with the sampler, or a block is longer than a sample.
    """
    seq_len = seq_len or process.max_length
    fields = config.model_dump(exclude={"name"})
    if fields.get("block_size", 1) > seq_len:
        raise InputError(
            f"sampler block_size {fields['block_size']} must not exceed seq_len {seq_len}; lower it"
        )
    if process.block_length is not None:
        raise InputError(
            f"sampler {config.name!r} does not go with this checkpoint of objective "
            f"{process.objective!r}, which decodes block by block; use sampler 'block_refinement' "
            "or 'sdar'"
        )
    if config.guidance_scale != 1.0 and process.forward_process == "uniform":
        raise InputError(
            f"guidance_scale {config.guidance_scale}: a checkpoint of forward_process 'uniform' "
            "was not trained on masks in place of a prompt; set guidance_scale to 1"
        )
    try:
        return SAMPLERS[config.name](
            kernel=process.kernel(), prediction=process.prediction, **fields
        )
    except ValueError as error:
        raise InputError(
            f"sampler {config.name!r} does not go with this checkpoint, whose forward_process is "
            f"{process.forward_process!r}: {error}; use sampler 'ancestral', or a "
            "checkpoint of forward_process 'absorbing'"
        ) from error


def check_sampler(
    config: "SamplerConfig", process: NoiseProcess, *, seq_len: int | None = None
) -> None:
    """Raise what `build_sampler` would: for a job, before any model is loaded."""
    build_sampler(config, process, seq_len=seq_len)


class SamplingModel:
    """A checkpoint ready to sample: what one actor holds."""

    def __init__(self, checkpoint: Path, config: "GenerateConfig", *, device: str) -> None:
        denoiser, self.tokenizer, self.process = load_for_inference(checkpoint)
        self._denoiser = denoiser.to(device)
        self._device, self._config = torch.device(device), config
        self.seq_len = config.seq_len or self.process.max_length
        self._sampler = build_sampler(config.sampler, self.process, seq_len=self.seq_len)

    def sample(
        self, rows: list[GenerationRow], *, on_step: StepCallback | None = None
    ) -> list[dict[str, Any]]:
        """One record per row, as a part file holds it.

        Returns:
            id, prompt, num_prompt_tokens, gaps (places in the prompt that were filled), tokens,
            text (prompt included), num_model_calls, and seconds: what the row's batch took.
        """
        start = time.perf_counter()
        prompts = [encode_prompt(self.tokenizer, row.prompt) for row in rows]
        tokens, is_given = prefix_batch(
            prompts, seq_len=self.seq_len, mask_token_id=self.process.mask_token_id
        )
        ids = torch.tensor([row.id for row in rows], dtype=torch.int64, device=self._device)
        generator = RowGenerator.for_rows(key_from(self._config.seed, "sample"), ids)
        is_bf16 = self._config.mixed_precision == "bf16"
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_bf16):
            samples = self._sampler.sample(
                self._denoiser,
                tokens.to(self._device),
                is_given.to(self._device),
                generator,
                on_step=on_step,
            )
        seconds = round(time.perf_counter() - start, 3)
        mask = self.process.mask_token_id
        return [
            {
                "id": row.id,
                "prompt": row.prompt,
                "num_prompt_tokens": len(prompt),
                "gaps": [at for at, token in enumerate(prompt) if token == mask],
                "tokens": sampled,
                "text": self.tokenizer.decode(sampled, skip_special_tokens=True),
                "num_model_calls": calls,
                "seconds": seconds,
            }
            for row, prompt, sampled, calls in zip(
                rows,
                prompts,
                samples.tokens.tolist(),
                samples.num_model_calls.tolist(),
                strict=True,
            )
        ]


def encode_prompt(tokenizer: Any, prompt: str | None) -> list[int]:
    """Token ids of a prompt, without the special tokens that some tokenizers put around a text."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt is not None else []
