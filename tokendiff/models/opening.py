"""Models to train, by name: a transformers name or path, or a small built-in one."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from tokendiff.errors import InputError
from tokendiff.models.builtin import (
    BUILTIN_PREFIX,
    builtin_config,
    builtin_names,
    is_builtin,
)
from tokendiff.models.causal_denoiser import TransformersCausalDenoiser
from tokendiff.models.denoiser import (
    TransformersDenoiser,
    attend_both_ways,
    attend_without_window,
)
from tokendiff.models.families import CAUSAL_TYPES
from tokendiff.models.pretrained import longest_input, open_config, open_weights
from tokendiff.models.vocabulary import (
    check_mask_token,
    grow_embedding,
    start_unknown_tokens,
)

_FIELD = "model_name_or_path"


def load_denoiser(
    model_name_or_path: str,
    *,
    tokenizer: Any,
    max_length: int,
    from_scratch: bool = False,
    dropout: float | None = None,
    seed: int = 0,
    warn: Callable[[str], None] = warnings.warn,
) -> TransformersDenoiser:
    """A denoiser in float32 on the CPU.

    Args:
        tokenizer: the one that made the data; the model's embedding grows to its size where it is
            smaller.
        max_length: longest row that the model will see.
        from_scratch: take the config of `model_name_or_path` and new weights.
        dropout: sets every dropout of the architecture; None leaves the config's.
        seed: decides new weights.
        warn: hears that the embedding grew, and what is not trained.

    Raises:
        InputError: no such model, neither a masked LM nor a causal one that can be made
            bidirectional, too short for max_length, no usable mask token.
    """

    def prepare(config: Any) -> Any:
        auto_class = _auto_class(config, model_name_or_path)
        if config.model_type in CAUSAL_TYPES:
            attend_both_ways(config)
        return auto_class

    model, vocab_size = _open_model(
        model_name_or_path,
        prepare,
        tokenizer=tokenizer,
        max_length=max_length,
        from_scratch=from_scratch,
        dropout=dropout,
        seed=seed,
        warn=warn,
    )
    denoiser = TransformersDenoiser(model, vocab_size=vocab_size)
    # The architectures that are split are known to use all they have.
    if not denoiser.is_split and (unused := denoiser.freeze_unused()):
        warn(f"{len(unused)} parameters do not lead to logits and stay as they are: {unused}")
    return denoiser


def load_causal_denoiser(
    model_name_or_path: str,
    *,
    tokenizer: Any,
    max_length: int,
    from_scratch: bool = False,
    dropout: float | None = None,
    seed: int = 0,
    warn: Callable[[str], None] = warnings.warn,
) -> TransformersCausalDenoiser:
    """A causal language model that stays one, to be told what each position sees.

    Args, and what is raised: as `load_denoiser`; a model that attends in both directions is
        refused.
    """

    def prepare(config: Any) -> Any:
        from transformers import AutoModelForCausalLM

        if config.model_type not in CAUSAL_TYPES or not getattr(config, "is_causal", True):
            is_known = config.model_type in CAUSAL_TYPES
            what = "but attends in both directions" if is_known else "and no causal one"
            raise InputError(
                f"model_name_or_path {model_name_or_path!r} is of type {config.model_type!r}, "
                f"{what}; this objective takes a causal language model of type "
                f"{', '.join(CAUSAL_TYPES)}, or {BUILTIN_PREFIX}qwen3-tiny | mini | small | base"
            )
        # What a position sees is said by masks alone, in training as in decoding.
        attend_without_window(config)
        return AutoModelForCausalLM

    model, vocab_size = _open_model(
        model_name_or_path,
        prepare,
        tokenizer=tokenizer,
        max_length=max_length,
        from_scratch=from_scratch,
        dropout=dropout,
        seed=seed,
        warn=warn,
    )
    return TransformersCausalDenoiser(model, vocab_size=vocab_size)


def _open_model(
    model_name_or_path: str,
    prepare: Callable[[Any], Any],
    *,
    tokenizer: Any,
    max_length: int,
    from_scratch: bool,
    dropout: float | None,
    seed: int,
    warn: Callable[[str], None],
) -> tuple[Any, int]:
    """A transformers model, and the ids that its tokenizer has.

    Args:
        prepare: changes the model's config to what is wanted of it and returns the Auto class.
    """
    check_mask_token(tokenizer)
    vocab_size = len(tokenizer)
    has_new_weights = from_scratch or is_builtin(model_name_or_path)
    if is_builtin(model_name_or_path):
        config = builtin_config(
            model_name_or_path, vocab_size=vocab_size, max_length=max_length, tokenizer=tokenizer
        )
    else:
        config = open_config(
            model_name_or_path,
            field=_FIELD,
            remedy=f"give a folder with a config.json, a hub name, or one of {builtin_names()}",
        )
    auto_class = prepare(config)
    if from_scratch and not is_builtin(model_name_or_path):
        config.vocab_size = vocab_size
        if tokenizer.pad_token_id is not None:  # another tokenizer's may lie outside the vocabulary
            config.pad_token_id = tokenizer.pad_token_id
    _check_length(config, model_name_or_path, max_length)
    if dropout is not None:
        _set_dropout(config, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        if has_new_weights:
            return auto_class.from_config(config, dtype=torch.float32), vocab_size
        model = open_weights(
            auto_class,
            model_name_or_path,
            config,
            field=_FIELD,
            dtype=torch.float32,
            remedy="from_scratch starts from new ones",
        ).model
        grow_embedding(model, vocab_size, warn)
        start_unknown_tokens(model, model_name_or_path, tokenizer, warn)
    return model, vocab_size


def _auto_class(config: Any, name: str) -> Any:
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
        f"model_name_or_path {name!r} is of type {config.model_type!r}, {reason}; give a masked "
        "language model (BERT, RoBERTa, ModernBERT, ...) or a causal one of type "
        f"{', '.join(CAUSAL_TYPES)}"
    )


def _check_length(config: Any, name: str, max_length: int) -> None:
    longest = longest_input(config)
    if longest is not None and longest < max_length:
        raise InputError(
            f"model_name_or_path {name!r} takes at most {longest} tokens; max_length is "
            f"{max_length}"
        )


def _set_dropout(config: Any, dropout: float) -> None:
    names = [name for name in vars(config) if "dropout" in name or name.endswith("_pdrop")]  # GPT-2
    for field in (name for name in names if "classifier" not in name):
        value = getattr(config, field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, field, dropout)
