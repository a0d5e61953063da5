"""The bound on -ln p(x) that a masked diffusion model gives, estimated with little variance.

The continuous-time bound with alpha going from 1 to 0 depends on no schedule: it is the mean over
all orders of the order-wise negative log-likelihood, which in turn is

    L = E_{l ~ U{1..n}} E_{l of n masked} [ n / l * sum over masked positions of -ln x_theta(x_0) ].

Drawing the number of masked positions and masking exactly that many is the low-variance estimator
of LLaDA (arXiv 2502.09992, eq. 6 and App. A). It covers both ends of time, so nothing is left out
of what is reported.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokendiff.interfaces import Denoiser
from tokendiff.objectives.chunked import token_losses
from tokendiff.random import RowGenerator


@torch.no_grad()
def row_bounds(
    model: Denoiser,
    x_0: Tensor,
    is_valid: Tensor,
    generator: RowGenerator,
    *,
    mask_token_id: int,
    num_mask_samples: int,
) -> tuple[Tensor, Tensor]:
    """One estimate of the bound per row.

    Args:
        x_0: [B, L] clean tokens.
        is_valid: [B, L]; padding is neither seen nor counted.
        num_mask_samples: noise levels per row, stratified over 1..n within the row.

    Returns:
        nats [B] float64 of the whole row, and the number of tokens [B] int64 that they are the
        bound of.
    """
    is_target = is_valid & (x_0 != mask_token_id)
    num_tokens = is_target.sum(1)
    u = generator.fold_in(-1).uniform(1)[:, 0]
    total = torch.zeros(x_0.shape[0], dtype=torch.float64, device=x_0.device)
    for sample in range(num_mask_samples):
        level = torch.remainder((u + sample) / num_mask_samples, 1.0)
        num_masked = 1 + (level * num_tokens).long()  # uniform on 1..n
        score = generator.fold_in(sample).uniform(x_0.shape[1]).masked_fill(~is_target, torch.inf)
        rank = score.argsort(dim=1).argsort(dim=1)
        is_masked = is_target & (rank < num_masked[:, None])
        hidden = model.encode(x_0.masked_fill(is_masked, mask_token_id), is_valid)[is_masked]
        losses = token_losses(model.head, hidden, x_0[is_masked], mask_token_id=mask_token_id)
        weight = num_tokens.double() / num_masked.double()
        row = is_masked.nonzero()[:, 0]
        total.index_add_(0, row, losses.nll.double() * weight[row])
    return total / num_mask_samples, num_tokens


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The bound over a corpus, with its standard error.

    Attributes:
        nats_per_token, standard_error: of the mean over tokens.
        bits_per_byte: over the UTF-8 bytes of the source text.
        perplexity: exp(nats_per_token), an upper bound on the perplexity.
    """

    nats_per_token: float
    standard_error: float
    bits_per_byte: float | None
    perplexity: float
    num_rows: int
    num_tokens: int
    num_bytes: int


def summarize(nats: np.ndarray, num_tokens: np.ndarray, num_bytes: np.ndarray) -> Bound:
    """Gather per-row estimates ([rows] each).

    The standard error is that of a ratio of sums over rows taken as independent; it covers the
    choice of rows and the drawn noise. Rows cut from one document are not quite independent, so for
    few documents it is optimistic.
    """
    rows, tokens = len(nats), int(num_tokens.sum())
    mean = float(nats.sum() / tokens)
    residual = nats - mean * num_tokens
    standard_error = math.sqrt(rows / max(rows - 1, 1) * float((residual**2).sum())) / tokens
    total_bytes = int(num_bytes.sum())
    return Bound(
        nats_per_token=mean,
        standard_error=standard_error,
        bits_per_byte=float(nats.sum()) / math.log(2.0) / total_bytes if total_bytes else None,
        perplexity=math.exp(min(mean, 700.0)),
        num_rows=rows,
        num_tokens=tokens,
        num_bytes=total_bytes,
    )
