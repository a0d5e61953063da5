"""What a name, a tokenizer and an objective make of a model, by its config alone."""

from dataclasses import dataclass
from typing import Any

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
from tokendiff.models.families import CAUSAL_TYPES
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
    """

    name: str
    field: str
    config: Any
    auto_class: Any
    vocab_size: int
    is_new: bool


def plan_model(
    model_name_or_path: str,
    *,
    tokenizer: Any,
    max_length: int,
    is_causal: bool,
    from_scratch: bool = False,
    isolates_documents: bool = False,
    field: str = MODEL_FIELD,
) -> ModelPlan:
    """What `load_denoiser`, or `load_causal_denoiser` if `is_causal`, would load; no weight is
    read.

    Args:
        isolates_documents: of the rows; every causal model hides their documents from each other.
        field: of the config that gave the name.

    Raises:
        InputError: no such model, one that does not go with the tokenizer, the objective or rows of
            isolated documents, or one that is too short for max_length.
    """
    check_mask_token(tokenizer)
    name, vocab_size = model_name_or_path, len(tokenizer)
    if is_builtin(name):
        config = builtin_config(
            name, vocab_size=vocab_size, max_length=max_length, tokenizer=tokenizer
        )
        auto_class = _fitted(config, name, is_causal=is_causal, field=field)
    else:
        config, auto_class = open_trainable_config(name, is_causal=is_causal, field=field)
        if from_scratch:
            config.vocab_size = vocab_size
            if tokenizer.pad_token_id is not None:  # another's may lie outside the vocabulary
                config.pad_token_id = tokenizer.pad_token_id
    is_new = from_scratch or is_builtin(name)
    check_length(config, name, field=field, max_length=max_length)
    if isolates_documents and not is_causal:
        check_isolation(config, origin=f"{field} {name!r}")
    if not is_new:
        check_weights(name, field=field, remedy=NO_WEIGHTS)
    return ModelPlan(
        name=name,
        field=field,
        config=config,
        auto_class=auto_class,
        vocab_size=vocab_size,
        is_new=is_new,
    )


def open_trainable_config(
    model_name_or_path: str, *, is_causal: bool, field: str = MODEL_FIELD
) -> tuple[Any, Any]:
    """The config of a model that is not built in, and the Auto class that opens it for such an
    objective.

    Raises:
        InputError: no such model, or one of a type that does not go with the objective.
    """
    remedy = f"give a folder with a config.json, a hub name, or one of {builtin_names()}"
    config = open_config(model_name_or_path, field=field, remedy=remedy)
    return config, _fitted(config, model_name_or_path, is_causal=is_causal, field=field)


def _fitted(config: Any, name: str, *, is_causal: bool, field: str) -> Any:
    """Change a config to what is wanted of its model; returns the Auto class that makes one."""
    from transformers import AutoModelForCausalLM

    if is_draft_config(config):
        raise InputError(
            f"{field} {name!r} is a DFlash draft; give it as draft_model_id to objective 'dflash'"
        )
    if is_causal:
        _check_causal(config, name, field)
        # What a position sees is said by masks alone, in training as in decoding.
        attend_without_window(config)
        return AutoModelForCausalLM
    auto_class = _auto_class(config, name, field)
    if config.model_type in CAUSAL_TYPES:
        attend_both_ways(config)
    return auto_class


def _check_causal(config: Any, name: str, field: str) -> None:
    is_known = config.model_type in CAUSAL_TYPES
    if not is_known or not getattr(config, "is_causal", True):
        what = "but attends in both directions" if is_known else "and no causal one"
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
    if config.model_type in CAUSAL_TYPES:
        return AutoModelForCausalLM
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    reason = (
        "a causal language model that is not known to work with attention in both directions"
        if is_causal
        else "which is no language model"
    )
    raise InputError(
        f"{field} {name!r} is of type {config.model_type!r}, {reason}; give a masked "
        "language model (BERT, RoBERTa, ModernBERT, ...) or a causal one of type "
        f"{', '.join(CAUSAL_TYPES)}"
    )
