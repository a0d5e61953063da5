"""DiffusionGemma: a causal encoder reads clean text into a cache, and a decoder with the same
weights denoises a canvas of random tokens behind it.

The two differ in three things. The decoder's positions see each other; it is told what it found in
the step before (self-conditioning); and each layer scales its output by a number of its own. Layers
with a sliding window keep W - 1 tokens before a canvas, which all of the canvas sees, however far
its own end is from them; so does the cache of transformers.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokendiff.diffusion.attention_masks import MaskRule, dense
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import DecodingCache
from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.errors import InputError
from tokendiff.models.denoiser import ModelInTwoParts
from tokendiff.models.layers import cache_argument
from tokendiff.models.pretrained import open_weights
from tokendiff.objectives.chunked import most_logits, without_mask

if TYPE_CHECKING:
    from tokendiff.models.ragged_cache import RaggedCache

MODEL_TYPE = "diffusion_gemma"
# alpha(t) = 1 - t as in the released schedulers; at 1 it has to stay above 0.
_ALPHA_AT_ONE = 1e-12
_FAR = 2**31 - 1  # beyond any position

KeysAndValues = tuple[Tensor, Tensor]


def check_encoder_decoder(config: Any, *, origin: str) -> None:
    """Raise InputError where a DiffusionGemma's config asks for what is not computed here.

    Args:
        origin: what the error begins with.
    """
    text = config.get_text_config()
    if text.use_bidirectional_attention == "all":
        raise InputError(
            f"{origin}: text_config.use_bidirectional_attention 'all' lets clean text see what "
            "follows it, which a cache of finished blocks cannot; supported are null and 'vision'"
        )
    for name, value in (
        ("canvas_length", config.canvas_length),
        ("text_config.num_experts", text.num_experts),
        ("text_config.top_k_experts", text.top_k_experts),
        ("text_config.moe_intermediate_size", text.moe_intermediate_size),
    ):
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"{origin}: {name} must be a whole number, got {value!r}; give a folder whose "
                "config.json is that of a DiffusionGemma"
            )


def uniform_noise(vocab_size: int) -> UniformKernel:
    """The noise of the released models: any id of the vocabulary, which has no mask."""
    return UniformKernel(
        schedule=LogLinear(eps=_ALPHA_AT_ONE), vocab_size=vocab_size + 1, mask_token_id=vocab_size
    )


def open_encoder_decoder(
    name: str,
    config: Any,
    *,
    field: str,
    dtype: torch.dtype = torch.float32,
    vocab_size: int | None = None,
) -> "EncoderDecoder":
    """A DiffusionGemma of a config that `open_config` read, on the CPU in eval mode.

    Args:
        field: of the config that gave the name.
        vocab_size: ids that it may write; by default all that it has.

    Raises:
        InputError: weights that are missing or of another shape, or see `check_encoder_decoder`.
    """
    from transformers import DiffusionGemmaForBlockDiffusion

    check_encoder_decoder(config, origin=f"{field} {name!r}")
    weights = open_weights(DiffusionGemmaForBlockDiffusion, name, config, field=field, dtype=dtype)
    size = vocab_size or config.get_text_config().vocab_size
    return EncoderDecoder(weights.complete().eval(), vocab_size=size)


def buffers_to_float32(model: Any) -> None:
    """Make float32 of what is no parameter of a DiffusionGemma that was opened in less: the scales
    of layers, and the scale of embeddings, which files do not hold.
    """
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


class _StatesOfLayer:
    """What a layer of transformers takes for a cache: keys and values of one layer."""

    is_compileable = False

    def __init__(self, index: int, states: KeysAndValues | None = None) -> None:
        keys, values = states or (None, None)
        self.keys: Any = keys
        self.values: Any = values
        self.layers = {index: self}

    def update(self, keys: Tensor, values: Tensor, index: int, **inputs: Any) -> KeysAndValues:
        self.keys, self.values = keys, values
        return keys, values


class TiedLayers(nn.Module):
    """A layer of the encoder and the layer of the decoder that has the same weights.

    Training calls both through here: weights that lie in parts on several workers (FSDP2) are
    gathered for a call of the module that they belong to.
    """

    def __init__(self, encoder: Any, decoder: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(
        self, hidden: Tensor, states: KeysAndValues | None, *, is_noisy: bool, **inputs: Any
    ) -> Any:
        """By the decoder the next hidden states [n, K, D]; by the encoder these and its keys and
        values.

        Args:
            states: of the clean text, for the decoder; None where there is none.
            inputs: what layers of transformers are told beside.
        """
        if is_noisy:
            kept = None if states is None else _StatesOfLayer(self.decoder.layer_idx, states)
            return self.decoder(hidden, **cache_argument(self.decoder, kept), **inputs)
        if self.recomputes and self.training:
            return checkpoint(self._encoded, hidden, use_reentrant=False, **inputs)
        return self._encoded(hidden, **inputs)

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again in the backward pass. By transformers only those
        of its decoder are, whose flag this is.
        """
        flag: bool = self.decoder.gradient_checkpointing
        return flag

    def _encoded(self, hidden: Tensor, **inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        kept = _StatesOfLayer(self.encoder.layer_idx)
        hidden = self.encoder(hidden, **cache_argument(self.encoder, kept), **inputs)
        # Copies, since FSDP2 hooks what a module returns, and warns of views.
        return hidden, kept.keys.clone(), kept.values.clone()


class _BothHalves(ModelInTwoParts):
    """What decoding and training share.

    Args:
        model: a DiffusionGemmaForBlockDiffusion of transformers. What it has for images is not
            used.
        vocab_size: ids that it may write.
    """

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        super().__init__(model, vocab_size=vocab_size)
        halves = model.model.encoder.language_model.layers, model.model.decoder.layers
        self.layers = nn.ModuleList(TiedLayers(*pair) for pair in zip(*halves, strict=True))

    @property
    def is_split(self) -> bool:
        return True

    @property
    def _text(self) -> Any:
        return self.model.config.get_text_config()

    def head(self, hidden: Tensor) -> Tensor:
        cap = self.model.final_logit_softcapping
        logits: Tensor = self.model.lm_head(hidden)[..., : self.vocab_size].float()
        return torch.tanh(logits / cap) * cap

    def expected_embedding(self, logits: Tensor) -> Tensor:
        """[N, D] the mean embedding of tokens under logits [N, V], which have no gradient."""
        table = self.model.model.decoder.embed_tokens
        # The released models keep logits from step to step in the weights' dtype.
        logits = logits.detach().to(table.weight.dtype)
        shares = logits.softmax(-1, dtype=torch.float32).to(table.weight.dtype)
        embeddings = table.weight[: logits.shape[-1]]
        return shares @ embeddings * table.embed_scale.to(table.weight.dtype)

    def decode(
        self,
        tokens: Tensor,
        found: Tensor | None,
        positions: Tensor,
        states: Sequence[KeysAndValues | None],
        masks: dict[str, Tensor],
    ) -> Tensor:
        """Hidden states [n, K, D] of noisy tokens [n, K].

        Args:
            found: see `CanvasDecoder.denoise`.
            positions: [n, K] in their texts.
            states: keys and values of the clean text in each layer; None where there is no text.
            masks: by type of layer, what a position sees of the clean text, then of the noisy one.
        """
        decoder = self.model.model.decoder
        embedded = decoder.embed_tokens(tokens)
        found = torch.zeros_like(embedded) if found is None else found
        hidden = decoder.self_conditioning(embedded, found)
        inputs = self._inputs_of_layers(hidden, positions, masks)
        for layer, of_text, beside in zip(self.layers, states, inputs, strict=True):
            hidden = layer(hidden, of_text, is_noisy=True, **beside)
        result: Tensor = decoder.norm(hidden)
        return result

    def _inputs_of_layers(
        self, hidden: Tensor, positions: Tensor, masks: dict[str, Tensor]
    ) -> list[dict[str, Any]]:
        types, embed = self._text.layer_types, self.model.model.decoder.rotary_emb
        rotary = {name: embed(hidden, positions, name) for name in set(types)}
        return [
            {
                "position_embeddings": rotary[name],
                "attention_mask": masks[name],
                "position_ids": positions,
            }
            for name in types
        ]

    def _masks(self, is_seen: Tensor, in_window: Tensor) -> dict[str, Tensor]:
        """What transformers takes as attention_mask, from [n, Q, KV] bool."""
        masks = {"full_attention": is_seen[:, None], "sliding_attention": in_window[:, None]}
        if self._text._attn_implementation != "eager":
            return masks
        dtype = self.model.dtype
        lowest = torch.finfo(dtype).min
        return {
            name: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
            for name, mask in masks.items()
        }


class EncoderDecoder(_BothHalves):
    """A DiffusionGemma as a `tokendiff.diffusion.interfaces.CanvasDecoder`."""

    def new_cache(self, num_rows: int) -> "RaggedCache":
        from tokendiff.models.ragged_cache import RaggedCache

        layers = self._text.num_hidden_layers
        return RaggedCache(num_rows, num_layers=layers, device=self.device)

    def encode(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
    ) -> Tensor:
        """As `Decoder.encode`, of clean text."""
        kept = cast("RaggedCache", cache)
        places, width = kept.begin(rows, tokens.shape[1])
        tokens, num_tokens, places = (
            sent(numbers, self.device) for numbers in (tokens, num_tokens, places)
        )
        is_padding = torch.arange(tokens.shape[1], device=self.device) >= num_tokens[:, None]
        kv = torch.arange(width, device=self.device)
        end = places[:, :1] + num_tokens[:, None]
        b = torch.arange(len(rows), device=self.device)[:, None, None]
        q = places[:, :, None]
        # Padding sees itself alone: a query with nothing to see has no softmax.
        is_seen = torch.where(q < end[..., None], rule(b, q, kv) & (kv < end)[:, None], kv == q)
        in_window = is_seen & (q - kv < self._text.sliding_window)
        encoder = self.model.model.encoder.language_model
        hidden: Tensor = encoder(
            input_ids=tokens.masked_fill(is_padding, 0),
            attention_mask=self._masks(is_seen, in_window),
            position_ids=places.masked_fill(is_padding, 0),
            **cache_argument(encoder, cache),
        ).last_hidden_state
        return hidden

    def denoise(
        self, tokens: Tensor, found: Tensor | None, cache: DecodingCache, rows: Tensor
    ) -> Tensor:
        lengths = sent(cache.lengths[rows], self.device)
        tokens = sent(tokens, self.device)
        view = cast("RaggedCache", cache).view(rows)
        canvas = torch.arange(tokens.shape[1], device=self.device)
        kv = torch.arange(view.width, device=self.device)
        is_kept = (kv < lengths[:, None])[:, None]
        in_window = is_kept & (kv > (lengths - self._text.sliding_window)[:, None])[:, None]
        masks = self._masks(*(self._beside_canvas(kept, tokens) for kept in (is_kept, in_window)))
        states: Sequence[KeysAndValues | None] = view.layers or [None] * len(self.layers)
        return self.decode(tokens, found, lengths[:, None] + canvas, states, masks)

    def _beside_canvas(self, is_kept: Tensor, canvas: Tensor) -> Tensor:
        """[n, K, T + K] from [n, 1, T]: a canvas [n, K] sees itself whole."""
        size = canvas.shape[1]
        return torch.cat(
            [is_kept.expand(-1, size, -1), is_kept.new_ones(len(canvas), size, size)], dim=-1
        )


class EncoderDecoderDenoiser(_BothHalves):
    """A DiffusionGemma as a `tokendiff.diffusion.interfaces.SelfConditionedDenoiser`: rows
    `[x_t ; x_0]`, of which the encoder reads x_0 and the decoder x_t.

    Args:
        model, vocab_size: see `_BothHalves`; what it has for images is not trained.
        mask_token_id: never a candidate in what the decoder is told.
    """

    def __init__(self, model: Any, *, vocab_size: int, mask_token_id: int) -> None:
        super().__init__(model, vocab_size=vocab_size)
        self.mask_token_id = mask_token_id
        for part in (model.model.encoder.vision_tower, model.model.encoder.embed_vision):
            part.requires_grad_(False)

    @property
    def _is_spread(self) -> bool:
        """Whether layers are gathered from several workers, all of which must ask for them."""
        return hasattr(self.layers[0], "unshard")

    def encode(self, tokens: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
        size = tokens.shape[1]
        seen = dense(rule, len(tokens), size, size, tokens.device)[:, 0]
        return self._encode(tokens, positions, seen)[0]

    def _encode(
        self, tokens: Tensor, positions: Tensor, seen: Tensor
    ) -> tuple[Tensor, list[KeysAndValues]]:
        """Hidden states [B, L, D] of clean text, and the keys and values of each layer.

        Args:
            seen: [B, L, L] bool; no position may see what follows it.
        """
        distance = positions[:, :, None] - positions[:, None]
        masks = self._masks(seen, seen & (distance < self._text.sliding_window))
        encoder = self.model.model.encoder.language_model
        hidden = encoder.embed_tokens(tokens)
        states = []
        inputs = self._inputs_of_layers(hidden, positions, masks)
        for layer, beside in zip(self.layers, inputs, strict=True):
            hidden, keys, values = layer(hidden, None, is_noisy=False, **beside)
            states.append((keys, values))
        return encoder.norm(hidden), states

    def encode_noisy(
        self, tokens: Tensor, positions: Tensor, rule: MaskRule, *, is_told: Tensor | None
    ) -> Tensor:
        half, window = tokens.shape[1] // 2, self._text.sliding_window
        seen = dense(rule, len(tokens), 2 * half, 2 * half, tokens.device)[:, 0]
        place, at = positions[:, half:], positions[:, :half]
        encoded, states = self._encode(tokens[:, half:], place, seen[:, half:, half:])
        kept, canvas = seen[:, :half, half:], seen[:, :half, :half]
        begin = at[:, None].expand(-1, half, -1).masked_fill(~canvas, _FAR).amin(-1)
        in_reach = kept & (place[:, None] > begin[:, :, None] - window)
        masks = self._masks(*(torch.cat([part, canvas], dim=-1) for part in (kept, in_reach)))
        found = None
        if is_told is not None and (self._is_spread or bool(is_told.any())):
            with torch.no_grad():
                before = self.decode(tokens[:, :half], None, at, states, masks)
            found = self._found(before) * sent(is_told, before.device)[:, None, None]
        noisy = self.decode(tokens[:, :half], found, at, states, masks)
        return torch.cat([noisy, encoded], dim=1)

    def _found(self, hidden: Tensor) -> Tensor:
        """[B, W, D] from states [B, W, D] of a pass without gradient: the logits have none, the
        embeddings have. Chunks are computed again in the backward pass, so that no [B, W, V] tensor
        is kept.
        """
        flat = hidden.flatten(0, 1)
        size = max(1, most_logits(hidden.device) // self.vocab_size)
        chunks = [
            checkpoint(self._found_by, chunk, use_reentrant=False) for chunk in flat.split(size)
        ]
        return torch.cat(chunks).view_as(hidden)

    def _found_by(self, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            logits = without_mask(self.head(hidden), self.mask_token_id)
        return self.expected_embedding(logits)
