"""A small diffusion transformer: bidirectional pre-norm blocks, modulated by the time.

Importing this module registers it with transformers, so that AutoConfig, AutoModel and
AutoModelForMaskedLM open what `save_pretrained` wrote.

Sources: DiT (arXiv 2212.09748) for adaLN-zero and the initialisation; the backbone of SEDD and MDLM
(arXiv 2310.16834, 2406.07524) for rotary positions and for where dropout stands.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_OWN_ATTENTION = ("sdpa", "eager")  # both are torch's scaled_dot_product_attention
_NUM_SINUSOIDS = 256
_TIME_SCALE = 1000.0  # the sinusoids are spaced for step numbers, and t is in [0, 1]


class DiffusionTransformerConfig(PreTrainedConfig):
    """Sizes of a `DiffusionTransformerModel`.

    Args:
        max_position_embeddings: longest row that it is meant for; rotary positions know no limit.
        dropout: on what attention and MLP add to the hidden states.
        is_time_conditioned: False has no modulation, and forward then takes no time.
    """

    model_type = "tokendiff_dit"

    vocab_size: int = 50257
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 1024
    rope_theta: float = 10_000.0
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    initializer_range: float = 0.02  # of the token embedding
    is_time_conditioned: bool = True
    time_embedding_size: int = 128
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_attention_heads "
                f"{self.num_attention_heads}: rotary positions turn pairs within a head"
            )


class DiffusionTransformerPreTrainedModel(PreTrainedModel):
    config: DiffusionTransformerConfig
    config_class = DiffusionTransformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DiffusionTransformerBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DiT's: at first every block is the identity and every logit zero."""
        if not isinstance(module, nn.Linear):
            super()._init_weights(module)
            return
        if isinstance(module, _ZeroLinear):
            init.zeros_(module.weight)
        else:
            init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)


class DiffusionTransformerModel(DiffusionTransformerPreTrainedModel):
    """Token ids and times to hidden states, the final norm included."""

    def __init__(self, config: DiffusionTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_time = _TimeEmbedding(config) if config.is_time_conditioned else None
        self.layers = nn.ModuleList(
            DiffusionTransformerBlock(config) for _ in range(config.num_hidden_layers)
        )
        self.norm = _FinalNorm(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        time: Tensor | None = None,
        output_hidden_states: bool = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """See `DiffusionTransformerForMaskedLM.forward`."""
        rows, length = input_ids.shape
        if self.embed_time is None:
            if time is not None:
                raise ValueError("time was given to a model with is_time_conditioned False")
            condition = None
        else:
            if time is None or time.shape != (rows,):
                given = None if time is None else list(time.shape)
                raise ValueError(f"time must have shape [{rows}], one per row; got {given}")
            condition = self.embed_time(time)
        is_seen = attention_mask
        if attention_mask is not None and len(attention_mask.shape) == 2:
            is_seen = attention_mask.bool()[:, None, None, :]
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)
        rotation = _rotation(position_ids, self.config)
        hidden, states = self.embed_tokens(input_ids), []
        for layer in self.layers:
            if output_hidden_states:
                states.append(hidden)
            hidden = layer(hidden, condition, rotation, is_seen, **kwargs)
        hidden = self.norm(hidden, condition)
        return BaseModelOutput(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )


class DiffusionTransformerForMaskedLM(DiffusionTransformerPreTrainedModel):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DiffusionTransformerConfig) -> None:
        super().__init__(config)
        self.model = DiffusionTransformerModel(config)
        self.lm_head = _ZeroLinear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        time: Tensor | None = None,
        output_hidden_states: bool = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits [B, L, V] of tokens [B, L].

        Args:
            attention_mask: [B, L]; positions where it is 0 are not attended to. Or what each
                position sees: [B, 1, L, L] bool, or a BlockMask of flex_attention.
            time: [B] in [0, 1]; exactly where the config says `is_time_conditioned`.
            position_ids: [B, L]; by default 0..L-1.
            kwargs: for the attention function, where the config has one that is not torch's own.

        Raises:
            ValueError: a time that is missing, of another shape, or not wanted.
        """
        output = self.model(
            input_ids, attention_mask, time, output_hidden_states, position_ids, **kwargs
        )
        return MaskedLMOutput(
            logits=self.lm_head(output.last_hidden_state), hidden_states=output.hidden_states
        )


class DiffusionTransformerBlock(GradientCheckpointingLayer):
    def __init__(self, config: DiffusionTransformerConfig) -> None:
        super().__init__()
        self.attention = _Residual(config, _Attention(config))
        self.mlp = _Residual(config, _MLP(config))

    def forward(
        self,
        hidden: Tensor,
        condition: Tensor | None,
        rotation: tuple[Tensor, Tensor],
        is_seen: Any,
        **kwargs: Any,
    ) -> Tensor:
        hidden = self.attention(hidden, condition, rotation, is_seen, **kwargs)
        return self.mlp(hidden, condition)


class _Residual(nn.Module):
    """hidden + gate * branch(norm(hidden) * (1 + scale) + shift), where shift, scale and gate are
    linear in the condition and start at zero (adaLN-zero); without modulation, plain pre-norm.
    """

    def __init__(self, config: DiffusionTransformerConfig, branch: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.modulation = _modulation(config, parts=3)
        self.branch = branch
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden: Tensor, condition: Tensor | None, *arguments: Any, **kwargs: Any
    ) -> Tensor:
        if self.modulation is None:
            return hidden + self.dropout(self.branch(self.norm(hidden), *arguments, **kwargs))
        shift, scale, gate = self.modulation(condition)[:, None].chunk(3, dim=-1)
        branch = self.branch(self.norm(hidden) * (1 + scale) + shift, *arguments, **kwargs)
        return hidden + gate * self.dropout(branch)


class _FinalNorm(nn.Module):
    def __init__(self, config: DiffusionTransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)
        self.modulation = _modulation(config, parts=2)

    def forward(self, hidden: Tensor, condition: Tensor | None) -> Tensor:
        if self.modulation is None:
            return self.norm(hidden)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.norm(hidden) * (1 + scale) + shift


class _Attention(nn.Module):
    def __init__(self, config: DiffusionTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], is_seen: Any, **kwargs: Any
    ) -> Tensor:
        qkv = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.transpose(1, 3).unbind(2)  # each [B, heads, L, head size]
        query, key = _rotate(query, rotation), _rotate(key, rotation)
        implementation = self.config._attn_implementation
        if implementation in _OWN_ATTENTION:
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=is_seen)
            return self.output(attended.transpose(1, 2).flatten(2))
        # transformers reads this very call in the source to see that the function can be set.
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, None)  # type: ignore[arg-type]
        attended, _ = attend(self, query, key, value, is_seen, **kwargs)  # [B, L, heads, head size]
        return self.output(attended.flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: DiffusionTransformerConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(F.gelu(self.hidden(hidden), approximate="tanh"))


class _TimeEmbedding(nn.Module):
    """Sinusoids of the times [B], then an MLP: [B, time_embedding_size]."""

    def __init__(self, config: DiffusionTransformerConfig) -> None:
        super().__init__()
        self.hidden = nn.Linear(_NUM_SINUSOIDS, config.time_embedding_size)
        self.output = nn.Linear(config.time_embedding_size, config.time_embedding_size)

    def forward(self, time: Tensor) -> Tensor:
        half = _NUM_SINUSOIDS // 2
        exponents = torch.arange(half, dtype=torch.float32, device=time.device) / half
        frequencies = torch.exp(-math.log(10_000.0) * exponents)
        angles = _TIME_SCALE * time.float()[:, None] * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return F.silu(self.output(F.silu(self.hidden(sinusoids.to(self.hidden.weight.dtype)))))


class _ZeroLinear(nn.Linear):
    """Zero until it is trained."""


def _modulation(config: DiffusionTransformerConfig, *, parts: int) -> "_ZeroLinear | None":
    if not config.is_time_conditioned:
        return None
    return _ZeroLinear(config.time_embedding_size, parts * config.hidden_size)


def _rotation(positions: Tensor, config: DiffusionTransformerConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (arXiv 2104.09864), for every head alike.

    Args:
        positions: [L], or [B, L].

    Returns:
        [L, half a head], or [B, 1, L, half a head].
    """
    half = config.hidden_size // config.num_attention_heads // 2
    exponents = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    angles = positions.float()[..., None] * config.rope_theta**-exponents
    angles = angles if positions.dim() == 1 else angles[:, None]
    return angles.cos(), angles.sin()


def _rotate(vectors: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    first, second = vectors.chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.to(vectors.dtype)


# exist_ok: a notebook reloads modules.
AutoConfig.register(
    DiffusionTransformerConfig.model_type, DiffusionTransformerConfig, exist_ok=True
)
AutoModel.register(DiffusionTransformerConfig, DiffusionTransformerModel, exist_ok=True)
AutoModelForMaskedLM.register(
    DiffusionTransformerConfig, DiffusionTransformerForMaskedLM, exist_ok=True
)
