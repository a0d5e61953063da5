"""Cross-entropy through the head in chunks of tokens, so that no [B, L, V] tensor ever exists."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

CHUNK_TOKENS = 1024  # 1024 x 30,522 fp32 logits are 125 MB


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Per token of N: negative log-likelihood, whether it is the argmax, entropy of the tempered
    softmax.
    """

    nll: Tensor
    is_correct: Tensor
    entropy: Tensor | None


def token_losses(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    mask_token_id: int,
    entropy_temperature: float | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> TokenLosses:
    """SUBS cross-entropy: the mask has probability 0, and the loss is computed in float32.

    Args:
        hidden: [N, D] hidden states of the positions that count.
        targets: [N] clean tokens, none of them the mask.
        entropy_temperature: also the entropy (nats) of softmax(logits / entropy_temperature), with
            gradient.
        chunk_tokens: more tokens than this go through in chunks whose logits are computed again in
            the backward pass: one head's worth of extra work for V / D times less memory.

    Returns:
        each field [N] float32 (`is_correct` bool).
    """

    def one_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = head(hidden).float()
        logits = logits.index_fill(
            -1, torch.tensor([mask_token_id], device=logits.device), -torch.inf
        )
        nll = functional.cross_entropy(logits, targets, reduction="none")
        is_correct = logits.detach().argmax(-1) == targets
        if entropy_temperature is None:
            return nll, is_correct
        log_p = functional.log_softmax(logits / entropy_temperature, dim=-1)
        # 0 * -inf at the mask would be NaN in the value and in the gradient.
        plogp = log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)
        return nll, is_correct, -plogp.sum(-1)

    if hidden.shape[0] <= chunk_tokens:
        parts = [one_chunk(hidden, targets)]
    else:
        parts = [
            checkpoint(one_chunk, h, x, use_reentrant=False)
            for h, x in zip(hidden.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
        ]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    return TokenLosses(
        nll=columns[0], is_correct=columns[1], entropy=columns[2] if len(columns) > 2 else None
    )
