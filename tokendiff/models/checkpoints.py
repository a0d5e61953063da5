"""Checkpoints of ours as models, with their averaged weights where they have them."""

from pathlib import Path
from typing import Any

from tokendiff.artifacts.checkpoint import EMA_WEIGHTS, open_checkpoint
from tokendiff.artifacts.model_folders import SCHEDULER_CONFIG, is_plain_causal
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.artifacts.tensor_files import TensorFiles, has_tensors
from tokendiff.data.tokenizers import open_tokenizer
from tokendiff.errors import InputError
from tokendiff.models.denoiser import ModelInTwoParts
from tokendiff.models.families import family_of, published_type
from tokendiff.models.kept_base import open_draft_adapters
from tokendiff.models.opening import load_causal_denoiser, load_denoiser
from tokendiff.models.plans import plan_model

_FIELD = "checkpoint_path"


def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of an opened checkpoint."""
    # transformers looks at the model's type too, and warns of one that it does not know.
    import tokendiff.models.diffusion_transformer  # noqa: F401

    return open_tokenizer(checkpoint, field=_FIELD)


def load_for_inference(checkpoint_path: str | Path) -> tuple[Any, Any, NoiseProcess]:
    """Open a checkpoint for sampling or evaluation, with its averaged weights where it has them.

    Returns:
        (denoiser on the CPU in float32 and eval mode, tokenizer, noise process); a causal denoiser
        where the process has a block_length.
    """
    folder = open_checkpoint(checkpoint_path)
    tokenizer, process = open_process(folder)
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_length": process.max_length,
        "dropout": 0.0,
        "allow_new_weights": False,
        "field": _FIELD,
    }
    denoiser: ModelInTwoParts
    if process.block_length is None:
        denoiser = load_denoiser(
            str(folder), predict="next" if process.predict == "next" else "own", **options
        )
    else:
        denoiser = load_causal_denoiser(
            str(folder),
            keeps_base=process.keeps_base,
            takes_canvas=process.forward_process == "uniform",
            **options,
        )
    if process.keeps_base:
        open_draft_adapters(denoiser, folder)
    else:
        take_average(denoiser.model, folder)
    return denoiser.eval(), tokenizer, process


def check_denoiser(folder: Path) -> tuple[Any, NoiseProcess, Any]:
    """Tokenizer, noise process and transformers config of an opened checkpoint: what
    `load_for_inference` would raise of them is raised here, before a weight is read.
    """
    tokenizer, process = open_process(folder)
    plan = plan_model(
        str(folder),
        tokenizer=tokenizer,
        max_length=process.max_length,
        is_causal=process.block_length is not None,
        takes_canvas=process.forward_process == "uniform",
        field=_FIELD,
    )
    return tokenizer, process, plan.config


def open_process(folder: Path) -> tuple[Any, NoiseProcess]:
    """Tokenizer and noise process of an opened checkpoint.

    Raises:
        InputError: one of them is missing, or they do not belong to each other.
    """
    process = NoiseProcess.load(folder)
    tokenizer = load_tokenizer(folder)
    here = (len(tokenizer), tokenizer.mask_token_id)
    if here != (process.vocab_size, process.mask_token_id):
        raise InputError(
            f"{folder / SCHEDULER_CONFIG}: vocab_size {process.vocab_size} and mask_token_id "
            f"{process.mask_token_id} are not those of the tokenizer beside it, {here[0]} and "
            f"{here[1]}; one of the two belongs to another model"
        )
    return tokenizer, process


def load_autoregressive(folder: Path) -> tuple[Any, Any]:
    """An opened checkpoint of objective ar, with its averaged weights where it has them.

    Returns:
        (causal denoiser on the CPU in float32 and eval mode, tokenizer).
    """
    tokenizer = load_tokenizer(folder)
    denoiser = load_causal_denoiser(
        str(folder),
        tokenizer=tokenizer,
        max_length=1,
        dropout=0.0,
        allow_new_weights=False,
        field=_FIELD,
        keeps_base=True,
        needs_mask=False,
    )
    take_average(denoiser.model, folder)
    return denoiser.eval(), tokenizer


def check_autoregressive(folder: Path) -> int:
    """How many ids the model takes; raises what `load_autoregressive` would of tokenizer and
    config, before a weight is read.
    """
    tokenizer = load_tokenizer(folder)
    plan = plan_model(
        str(folder),
        tokenizer=tokenizer,
        max_length=1,
        is_causal=True,
        field=_FIELD,
        needs_mask=False,
    )
    published = published_type(plan.config)
    if is_plain_causal(folder) and family_of(published).attention != "causal":
        raise InputError(
            f"{_FIELD} {folder} is of type {published!r}, which is no model that predicts text "
            "token by token, and it does not say what noise it was trained under; sample from it "
            "with jobs.generate --model_id"
        )
    size: int = plan.config.get_text_config().vocab_size
    return size


def take_average(model: Any, folder: Path) -> None:
    """Put the averaged weights of a checkpoint, where it has them, in place of the model's."""
    if not has_tensors(folder, EMA_WEIGHTS):
        return
    parameters = dict(model.named_parameters())
    with TensorFiles(folder, EMA_WEIGHTS) as files:
        for name in files.names:
            parameters[name].data.copy_(files.read(name))
