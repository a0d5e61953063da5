"""Models to train, by name: a transformers name or path, or a small built-in one."""

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch

from tokendiff.models.builtin import MODEL_FIELD
from tokendiff.models.causal_denoiser import TransformersCausalDenoiser
from tokendiff.models.denoiser import SPLIT_TYPES, TransformersDenoiser, check_padding
from tokendiff.models.diffusion_gemma import (
    MODEL_TYPE,
    EncoderDecoderDenoiser,
    buffers_to_float32,
)
from tokendiff.models.layers import to_float32
from tokendiff.models.plans import NO_WEIGHTS, ModelPlan, plan_model
from tokendiff.models.pretrained import Weights, dtype_in_files, open_weights
from tokendiff.models.vocabulary import fit_embedding


def load_denoiser(
    model_name_or_path: str,
    *,
    tokenizer: Any,
    max_length: int,
    from_scratch: bool = False,
    dropout: float | None = None,
    seed: int = 0,
    warn: Callable[[str], None] = warnings.warn,
    allow_new_weights: bool = True,
    field: str = MODEL_FIELD,
    is_on_disk: bool = False,
    predict: Literal["own", "next"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> TransformersDenoiser:
    """A denoiser on the CPU.

    Args:
        tokenizer: the one that made the data; the model's embedding grows to its size where it is
            smaller.
        max_length: longest row that the model will see.
        from_scratch: take the config of `model_name_or_path` and new weights.
        dropout: sets every dropout of the architecture; None leaves the config's.
        seed: decides new weights.
        warn: hears which weights are new, which are not used, that the embedding grew, and what is
            not trained.
        allow_new_weights: a model that is to be trained may lack some, such as a head; False: one
            that is used as it is may not.
        field: of the config that gave the name, for errors.
        is_on_disk: leave weights in their files, in their dtype, until somebody makes float32 of
            them layer by layer; embeddings and head are float32 all the same. A model that gets
            new weights is in memory.
        predict: "own", a position's state tells its own token, or "next", the one behind it; by
            default as the weights were trained.
        dtype: of weights in memory; less than float32 only for a model that is not trained.

    Raises:
        InputError: no such model, neither a masked LM nor a causal one that can be made
            bidirectional, one that sees padding, too short for max_length, no usable mask token, or
            weights are missing.
    """
    plan = plan_model(
        model_name_or_path,
        tokenizer=tokenizer,
        max_length=max_length,
        is_causal=False,
        from_scratch=from_scratch,
        predict=predict,
        field=field,
    )
    model = _load(
        plan,
        tokenizer,
        dropout,
        seed,
        warn,
        allow_new_weights=allow_new_weights,
        is_on_disk=is_on_disk,
        dtype=dtype,
    )
    denoiser = TransformersDenoiser(
        model, vocab_size=plan.vocab_size, predicts_next=plan.predict == "next"
    )
    if denoiser.is_split:  # such architectures are known to use all they have, and no padding
        return denoiser
    check_padding(denoiser, origin=f"{field} {plan.name!r}")
    if unused := denoiser.freeze_unused():
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
    allow_new_weights: bool = True,
    field: str = MODEL_FIELD,
    is_on_disk: bool = False,
    keeps_base: bool = False,
    needs_mask: bool = True,
    takes_canvas: bool = False,
) -> TransformersCausalDenoiser | EncoderDecoderDenoiser:
    """A causal language model that stays one, to be told what each position sees; or an encoder
    with a decoder.

    Args, and what is raised: as `load_denoiser`; a model that attends in both directions is
        refused.
        keeps_base: nothing is added to it for a mask that it does not know.
        needs_mask, takes_canvas: see `plan_model`.
    """
    plan = plan_model(
        model_name_or_path,
        tokenizer=tokenizer,
        max_length=max_length,
        is_causal=True,
        from_scratch=from_scratch,
        field=field,
        needs_mask=needs_mask,
        takes_canvas=takes_canvas,
    )
    if plan.config.model_type == MODEL_TYPE:
        if dropout is not None:
            _set_dropout(plan.config.get_text_config(), dropout)
        weights = _open_on_disk(plan) if is_on_disk else _open(plan, torch.float32)
        return EncoderDecoderDenoiser(
            weights.complete(), vocab_size=plan.vocab_size, mask_token_id=tokenizer.mask_token_id
        )
    model = _load(
        plan,
        tokenizer,
        dropout,
        seed,
        warn,
        allow_new_weights=allow_new_weights,
        is_on_disk=is_on_disk,
        keeps_base=keeps_base,
    )
    return TransformersCausalDenoiser(model, vocab_size=plan.vocab_size)


def _load(
    plan: ModelPlan,
    tokenizer: Any,
    dropout: float | None,
    seed: int,
    warn: Callable[[str], None],
    *,
    allow_new_weights: bool,
    is_on_disk: bool,
    keeps_base: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The transformers model of a plan, whose config it changes."""
    if dropout is not None:
        _set_dropout(plan.config, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        if plan.is_new:
            return plan.auto_class.from_config(plan.config, dtype=torch.float32)
        weights = _open(plan, dtype) if not is_on_disk else _open_on_disk(plan)
        model = weights.told(warn) if allow_new_weights else weights.complete()
        if keeps_base:
            return model
        fit_embedding(model, plan.name, tokenizer, plan.vocab_size, warn, field=plan.field)
    return model


def _open(plan: ModelPlan, dtype: torch.dtype) -> Weights:
    return open_weights(
        plan.auto_class, plan.name, plan.config, field=plan.field, dtype=dtype, remedy=NO_WEIGHTS
    )


def _open_on_disk(plan: ModelPlan) -> Weights:
    """What is computed of the embeddings is computed in float32, and so is all of a model that is
    tried out before it is trained (`freeze_unused`).
    """
    dtype = dtype_in_files(plan.name)
    has_halves = plan.config.model_type == MODEL_TYPE
    if dtype is None or not (has_halves or plan.config.model_type in SPLIT_TYPES):
        return _open(plan, torch.float32)
    drawn_so_far = torch.get_rng_state()
    weights = _open(plan, dtype)
    if weights.missing:  # new ones are drawn, and in float32, as where all is in memory
        torch.set_rng_state(drawn_so_far)
        return _open(plan, torch.float32)
    for module in (weights.model.get_input_embeddings(), weights.model.get_output_embeddings()):
        if module is not None:
            to_float32(module)
    if has_halves:
        buffers_to_float32(weights.model)
    return weights


def _set_dropout(config: Any, dropout: float) -> None:
    names = [name for name in vars(config) if "dropout" in name or name.endswith("_pdrop")]  # GPT-2
    for field in (name for name in names if "classifier" not in name):
        value = getattr(config, field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, field, dropout)
