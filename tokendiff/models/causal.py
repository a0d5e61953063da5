"""A causal transformers model that decodes with a cache of our own.

Any model that keeps plain keys and values in every layer and takes a 4-D attention mask will do;
`tokendiff.models.decoding` finds out by trying, since no config says so.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokendiff.diffusion.attention_masks import MaskRule
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import DecodingCache
from tokendiff.errors import InputError
from tokendiff.models import grouped_attention
from tokendiff.models.adapters import DraftAdapters
from tokendiff.models.cuda_graphs import Recorder
from tokendiff.models.layers import cache_argument, hidden_states_asked
from tokendiff.models.pretrained import longest_input
from tokendiff.models.ragged_cache import RaggedCache


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
        self.draft_adapters: DraftAdapters | None = None
        self.recorder: Recorder | None = None
        self._is_split = _has_plain_head(model)

    def replay_by(self, recorder: Recorder | None) -> None:
        """Replay passes over caches to come; for weights that stay where they are."""
        self.recorder = recorder
        if recorder is not None and self.model.config._attn_implementation == "sdpa":
            grouped_attention.register()
            self.model.set_attn_implementation(grouped_attention.NAME)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def max_length(self) -> int | None:
        """The most tokens that the model takes; None where its config does not say."""
        return longest_input(self.model.config)

    def new_cache(self, num_rows: int) -> RaggedCache:
        layers = self.model.config.get_text_config().num_hidden_layers
        return RaggedCache(num_rows, num_layers=layers, device=self.device, recorder=self.recorder)

    def encode(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
        *,
        positions: Tensor | None = None,
        is_draft: Tensor | None = None,
    ) -> Tensor:
        return self.encode_layers(
            tokens,
            num_tokens,
            cache,
            rows,
            rule,
            layers=(),
            positions=positions,
            is_draft=is_draft,
        )[0]

    def encode_layers(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
        *,
        layers: Sequence[int],
        positions: Tensor | None = None,
        is_draft: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `encode`, and besides the last hidden states [n, N, D] those after each of `layers`,
        counted from 0; -1 is the embedding's output. As transformers has it, what the last layer
        gives has been through the final norm.
        """
        assert isinstance(cache, RaggedCache)
        places, width = cache.begin(rows, tokens.shape[1])
        positions = places if positions is None else positions
        tokens, num_tokens, places, positions = (
            sent(numbers, self.device) for numbers in (tokens, num_tokens, places, positions)
        )
        is_padding = torch.arange(tokens.shape[1], device=tokens.device) >= num_tokens[:, None]
        kv = torch.arange(width, device=tokens.device)
        end = places[:, :1] + num_tokens[:, None]
        b = torch.arange(len(rows), device=tokens.device)[:, None, None]
        q = places[:, :, None]
        # Padding sees itself alone: a query with nothing to see has no softmax.
        is_seen = torch.where(q < end[..., None], rule(b, q, kv) & (kv < end)[:, None], kv == q)
        encoder = self.model.base_model if self._is_split else self.model
        # transformers counts the embedding's output as the first, and keeps those alone.
        chosen = [layer + 1 for layer in layers]
        inputs = {
            "input_ids": tokens,
            "attention_mask": self._masks(is_seen, places, positions),
            # Padding may stand where a model with learned positions has none.
            "position_ids": positions.masked_fill(is_padding, 0),
        }

        def forward(given: dict[str, Any]) -> list[Tensor]:
            if self.draft_adapters is not None:
                self.draft_adapters.count_at(given["is_draft"])
            output = encoder(
                **given["inputs"],
                **cache_argument(encoder, cache),
                use_cache=True,
                output_hidden_states=hidden_states_asked(chosen),
            )
            hidden = output.last_hidden_state if self._is_split else output.logits
            return [hidden, *(output.hidden_states[index] for index in chosen)]

        if is_draft is not None:
            is_draft = sent(is_draft, self.device)
        hidden, *states = cache.run(
            forward, {"inputs": inputs, "is_draft": is_draft}, facts=(tuple(chosen),)
        )
        return hidden, states

    def head(self, hidden: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden) if self._is_split else hidden
        return logits[..., : self.vocab_size]

    def before_head(self, hidden: Tensor) -> Tensor:
        """What `head` takes, of hidden states that the model's output embedding is for."""
        return hidden if self._is_split else self.model.get_output_embeddings()(hidden)

    def _masks(self, is_seen: Tensor, places: Tensor, positions: Tensor) -> Any:
        """What the model takes as attention_mask: one mask, or one for each type of layer.

        Args:
            is_seen: [n, N, width].
            places, positions: [n, N] of the queries, in the cache and in their texts.
        """
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        masks = {"full_attention": is_seen}
        if window is not None:
            # A key that was kept stands at its position.
            kept = torch.arange(is_seen.shape[-1], device=is_seen.device)
            of_keys = kept.expand(len(is_seen), -1).scatter(1, places, positions)
            distance = positions[:, :, None] - of_keys[:, None]
            masks["sliding_attention"] = is_seen & (distance < window)
        check_layers(config)
        if config._attn_implementation == "eager":
            lowest = torch.finfo(self.model.dtype).min
            masks = {
                name: torch.zeros_like(mask, dtype=self.model.dtype).masked_fill(~mask, lowest)
                for name, mask in masks.items()
            }
        chosen = {name: masks[name][:, None] for name in _layer_types(config)}
        return chosen if len(chosen) > 1 else next(iter(chosen.values()))


def check_layers(config: Any, *, origin: str = "") -> None:
    """Raise InputError where a config speaks of layers that keep no keys and values per token.

    Args:
        origin: what the error begins with.
    """
    text = config.get_text_config()
    has_window = getattr(text, "sliding_window", None) is not None
    known = {"full_attention", *(["sliding_attention"] if has_window else [])}
    if unknown := sorted(_layer_types(text) - known):
        raise InputError(
            f"{origin}a model of type {config.model_type!r} has layers of {', '.join(unknown)}, "
            "whose state is not plain keys and values per token; give another model"
        )


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
