"""Models by name: a transformers name or path, or a small built-in one with new weights."""

from pathlib import Path
from typing import Any

import torch

from tokendiff.errors import InputError
from tokendiff.models.denoiser import MaskedLMDenoiser

BUILTIN_PREFIX = "builtin:"

# Small ModernBERT-type encoders (rotary positions, pre-norm, GeGLU; arXiv 2412.13663) for first
# runs and tests.
_BUILTIN_SIZES: dict[str, dict[str, Any]] = {
    "bert-tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    },
    "bert-mini": {
        "num_hidden_layers": 4,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "intermediate_size": 256,
    },
    "bert-small": {
        "num_hidden_layers": 6,
        "hidden_size": 384,
        "num_attention_heads": 6,
        "intermediate_size": 768,
    },
    "bert-base": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}


def builtin_config(name: str, *, vocab_size: int, max_length: int, tokenizer: Any) -> Any:
    """The transformers config of `builtin:NAME`."""
    from transformers import ModernBertConfig

    size = _BUILTIN_SIZES.get(name)
    if size is None:
        known = ", ".join(BUILTIN_PREFIX + known for known in _BUILTIN_SIZES)
        raise InputError(
            f"model_name_or_path {BUILTIN_PREFIX}{name}: no such built-in model; there are {known}"
        )
    return ModernBertConfig(
        **size,
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
) -> MaskedLMDenoiser:
    """A denoiser in float32 on the CPU.

    Args:
        tokenizer: the one that made the data; the model's embedding grows to its size where it is
            smaller.
        max_length: longest row that the model will see.
        from_scratch: take the config of `model_name_or_path` and new weights.
        dropout: sets every dropout of the architecture; None leaves the config's.
        seed: decides new weights.

    Raises:
        InputError: no such model, not a masked LM, too short for max_length, no mask token.
    """
    from transformers import AutoModelForMaskedLM

    if tokenizer.mask_token_id is None:
        raise InputError(
            "the tokenizer has no mask token; jobs.preprocess adds one to the tokenizer it saves"
        )
    vocab_size = len(tokenizer)
    is_builtin = model_name_or_path.startswith(BUILTIN_PREFIX)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        if is_builtin:
            name = model_name_or_path.removeprefix(BUILTIN_PREFIX)
            config = builtin_config(
                name, vocab_size=vocab_size, max_length=max_length, tokenizer=tokenizer
            )
        else:
            config = _pretrained_config(model_name_or_path)
            if from_scratch:
                config.vocab_size = vocab_size
        _check_fits(config, model_name_or_path, max_length)
        if dropout is not None:
            _set_dropout(config, dropout)
        if is_builtin or from_scratch:
            model = AutoModelForMaskedLM.from_config(config, dtype=torch.float32)
        else:
            model = _pretrained(model_name_or_path, config)
        if model.get_input_embeddings().num_embeddings < vocab_size:
            model.resize_token_embeddings(vocab_size)
    return MaskedLMDenoiser(model, vocab_size=vocab_size)


def check_vocabulary(model_name_or_path: str, tokenizer: Any) -> None:
    """Refuse data whose ids mean other tokens than the pretrained model learnt.

    Raises:
        InputError: `tokenizer` gives a token of the model's own tokenizer another id. It may add
            tokens. A model that comes without a tokenizer is taken on trust.
    """
    from transformers import AutoTokenizer

    folder = Path(model_name_or_path)
    has_none = folder.is_dir() and not any(
        any(folder.glob(pattern)) for pattern in ("tokenizer*", "vocab*", "spiece*")
    )
    # transformers makes an empty tokenizer up for some folders that have none.
    if model_name_or_path.startswith(BUILTIN_PREFIX) or has_none:
        return
    try:
        own = AutoTokenizer.from_pretrained(model_name_or_path, trust_remote_code=False).get_vocab()
    except (OSError, ValueError, ImportError):
        return
    here = tokenizer.get_vocab()
    differing = [token for token, index in own.items() if here.get(token) != index]
    if differing:
        raise InputError(
            f"the data was not made with the tokenizer of model_name_or_path "
            f"{model_name_or_path!r} ({len(differing):,} of its {len(own):,} tokens have another "
            f"id, {differing[0]!r} for one); preprocess with tokenizer_name_or_path set to the "
            "model, or train from_scratch"
        )


def _pretrained_config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        known = ", ".join(BUILTIN_PREFIX + known for known in _BUILTIN_SIZES)
        raise InputError(
            f"model_name_or_path {name!r} cannot be opened ({_first_line(error)}); "
            f"give a folder with a config.json, a hub name, or one of {known}"
        ) from error


def _pretrained(name: str, config: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForMaskedLM

    if (
        Path(name).is_dir()
        and not any(Path(name).glob("*.safetensors"))
        and not any(Path(name).glob("*.bin"))
    ):
        raise InputError(
            f"model_name_or_path {name}: a config but no weights; from_scratch starts from new ones"
        )
    try:
        return AutoModelForMaskedLM.from_pretrained(name, config=config, dtype=torch.float32)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"model_name_or_path {name!r}: weights cannot be read ({_first_line(error)})"
        ) from error


def _check_fits(config: Any, name: str, max_length: int) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise InputError(
            f"model_name_or_path {name!r} is of type {config.model_type!r}, which has no masked "
            "language model; "
            "objective mdlm needs one (BERT, RoBERTa, ModernBERT, ...)"
        )
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
    for field in (name for name in vars(config) if "dropout" in name and "classifier" not in name):
        value = getattr(config, field)
        if isinstance(value, int | float) and not isinstance(value, bool):
            setattr(config, field, dropout)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
