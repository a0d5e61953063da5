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

from tokendiff.artifacts.model_folders import SECOND_DRAFT_ARCHITECTURE
from tokendiff.models.pretrained import is_draft_config
from tokendiff.models.tiled_attention import Tile, tiled_attention

AnyMask = Tensor | BlockMask | tuple[Tile, ...] | None  # what a query sees, in one of these forms
EMBEDDING_OUTPUT = -1  # as a target layer id: what the target's first layer is given
# For each type of layer; or one for all of them, and then windows are cut out of it.
Masks = AnyMask | Mapping[str, AnyMask]
_KNOWN_FIELDS = frozenset({"target_layer_ids", "mask_token_id", "block_size"})
_SECOND_FIELDS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
SCALARS = ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")
_ATTENTION_MODE = "attention_mode"  # of the second layout; what stands nowhere is "gqa"
FULL, SLIDING = "full_attention", "sliding_attention"
# What from_pretrained is told of where files lie.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


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
        dflash_config: `target_layer_ids` and `mask_token_id`; of the second layout also
            `conv_kernel_size`, `conv_group_size`, `selector_rank` and `selector_top_k`.
        sliding_window: W of layers of type sliding_attention: a query at position p sees context
            from p - W + 1 on, as transformers counts it, and its own block whole.
        input_embedding_scale, output_multiplier, final_logit_softcapping: of the second layout,
            here or in `dflash_config`: what embeddings and logits are multiplied by (1 where they
            are not given), and the c of c tanh(logits / c) (no cap where it is not given, or 0).

    Raises:
        ValueError: a value that no draft can have, or a field that this version would ignore.
    """

    block_size: int | None = None
    num_target_layers: int | None = None
    dflash_config: dict[str, Any] | None = None
    sliding_window: int | None = None
    input_embedding_scale: float | None = None
    output_multiplier: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("auto_map", None)  # names code that is not saved beside our weights
        own = dict(self.dflash_config or {})
        for name in ("target_layer_ids", "mask_token_id"):
            if name in kwargs:
                own.setdefault(name, kwargs.pop(name))
        self.dflash_config = own
        if self.block_size is None:
            self.block_size = own.get("block_size")
        window = self.sliding_window
        super().__post_init__(**kwargs)
        if SLIDING in (self.layer_types or []):
            self.sliding_window = window  # which Qwen3 keeps only where use_sliding_window is set
        self._check()

    @property
    def target_layer_ids(self) -> list[int]:
        return list(self._own("target_layer_ids"))

    @property
    def mask_token_id(self) -> int:
        return int(self._own("mask_token_id"))

    @property
    def has_selector(self) -> bool:
        """Whether it is of the second layout."""
        named = SECOND_DRAFT_ARCHITECTURE in (self.architectures or [])
        own = self.dflash_config or {}
        return named or (not self.architectures and any(name in own for name in _SECOND_FIELDS))

    def second(self, name: str) -> int:
        """A field of the second layout."""
        return int(self._own(name))

    def scalar(self, name: str) -> float | None:
        """One of the optional numbers, wherever it stands; None where it is not given."""
        own: Any = (self.dflash_config or {}).get(name)
        return getattr(self, name) if own is None else float(own)

    def shaped(self, logits: Tensor) -> Tensor:
        """The draft's logits of what the target's head gives: as they are in the first layout."""
        multiplier, cap = self.scalar("output_multiplier"), self.scalar("final_logit_softcapping")
        if multiplier in (None, 1.0) and not cap:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits * (1.0 if multiplier is None else multiplier)
        return cap * torch.tanh(logits / cap) if cap else logits

    def _own(self, name: str) -> Any:
        assert self.dflash_config is not None
        if name not in self.dflash_config:
            raise AttributeError(f"the config of a DFlash draft has no {name} in its dflash_config")
        return self.dflash_config[name]

    def _check(self) -> None:
        own, ids = self.dflash_config or {}, (self.dflash_config or {}).get("target_layer_ids")
        if not own and self.block_size is None:
            return  # the default config, which transformers makes to see what differs from it
        known = _KNOWN_FIELDS
        if self.has_selector:
            known = known.union(_SECOND_FIELDS, SCALARS, [_ATTENTION_MODE])
        if unknown := sorted(own.keys() - known):
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
        self._check_attention()
        given = [name for name in SCALARS if getattr(self, name) is not None]
        if self.has_selector:
            self._check_second(own)
        elif given:
            raise ValueError(f"{given[0]} is of drafts of the layout {SECOND_DRAFT_ARCHITECTURE}")

    def _check_attention(self) -> None:
        kinds = set(self.layer_types or [])
        if not kinds or not kinds <= {FULL, SLIDING}:
            raise ValueError(f"layer_types {self.layer_types}: must be {FULL} or {SLIDING}")
        window = self.sliding_window
        if SLIDING in kinds and not (isinstance(window, int) and window >= 1):
            raise ValueError(
                f"sliding_window {window}: layers of type {SLIDING} need the number of positions "
                "that they see"
            )
        if getattr(self, "is_causal", False):
            raise ValueError("is_causal true: within a block, a draft attends in both directions")

    def _check_second(self, own: dict[str, Any]) -> None:
        for name in _SECOND_FIELDS:
            if not isinstance(own.get(name), int) or own[name] < 1:
                raise ValueError(
                    f"dflash_config.{name} {own.get(name)!r}: a draft of the layout "
                    f"{SECOND_DRAFT_ARCHITECTURE} needs a number of at least 1"
                )
        if self.hidden_size % own["conv_group_size"]:
            raise ValueError(
                f"dflash_config.conv_group_size {own['conv_group_size']} does not divide "
                f"hidden_size {self.hidden_size}"
            )
        if own["selector_top_k"] > self.vocab_size:
            raise ValueError(
                f"dflash_config.selector_top_k {own['selector_top_k']}: there are "
                f"{self.vocab_size} tokens"
            )
        for name in SCALARS:
            here, there = getattr(self, name), own.get(name)
            if None not in (here, there) and here != there:
                raise ValueError(f"{name} {here} contradicts dflash_config's {there}")
            number = self.scalar(name)
            if number == 0.0 and name == "final_logit_softcapping":
                continue  # written so where there is no cap
            if number is not None and not number > 0.0:
                raise ValueError(f"{name} {number} must be positive")
        if (mode := own.get(_ATTENTION_MODE, "gqa")) != "gqa":
            raise ValueError(
                f"dflash_config.{_ATTENTION_MODE} {mode!r}: this version implements gqa alone"
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
                BlockMask of that size; or tiles that cover it. One of these for each type of
                layer, by its name in `layer_types`; or one for all, a tensor or None, and then what
                is outside a window is taken away here.
            position_ids: [B or 1, C + Q] true positions; None counts on from the cache. The keys of
                the cache stand at 0, 1, ....

        Returns:
            `last_hidden_state` [B, Q, D], normed: what the target's head is for.
        """
        dtype = self.fc.weight.dtype
        hidden = noise_embeds.to(dtype)
        if (scale := self.config.scalar("input_embedding_scale")) not in (None, 1.0):
            hidden = hidden * scale
        context = self.hidden_norm(self.fc(context_hidden_states.to(dtype)))
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            length = context.shape[1] + hidden.shape[1]
            position_ids = torch.arange(start, start + length, device=hidden.device)[None]
        rotation = self.rotary_emb(hidden, position_ids)
        masks = self._by_layer_type(attention_mask, position_ids, context.shape[1], past_key_values)
        masks = {kind: self._prepare(mask, hidden.dtype) for kind, mask in masks.items()}
        kinds = self.config.layer_types or [FULL] * len(self.layers)
        for kind, layer in zip(kinds, self.layers, strict=True):
            hidden = layer(hidden, context, rotation, masks[kind], past_key_values)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden), past_key_values=past_key_values
        )

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


class DynamicConvolution(nn.Module):
    """Two convolutions over the positions of a block, whose kernels depend on the position.

    Side 0 stands before a part of a layer and side 1 behind it. Both kernels come from what the
    part is given, h. With g(c) = c // group, the group that channel c is in:

        out[i, c] = sum over taps t of (base[s, t, c] + (P h_i)[s, t, g(c)]) x[i - t, c]

    x is 0 before the first place of a block, so blocks that stand beside each other in a row do not
    mix.
    """

    def __init__(self, config: DFlashDraftConfig) -> None:
        super().__init__()
        width, group = config.hidden_size, config.second("conv_group_size")
        taps = config.second("conv_kernel_size")
        assert config.block_size is not None
        self.block_size, self.shape = config.block_size, (2, taps, width // group)
        self.base_kernel = nn.Parameter(torch.empty(2, taps, width))
        self.kernel_projection = nn.Linear(width, 2 * taps * (width // group), bias=False)

    @torch.no_grad()
    def start(self, initializer_range: float) -> None:
        """As if there were no convolution."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def deltas(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the base kernels: [B, Q, taps, groups] of each side, of h [B, Q, D]."""
        both = self.kernel_projection(hidden).unflatten(-1, self.shape)
        return both[:, :, 0], both[:, :, 1]

    def forward(self, states: Tensor, delta: Tensor, *, side: int) -> Tensor:
        """Convolved states [B, Q, D], Q being one block, the front of one, or several blocks."""
        length, size, taps = states.shape[1], self.block_size, self.shape[1]
        if length > size and length % size:
            raise ValueError(f"{length} positions are not blocks of {size}")
        blocks = states.unflatten(1, (-1, min(size, length)))
        padded = nn.functional.pad(blocks, (0, 0, taps - 1, 0))
        output: Tensor | None = None
        for tap in range(taps):
            shifted = padded[:, :, taps - 1 - tap : padded.shape[2] - tap].flatten(1, 2)
            grouped = shifted.unflatten(-1, (self.shape[-1], -1)) * delta[:, :, tap, :, None]
            part = shifted * self.base_kernel[side, tap] + grouped.flatten(-2)
            output = part if output is None else output + part
        assert output is not None
        return output.to(states.dtype)


class CandidateSelector(nn.Module):
    """What `tokendiff.diffusion.candidates` scores paths with."""

    def __init__(self, config: DFlashDraftConfig) -> None:
        super().__init__()
        rank, size = config.second("selector_rank"), config.vocab_size
        self.top_k = config.second("selector_top_k")
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)
        self.predecessor_codebook = nn.Parameter(torch.empty(size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(size, rank))

    @torch.no_grad()
    def start(self, initializer_range: float) -> None:
        """As if there were no selector: no token asks for another one behind it."""
        self.hidden_projection.weight.normal_(0.0, initializer_range)
        self.predecessor_codebook.normal_(0.0, initializer_range)
        self.successor_codebook.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """Features [..., R] of hidden states [..., D]."""
        features: Tensor = self.hidden_projection(hidden)
        return features


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
