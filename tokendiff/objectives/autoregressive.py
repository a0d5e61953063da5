"""The plain next-token loss of a causal language model.

    L = sum over documents and targets x_{i+1} of -ln p(x_{i+1} | x_1 .. x_i)

The first token of a document (or of the row, where the row goes on with one) is predicted from
nothing and is not counted. Logits at a position are for the next token.
Where only answers are targets, the sum is exactly -ln p(answers | what stands before each).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import causal, positions_in_document
from tokendiff.diffusion.devices import device_of, sent, sent_at
from tokendiff.diffusion.interfaces import CausalDenoiser, LossOutput, TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.objectives.chunked import (
    is_likeliest,
    negative_log_likelihood,
    predict_through_head,
    reduce_through_head,
)


@dataclass(frozen=True, kw_only=True)
class Autoregressive:
    def loss(self, model: CausalDenoiser, batch: TokenBatch, generator: RowGenerator) -> LossOutput:
        """Nothing is drawn."""
        hidden, targets, _ = _next_tokens(model, batch)
        return next_token_loss(model.head, hidden, targets)


def next_token_loss(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor
) -> LossOutput:
    """The summed negative log-likelihood of the tokens [N] behind those of hidden states [N, D]."""

    def loss_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        nll = negative_log_likelihood(logits, targets)
        return nll.sum(), is_likeliest(logits, targets).sum(dtype=torch.float64)[None]

    targets = sent(targets, hidden.device)
    loss_sum, right = reduce_through_head(head, hidden, (targets,), loss_of)
    num_tokens = torch.tensor(len(targets))
    return LossOutput(
        loss_sum=loss_sum,
        num_tokens=num_tokens,
        metrics={"accuracy": (right[0], num_tokens)},
    )


@torch.no_grad()
def row_nats(model: CausalDenoiser, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The negative log-likelihood of each row's targets, given what stands before each.

    Returns:
        nats [B] float64, where the model is, and the number of tokens [B] int64 that they are of,
        where the rows are.
    """
    hidden, targets, row = _next_tokens(model, batch)
    nats = predict_through_head(
        model.head,
        hidden,
        (sent(targets, hidden.device),),
        lambda logits, targets: negative_log_likelihood(logits.double(), targets),
    )
    zeros = torch.zeros(len(batch.tokens), dtype=torch.float64, device=nats.device)
    counts = row.bincount(minlength=len(batch.tokens))
    return zeros.index_add(0, sent(row, nats.device), nats), counts


def _next_tokens(model: CausalDenoiser, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, D] of the tokens whose next one in their document is a target, those next
    ones [N], and the rows [N] they are in.
    """
    document, there = batch.document, device_of(model, like=batch.tokens)
    position = sent(positions_in_document(document), there)
    hidden = model.encode(sent(batch.tokens, there), position, causal(sent(document, there)))
    is_counted = (document[:, 1:] == document[:, :-1]) & batch.is_target[:, 1:]
    at = is_counted.nonzero(as_tuple=True)
    return hidden[:, :-1][sent_at(at, there)], batch.tokens[:, 1:][at], at[0]
