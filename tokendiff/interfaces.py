"""What objectives and samplers are given and give back; a model is known here only as what it is
called by.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from tokendiff.attention_masks import MaskRule
from tokendiff.random import RowGenerator


class Denoiser(Protocol):
    """A model in two parts, so that logits are computed only where they are needed."""

    @property
    def is_time_conditioned(self) -> bool:
        """Whether `encode` reads the time; what it returns is otherwise good at any time."""
        ...

    def encode(self, tokens: Tensor, is_valid: Tensor, time: Tensor) -> Tensor:
        """Hidden states [B, L, D] of noisy tokens [B, L] at times [B] in [0, 1]; positions outside
        `is_valid` ([B, L]) are not seen.
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], over every id of the vocabulary, the mask
        included.
        """
        ...


class CausalDenoiser(Protocol):
    """A causal language model that is told where each token stands and what it sees.

    Its logits at a position are for the token at that position: nothing is shifted.
    """

    def encode(self, tokens: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
        """Hidden states [B, Q, D] of tokens [B, Q] at positions [B, Q] (counted from 0), each
        seeing what `rule` says (`tokendiff.attention_masks`).
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], over every id of the vocabulary, the mask
        included.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows of packed tokens.

    Attributes:
        tokens: [B, L] int64 clean tokens, padded at the right.
        is_valid: [B, L] bool; False on padding.
        document: [B, L] int64, which document of its row a position belongs to, counted from 0; -1
            on padding. By default a row is one document.
    """

    tokens: Tensor
    is_valid: Tensor
    document: Tensor = field(default=cast(Tensor, None))

    def __post_init__(self) -> None:
        if self.document is None:
            object.__setattr__(self, "document", self.is_valid.long() - 1)

    @classmethod
    def of_rows(cls, tokens: Tensor, lengths: Tensor, is_start: Tensor) -> "TokenBatch":
        """Rows as shards hold them.

        Args:
            tokens: [B, L] ids, anything on padding.
            lengths: [B] where padding begins.
            is_start: [B, L] bool, where a document begins.
        """
        is_valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        document = (is_start.cumsum(1) - 1).masked_fill(~is_valid, -1)
        return cls(tokens=tokens.long(), is_valid=is_valid, document=document)


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A sum and a count, so that the mean is taken once, over all workers and micro-batches.

    Attributes:
        loss_sum: scalar, nats, with gradient.
        num_tokens: scalar count of valid tokens that `loss_sum / num_tokens` is a mean over.
        metrics: name to (sum, count), scalars without gradient.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    def loss(self, model: Denoiser, batch: TokenBatch, generator: RowGenerator) -> LossOutput: ...


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Finished sequences.

    Attributes:
        tokens: [B, L] int64, no mask among them.
        num_model_calls: [B] int64, forward passes that the row took part in, those for guidance
            included.
    """

    tokens: Tensor
    num_model_calls: Tensor


# Called after each step of a sampler with (time reached, x_t [B, L]); x_t must not be written to.
StepCallback = Callable[[float, Tensor], None]
