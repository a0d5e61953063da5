"""Drafts by name, and whether one fits its target: all of it known from the two configs, before a
weight is read.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from tokendiff.artifacts.model_folders import (
    DRAFT_ARCHITECTURE,
    SECOND_DRAFT_ARCHITECTURE,
    local_model,
    revision_of,
)
from tokendiff.errors import InputError, input_errors, reason_of
from tokendiff.models.dflash.config import EMBEDDING_OUTPUT, DFlashDraftConfig, spread_layer_ids
from tokendiff.models.dflash.mask_token import choose_mask_token
from tokendiff.models.dflash.model import DFlashDraftModel, class_of
from tokendiff.models.pretrained import (
    check_causal_model,
    check_length,
    is_draft_config,
    open_config,
    open_weights,
)
from tokendiff.models.vocabulary import check_vocabulary

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig
    from tokendiff.data.rows import TokenData

_DRAFT = "draft_model_id"
# Of the published drafts of the second layout.
_WINDOW, _CONV_GROUP_SIZE, _SELECTOR_RANK, _SELECTOR_TOP_K = 2048, 16, 256, 16
_DRAFT_REMEDY = "give the folder or hub name of a DFlash draft"


@dataclass(frozen=True, kw_only=True)
class DraftPlan:
    """A draft that fits its target, by their configs alone.

    Attributes:
        draft: the config of `draft_model_id`, or of a new draft.
        target: the target's config.
        notes: what was chosen that nobody asked for.
    """

    draft: DFlashDraftConfig
    target: Any
    target_model_id: str
    draft_model_id: str | None
    notes: tuple[str, ...] = ()


def plan_draft(config: "TrainConfig", *, tokenizer: Any, max_length: int) -> DraftPlan:
    """Draft and target of a training run of objective dflash, by their configs; no weight is read.

    Args:
        tokenizer: the one that made the data.
        max_length: tokens of a row.

    Raises:
        InputError: something is missing, or does not fit the target.
    """
    target, draft = check_pair(config, max_length=max_length)
    objective, name = config.objective, config.target_model_id
    assert objective.name == "dflash"
    assert name is not None
    check_vocabulary(name, tokenizer, field="target_model_id")
    notes: tuple[str, ...] = ()
    if draft is None:
        mask = objective.mask_token_id
        mask = tokenizer.mask_token_id if mask is None else mask
        is_given = objective.mask_token_id is not None
        # The mask token that jobs.preprocess adds to a tokenizer may lie beyond the embedding.
        if mask is None or (not is_given and mask >= target.get_text_config().vocab_size):
            mask, note = choose_mask_token(target, tokenizer, target_model_id=name)
            notes = (note,)
        draft = new_draft_config(
            target,
            target_model_id=name,
            num_layers=objective.draft_num_layers,
            block_size=objective.block_size,
            mask_token_id=mask,
            target_layer_ids=layers_of_new_draft(config, target),
            layout=objective.draft_layout,
        )
    if draft.block_size is not None and draft.block_size > max_length:
        raise InputError(
            f"a block of {draft.block_size} tokens does not fit rows of {max_length}; lower "
            "block_size, or preprocess with a larger max_length"
        )
    return DraftPlan(
        draft=draft,
        target=target,
        target_model_id=name,
        draft_model_id=config.draft_model_id,
        notes=notes,
    )


def check_pair(config: "TrainConfig", *, max_length: int) -> tuple[Any, DFlashDraftConfig | None]:
    """The configs of target and draft, where it is not a new one, whatever the tokenizer.

    Raises:
        InputError: one is missing, or they go neither together nor with rows of that length.
    """
    name = config.target_model_id
    if name is None:
        raise InputError(
            "objective dflash trains a draft for a causal language model: set target_model_id to "
            "its name or path"
        )
    target = open_target_config(name)
    check_length(target, name, field="target_model_id", max_length=max_length)
    if config.draft_model_id is None:
        return target, None
    draft = open_draft_config(config.draft_model_id)
    check_fit(draft, target, draft_model_id=config.draft_model_id, target_model_id=name)
    return target, draft


def check_rows(data: "TokenData", target: Any, tokenizer: Any, *, target_model_id: str) -> None:
    """Raise InputError where rows hold ids that a target, which is frozen, has no embedding for.

    Its tokenizer may have more tokens than it has embeddings, and jobs.preprocess adds a mask token
    and an EOS token to a tokenizer that has none.
    """
    size = target.get_text_config().vocab_size
    if len(tokenizer) <= size:
        return
    highest = data.highest_token()
    if highest is not None and highest >= size:
        raise InputError(
            f"data_path {data.folder} holds tokens up to id {highest} "
            f"({tokenizer.convert_ids_to_tokens(highest)}), but target_model_id "
            f"{target_model_id!r} is frozen and has {size} embeddings; leave such tokens out of "
            "the text, or preprocess with a tokenizer whose EOS token the target has"
        )


def open_draft_config(draft_model_id: str) -> DFlashDraftConfig:
    """The config of a published draft, or of one of ours.

    Raises:
        InputError: there is none, it is no DFlash draft, or one that this version cannot run.
    """
    plain = open_config(draft_model_id, field=_DRAFT, remedy=_DRAFT_REMEDY)
    if not is_draft_config(plain):
        raise InputError(
            f"draft_model_id {draft_model_id!r} is no DFlash draft (its config.json has "
            f"architectures {plain.architectures}, not {DRAFT_ARCHITECTURE} or "
            f"{SECOND_DRAFT_ARCHITECTURE})"
        )
    with input_errors(f"{_DRAFT} {draft_model_id!r} cannot be opened", _DRAFT_REMEDY):
        return DFlashDraftConfig.from_pretrained(
            local_model(draft_model_id), **revision_of(draft_model_id)
        )


def open_target_config(target_model_id: str) -> Any:
    """The config of a causal language model of transformers.

    Raises:
        InputError: there is none, or it is not a causal language model.
    """
    remedy = "give a folder with a config.json, or a hub name"
    config = open_config(target_model_id, field="target_model_id", remedy=remedy)
    check_causal_model(config, target_model_id, field="target_model_id")
    return config


def check_fit(
    draft: DFlashDraftConfig, target: Any, *, draft_model_id: str, target_model_id: str
) -> None:
    """Raise InputError, naming all that does not fit, where a draft is not one of the target."""
    text = target.get_text_config()
    layers = text.num_hidden_layers
    problems = []
    if draft.hidden_size != text.hidden_size:
        problems.append(f"hidden_size {draft.hidden_size}, the target {text.hidden_size}")
    if draft.vocab_size != text.vocab_size:
        problems.append(f"vocab_size {draft.vocab_size}, the target {text.vocab_size}")
    if draft.num_target_layers not in (None, layers):
        problems.append(f"num_target_layers {draft.num_target_layers}, the target has {layers}")
    elif max(draft.target_layer_ids) >= layers:
        problems.append(
            f"target_layer_ids {draft.target_layer_ids}, the target has layers 0..{layers - 1}"
        )
    if problems:
        raise InputError(
            f"draft_model_id {draft_model_id!r} is not a draft of target_model_id "
            f"{target_model_id!r}: the draft has {'; '.join(problems)}"
        )


def new_draft_config(
    target: Any,
    *,
    target_model_id: str,
    num_layers: int,
    block_size: int,
    mask_token_id: int,
    target_layer_ids: list[int] | None = None,
    layout: Literal["dflash", "dflash2"] = "dflash",
) -> DFlashDraftConfig:
    """The config of a new draft: layers as wide as the target's, and as many hidden states of it as
    the draft has layers, which is how the published drafts are built.

    Raises:
        InputError: the target has too few layers, or cannot embed the mask.
    """
    text = target.get_text_config()
    ids = target_layer_ids or _spread(target, num_layers, target_model_id)
    if not 0 <= mask_token_id < text.vocab_size:
        raise InputError(
            f"the mask token has id {mask_token_id}, but target_model_id {target_model_id!r} is "
            f"frozen and has {text.vocab_size} embeddings; set mask_token_id to the id of a "
            "token that does not occur in your text"
        )
    heads = text.num_attention_heads
    fields: dict[str, Any] = {
        "architectures": [DRAFT_ARCHITECTURE],
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        "max_position_embeddings": text.max_position_embeddings,
        "num_hidden_layers": num_layers,
        "num_target_layers": text.num_hidden_layers,
        "block_size": block_size,
        "dflash_config": {"target_layer_ids": ids, "mask_token_id": mask_token_id},
    }
    rope = getattr(text, "rope_parameters", None)
    optional = {
        "rope_parameters": rope if isinstance(rope, dict) and "rope_type" in rope else None,
        "rms_norm_eps": getattr(text, "rms_norm_eps", None),
        "initializer_range": getattr(text, "initializer_range", None),
        **{name: getattr(text, name, None) for name in ("pad_token_id", "bos_token_id")},
        "eos_token_id": getattr(text, "eos_token_id", None),
    }
    fields |= {name: value for name, value in optional.items() if value is not None}
    if layout == "dflash2":
        fields["architectures"] = [SECOND_DRAFT_ARCHITECTURE]
        fields["layer_types"] = ["sliding_attention"] * num_layers
        fields |= {"sliding_window": _WINDOW, "is_causal": False}
        fields["dflash_config"] |= {
            "block_size": block_size,
            "conv_kernel_size": 2,
            "conv_group_size": math.gcd(text.hidden_size, _CONV_GROUP_SIZE),
            "selector_rank": _SELECTOR_RANK,
            "selector_top_k": min(_SELECTOR_TOP_K, text.vocab_size),
        }
    try:
        return DFlashDraftConfig(**fields)
    except ValueError as error:
        raise InputError(f"a draft for {target_model_id!r}: {reason_of(error)}") from error


def layers_of_new_draft(config: "TrainConfig", target: Any) -> list[int]:
    """Which of the target's layers a new draft reads: as many as it has layers itself.

    Without the target's hidden states it has as many copies of its embeddings: the same size, and
    opened by everything that opens drafts.

    Raises:
        InputError: the target has too few layers.
    """
    objective, name = config.objective, config.target_model_id
    assert objective.name == "dflash"
    assert name is not None
    if not objective.use_target_hidden_states:
        return [EMBEDDING_OUTPUT] * objective.draft_num_layers
    return _spread(target, objective.draft_num_layers, name)


def _spread(target: Any, num_layers: int, target_model_id: str) -> list[int]:
    try:
        return spread_layer_ids(target.get_text_config().num_hidden_layers, num_layers)
    except ValueError as error:
        raise InputError(
            f"draft_num_layers {num_layers} and target_model_id {target_model_id!r}: {error}"
        ) from error


def load_draft(draft_model_id: str, *, dtype: torch.dtype = torch.float32) -> DFlashDraftModel:
    """A draft on the CPU, in eval mode.

    Raises:
        InputError: it cannot be opened, or its weights are not those that its config speaks of.
    """
    config = open_draft_config(draft_model_id)
    weights = open_weights(class_of(config), draft_model_id, config, field=_DRAFT, dtype=dtype)
    wrong = {"missing": weights.missing, "unexpected": weights.unused}
    if listed := [f"{kind} {names[:3]}" for kind, names in wrong.items() if names]:
        raise InputError(
            f"draft_model_id {draft_model_id!r}: its weights are not those of its config: "
            f"{'; '.join(listed)}"
        )
    model: DFlashDraftModel = weights.model.eval()
    return model
