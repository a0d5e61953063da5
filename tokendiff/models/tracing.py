"""One sample on its way from noise to text, step by step: for the report, and for a picture."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.prompts import GenerationRow
from tokendiff.diffusion.interfaces import OnProgress, unwatched
from tokendiff.models.completion import CompletionModel
from tokendiff.models.sampling import SamplingModel

TRACE_STEPS = 64
_PROMPT_TOKENS = 8  # of a row of text, for what is written block by block


@dataclass(frozen=True, kw_only=True)
class Trace:
    """
    Attributes:
        frames: token ids of the sample, the start first, then after every step.
        times: t of each frame; block by block the share of the tokens that are still masked.
        vocabulary: text of every id that occurs.
        num_prompt_tokens: tokens at the front that were given.
    """

    frames: list[list[int]]
    times: list[float]
    vocabulary: dict[int, str]
    mask_token_id: int
    num_prompt_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def can_be_traced(process: NoiseProcess) -> bool:
    """Whether `trace_sample` knows a sampler for it."""
    if process.block_length is None:
        return True
    return process.forward_process == "absorbing" and process.attention_mask_mode == "4d"


def trace_sample(
    checkpoint: Path,
    *,
    row: list[int],
    seed: int,
    num_given: int | None = None,
    temperature: float = 1.0,
    device: str = "cpu",
    on_progress: OnProgress = unwatched,
) -> Trace:
    """A sample of a checkpoint for which `can_be_traced`.

    Args:
        row: token ids of a text; a model that writes block by block continues its first ones.
        num_given: how many of them: of a chat those before its first answer. By default a few.
    """
    process = NoiseProcess.load(checkpoint)
    if process.block_length is None:
        return _whole_row(checkpoint, seed, temperature, device, on_progress)
    if num_given is None:
        num_given = max(1, min(_PROMPT_TOKENS, process.max_length // 4))
    return _by_blocks(checkpoint, row[:num_given], seed, temperature, device, on_progress)


def _whole_row(
    checkpoint: Path, seed: int, temperature: float, device: str, on_progress: OnProgress
) -> Trace:
    from tokendiff.config.generate import GenerateConfig
    from tokendiff.config.samplers import AncestralConfig

    sampler = AncestralConfig(num_inference_steps=TRACE_STEPS, temperature=temperature)
    model = SamplingModel(checkpoint, GenerateConfig(sampler=sampler, seed=seed), device=device)
    frames: list[list[int]] = []
    times: list[float] = []

    def keep(time: float, x_t: Tensor) -> None:
        frames.append(x_t[0].tolist())
        times.append(time)

    model.sample(
        [GenerationRow(id=0, prompt=None)],
        on_step=keep,
        on_progress=lambda figures: on_progress(lambda: (len(frames), figures()[1])),
    )
    return Trace(
        frames=frames,
        times=times,
        vocabulary=_texts(model.tokenizer, frames),
        mask_token_id=model.process.mask_token_id,
    )


def _by_blocks(
    checkpoint: Path,
    prompt: list[int],
    seed: int,
    temperature: float,
    device: str,
    on_progress: OnProgress,
) -> Trace:
    from tokendiff.config.generate import GenerateConfig
    from tokendiff.config.samplers import SDARSamplerConfig

    process = NoiseProcess.load(checkpoint)
    mask = process.mask_token_id
    num_new = min(TRACE_STEPS, process.max_length - len(prompt))
    sampler = SDARSamplerConfig(max_new_tokens=num_new, temperature=temperature)
    config = GenerateConfig(checkpoint_path=str(checkpoint), sampler=sampler, seed=seed)
    model = CompletionModel(config, checkpoint=checkpoint, device=device)
    frames = [[*prompt, *[mask] * num_new]]

    def keep(tokens: Tensor) -> None:
        frames.append(tokens[0, : len(frames[0])].tolist())
        on_progress(lambda: (len(frames), num_new - frames[-1].count(mask)))

    completion = model.traced(prompt, on_step=keep)
    # What is behind the token that ends the text is no part of it.
    length = len(prompt) + len(completion.tokens)
    frames = [frame[:length] for frame in frames]
    return Trace(
        frames=frames,
        times=[frame.count(mask) / max(1, len(completion.tokens)) for frame in frames],
        vocabulary=_texts(model.tokenizer, frames),
        mask_token_id=mask,
        num_prompt_tokens=len(prompt),
    )


def _texts(tokenizer: Any, frames: list[list[int]]) -> dict[int, str]:
    ids = sorted({token for frame in frames for token in frame})
    return {token: tokenizer.decode([token]) for token in ids}
