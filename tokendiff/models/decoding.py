"""A causal language model by name, opened for decoding with a cache, and tried."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendiff.artifacts.model_folders import SCHEDULER_CONFIG, local_model, revision_of
from tokendiff.data.tokenizers import MASK_TOKENS, open_tokenizer
from tokendiff.diffusion.attention_masks import block_causal_by_position, causal_by_position
from tokendiff.errors import InputError, input_errors, raise_outage, reason_of
from tokendiff.models.causal import CausalModel, check_layers
from tokendiff.models.diffusion_gemma import (
    MODEL_TYPE,
    EncoderDecoder,
    check_encoder_decoder,
    open_encoder_decoder,
)
from tokendiff.models.pretrained import (
    check_causal_model,
    open_config,
    open_weights,
)

_REMEDY = "give the hub name or the folder of a causal language model with its tokenizer"
_CHECK_LENGTH = 6


def open_causal(
    name: str,
    *,
    field: str = "model_id",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[CausalModel, Any]:
    """A causal language model by its transformers name or path, on the CPU in eval mode, and its
    tokenizer.

    Args:
        field: of the config that gave the name.
        trust_remote_code: run code that comes with the weights, for architectures that
            transformers does not have.

    Raises:
        InputError: no such model, not a causal one, or one that does not decode with a cache.
    """
    config, tokenizer = open_causal_config(name, field=field, trust_remote_code=trust_remote_code)
    model = _open_causal(name, config, tokenizer, field, dtype, trust_remote_code)
    return model, tokenizer


def open_decoder(
    name: str,
    *,
    field: str = "model_id",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> tuple[CausalModel | EncoderDecoder, Any]:
    """As `open_causal`, and a DiffusionGemma too."""
    config, tokenizer = open_causal_config(name, field=field, trust_remote_code=trust_remote_code)
    if config.model_type == MODEL_TYPE:
        # What was trained here knows the tokens of its rows; others write any id that they have.
        is_ours = (Path(local_model(name)) / SCHEDULER_CONFIG).is_file()
        size = len(tokenizer) if is_ours else None
        model = open_encoder_decoder(name, config, field=field, dtype=dtype, vocab_size=size)
        return model, tokenizer
    return _open_causal(name, config, tokenizer, field, dtype, trust_remote_code), tokenizer


def _open_causal(
    name: str,
    config: Any,
    tokenizer: Any,
    field: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
) -> CausalModel:
    from transformers import AutoModelForCausalLM

    if config.model_type == MODEL_TYPE:
        raise InputError(
            f"{field} {name!r} is of type {MODEL_TYPE!r}, an encoder with a decoder, where one "
            "causal language model is read; give one, or sample from this with sampler 'canvas'"
        )
    weights = open_weights(
        AutoModelForCausalLM,
        name,
        config,
        field=field,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    model = weights.complete()
    num_logits = int(model.get_output_embeddings().weight.shape[0])
    causal_model = CausalModel(model.eval(), vocab_size=min(len(tokenizer), num_logits))
    check_decoding(causal_model, name, field=field)
    return causal_model


def open_causal_config(
    name: str, *, field: str = "model_id", trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Config and tokenizer of a causal language model; no weight is read.

    Raises:
        InputError: one of the two cannot be opened.
    """
    options: dict[str, Any] = {
        "field": field,
        "remedy": _REMEDY,
        "trust_remote_code": trust_remote_code,
    }
    return open_config(name, **options), open_tokenizer(name, **options)


def check_decoder(config: Any, name: str, *, field: str) -> None:
    """Raise InputError where a model cannot be decoded with, by its config alone."""
    if config.model_type == MODEL_TYPE:
        check_encoder_decoder(config, origin=f"{field} {name!r}")
        return
    # Blocks are decoded with masks of our own, whatever way the model attends by itself.
    check_causal_model(config, name, field=field, is_one_way=False)
    check_layers(config, origin=f"{field} {name!r}: ")


def find_mask_token(config: Any, tokenizer: Any) -> int | None:
    """The id of the mask token: as the config says, else as the tokenizer does."""
    for name in ("mask_token_id", "mask_id"):
        if isinstance(index := getattr(config, name, None), int):
            return index
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    vocabulary = tokenizer.get_vocab()
    return next((vocabulary[token] for token in MASK_TOKENS if token in vocabulary), None)


def find_stop_tokens(name: str, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's EOS, and those of the model's generation config, or of
    its own config where there is none.

    Raises:
        InputError: the model's folder has a generation config that cannot be read.
        ConnectionError: the hub does not say whether it has one.
    """
    from transformers import GenerationConfig

    path = Path(local_model(name)) / "generation_config.json"
    if path.is_file():
        with input_errors(f"{path} cannot be read", "mend or delete it"):
            config = GenerationConfig.from_pretrained(path.parent)
    elif not path.parent.is_dir():
        try:
            config = GenerationConfig.from_pretrained(local_model(name), **revision_of(name))
        except OSError as error:  # the hub has none, or could not be asked
            if not _is_known_missing(name, path.name):
                raise_outage(error, f"{path.name} of {name!r} cannot be read")
    own = getattr(config, "eos_token_id", None)
    if own is None and hasattr(config, "get_text_config"):
        own = getattr(config.get_text_config(), "eos_token_id", None)
    found = [tokenizer.eos_token_id, own]
    listed = [value if isinstance(value, list | tuple) else [value] for value in found]
    return tuple(sorted({index for values in listed for index in values if index is not None}))


def _is_known_missing(name: str, file: str) -> bool:
    """Whether the hub has said before that a model has no such file."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    found = try_to_load_from_cache(local_model(name), file, **revision_of(name))
    return found is _CACHED_NO_EXIST


@torch.no_grad()
def check_decoding(model: CausalModel, name: str, *, field: str = "model_id") -> None:
    """Decode a few tokens in pieces and at once, and see that masks decide what is seen.

    Raises:
        InputError: the model does not heed masks, positions or the cache as it should.
    """
    tokens = torch.arange(_CHECK_LENGTH, device=model.device) % model.vocab_size
    other = tokens.clone()
    other[2] = (other[2] + 1) % model.vocab_size
    whole = torch.stack([tokens, other])
    every, length = torch.arange(2, device=model.device), _CHECK_LENGTH
    sees_all, hidden = block_causal_by_position(length), {}
    try:
        for rule in (causal_by_position, sees_all):
            full = torch.full_like(every, length)
            hidden[rule] = model.encode(whole, full, model.new_cache(2), every, rule)
        pieces = _in_pieces(model, whole)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{field} {name!r}: a model of type {model.model.config.model_type!r} cannot decode "
            f"with a cache and a mask of our own ({reason_of(error)}); give another model"
        ) from error
    left, both = (model.head(states.flatten(0, 1)).float() for states in hidden.values())
    left, both = left.view(2, length, -1), both.view(2, length, -1)
    scale = left.std() + 1e-9
    tolerance = 1e-3 if model.model.dtype in (torch.float32, torch.float64) else 0.1
    cached = (left - model.head(pieces.flatten(0, 1)).float().view_as(left)).abs().max() / scale
    leaked = (left[0, :2] - left[1, :2]).abs().max() / scale
    unseen = (both[0, 0] - both[1, 0]).abs().max()
    for problem, is_there in (
        ("its logits with a cache are not those without", not cached <= tolerance),
        ("it sees what a mask hides", not leaked <= tolerance),
        ("it does not see what a mask shows", not unseen > 0),
    ):
        if is_there:
            raise InputError(
                f"{field} {name!r}: a model of type {model.model.config.model_type!r} does not "
                f"decode as it should ({problem}); give another model"
            )


def _in_pieces(model: CausalModel, tokens: Tensor) -> Tensor:
    """Hidden states of tokens [2, L], one row cut after 4 tokens, the other after 1."""
    cache, rows = model.new_cache(2), torch.arange(2, device=model.device)
    first, length = torch.tensor([4, 1], device=model.device), tokens.shape[1]
    started = model.encode(tokens[:, :4], first, cache, rows, causal_by_position)
    cache.extend(rows, first)
    behind = (first[:, None] + torch.arange(length - 1, device=model.device)).clamp(max=length - 1)
    ended = model.encode(tokens.gather(1, behind), length - first, cache, rows, causal_by_position)
    one = torch.cat([started[0], ended[0, : length - 4]])
    other = torch.cat([started[1, :1], ended[1]])
    return torch.stack([one, other])
