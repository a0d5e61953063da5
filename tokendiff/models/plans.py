"""What a name, a tokenizer and an objective make of a model, by its config alone."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokendiff.artifacts.model_folders import SCHEDULER_CONFIG, local_model
from tokendiff.errors import InputError
from tokendiff.models.builtin import (
    BUILTIN_PREFIX,
    MODEL_FIELD,
    builtin_config,
    builtin_names,
    is_builtin,
)
from tokendiff.models.denoiser import (
    attend_both_ways,
    attend_without_window,
    check_isolation,
)
from tokendiff.models.diffusion_gemma import check_encoder_decoder
from tokendiff.models.families import CAUSAL_TYPES, MASKED_TYPES, family_of, published_type
from tokendiff.models.layouts import take_tokens
from tokendiff.models.pretrained import (
    check_length,
    check_weights,
    is_draft_config,
    open_config,
)
from tokendiff.models.vocabulary import check_mask_token

NO_WEIGHTS = "from_scratch starts from new ones"


@dataclass(frozen=True, kw_only=True)
class ModelPlan:
    """A model that fits a tokenizer's rows, by its config alone.

    Attributes:
        field: of the config that gave the name.
        config: of transformers, changed to what is wanted of the model.
        auto_class: what makes a model of it.
        vocab_size: ids that the tokenizer has.
        is_new: whether it starts from new weights.
        predict: of a denoiser of whole rows, what its weights were trained to tell: "own", a
            position's state tells its own token, or "next", the one behind it.
    """

    name: str
    field: str
    config: Any
    auto_class: Any
    vocab_size: int
    is_new: bool
    predict: Literal["own", "next"] = "own"


def plan_model(
    model_name_or_path: str,
    *,
    tokenizer: Any,
    max_length: int,
    is_causal: bool,
    from_scratch: bool = False,
    isolates_documents: bool = False,
    predict: Literal["own", "next"] | None = None,
    field: str = MODEL_FIELD,
    needs_mask: bool = True,
    takes_canvas: bool = False,
) -> ModelPlan:
    """What `load_denoiser`, or `load_causal_denoiser` if `is_causal`, would load; no weight is
    read.

    Args:
        needs_mask: False: a model that is judged token by token is given no mask.
        takes_canvas: the objective's blocks are of random tokens, as an encoder with a decoder
            denoises them.
        predict: what a denoiser of whole rows is to tell; by default what it has learnt to.
        isolates_documents: of the rows; every causal model hides their documents from each other.
        field: of the config that gave the name.

    Raises:
        InputError: no such model, one that does not go with the tokenizer, the objective or rows of
            isolated documents, or one that is too short for max_length.
    """
    if needs_mask:
        check_mask_token(tokenizer)
    name, vocab_size = model_name_or_path, len(tokenizer)
    if is_builtin(name):
        config = builtin_config(
            name, vocab_size=vocab_size, max_length=max_length, tokenizer=tokenizer
        )
        auto_class = _fitted(config, name, is_causal=is_causal, field=field)
    else:
        config, auto_class = open_trainable_config(
            name, is_causal=is_causal, field=field, takes_canvas=takes_canvas
        )
        if family_of(published_type(config)).attention == "canvas":
            _check_canvas_start(config, name, vocab_size, from_scratch=from_scratch, field=field)
        elif from_scratch:
            config.vocab_size = vocab_size
            if (layout := family_of(published_type(config)).layout) is not None:
                take_tokens(config, layout, tokenizer)
            else:  # another tokenizer's ids may lie outside the vocabulary, or be other tokens
                config.bos_token_id = tokenizer.bos_token_id
                config.eos_token_id = tokenizer.eos_token_id
                if tokenizer.pad_token_id is not None:
                    config.pad_token_id = tokenizer.pad_token_id
            if _sees_rows(config):
                config.mask_token_id = tokenizer.mask_token_id
    is_new = from_scratch or is_builtin(name)
    check_length(config, name, field=field, max_length=max_length)
    if isolates_documents and not is_causal:
        check_isolation(config, origin=f"{field} {name!r}")
    if not is_new:
        check_weights(name, field=field, remedy=NO_WEIGHTS)
        _check_mask(config, name, tokenizer, field=field)
    return ModelPlan(
        name=name,
        field=field,
        config=config,
        auto_class=auto_class,
        vocab_size=vocab_size,
        is_new=is_new,
        predict="own" if is_causal else _prediction(name, config, predict, field=field),
    )


def _check_canvas_start(
    config: Any, name: str, vocab_size: int, *, from_scratch: bool, field: str
) -> None:
    """Raise InputError where an encoder with a decoder cannot start as it is."""
    if from_scratch:
        raise InputError(
            f"from_scratch: {field} {name!r} is of type {published_type(config)!r}, which is "
            f"trained on from its weights; leave it out, or give {BUILTIN_PREFIX}qwen3-tiny"
        )
    there = config.get_text_config().vocab_size
    if vocab_size > there:
        raise InputError(
            f"{field} {name!r} has {there:,} embeddings, and the rows' tokenizer {vocab_size:,} "
            "tokens; preprocess with tokenizer_name_or_path set to the model"
        )


def _prediction(
    name: str, config: Any, wanted: Literal["own", "next"] | None, *, field: str
) -> Literal["own", "next"]:
    learnt = _learnt_to_predict(name, config)
    is_published = family_of(published_type(config)).attention == "rows"
    if is_published and wanted not in (None, learnt):
        raise InputError(
            f"predict {wanted!r}: {field} {name!r} is of type {published_type(config)!r}, whose "
            f"published loaders assume predict {learnt!r}; remove predict"
        )
    return wanted or learnt


def _check_mask(config: Any, name: str, tokenizer: Any, *, field: str) -> None:
    """Raise InputError where a published denoiser has learnt another mask than the rows have."""
    family = family_of(published_type(config))
    mask = getattr(config, "mask_token_id", None)
    mask = family.mask_token_id if mask is None else mask
    is_known = family.attention == "rows" or (family.attention == "blocks" and mask is not None)
    if is_known and mask != tokenizer.mask_token_id:
        raise InputError(
            f"{field} {name!r}: its mask is id {mask}, and that of the rows' tokenizer is "
            f"{tokenizer.mask_token!r}, id {tokenizer.mask_token_id}; preprocess with "
            "tokenizer_name_or_path set to the model, or name mask_token in its "
            "tokenizer_config.json"
        )


def _learnt_to_predict(name: str, config: Any) -> Literal["own", "next"]:
    """What the weights of a denoiser tell: as its checkpoint records, else as its family does."""
    path = Path(local_model(name)) / SCHEDULER_CONFIG
    if path.is_file():
        try:
            fields = json.loads(path.read_text())
        except ValueError:
            fields = {}
        if isinstance(fields, dict) and fields.get("predict") == "next":
            return "next" if fields.get("block_length") is None else "own"
    return family_of(published_type(config)).predict


def open_trainable_config(
    model_name_or_path: str,
    *,
    is_causal: bool,
    field: str = MODEL_FIELD,
    takes_canvas: bool = False,
) -> tuple[Any, Any]:
    """The config of a model that is not built in, and the Auto class that opens it for such an
    objective.

    Args:
        takes_canvas: see `plan_model`.

    Raises:
        InputError: no such model, or one of a type that does not go with the objective.
    """
    remedy = f"give a folder with a config.json, a hub name, or one of {builtin_names()}"
    config = open_config(model_name_or_path, field=field, remedy=remedy)
    auto_class = _fitted(
        config, model_name_or_path, is_causal=is_causal, field=field, takes_canvas=takes_canvas
    )
    return config, auto_class


def _fitted(
    config: Any, name: str, *, is_causal: bool, field: str, takes_canvas: bool = False
) -> Any:
    """Change a config to what is wanted of its model; returns the Auto class that makes one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if is_draft_config(config):
        raise InputError(
            f"{field} {name!r} is a DFlash draft; give it as draft_model_id to objective 'dflash'"
        )
    if family_of(published_type(config)).attention == "canvas":
        if not (is_causal and takes_canvas):
            raise InputError(
                f"{field} {name!r} is of type {published_type(config)!r}, which denoises canvases "
                "of random tokens; train it with objective 'block_diffusion', noise 'uniform' and "
                "ar_loss_weight above 0, or give another model"
            )
        check_encoder_decoder(config, origin=f"{field} {name!r}")
        return AutoModelForImageTextToText
    if is_causal:
        _check_causal(config, name, field)
        # What a position sees is said by masks alone, in training as in decoding.
        attend_without_window(config)
        return AutoModelForCausalLM
    auto_class = _auto_class(config, name, field)
    if config.model_type in CAUSAL_TYPES or _sees_rows(config):
        attend_both_ways(config)
    return auto_class


def _sees_rows(config: Any) -> bool:
    return family_of(published_type(config)).attention == "rows"


def _check_causal(config: Any, name: str, field: str) -> None:
    is_known = config.model_type in MASKED_TYPES
    if _sees_rows(config):
        raise InputError(
            f"{field} {name!r} is of type {published_type(config)!r}, a denoiser of whole rows; "
            "train it with objective 'mdlm'"
        )
    if not is_known or not getattr(config, "is_causal", True):
        what = "but attends in both directions" if is_known else "and no causal one known here"
        raise InputError(
            f"{field} {name!r} is of type {config.model_type!r}, {what}; this objective takes a "
            f"causal language model of type {', '.join(CAUSAL_TYPES)}, or "
            f"{BUILTIN_PREFIX}qwen3-tiny | mini | small | base"
        )


def _auto_class(config: Any, name: str, field: str) -> Any:
    """The Auto class that opens a model of this config with its head."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
    )

    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForMaskedLM
    if config.model_type in CAUSAL_TYPES or _sees_rows(config):
        return AutoModelForCausalLM
    if family_of(published_type(config)).attention == "blocks":
        raise InputError(
            f"{field} {name!r} is of type {published_type(config)!r}, a denoiser of blocks; train "
            "it with objective 'block_diffusion'"
        )
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    reason = (
        "a causal language model that is not known to work with attention in both directions"
        if is_causal
        else "which is no language model"
    )
    raise InputError(
        f"{field} {name!r} is of type {published_type(config)!r}, {reason}; give a masked "
        "language model (BERT, RoBERTa, ModernBERT, ...) or a causal one of type "
        f"{', '.join(CAUSAL_TYPES)}"
    )
