"""Models by name: a transformers name or path, or a small built-in one with new weights."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokendiff.artifacts.model_folders import local_model
from tokendiff.errors import InputError
from tokendiff.models.causal_denoiser import TransformersCausalDenoiser
from tokendiff.models.denoiser import (
    CAUSAL_TYPES,
    TransformersDenoiser,
    attend_both_ways,
    attend_without_window,
)

BUILTIN_PREFIX = "builtin:"
_LEAST_CAUSAL_LENGTH = 4096

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2},
    "mini": {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 2},
    "small": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
}
_BUILTIN_SIZES = {
    f"{family}-{name}": size for family in ("bert", "dit", "qwen3") for name, size in _SIZES.items()
}


def builtin_config(name: str, *, vocab_size: int, max_length: int, tokenizer: Any) -> Any:
    """The transformers config of `builtin:NAME`, for first runs and tests.

    bert-* are ModernBERT-type encoders (rotary positions, pre-norm, GeGLU; arXiv 2412.13663), which
    take no time; dit-* are diffusion transformers, which do; qwen3-* are causal language models.
    """
    from transformers import ModernBertConfig, Qwen3Config

    from tokendiff.models.diffusion_transformer import DiffusionTransformerConfig

    size = _BUILTIN_SIZES.get(name)
    if size is None:
        raise InputError(
            f"model_name_or_path {BUILTIN_PREFIX}{name}: no such built-in model; there are "
            f"{_builtin_names()}"
        )
    if name.startswith("dit-"):
        return DiffusionTransformerConfig(
            **size,
            intermediate_size=4 * size["hidden_size"],
            vocab_size=vocab_size,
            max_position_embeddings=max_length,
            pad_token_id=tokenizer.pad_token_id,
        )
    if name.startswith("qwen3-"):
        heads = size["num_attention_heads"]
        return Qwen3Config(
            **size,
            intermediate_size=3 * size["hidden_size"],
            num_key_value_heads=heads // 2,
            head_dim=size["hidden_size"] // heads,
            tie_word_embeddings=True,
            vocab_size=vocab_size,
            # Rotary positions have no end, and completions go on where training rows stop.
            max_position_embeddings=max(max_length, _LEAST_CAUSAL_LENGTH),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    return ModernBertConfig(
        **size,
        intermediate_size=2 * size["hidden_size"],
        vocab_size=vocab_size,
        max_position_embeddings=max_length,
        layer_types=["full_attention"] * size["num_hidden_layers"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )


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
    _check_mask_token(tokenizer)
    vocab_size = len(tokenizer)
    is_builtin = model_name_or_path.startswith(BUILTIN_PREFIX)
    if is_builtin:
        name = model_name_or_path.removeprefix(BUILTIN_PREFIX)
        config = builtin_config(
            name, vocab_size=vocab_size, max_length=max_length, tokenizer=tokenizer
        )
    else:
        config = _pretrained_config(model_name_or_path)
    auto_class = prepare(config)
    if from_scratch and not is_builtin:
        config.vocab_size = vocab_size
        if tokenizer.pad_token_id is not None:  # another tokenizer's may lie outside the vocabulary
            config.pad_token_id = tokenizer.pad_token_id
    _check_length(config, model_name_or_path, max_length)
    if dropout is not None:
        _set_dropout(config, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        if is_builtin or from_scratch:
            return auto_class.from_config(config, dtype=torch.float32), vocab_size
        model = _pretrained(auto_class, model_name_or_path, config)
        _grow_embedding(model, vocab_size, warn)
        _start_unknown_tokens(model, model_name_or_path, tokenizer, warn)
    return model, vocab_size


def check_vocabulary(
    model_name_or_path: str, tokenizer: Any, *, field: str = "model_name_or_path"
) -> None:
    """Refuse data whose ids mean other tokens than the pretrained model learnt.

    Raises:
        InputError: `tokenizer` gives a token of the model's own tokenizer another id. It may add
            tokens. A model that comes without a tokenizer is taken on trust.
    """
    own = (
        {} if model_name_or_path.startswith(BUILTIN_PREFIX) else _vocabulary_of(model_name_or_path)
    )
    here = tokenizer.get_vocab()
    differing = [token for token, index in own.items() if here.get(token) != index]
    if differing:
        raise InputError(
            f"the data was not made with the tokenizer of {field} "
            f"{model_name_or_path!r} ({len(differing):,} of its {len(own):,} tokens have another "
            f"id, {differing[0]!r} for one); preprocess with tokenizer_name_or_path set to the "
            "model, or train from_scratch"
        )


def _vocabulary_of(model_name_or_path: str) -> dict[str, int]:
    """Tokens and ids of the tokenizer that comes with a model; empty where there is none."""
    from transformers import AutoTokenizer

    name = local_model(model_name_or_path)
    folder = Path(name)
    # transformers makes an empty tokenizer up for some folders that have none.
    if folder.is_dir() and not any(
        any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "spiece*")
    ):
        return {}
    try:
        own = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return {}
    return dict(own.get_vocab())


def _builtin_names() -> str:
    return ", ".join(BUILTIN_PREFIX + name for name in _BUILTIN_SIZES)


def _check_mask_token(tokenizer: Any) -> None:
    mask = tokenizer.mask_token_id
    if mask is None:
        raise InputError(
            "the tokenizer has no mask token; jobs.preprocess adds one to the tokenizer it saves"
        )
    if not 0 <= mask < len(tokenizer):
        raise InputError(
            f"the tokenizer's mask token {tokenizer.mask_token!r} has id {mask}, outside its "
            f"vocabulary of {len(tokenizer)}; number the tokens from 0 without gaps"
        )


def _pretrained_config(name: str) -> Any:
    from transformers import AutoConfig

    # Registers our own architecture, which a checkpoint may be of.
    import tokendiff.models.diffusion_transformer  # noqa: F401

    try:
        return AutoConfig.from_pretrained(local_model(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model_name_or_path {name!r} cannot be opened ({_first_line(error)}); "
            f"give a folder with a config.json, a hub name, or one of {_builtin_names()}"
        ) from error


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


def _pretrained(auto_class: Any, name: str, config: Any) -> Any:
    from safetensors import SafetensorError

    folder = Path(local_model(name))
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise InputError(
            f"model_name_or_path {name}: a config but no weights; from_scratch starts from new ones"
        )
    try:
        return auto_class.from_pretrained(local_model(name), config=config, dtype=torch.float32)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model_name_or_path {name!r}: weights cannot be read ({_first_line(error)})"
        ) from error


def _grow_embedding(model: Any, vocab_size: int, warn: Callable[[str], None]) -> None:
    size = model.get_input_embeddings().num_embeddings
    if size >= vocab_size:
        return
    # transformers draws the new rows from a normal distribution around the mean of the old ones
    # that is so narrow (1e-9 of their covariance) that they are that mean.
    model.resize_token_embeddings(vocab_size, mean_resizing=True)
    warn(
        f"embedding resized from {size} to {vocab_size}: the tokenizer has {vocab_size - size} "
        "tokens that the model does not know; theirs start at the mean of the others"
    )


@torch.no_grad()
def _start_unknown_tokens(
    model: Any, name: str, tokenizer: Any, warn: Callable[[str], None]
) -> None:
    """Give tokens that the model's own tokenizer does not have the mean embedding.

    Models are padded to a round number of ids, so a mask token that was added to the tokenizer
    often needs no new row: it gets one that was never trained, of a scale unlike all others (zero,
    in some). The mean of what was trained says "some token" and no one in particular, which is what
    a mask is; noise would be a token that the layers above take for content. One new token need not
    be told apart from others, so the mean is not disturbed. With a tied head the mask's logit
    becomes the mean of all logits; it is excluded wherever a mask could be predicted.
    """
    own = _vocabulary_of(name)
    unknown = sorted(set(tokenizer.get_vocab().values()) - set(own.values()))
    if not own or not unknown:
        return
    known = torch.tensor(sorted(own.values()))
    heads = [model.get_input_embeddings().weight]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not heads[0]:
        heads.append(output.weight)
    for weight in heads:
        weight[unknown] = weight[known[known < len(weight)]].mean(0)
    warn(
        f"{len(unknown)} tokens of the tokenizer are not in the model's own, the first of them "
        f"{tokenizer.convert_ids_to_tokens(unknown[0])!r}; their embeddings start at the mean"
    )


def _check_length(config: Any, name: str, max_length: int) -> None:
    # RoBERTa's positions start behind the padding id.
    offset = (
        config.pad_token_id + 1
        if config.model_type in ("roberta", "xlm-roberta", "camembert")
        else 0
    )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and longest - offset < max_length:
        raise InputError(
            f"model_name_or_path {name!r} takes at most {longest - offset} tokens; max_length is "
            f"{max_length}"
        )


def _set_dropout(config: Any, dropout: float) -> None:
    names = [name for name in vars(config) if "dropout" in name or name.endswith("_pdrop")]  # GPT-2
    for field in (name for name in names if "classifier" not in name):
        value = getattr(config, field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, field, dropout)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
