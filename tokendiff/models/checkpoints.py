"""Checkpoints of ours as models, with their averaged weights where they have them."""

from pathlib import Path
from typing import Any

from tokendiff.artifacts.checkpoint import EMA_WEIGHTS, open_checkpoint
from tokendiff.artifacts.model_folders import SCHEDULER_CONFIG
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.tokenizers import open_tokenizer
from tokendiff.errors import InputError
from tokendiff.models.opening import load_causal_denoiser, load_denoiser


def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of an opened checkpoint."""
    # transformers looks at the model's type too, and warns of one that it does not know.
    import tokendiff.models.diffusion_transformer  # noqa: F401

    return open_tokenizer(checkpoint, field="checkpoint_path")


def load_for_inference(checkpoint_path: str | Path) -> tuple[Any, Any, NoiseProcess]:
    """Open a checkpoint for sampling or evaluation, with its averaged weights where it has them.

    Returns:
        (denoiser on the CPU in float32 and eval mode, tokenizer, noise process); a causal denoiser
        where the process has a block_length.
    """
    folder = open_checkpoint(checkpoint_path)
    process = NoiseProcess.load(folder)
    tokenizer = load_tokenizer(folder)
    here = (len(tokenizer), tokenizer.mask_token_id)
    if here != (process.vocab_size, process.mask_token_id):
        raise InputError(
            f"{folder / SCHEDULER_CONFIG}: vocab_size {process.vocab_size} and mask_token_id "
            f"{process.mask_token_id} are not those of the tokenizer beside it, {here[0]} and "
            f"{here[1]}; one of the two belongs to another model"
        )
    load = load_denoiser if process.block_length is None else load_causal_denoiser
    denoiser = load(str(folder), tokenizer=tokenizer, max_length=process.max_length, dropout=0.0)
    take_average(denoiser.model, folder)
    return denoiser.eval(), tokenizer, process


def load_autoregressive(folder: Path) -> tuple[Any, Any]:
    """An opened checkpoint of objective ar, with its averaged weights where it has them.

    Returns:
        (causal denoiser on the CPU in float32 and eval mode, tokenizer).
    """
    tokenizer = load_tokenizer(folder)
    denoiser = load_causal_denoiser(str(folder), tokenizer=tokenizer, max_length=1, dropout=0.0)
    take_average(denoiser.model, folder)
    return denoiser.eval(), tokenizer


def take_average(model: Any, folder: Path) -> None:
    """Put the averaged weights of a checkpoint, where it has them, in place of the model's."""
    from safetensors.torch import load_file

    if (folder / EMA_WEIGHTS).is_file():
        parameters = dict(model.named_parameters())
        for name, value in load_file(folder / EMA_WEIGHTS).items():
            parameters[name].data.copy_(value)
