"""Small models that need no download: their configs, for first runs and tests, with new weights."""

from typing import Any

from tokendiff.errors import InputError

MODEL_FIELD = "model_name_or_path"  # of the config, that names a model to train
BUILTIN_PREFIX = "builtin:"
_LEAST_CAUSAL_LENGTH = 4096

_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2},
    "mini": {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 2},
    "small": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 6},
    "base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
}
BUILTIN_SIZES = {
    f"{family}-{name}": size for family in ("bert", "dit", "qwen3") for name, size in _SIZES.items()
}


def is_builtin(name: str) -> bool:
    return name.startswith(BUILTIN_PREFIX)


def builtin_names() -> str:
    """The names of all built-in models, as a config writes them."""
    return ", ".join(BUILTIN_PREFIX + name for name in BUILTIN_SIZES)


def check_builtin(name: str) -> None:
    """Raise InputError where there is no built-in model of a name that begins like one."""
    if name.removeprefix(BUILTIN_PREFIX) not in BUILTIN_SIZES:
        raise InputError(
            f"{MODEL_FIELD} {name}: no such built-in model; there are {builtin_names()}"
        )


def builtin_config(name: str, *, vocab_size: int, max_length: int, tokenizer: Any) -> Any:
    """The transformers config of `builtin:NAME`.

    bert-* are ModernBERT-type encoders (rotary positions, pre-norm, GeGLU; arXiv 2412.13663), which
    take no time; dit-* are diffusion transformers, which do; qwen3-* are causal language models.
    """
    from transformers import ModernBertConfig, Qwen3Config

    from tokendiff.models.diffusion_transformer import DiffusionTransformerConfig

    check_builtin(name)
    name = name.removeprefix(BUILTIN_PREFIX)
    size = BUILTIN_SIZES[name]
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
