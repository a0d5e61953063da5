"""A causal transformers model under explicit attention masks and positions."""

from typing import Any

from torch import Tensor

from tokendiff.diffusion.attention_masks import MaskRule
from tokendiff.models import tiled_attention
from tokendiff.models.adapters import DraftAdapters
from tokendiff.models.denoiser import ModelInTwoParts
from tokendiff.models.families import CAUSAL_TYPES, MASKED_TYPES
from tokendiff.models.masked_attention import (
    IMPLEMENTATIONS,
    AttentionKernel,
    best_kernel,
    under_rule,
)


class TransformersCausalDenoiser(ModelInTwoParts):
    """A `transformers` causal language model as `tokendiff.diffusion.interfaces.CausalDenoiser`.

    Args:
        model: from AutoModelForCausalLM, one of MASKED_TYPES.
        attention_kernel: what computes attention, with the same numbers to rounding. `flex` is
            torch's flex_attention, `tiles` is `tokendiff.models.tiled_attention`, `dense` is one
            call with the whole mask. By default `masked_attention.best_kernel`.

    Raises:
        ValueError: the model is of another type, or was made bidirectional.
    """

    def __init__(
        self, model: Any, *, vocab_size: int, attention_kernel: AttentionKernel | None = None
    ) -> None:
        super().__init__(model, vocab_size=vocab_size)
        model_type = model.config.model_type
        if model_type not in MASKED_TYPES or not getattr(model.config, "is_causal", True):
            raise ValueError(
                f"a model of type {model_type!r} is not a causal one of {CAUSAL_TYPES}"
            )
        tiled_attention.register()
        self._kernel = attention_kernel
        self._current: AttentionKernel | None = None
        self.draft_adapters: DraftAdapters | None = None

    def encode(
        self,
        tokens: Tensor,
        positions: Tensor,
        rule: MaskRule,
        *,
        is_draft: Tensor | None = None,
    ) -> Tensor:
        if self.draft_adapters is not None:
            self.draft_adapters.count_at(is_draft)
        kernel = self._kernel or best_kernel(self.model, tokens.device)
        if kernel != self._current:
            self.model.set_attn_implementation(IMPLEMENTATIONS[kernel])
            self._current = kernel
        inputs = under_rule(
            rule,
            kernel,
            batch_size=len(tokens),
            length=tokens.shape[1],
            device=tokens.device,
        )
        output = self.model.base_model(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            **inputs,
        )
        return output.last_hidden_state
