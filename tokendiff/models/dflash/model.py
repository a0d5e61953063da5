"""The DFlash draft: a few Qwen3-type layers that fill a block of masks in one pass, given hidden
states of the model they draft for.

Importing this module makes `AutoModel` open the published layout without remote code: a config of
model_type "qwen3" whose architecture is "DFlashDraftModel", with `block_size` and `dflash_config:
{target_layer_ids, mask_token_id}`; weights `layers.*`, `fc`, `hidden_norm`, `norm`, and neither an
embedding nor a head, which are the target's. `save_pretrained` writes the same layout.

The second layout, "DFlash2DraftModel", adds to `dflash_config` what `DFlash2DraftModel` reads:
convolutions around attention and MLP, and a selector of candidates.

`forward` is what transformers' own DFlash candidate generator calls, so a draft also serves
`target.generate(..., assistant_model=draft, speculation_type="dflash")`.

Source: DFlash (arXiv 2602.06036).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoModel, Cache, PreTrainedConfig, PreTrainedModel, Qwen3Config
from transformers import Qwen3Model as _Qwen3Model
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    eager_attention_forward,
    rotate_half,
)

from tokendiff.models.dflash.config import FULL, SLIDING, DFlashDraftConfig
from tokendiff.models.dflash.second_layout import CandidateSelector, DynamicConvolution
from tokendiff.models.pretrained import is_draft_config
from tokendiff.models.tiled_attention import Tile, tiled_attention

AnyMask = Tensor | BlockMask | tuple[Tile, ...] | None  # what a query sees, in one of these forms
# For each type of layer; or one for all of them, and then windows are cut out of it.
Masks = AnyMask | Mapping[str, AnyMask]
# What from_pretrained is told of where files lie.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class DFlashDraftModel(PreTrainedModel):
    """Embedded blocks and the target's hidden states to hidden states for the target's head."""

    config: DFlashDraftConfig
    config_class = DFlashDraftConfig
    base_model_prefix = "model"
    main_input_name = "noise_embeds"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DFlashDraftLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: DFlashDraftConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        layer = DFlash2DraftLayer if config.has_selector else DFlashDraftLayer
        self.layers = nn.ModuleList(
            layer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, eps=config.rms_norm_eps)
        self.candidate_selector = CandidateSelector(config) if config.has_selector else None
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As of any transformers model; a plain Qwen3Config with a draft's fields will do. A draft
        of the second layout is a `DFlash2DraftModel`.
        """
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        if config is None:
            config = DFlashDraftConfig.from_pretrained(name, **where)
        elif _lost_its_window(config):
            again = DFlashDraftConfig.from_pretrained(name, **where)
            again._attn_implementation = config._attn_implementation
            config = again
        config = _as_draft_config(config)
        if config.has_selector and cls is DFlashDraftModel:
            return DFlash2DraftModel.from_pretrained(name, *args, config=config, **kwargs)
        return super().from_pretrained(name, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        config = _as_draft_config(config)
        if config.has_selector and cls is DFlashDraftModel:
            return DFlash2DraftModel._from_config(config, **kwargs)
        return super()._from_config(config, **kwargs)

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        attention_mask: Masks = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the blocks.

        The keys and values of a layer are those in the cache, then C context states, then the Q
        block states; the cache keeps all of them, and its owner cuts the block's away.

        Args:
            noise_embeds: [B, Q, D] the target's input embeddings of one block [anchor, mask, ...],
                or of several in a row.
            context_hidden_states: [B, C, n D] the outputs of the target's layers
                `config.target_layer_ids`, side by side; C may be 0.
            attention_mask: None where every query sees every key; [B, past + C + Q], 0 at keys that
                none of the row's queries sees; [B, 1, Q, past + C + Q] bool; flex attention's
                BlockMask of that size; or tiles that cover it. One of these for each type of
                layer, by its name in `layer_types`; or one for all, a tensor or None, and then what
                is outside a window is taken away here.
            position_ids: [B or 1, C + Q] true positions; None counts on from the cache. The keys of
                the cache stand at 0, 1, ....
            past_key_values: what transformers before 5.24 calls `cache`.

        Returns:
            `last_hidden_state` [B, Q, D], normed: what the target's head is for.
        """
        cache = past_key_values if cache is None else cache
        dtype = self.fc.weight.dtype
        hidden = noise_embeds.to(dtype)
        if (scale := self.config.scalar("input_embedding_scale")) not in (None, 1.0):
            hidden = hidden * scale
        context = self.hidden_norm(self.fc(context_hidden_states.to(dtype)))
        if position_ids is None:
            start = 0 if cache is None else cache.get_seq_length()
            length = context.shape[1] + hidden.shape[1]
            position_ids = torch.arange(start, start + length, device=hidden.device)[None]
        rotation = self.rotary_emb(hidden, position_ids)
        masks = self._by_layer_type(attention_mask, position_ids, context.shape[1], cache)
        masks = {kind: self._prepare(mask, hidden.dtype) for kind, mask in masks.items()}
        kinds = self.config.layer_types or [FULL] * len(self.layers)
        for kind, layer in zip(kinds, self.layers, strict=True):
            hidden = layer(hidden, context, rotation, masks[kind], cache)
        # By place, since the second field has the one name or the other too.
        return BaseModelOutputWithPast(self.norm(hidden), cache)

    def _by_layer_type(
        self, mask: Masks, positions: Tensor, num_context: int, cache: Cache | None
    ) -> dict[str, AnyMask]:
        if isinstance(mask, Mapping):
            return dict(mask)
        masks: dict[str, AnyMask] = {FULL: mask}
        if (window := self.window) is None:
            return masks
        if isinstance(mask, BlockMask | tuple):
            raise ValueError("layers with a window need a mask for each type of layer")
        num_past = 0 if cache is None else cache.get_seq_length()
        past = torch.arange(num_past, device=positions.device).expand(len(positions), -1)
        keys = torch.cat([past, positions], dim=1)
        is_near = in_window(keys, positions[:, num_context:], window)[:, None]
        if isinstance(mask, Tensor):
            is_near = is_near & (mask[:, None, None] if mask.ndim == 2 else mask).bool()
        return {**masks, SLIDING: is_near}

    @property
    def window(self) -> int | None:
        """The window of those layers that have one."""
        return self.config.sliding_window if SLIDING in (self.config.layer_types or []) else None

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DynamicConvolution | CandidateSelector):
            module.start(self.config.initializer_range)

    def _prepare(self, mask: AnyMask, dtype: torch.dtype) -> AnyMask:
        """The mask in the form that the attention function takes."""
        if not isinstance(mask, Tensor):
            return mask
        if mask.ndim == 2:
            mask = mask.bool()
            if bool(mask.all()):
                return None
            mask = mask[:, None, None, :]
        if self.config._attn_implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


class DFlashDraftLayer(GradientCheckpointingLayer):
    def __init__(self, config: DFlashDraftConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = DFlashDraftAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: AnyMask,
        cache: Cache | None,
    ) -> Tensor:
        # The context is normed already, once for all layers.
        hidden = hidden + self.self_attn(
            self.input_layernorm(hidden), context, rotation, mask, cache
        )
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DFlash2DraftLayer(DFlashDraftLayer):
    """Convolutions go before and behind attention, and before and behind the MLP."""

    def __init__(self, config: DFlashDraftConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.attention_conv = DynamicConvolution(config)
        self.mlp_conv = DynamicConvolution(config)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: AnyMask,
        cache: Cache | None,
    ) -> Tensor:
        normed = self.input_layernorm(hidden)
        before, behind = self.attention_conv.deltas(normed)
        normed = self.attention_conv(normed, before, side=0)
        output = self.self_attn(normed, context, rotation, mask, cache)
        hidden = hidden + self.attention_conv(output, behind, side=1)
        normed = self.post_attention_layernorm(hidden)
        before, behind = self.mlp_conv.deltas(normed)
        output = self.mlp(self.mlp_conv(normed, before, side=0))
        return hidden + self.mlp_conv(output, behind, side=1)


class DFlashDraftAttention(nn.Module):
    """The block attends to the context and to itself, in both directions."""

    is_causal = False

    def __init__(self, config: DFlashDraftConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        assert shared is not None
        self.num_key_value_groups = heads // shared
        width, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, shared * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, shared * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=bias)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: AnyMask,
        cache: Cache | None,
    ) -> Tensor:
        states = torch.cat([context, hidden], dim=1)
        cosine, sine = (part[:, None] for part in rotation)
        length = hidden.shape[1]
        query = self.q_norm(self._heads(self.q_proj(hidden)))
        key = self.k_norm(self._heads(self.k_proj(states)))
        value = self._heads(self.v_proj(states))
        query = _rotate(query, cosine[:, :, -length:], sine[:, :, -length:])
        key = _rotate(key, cosine, sine)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        how: dict[str, Any] = {
            "dropout": self.config.attention_dropout if self.training else 0.0,
            "scaling": self.head_dim**-0.5,
        }
        if isinstance(mask, tuple):
            output, _ = tiled_attention(self, query, key, value, None, tiles=mask, **how)
        else:
            name = self.config._attn_implementation
            if isinstance(mask, BlockMask):
                name = "flex_attention"
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
            output, _ = attend(self, query, key, value, mask, **how)
        return self.o_proj(output.reshape(*hidden.shape[:-1], -1))

    def _heads(self, states: Tensor) -> Tensor:
        """[B, L, H d] to [B, L, H, d] to [B, H, L, d]."""
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def _rotate(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return vectors * cosine + rotate_half(vectors) * sine


def in_window(keys: Tensor, queries: Tensor, window: int) -> Tensor:
    """[B, Q, KV] which keys at positions [B, KV] are among the `window` positions that end with a
    query's own [B, Q], or in its block, which begins with the first query.
    """
    begin = (queries - window + 1).minimum(queries[:, :1])
    return keys[:, None] >= begin[:, :, None]


class DFlash2DraftModel(DFlashDraftModel):
    """A draft of the second layout: convolutions in its layers, and a candidate selector."""

    _no_split_modules = ["DFlash2DraftLayer"]  # noqa: RUF012


def class_of(config: DFlashDraftConfig) -> type[DFlashDraftModel]:
    return DFlash2DraftModel if config.has_selector else DFlashDraftModel


def _lost_its_window(config: Any) -> bool:
    """A plain Qwen3Config drops the window where `use_sliding_window` is false."""
    kinds = getattr(config, "layer_types", None) or []
    return SLIDING in kinds and getattr(config, "sliding_window", None) is None


def _as_draft_config(config: Any) -> Any:
    if not isinstance(config, PreTrainedConfig) or isinstance(config, DFlashDraftConfig):
        return config
    draft = DFlashDraftConfig.from_dict(config.to_dict())
    draft._attn_implementation = config._attn_implementation
    return draft


class _Qwen3ModelOrDraft(_Qwen3Model):
    """What AutoModel opens for a Qwen3Config: the draft where the config is one, else Qwen3Model.

    The published drafts have the model_type of their layers, "qwen3", so that AutoModel would make
    a Qwen3Model with a new embedding of one. (transformers can hold several classes for a config,
    told apart by architecture, but fails then on a config that names none.)
    """

    # transformers asks whether a class is its own to decide if trusted remote code goes first.
    __module__ = _Qwen3Model.__module__

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        return _class_of(config).from_pretrained(name, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return _class_of(config)._from_config(config, **kwargs)


def _class_of(config: Any) -> Any:
    return DFlashDraftModel if is_draft_config(config) else _Qwen3Model


# exist_ok: a notebook reloads modules, and transformers has its own class for Qwen3Config.
AutoModel.register(Qwen3Config, _Qwen3ModelOrDraft, exist_ok=True)
AutoModel.register(DFlashDraftConfig, DFlashDraftModel, exist_ok=True)
