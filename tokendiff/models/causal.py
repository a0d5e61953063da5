"""A causal language model, opened for decoding with a cache.

Any transformers model that keeps plain keys and values in every layer and takes a 4-D attention
mask will do; `check_decoding` finds out by trying, since no config says so.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokendiff.artifacts.identity import file_identity
from tokendiff.artifacts.manifest import fingerprint
from tokendiff.artifacts.model_folders import local_model
from tokendiff.diffusion.attention_masks import (
    MaskRule,
    block_causal_by_position,
    causal_by_position,
)
from tokendiff.diffusion.interfaces import DecodingCache
from tokendiff.errors import InputError
from tokendiff.models.ragged_cache import RaggedCache

# Architectures that are another one under a name of their own, with other attention masks: opened
# as that one, without the code that comes with the weights. SDAR (arXiv 2510.06303) is Qwen3.
_SAME_AS = {"sdar": "qwen3"}
_MASK_TOKENS = ("<|MASK|>", "<|mask|>", "[MASK]", "<mask>")
_CHECK_LENGTH = 6


class CausalModel(nn.Module):
    """A transformers causal language model as a `tokendiff.diffusion.interfaces.Decoder`.

    Args:
        model: of AutoModelForCausalLM.
        vocab_size: ids that the tokenizer has; logits of those beyond are dropped.
    """

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self._is_split = _has_plain_head(model)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def max_length(self) -> int | None:
        """The most tokens that the model takes; None where its config does not say."""
        longest = getattr(self.model.config, "max_position_embeddings", None)
        return longest if isinstance(longest, int) else None

    def new_cache(self, num_rows: int) -> RaggedCache:
        layers = self.model.config.get_text_config().num_hidden_layers
        return RaggedCache(num_rows, num_layers=layers, device=self.device)

    def encode(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
    ) -> Tensor:
        return self.encode_layers(tokens, num_tokens, cache, rows, rule, layers=())[0]

    def encode_layers(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
        *,
        layers: Sequence[int],
    ) -> tuple[Tensor, list[Tensor]]:
        """As `encode`, and besides the last hidden states [n, N, D] those after each of `layers`,
        counted from 0; -1 is the embedding's output. As transformers has it, what the last layer
        gives has been through the final norm.
        """
        assert isinstance(cache, RaggedCache)
        positions, width = cache.begin(rows, tokens.shape[1])
        is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= num_tokens[:, None]
        kv = torch.arange(width, device=tokens.device)
        end = positions[:, :1] + num_tokens[:, None]
        b = torch.arange(len(rows), device=tokens.device)[:, None, None]
        q = positions[:, :, None]
        # Padding sees itself alone: a query with nothing to see has no softmax.
        is_seen = torch.where(q < end[..., None], rule(b, q, kv) & (kv < end)[:, None], kv == q)
        encoder = self.model.base_model if self._is_split else self.model
        # transformers counts the embedding's output as the first, and keeps those alone.
        chosen = [layer + 1 for layer in layers]
        output = encoder(
            input_ids=tokens,
            attention_mask=self._masks(is_seen, positions, kv),
            # Padding may stand where a model with learned positions has none.
            position_ids=positions.masked_fill(is_padding, 0),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=chosen or False,
        )
        hidden = output.last_hidden_state if self._is_split else output.logits
        return hidden, [output.hidden_states[index] for index in chosen]

    def head(self, hidden: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden) if self._is_split else hidden
        return logits[..., : self.vocab_size]

    def before_head(self, hidden: Tensor) -> Tensor:
        """What `head` takes, of hidden states that the model's output embedding is for."""
        return hidden if self._is_split else self.model.get_output_embeddings()(hidden)

    def _masks(self, is_seen: Tensor, positions: Tensor, kv: Tensor) -> Any:
        """What the model takes as attention_mask: one mask, or one for each type of layer."""
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        masks = {"full_attention": is_seen}
        if window is not None:
            masks["sliding_attention"] = is_seen & (positions[:, :, None] - kv < window)
        types = _layer_types(config)
        if unknown := sorted(types - set(masks)):
            raise InputError(
                f"a model of type {config.model_type!r} has layers of {', '.join(unknown)}, whose "
                "state is not plain keys and values per token; give another model"
            )
        if config._attn_implementation == "eager":
            lowest = torch.finfo(self.model.dtype).min
            masks = {
                name: torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, lowest)
                for name, mask in masks.items()
            }
        chosen = {name: masks[name][:, None] for name in types}
        return chosen if len(chosen) > 1 else next(iter(chosen.values()))


def open_causal(
    name: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[CausalModel, Any]:
    """A causal language model by its transformers name or path, on the CPU in eval mode, and its
    tokenizer.

    Args:
        trust_remote_code: run code that comes with the weights, for architectures that
            transformers does not have.

    Raises:
        InputError: no such model, not a causal one, or one that does not decode with a cache.
    """
    from transformers import AutoModelForCausalLM

    config = causal_config(name, trust_remote_code=trust_remote_code)
    tokenizer = load_causal_tokenizer(name, trust_remote_code=trust_remote_code)
    with _opening(name):
        model = AutoModelForCausalLM.from_pretrained(
            local_model(name), config=config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    causal_model = CausalModel(model.eval(), vocab_size=min(len(tokenizer), _num_logits(model)))
    check_decoding(causal_model, name)
    return causal_model, tokenizer


def causal_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a causal language model, of the architecture that it is."""
    from transformers import AutoConfig, PreTrainedConfig

    with _opening(name):
        folder = local_model(name)
        fields, _ = PreTrainedConfig.get_config_dict(folder)
        known = _SAME_AS.get(fields.get("model_type", ""))
        if known is None:
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        foreign = ("model_type", "architectures", "auto_map")
        kept = {key: value for key, value in fields.items() if key not in foreign}
        return AutoConfig.for_model(known, published_model_type=fields["model_type"], **kept)


def causal_identity(name: str) -> Any:
    """What changes when the model does that a name or folder stands for: the content of a folder;
    of a hub name, the name.
    """
    folder = Path(local_model(name)).expanduser()
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return fingerprint([file_identity(path) for path in files])


def load_causal_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    with _opening(name):
        return AutoTokenizer.from_pretrained(local_model(name), trust_remote_code=trust_remote_code)


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """Turns what transformers says of a name that it cannot open into an InputError."""
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise InputError(
            f"model_id {name!r} cannot be opened ({_first_line(error)}); give the hub name or the "
            "folder of a causal language model with its tokenizer"
        ) from error


def find_mask_token(config: Any, tokenizer: Any) -> int | None:
    """The id of the mask token: as the config says, else as the tokenizer does."""
    for name in ("mask_token_id", "mask_id"):
        if isinstance(index := getattr(config, name, None), int):
            return index
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    vocabulary = tokenizer.get_vocab()
    return next((vocabulary[token] for token in _MASK_TOKENS if token in vocabulary), None)


def find_stop_tokens(name: str, config: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's EOS, and those of the model's generation config, or of
    its own config where there is none.
    """
    from transformers import GenerationConfig

    with suppress(OSError):
        config = GenerationConfig.from_pretrained(local_model(name))
    found = [tokenizer.eos_token_id, getattr(config, "eos_token_id", None)]
    listed = [value if isinstance(value, list | tuple) else [value] for value in found]
    return tuple(sorted({index for values in listed for index in values if index is not None}))


@torch.no_grad()
def check_decoding(model: CausalModel, name: str) -> None:
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
            f"model_id {name!r}: a model of type {model.model.config.model_type!r} cannot decode "
            f"with a cache and a mask of our own ({_first_line(error)}); give another model"
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
                f"model_id {name!r}: a model of type {model.model.config.model_type!r} does not "
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


def _has_plain_head(model: Any) -> bool:
    """Whether the logits are the output embedding of the last hidden state and nothing else (some
    models scale or cap them): found out with two tokens.
    """
    tokens = torch.arange(2, device=model.device)[None]
    try:
        with torch.no_grad():
            hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
            logits = model(input_ids=tokens, use_cache=False).logits
            return torch.allclose(model.get_output_embeddings()(hidden), logits, rtol=1e-3)
    except (TypeError, AttributeError, RuntimeError):
        return False


def _layer_types(config: Any) -> set[str]:
    types = getattr(config, "layer_types", None)
    if types:
        return set(types)
    is_sliding = getattr(config, "sliding_window", None) is not None
    return {"sliding_attention" if is_sliding else "full_attention"}


def _num_logits(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
