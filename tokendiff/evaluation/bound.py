"""The bound on -ln p(x) that a diffusion model gives, estimated with little variance and whole:
never clipped or reweighted, and with what it has at both ends of time.

Absorbing noise. With alpha going from 1 to 0 the bound is the mean over all orders of the
order-wise negative log-likelihood, whatever the schedule, which in turn is

    L = E_{l ~ U{1..n}} E_{l of n masked} [ n / l * sum over masked positions of -ln x_theta(x_0) ].

Drawing the number of masked positions and masking exactly that many is the low-variance estimator
of LLaDA (arXiv 2502.09992, eq. 6 and App. A). A model that is given the time sees the one at which
1 - alpha is distributed as given l masked of n: Beta(l, n - l + 1), the l-th smallest of n uniform
numbers, of which masking takes the l smallest.

Uniform and hybrid noise. The integrand of `tokendiff.diffusion.kernels.ForwardKernel.nelbo` at
times that are stratified within the row and crowd where it is large, with the prior and the
reconstruction.

Where only some tokens are targets, all of this is of p(targets | the other tokens): the others are
never noised and never counted. An answer that preprocessing filled up with EOS is judged with its
filling: p(answer) >= p(answer and filling), so the nats stay a bound.

Rows may be on the CPU and the model elsewhere: it is sent what it reads, and nobody waits for it
(`tokendiff.diffusion.devices`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tokendiff.diffusion.devices import device_of, sent, sent_at
from tokendiff.diffusion.interfaces import Denoiser, TokenBatch
from tokendiff.diffusion.kernels import LEAST_TIME, AbsorbingKernel, ForwardKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.errors import InputError
from tokendiff.objectives.chunked import (
    negative_log_likelihood,
    predict_through_head,
    without_mask,
)
from tokendiff.objectives.token_noise import nelbo_bracket

_NEGLIGIBLE = 1e-9  # share of noise at the least time that a reconstruction need not care for
_STRATUM, _END = -1, -2  # what a row's random numbers are for, beside the samples 0, 1, ...


@torch.no_grad()
def row_bounds(
    model: Denoiser,
    batch: TokenBatch,
    generator: RowGenerator,
    *,
    kernel: ForwardKernel,
    prediction: str = "loo",
    predicts_next: bool = False,
    num_mask_samples: int,
) -> tuple[Tensor, Tensor]:
    """One estimate of the bound per row.

    Args:
        batch: padding is neither seen nor counted, a literal mask is not counted.
        prediction: what the model gives, "loo" or "posterior"; `NoiseProcess` explains them.
        predicts_next: a first token is told by no state, and is given as it is in training; see
            `TokenBatch.without_first_tokens`.
        num_mask_samples: noise levels per row, stratified within the row.

    Returns:
        nats [B] float64 of all targets of the row, where the model is; and the number of tokens [B]
        int64 that they are the bound of, where the rows are.
    """
    if predicts_next:
        batch = batch.without_first_tokens()
    batch = replace(batch, is_target=batch.is_target & (batch.tokens != kernel.mask_token_id))
    length = batch.tokens.shape[1]
    stratum = generator.fold_in(_STRATUM).uniform(1)[:, 0]
    there = device_of(model, like=batch.tokens)
    total = torch.zeros(len(batch.tokens), dtype=torch.float64, device=there)
    for sample in range(num_mask_samples):
        level = torch.remainder((stratum + sample) / num_mask_samples, 1.0)
        noise = generator.fold_in(sample).uniform(length)
        if isinstance(kernel, AbsorbingKernel):
            total += _masked_nats(model, batch, level, noise, kernel)
        else:
            total += _noisy_nats(model, batch, level, noise, kernel, prediction)
    total /= num_mask_samples
    num_tokens = batch.is_target.sum(1)
    if not isinstance(kernel, AbsorbingKernel):
        total += sent(kernel.prior_nats() * num_tokens, there)
        if has_end(kernel):
            noise = generator.fold_in(_END).uniform(length)
            total += _end_nats(model, batch, noise, kernel, prediction)
    return total, num_tokens


def _masked_nats(
    model: Denoiser,
    batch: TokenBatch,
    level: Tensor,
    noise: Tensor,
    kernel: AbsorbingKernel,
) -> Tensor:
    """[B] nats with a number of masked positions drawn by `level` [B] in [0, 1)."""
    x_0, is_target, mask = batch.tokens, batch.is_target, kernel.mask_token_id
    num_tokens = is_target.sum(1)
    num_masked = 1 + (level * num_tokens).long()  # uniform on 1..n
    score = noise.masked_fill(~is_target, torch.inf)
    ordered, order = score.sort(dim=1)
    rank = order.argsort(dim=1)
    is_masked = is_target & (rank < num_masked[:, None])
    masked_share = ordered.gather(1, (num_masked - 1).clamp(max=x_0.shape[1] - 1)[:, None])[:, 0]
    time = kernel.schedule.time(1.0 - masked_share.clamp(max=1.0))
    x_t = x_0.masked_fill(is_masked, mask)
    at = is_masked.nonzero(as_tuple=True)
    hidden = model.encode(x_t, batch.is_valid, time, batch.isolated)
    nll = predict_through_head(
        model.head,
        hidden[sent_at(at, hidden.device)],
        (sent(x_0[at], hidden.device),),
        lambda logits, targets: negative_log_likelihood(without_mask(logits, mask), targets),
    )
    weight = num_tokens.double() / num_masked.double()
    return sum_by_row(nll * sent(weight[at[0]], nll.device), at[0], num_rows=len(x_0))


def _noisy_nats(
    model: Denoiser,
    batch: TokenBatch,
    level: Tensor,
    noise: Tensor,
    kernel: ForwardKernel,
    prediction: str,
) -> Tensor:
    """[B] nats at the time that belongs to `level` [B] in [0, 1)."""
    x_0, is_target = batch.tokens, batch.is_target
    t, slope = kernel.warped_time(level)
    x_t = kernel.corrupt(x_0, t, uniform=noise, is_noisable=is_target)
    nats, row = _nats_of_targets(model, batch, x_t, t, integrand(kernel, prediction))
    return sum_by_row(nats * sent(slope[row], nats.device), row, num_rows=len(x_0))


# Of logits [N, V], clean and noisy tokens [N] and times [N]: nats [N].
NatsOfTokens = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def integrand(kernel: ForwardKernel, prediction: str) -> NatsOfTokens:
    """The bound's integrand for what a model predicts."""

    def nats_of(logits: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        logits = _loo_logits(logits, x_t, t, kernel, prediction)
        weight = kernel.loss_weight(x_0, x_t, t)
        nats = weight * nelbo_bracket(kernel, logits, x_0, x_t, t)
        return torch.where(weight > 0.0, nats, torch.zeros_like(nats))

    return nats_of


def reconstruction(kernel: ForwardKernel, prediction: str) -> NatsOfTokens:
    """The bound's end at the least time for what a model predicts."""

    def nats_of(logits: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        belief = _loo_logits(logits, x_t, t, kernel, prediction).softmax(-1)
        of_x_0, of_x_t = (belief.gather(-1, x[:, None])[:, 0] for x in (x_0, x_t))
        return kernel.reconstruction_nats(of_x_0, of_x_t, x_0, x_t, t)

    return nats_of


def has_end(kernel: ForwardKernel) -> bool:
    """Whether noise is left at the least time, whose reconstruction is to be counted."""
    least = torch.full((1,), LEAST_TIME, dtype=torch.float64)
    return 1.0 - float(kernel.alpha(least)) > _NEGLIGIBLE


def _end_nats(
    model: Denoiser,
    batch: TokenBatch,
    noise: Tensor,
    kernel: ForwardKernel,
    prediction: str,
) -> Tensor:
    """[B] nats of the reconstruction from the least time."""
    x_0, is_target = batch.tokens, batch.is_target
    t = torch.full((len(x_0),), LEAST_TIME, dtype=torch.float64, device=x_0.device)
    x_t = kernel.corrupt(x_0, t, uniform=noise, is_noisable=is_target)
    nats, row = _nats_of_targets(model, batch, x_t, t, reconstruction(kernel, prediction))
    return sum_by_row(nats, row, num_rows=len(x_0))


def _nats_of_targets(
    model: Denoiser, batch: TokenBatch, x_t: Tensor, t: Tensor, nats_of: NatsOfTokens
) -> tuple[Tensor, Tensor]:
    """[N] nats of the N targets of x_t [B, L] at times t [B]; and [N] the rows that they are in."""
    at = batch.is_target.nonzero(as_tuple=True)
    hidden = model.encode(x_t, batch.is_valid, t, batch.isolated)
    columns = [sent(each, hidden.device) for each in (batch.tokens[at], x_t[at], t[at[0]])]
    states = hidden[sent_at(at, hidden.device)]
    return predict_through_head(model.head, states, tuple(columns), nats_of), at[0]


def _loo_logits(
    logits: Tensor, x_t: Tensor, t: Tensor, kernel: ForwardKernel, prediction: str
) -> Tensor:
    """float64, the mask excluded, whatever the model predicts."""
    logits = without_mask(logits.double(), kernel.mask_token_id)
    return kernel.loo_logits(logits, x_t, t) if prediction == "posterior" else logits


def sum_by_row(values: Tensor, row: Tensor, *, num_rows: int) -> Tensor:
    """[num_rows] float64 sums of values [N] that are of rows [N]."""
    zeros = torch.zeros(num_rows, dtype=torch.float64, device=values.device)
    return zeros.index_add(0, sent(row, values.device), values.double())


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

    Raises:
        InputError: the rows have no token that is judged.
    """
    rows, tokens = len(nats), int(num_tokens.sum())
    if tokens == 0:
        raise InputError(
            f"none of the {rows:,} rows has a token to judge: their tokens all belong to the "
            "prompt (prompt_length), are the first ones of their documents, or are masks; evaluate "
            "on longer documents"
        )
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
