"""The DFlash draft: a few Qwen3-type layers that fill a block of masks in one pass, given hidden
states of the model they draft for.

Importing this module makes `AutoModel` open the published layout without remote code: a config of
model_type "qwen3" whose architecture is "DFlashDraftModel", with `block_size` and `dflash_config:
{target_layer_ids, mask_token_id}`; weights `layers.*`, `fc`, `hidden_norm`, `norm`, and neither an
embedding nor a head, which are the target's. `save_pretrained` writes the same layout.

`forward` is what transformers' own DFlash candidate generator calls, so a draft also serves
`target.generate(..., assistant_model=draft, speculation_type="dflash")`.

Source: DFlash (arXiv 2602.06036).
"""

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

from tokendiff.models.pretrained import is_draft_config
from tokendiff.models.tiled_attention import Tile, tiled_attention

AnyMask = Tensor | BlockMask | tuple[Tile, ...] | None  # what a query sees, in one of these forms
EMBEDDING_OUTPUT = -1  # as a target layer id: what the target's first layer is given
_KNOWN_FIELDS = frozenset({"target_layer_ids", "mask_token_id", "block_size"})


def spread_layer_ids(num_target_layers: int, num_ids: int) -> list[int]:
    """Which of the target's layers a new draft reads: [N // 2] if one, else evenly from 1 to N - 3.

    Layer i, counted from 0, gives its output: `hidden_states[i + 1]` of transformers, whose first
    entry is the embedding's output.

    Raises:
        ValueError: the target has too few layers for that many different ones.
    """
    if num_ids < 1:
        raise ValueError(f"a draft needs at least one target layer, got {num_ids}")
    if num_ids == 1:
        return [num_target_layers // 2]
    first, last = 1, num_target_layers - 3
    if last - first + 1 < num_ids:
        raise ValueError(
            f"{num_ids} different layers from 1 to N - 3 need a target of at least {num_ids + 3} "
            f"layers; it has {num_target_layers}"
        )
    step = (last - first) / (num_ids - 1)
    return [round(first + index * step) for index in range(num_ids)]


class DFlashDraftConfig(Qwen3Config):
    """A Qwen3 config with what makes it a draft's.

    Args:
        block_size: tokens of a block, the anchor included. The published layouts have it here or in
            `dflash_config`.
        num_target_layers: layers of the target; None where it is not recorded.
        dflash_config: `target_layer_ids` and `mask_token_id`.

    Raises:
        ValueError: a value that no draft can have, or a field that this version would ignore.
    """

    block_size: int | None = None
    num_target_layers: int | None = None
    dflash_config: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # names code that is not saved beside our weights
        own = dict(self.dflash_config or {})
        for name in ("target_layer_ids", "mask_token_id"):
            if name in kwargs:
                own.setdefault(name, kwargs.pop(name))
        self.dflash_config = own
        if self.block_size is None:
            self.block_size = own.get("block_size")
        super().__post_init__(**kwargs)
        self._check()

    @property
    def target_layer_ids(self) -> list[int]:
        return list(self._own("target_layer_ids"))

    @property
    def mask_token_id(self) -> int:
        return int(self._own("mask_token_id"))

    def _own(self, name: str) -> Any:
        assert self.dflash_config is not None
        if name not in self.dflash_config:
            raise AttributeError(f"the config of a DFlash draft has no {name} in its dflash_config")
        return self.dflash_config[name]

    def _check(self) -> None:
        own, ids = self.dflash_config or {}, (self.dflash_config or {}).get("target_layer_ids")
        if not own and self.block_size is None:
            return  # the default config, which transformers makes to see what differs from it
        if unknown := sorted(own.keys() - _KNOWN_FIELDS):
            raise ValueError(
                f"dflash_config has {', '.join(unknown)}, which this version does not implement"
            )
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise ValueError(f"dflash_config.target_layer_ids must list layers, got {ids!r}")
        num_layers = self.num_target_layers
        if any(i < EMBEDDING_OUTPUT or (num_layers is not None and i >= num_layers) for i in ids):
            last = "N - 1" if num_layers is None else num_layers - 1
            raise ValueError(
                f"dflash_config.target_layer_ids {ids} must lie in -1..{last}, the target's layers"
            )
        mask = own.get("mask_token_id")
        if not isinstance(mask, int) or not 0 <= mask < self.vocab_size:
            raise ValueError(
                f"dflash_config.mask_token_id {mask!r} must be an id of the target's "
                f"{self.vocab_size} embeddings"
            )
        if own.get("block_size", self.block_size) != self.block_size:
            raise ValueError(
                f"block_size {self.block_size} contradicts dflash_config's {own['block_size']}"
            )
        if self.block_size is None or self.block_size < 2:
            raise ValueError(
                f"block_size {self.block_size}: a block is the anchor and at least one token more"
            )
        if sorted(set(self.layer_types or [])) != ["full_attention"]:
            raise ValueError(
                f"layer_types {self.layer_types}: this version has drafts with full attention only"
            )


class DFlashDraftModel(PreTrainedModel):
    """Embedded blocks and the target's hidden states to hidden states for the target's head."""

    config: DFlashDraftConfig
    config_class = DFlashDraftConfig
    base_model_prefix = "model"
    main_input_name = "noise_embeds"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DFlashDraftLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True

    def __init__(self, config: DFlashDraftConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.layers = nn.ModuleList(
            DFlashDraftLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = Qwen3RMSNorm(width, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.fc = nn.Linear(len(config.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, eps=config.rms_norm_eps)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As of any transformers model; a plain Qwen3Config with a draft's fields will do."""
        return super().from_pretrained(name, *args, config=_as_draft_config(config), **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return super()._from_config(_as_draft_config(config), **kwargs)

    def forward(
        self,
        noise_embeds: Tensor,
        context_hidden_states: Tensor,
        attention_mask: AnyMask = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of the blocks.

        The keys and values of a layer are those in `past_key_values`, then C context states, then
        the Q block states; the cache keeps all of them, and its owner cuts the block's away.

        Args:
            noise_embeds: [B, Q, D] the target's input embeddings of one block [anchor, mask, ...],
                or of several in a row.
            context_hidden_states: [B, C, n D] the outputs of the target's layers
                `config.target_layer_ids`, side by side; C may be 0.
            attention_mask: None where every query sees every key; [B, past + C + Q], 0 at keys that
                none of the row's queries sees; [B, 1, Q, past + C + Q] bool; flex attention's
                BlockMask of that size; or tiles that cover it.
            position_ids: [B or 1, C + Q] true positions; None counts on from the cache.

        Returns:
            `last_hidden_state` [B, Q, D], normed: what the target's head is for.
        """
        dtype = self.fc.weight.dtype
        hidden = noise_embeds.to(dtype)
        context = self.hidden_norm(self.fc(context_hidden_states.to(dtype)))
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            length = context.shape[1] + hidden.shape[1]
            position_ids = torch.arange(start, start + length, device=hidden.device)[None]
        rotation = self.rotary_emb(hidden, position_ids)
        mask = self._prepare(attention_mask, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, context, rotation, mask, past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )

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
