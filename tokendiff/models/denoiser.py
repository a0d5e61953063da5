"""A transformers model in the two parts that objectives and samplers call: encoder, then head."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Where each architecture keeps what stands between its last hidden state and its logits. An
# architecture that is not listed works as well, but computes logits at every position.
_HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "albert": lambda model, hidden: model.predictions(hidden),
    "bert": lambda model, hidden: model.cls(hidden),
    "camembert": lambda model, hidden: model.lm_head(hidden),
    "electra": lambda model, hidden: model.generator_lm_head(model.generator_predictions(hidden)),
    "modernbert": lambda model, hidden: model.decoder(model.head(hidden)),
    "roberta": lambda model, hidden: model.lm_head(hidden),
    "xlm-roberta": lambda model, hidden: model.lm_head(hidden),
}


class MaskedLMDenoiser(nn.Module):
    """A `transformers` masked language model as a denoiser (`tokendiff.interfaces.Denoiser`).

    Args:
        model: from AutoModelForMaskedLM.
        vocab_size: ids that the tokenizer has. A model's embedding is often padded to a round size;
            the logits of the ids beyond are dropped, since they cannot occur in text.
    """

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        super().__init__()
        self.model = model
        self.vocab_size = vocab_size
        self._head = _HEADS.get(model.config.model_type)

    @property
    def is_split(self) -> bool:
        """Whether logits can be computed at chosen positions alone."""
        return self._head is not None

    def encode(self, tokens: Tensor, is_valid: Tensor) -> Tensor:
        # Packed rows are rarely padded, and attention without a mask is the faster kernel.
        attention_mask = None if bool(is_valid.all()) else is_valid.to(torch.int64)
        if self._head is None:
            return self.model(input_ids=tokens, attention_mask=attention_mask).logits
        return self.model.base_model(input_ids=tokens, attention_mask=attention_mask)[0]

    def head(self, hidden: Tensor) -> Tensor:
        logits = hidden if self._head is None else self._head(self.model, hidden)
        return logits[..., : self.vocab_size]

    def recompute_activations(self) -> None:
        """Keep no activations between layers; the backward pass computes them again."""
        # transformers 5.23 renamed the method and warns at the old name.
        name = "activation_checkpointing_enable"
        enable = getattr(self.model, name, self.model.gradient_checkpointing_enable)
        enable()

    def compile_encoder(self) -> None:
        """torch.compile the encoder in place; the head sees a new number of rows at every step and
        stays eager.
        """
        (self.model if self._head is None else self.model.base_model).compile()
