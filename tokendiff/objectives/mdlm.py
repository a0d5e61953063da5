"""Masked diffusion in continuous time.

    L = E_{t ~ U(0,1)} [ -alpha'_t / (1 - alpha_t) * sum over masked positions of -ln x_theta(x_0) ]

Source: MDLM (arXiv 2406.07524), eq. 10, with SUBS: the mask is never predicted, an unmasked token
is itself.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.interfaces import Denoiser, LossOutput, TokenBatch
from tokendiff.kernels import AbsorbingKernel
from tokendiff.objectives.chunked import token_losses
from tokendiff.random import RowGenerator


@dataclass(frozen=True, kw_only=True)
class MDLM:
    kernel: AbsorbingKernel
    min_time: float = 1e-3  # the weight -alpha'/(1 - alpha) is infinite at t = 0
    lambda_conf: float = 0.0
    conf_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.min_time < 1.0:
            raise ValueError(f"min_time must lie strictly between 0 and 1, got {self.min_time}")
        if self.lambda_conf < 0.0:
            raise ValueError(f"lambda_conf must not be negative, got {self.lambda_conf}")
        if self.conf_temperature <= 0.0:
            raise ValueError(f"conf_temperature must be positive, got {self.conf_temperature}")

    def loss(self, model: Denoiser, batch: TokenBatch, generator: RowGenerator) -> LossOutput:
        """Draw a time and a noisy sequence per row, and take the loss there.

        The sum estimates the integral over [min_time, 1]; what lies below min_time is the
        reconstruction of the last few tokens, and belongs to the reported bound
        (`tokendiff.evaluation.bound`), not to training.
        """
        t = self.min_time + (1.0 - self.min_time) * generator.stratified()
        uniform = generator.uniform(batch.tokens.shape[1])
        # A literal mask token in the text has no likelihood under SUBS: it is context, never a
        # target.
        is_target = batch.is_valid & (batch.tokens != self.kernel.mask_token_id)
        x_t = self.kernel.corrupt(batch.tokens, t, uniform=uniform, is_noisable=is_target)
        return self.loss_at(model, batch, x_t, t)

    def loss_at(self, model: Denoiser, batch: TokenBatch, x_t: Tensor, t: Tensor) -> LossOutput:
        """The loss at given times t [B] and noisy tokens x_t [B, L]; nothing is drawn here."""
        x_0, mask = batch.tokens, self.kernel.mask_token_id
        is_target = batch.is_valid & (x_0 != mask)
        is_masked = is_target & (x_t == mask)
        row = is_masked.nonzero()[:, 0]
        hidden = model.encode(x_t, batch.is_valid)[is_masked]
        losses = token_losses(
            model.head,
            hidden,
            x_0[is_masked],
            mask_token_id=mask,
            entropy_temperature=self.conf_temperature if self.lambda_conf > 0.0 else None,
        )
        weight = ((1.0 - self.min_time) * self.kernel.loss_weight(t)).to(losses.nll.dtype)
        num_tokens = is_target.sum()
        loss_sum = (weight[row] * losses.nll).sum()
        metrics = {
            "masked_nll": (losses.nll.detach().sum(), is_masked.sum()),
            "masked_accuracy": (losses.is_correct.sum(), is_masked.sum()),
        }
        if losses.entropy is not None:
            confidence_sum = _sum_of_row_means(
                losses.entropy, losses.is_correct, row, is_target.sum(1)
            )
            loss_sum = loss_sum + self.lambda_conf * confidence_sum
            metrics["confidence_entropy"] = (confidence_sum.detach(), num_tokens)
        return LossOutput(loss_sum=loss_sum, num_tokens=num_tokens, metrics=metrics)


def _sum_of_row_means(
    entropy: Tensor, is_correct: Tensor, row: Tensor, row_tokens: Tensor
) -> Tensor:
    """Sum over rows of (tokens in the row) * (mean entropy over the row's correct masked tokens).

    Divided by the number of tokens it is the mean entropy over correct tokens, taken by row. A mean
    over all correct tokens of the batch would depend on how its rows are spread over workers and
    micro-batches.
    """
    chosen = is_correct.to(entropy.dtype)
    zeros = torch.zeros(row_tokens.shape[0], dtype=entropy.dtype, device=entropy.device)
    sums = zeros.index_add(0, row, entropy * chosen)
    counts = zeros.index_add(0, row, chosen)
    return (row_tokens * sums / counts.clamp(min=1.0)).sum()
