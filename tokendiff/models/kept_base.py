"""A causal model that stays what it was, with adapters beside it that draft: `train.keep_base`.

Its folder holds the weights of the base model, which any tool opens as that model; the adapters
(`adapters.safetensors`, or averaged ones) with the embedding of the mask, named as the parameters
of the model with its adapters are; and in `draft_adapters.json` what adapters those are.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from tokendiff.artifacts.checkpoint import ADAPTERS, DRAFT_ADAPTERS, EMA_ADAPTERS
from tokendiff.artifacts.model_folders import local_model
from tokendiff.artifacts.tensor_files import TensorFiles, has_tensors
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.models.adapters import DraftAdapters, adapter_tensors, add_adapters
from tokendiff.models.vocabulary import unknown_mask

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig


class DraftAdapterFields(TypedDict):
    """What `draft_adapters.json` holds.

    Attributes:
        is_new_token: the base model does not know the mask, and has no logit of it.
    """

    rank: int
    alpha: float
    target_modules: list[str]
    mask_token_id: int
    is_new_token: bool


def draft_adapter_fields(
    config: "TrainConfig", tokenizer: Any, *, name: str, field: str
) -> DraftAdapterFields:
    """The adapters that a run trains beside the base model `name`, which `field` gave.

    Raises:
        InputError: the model cannot stay as it is with that tokenizer.
    """
    assert config.lora_rank is not None
    folder = Path(local_model(name))
    # The tokenizer of such a folder knows the mask, and its weights do not.
    is_kept = (folder / DRAFT_ADAPTERS).is_file()
    return {
        "rank": config.lora_rank,
        "alpha": config.lora_alpha,
        "target_modules": list(config.lora_target_modules),
        "mask_token_id": tokenizer.mask_token_id,
        "is_new_token": read_fields(folder)["is_new_token"]
        if is_kept
        else unknown_mask(name, tokenizer, field=field),
    }


def put_draft_adapters(
    model: Any, fields: DraftAdapterFields, *, dropout: float = 0.0, seed: int = 0
) -> None:
    """Put new adapters into a denoiser or decoder of the base model, in place."""
    add_adapters(
        model.model,
        rank=fields["rank"],
        alpha=fields["alpha"],
        dropout=dropout,
        target_modules=fields["target_modules"],
        trained_token_id=fields["mask_token_id"],
        is_new_token=fields["is_new_token"],
        seed=seed,
    )
    model.draft_adapters = DraftAdapters(model.model)
    if fields["is_new_token"]:
        model.vocab_size = fields["mask_token_id"]


def open_draft_adapters(model: Any, folder: Path) -> None:
    """Put the adapters of a checkpoint, averaged where it has such, into a denoiser or decoder of
    its base model, in place.

    Raises:
        InputError: peft is not installed, or what adapters they are cannot be read.
        CorruptFileError: some are missing.
    """
    put_draft_adapters(model, read_fields(folder))
    fill_draft_adapters(model, folder)


def read_as_base(model: Any, folder: Path) -> None:
    """Make of an opened denoiser or decoder the base model alone, in place: it has the logits that
    the base model had.

    Raises:
        InputError: what adapters there are cannot be read.
    """
    fields = read_fields(folder)
    if fields["is_new_token"]:
        model.vocab_size = fields["mask_token_id"]


@torch.no_grad()
def fill_draft_adapters(model: Any, folder: Path) -> None:
    """Take the adapters of a checkpoint.

    Raises:
        CorruptFileError: some are missing.
    """
    stem = EMA_ADAPTERS if has_tensors(folder, EMA_ADAPTERS) else ADAPTERS
    with TensorFiles(folder, stem) as files:
        for name, tensor in adapter_tensors(model.model).items():
            if name not in files.names:
                raise CorruptFileError(f"{folder} has no tensor {name!r} of its {stem}")
            tensor.copy_(files.read(name))


def read_fields(folder: Path) -> DraftAdapterFields:
    """What adapters a checkpoint has.

    Raises:
        InputError: it does not say.
    """
    path = folder / DRAFT_ADAPTERS
    try:
        found = json.loads(path.read_text())
        return {name: found[name] for name in DraftAdapterFields.__annotations__}  # type: ignore
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} does not say what adapters draft beside the base model "
            f"({type(error).__name__}: {error}); use the whole folder that training wrote"
        ) from error
