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
from tokendiff.objectives.chunked import (
    confidence_weights,
    is_likeliest,
    negative_log_likelihood,
    reduce_through_head,
    tempered_entropy,
    without_mask,
)
from tokendiff.random import RowGenerator


@dataclass(frozen=True, kw_only=True)
class MDLM:
    """
    Attributes:
        max_loss_weight: clips the weight -alpha'/(1 - alpha).
        lambda_conf: weight of the confidence term: per row, the mean entropy of
            softmax(logits / conf_temperature) over the correctly predicted masked tokens.

    Where clipping or confidence change the loss, the bound itself is logged beside it as `elbo`.
    """

    kernel: AbsorbingKernel
    min_time: float = 1e-3  # the weight -alpha'/(1 - alpha) is infinite at t = 0
    max_loss_weight: float | None = None
    lambda_conf: float = 0.0
    conf_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self.min_time, self.max_loss_weight, self.lambda_conf, self.conf_temperature)

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
        at = is_masked.nonzero(as_tuple=True)
        row = at[0]
        hidden = model.encode(x_t, batch.is_valid, t)[at]
        weight = self.kernel.masked_loss_weight(t)
        clipped = weight.clamp(max=self.max_loss_weight or torch.inf)
        columns = [x_0[at], *((1.0 - self.min_time) * of[row] for of in (clipped, weight))]
        has_confidence = self.lambda_conf > 0.0
        if has_confidence:
            columns.append(
                confidence_weights(
                    model.head, hidden, columns[0], row, is_target.sum(1), mask_token_id=mask
                )
            )

        def loss_of(
            logits: Tensor,
            targets: Tensor,
            clipped: Tensor,
            weight: Tensor,
            conf_weight: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]:
            logits = without_mask(logits, mask)
            nll = negative_log_likelihood(logits, targets)
            loss = (clipped.to(nll.dtype) * nll).sum()
            known = nll.detach()
            sums = [known.sum(), is_likeliest(logits, targets).sum(), (weight * known).sum()]
            if conf_weight is not None:
                entropy = tempered_entropy(logits, self.conf_temperature)
                confidence = (conf_weight.to(entropy.dtype) * entropy).sum()
                loss = loss + self.lambda_conf * confidence
                sums.append(confidence.detach())
            return loss, torch.stack([value.double() for value in sums])

        loss_sum, sums = reduce_through_head(model.head, hidden, tuple(columns), loss_of)
        num_tokens, num_masked = is_target.sum(), is_masked.sum()
        metrics = {
            "masked_nll": (sums[0], num_masked),
            "masked_accuracy": (sums[1], num_masked),
        }
        if has_confidence or self.max_loss_weight is not None:
            metrics["elbo"] = (sums[2], num_tokens)
        if has_confidence:
            metrics["confidence_entropy"] = (sums[3], num_tokens)
        return LossOutput(loss_sum=loss_sum, num_tokens=num_tokens, metrics=metrics)


def check_fields(
    min_time: float,
    max_loss_weight: float | None,
    lambda_conf: float,
    conf_temperature: float,
) -> None:
    """Checks that objectives share; raises ValueError."""
    if not 0.0 < min_time < 1.0:
        raise ValueError(f"min_time must lie strictly between 0 and 1, got {min_time}")
    if max_loss_weight is not None and max_loss_weight <= 0.0:
        raise ValueError(f"max_loss_weight must be positive, got {max_loss_weight}")
    if lambda_conf < 0.0:
        raise ValueError(f"lambda_conf must not be negative, got {lambda_conf}")
    if conf_temperature <= 0.0:
        raise ValueError(f"conf_temperature must be positive, got {conf_temperature}")
