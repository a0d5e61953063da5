"""A causal transformers model under explicit attention masks and positions."""

from typing import Any, Literal

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import MaskRule, dense, mask_mod
from tokendiff.models import tiled_attention
from tokendiff.models.denoiser import ModelInTwoParts
from tokendiff.models.families import CAUSAL_TYPES

AttentionKernel = Literal["flex", "tiles", "dense"]
_IMPLEMENTATIONS = {"flex": "flex_attention", "tiles": tiled_attention.NAME, "dense": "sdpa"}


class TransformersCausalDenoiser(ModelInTwoParts):
    """A `transformers` causal language model as `tokendiff.diffusion.interfaces.CausalDenoiser`.

    Args:
        model: from AutoModelForCausalLM, one of CAUSAL_TYPES.
        attention_kernel: what computes attention, with the same numbers to rounding. `flex` is
            torch's flex_attention, `tiles` is `tokendiff.models.tiled_attention`, `dense` is one
            call with the whole mask. By default flex on CUDA, where it skips what the mask leaves
            out and holds no mask in memory, and tiles elsewhere: on a CPU flex has no backward.

    Raises:
        ValueError: the model is of another type, or was made bidirectional.
    """

    def __init__(
        self, model: Any, *, vocab_size: int, attention_kernel: AttentionKernel | None = None
    ) -> None:
        super().__init__(model, vocab_size=vocab_size)
        model_type = model.config.model_type
        if model_type not in CAUSAL_TYPES or not getattr(model.config, "is_causal", True):
            raise ValueError(f"the {model_type} model is no causal one of {CAUSAL_TYPES}")
        tiled_attention.register()
        self._kernel = attention_kernel
        self._current: AttentionKernel | None = None

    def encode(self, tokens: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
        kernel = self._kernel or self._best_kernel(tokens.device)
        if kernel != self._current:
            self.model.set_attn_implementation(_IMPLEMENTATIONS[kernel])
            self._current = kernel
        batch, length = tokens.shape
        extra: dict[str, Any] = {}
        if kernel == "flex":
            from torch.nn.attention.flex_attention import create_block_mask

            mask: Any = create_block_mask(
                mask_mod(rule), batch, None, length, length, device=tokens.device
            )
        else:
            mask = dense(rule, batch, length, length, tokens.device)
            if kernel == "tiles":
                extra = {"tiles": tiled_attention.tiles_of(mask)}
        output = self.model.base_model(
            input_ids=tokens,
            position_ids=positions,
            attention_mask=mask,
            use_cache=False,
            **extra,
        )
        return output.last_hidden_state

    def _best_kernel(self, device: torch.device) -> AttentionKernel:
        # flex_attention has no dropout.
        names = ("attention_dropout", "attn_pdrop")
        has_dropout = any(getattr(self.model.config, name, 0.0) for name in names)
        return "flex" if device.type == "cuda" and not has_dropout else "tiles"
