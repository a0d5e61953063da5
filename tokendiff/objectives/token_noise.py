"""Diffusion whose noise is other tokens: the uniform (UDLM) and hybrid (GIDD) kernels.

The integrand of the bound (`tokendiff.diffusion.kernels.ForwardKernel.nelbo`) is a sum over the
vocabulary. With b the noise at one id and r = alpha / b, the mask having probability 0 under
x_theta,

    KL(q_t(. | x_0) || q_t(. | x_theta)) = alpha [ln(1 + r) - ln(1 + r x_theta(x_0))]
                                           + b [ln(1 + r) - sum_j ln(1 + r x_theta(j))],
    ln rho = ln(q_t(z | x_0) / b) - ln(1 + r x_theta(z))   for z = x_t other than the mask, else 0,

which is one reduction of the model's output and two gathers. Nothing cancels: with b in place of
1 + r the terms would be differences of large logarithms. Sources: UDLM (arXiv 2412.10193), GIDD
(arXiv 2503.04482).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent, sent_at
from tokendiff.diffusion.interfaces import Denoiser, LossOutput, TokenBatch
from tokendiff.diffusion.kernels import ForwardKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.objectives.chunked import (
    confidence_weights,
    is_likeliest,
    negative_log_likelihood,
    reduce_through_head,
    tempered_entropy,
    without_mask,
)
from tokendiff.objectives.masked import check_fields

# Where a kernel has no noise but the mask, b = 0 and r is infinite; any b this small is the same.
_LEAST_NOISE = 1e-30


@dataclass(frozen=True, kw_only=True)
class TokenNoiseDiffusion:
    """
    Attributes:
        kernel: uniform or hybrid.
        loss_type: "elbo" trains the leave-one-out posterior that bound and sampler are built on;
            "cross_entropy" trains p(x_0 | x_t), which they then convert.
        max_loss_weight: clips r_t / q_t, which is unbounded next to the ends of time; the loss is
            then no longer the bound.
        lambda_conf: weight of the confidence term: per row, the mean entropy of
            softmax(logits / conf_temperature) over the correctly predicted tokens.
        predicts_next: the state before a token tells it; see `MDLM`.

    Where clipping or confidence change the loss, the bound itself is logged beside it as `elbo`.
    """

    kernel: ForwardKernel
    loss_type: Literal["elbo", "cross_entropy"] = "elbo"
    min_time: float = 1e-4
    max_loss_weight: float | None = None
    lambda_conf: float = 0.0
    conf_temperature: float = 1.0
    predicts_next: bool = False

    def __post_init__(self) -> None:
        check_fields(self.min_time, self.max_loss_weight, self.lambda_conf, self.conf_temperature)
        if self.loss_type not in ("elbo", "cross_entropy"):
            raise ValueError(f"loss_type must be elbo or cross_entropy, got {self.loss_type!r}")
        if self.loss_type == "cross_entropy" and self.max_loss_weight is not None:
            raise ValueError("max_loss_weight must be None with loss_type cross_entropy: no weight")

    @property
    def _is_changed(self) -> bool:
        return self.max_loss_weight is not None or self.lambda_conf > 0.0

    def loss(self, model: Denoiser, batch: TokenBatch, generator: RowGenerator) -> LossOutput:
        """Draw a time and a noisy sequence per row, and take the loss there.

        The sum estimates the bound's integral over [min_time, 1], at times that crowd where it is
        large; the cross-entropy is the mean over times that are spread evenly.
        """
        batch = self._rows(batch)
        u = generator.stratified()
        if self.loss_type == "elbo":
            t, slope = self.kernel.warped_time(u, min_time=self.min_time)
        else:
            t, slope = self.min_time + (1.0 - self.min_time) * u, torch.ones_like(u)
        is_target = batch.is_target & (batch.tokens != self.kernel.mask_token_id)
        uniform = generator.uniform(batch.tokens.shape[1])
        x_t = self.kernel.corrupt(batch.tokens, t, uniform=uniform, is_noisable=is_target)
        return self.loss_at(model, batch, x_t, t, slope)

    def loss_at(
        self, model: Denoiser, batch: TokenBatch, x_t: Tensor, t: Tensor, slope: Tensor
    ) -> LossOutput:
        """The loss at given times t [B] and noisy tokens x_t [B, L]; nothing is drawn here.

        Args:
            slope: [B] what a row's bound counts: dt/du of the draw of t. The cross-entropy is not
                an integral and leaves it out.
        """
        batch = self._rows(batch)
        is_target = batch.is_target & (batch.tokens != self.kernel.mask_token_id)
        states = model.encode(x_t, batch.is_valid, t, batch.isolated)
        at = is_target.nonzero(as_tuple=True)
        return self.loss_of_states(
            model.head,
            states[sent_at(at, states.device)],
            batch.tokens,
            x_t,
            t[:, None].expand_as(x_t),
            slope[:, None].expand_as(x_t),
            is_target,
            is_target.sum(),
        )

    def loss_of_states(
        self,
        head: Callable[[Tensor], Tensor],
        hidden: Tensor,
        tokens: Tensor,
        x_t: Tensor,
        t: Tensor,
        slope: Tensor,
        is_target: Tensor,
        num_tokens: Tensor,
    ) -> LossOutput:
        """The loss from the states [N, D] that tell the N targets.

        Args:
            tokens, x_t, t, slope: [B, L] clean and noisy tokens, and times as in `loss_at`.
            is_target: [B, L].
            num_tokens: how many tokens the loss is said to be of.
        """
        at = is_target.nonzero(as_tuple=True)
        num_noised = (x_t[at] != tokens[at]).sum()
        of_tokens = (tokens[at], x_t[at], t[at], slope[at], at[0], is_target.sum(1))
        x_0, z, t, slope, row, row_tokens = (sent(column, hidden.device) for column in of_tokens)
        columns = [x_0, z, t, slope]
        if self.lambda_conf > 0.0:
            mask = self.kernel.mask_token_id
            columns.append(
                confidence_weights(head, hidden, x_0, row, row_tokens, mask_token_id=mask)
            )
        loss_sum, sums = reduce_through_head(head, hidden, tuple(columns), self._loss_of)
        metrics = {"noised_accuracy": (sums[0], num_noised), "elbo": (sums[1], num_tokens)}
        if self.loss_type == "cross_entropy" or not self._is_changed:
            del metrics["elbo"]
        if self.lambda_conf > 0.0:
            metrics["confidence_entropy"] = (sums[2], num_tokens)
        return LossOutput(loss_sum=loss_sum, num_tokens=num_tokens, metrics=metrics)

    def _rows(self, batch: TokenBatch) -> TokenBatch:
        return batch.without_first_tokens() if self.predicts_next else batch

    def _loss_of(
        self,
        logits: Tensor,
        x_0: Tensor,
        x_t: Tensor,
        t: Tensor,
        slope: Tensor,
        conf_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and metric sums of one chunk: correct among the noised, unclipped bound, entropy."""
        logits = without_mask(logits, self.kernel.mask_token_id)
        is_correct = is_likeliest(logits, x_0) & (x_t != x_0)
        elbo = torch.zeros((), device=logits.device)
        if self.loss_type == "cross_entropy":
            loss = negative_log_likelihood(logits, x_0).sum()
        else:
            bracket = nelbo_bracket(self.kernel, logits, x_0, x_t, t)
            weight = self.kernel.loss_weight(x_0, x_t, t)
            clipped = weight.clamp(max=self.max_loss_weight or torch.inf)
            loss = ((slope * clipped).to(bracket.dtype) * bracket).sum()
            elbo = (slope * weight * bracket.detach()).sum()
        sums = [is_correct.sum(), elbo]
        if conf_weight is not None:
            entropy = tempered_entropy(logits, self.conf_temperature)
            confidence = (conf_weight.to(entropy.dtype) * entropy).sum()
            loss = loss + self.lambda_conf * confidence
            sums.append(confidence.detach())
        return loss, torch.stack([value.double() for value in sums])


def nelbo_bracket(
    kernel: ForwardKernel, logits: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor
) -> Tensor:
    """KL(q_t(. | x_0) || q_t(. | x_theta)) + rho - ln rho - 1, in one pass over the vocabulary.

    Args:
        logits: [N, V], -inf at the mask, float32 or float64; x_theta is their softmax.
        x_0, x_t, t: [N].

    Returns:
        [N] of the dtype of the logits; times `kernel.loss_weight` it is `kernel.nelbo`.
    """
    noise = kernel.noise(t)
    alpha, b = kernel.alpha(t), noise.token.clamp(min=_LEAST_NOISE)
    # The mask has the same probability given x_0 and given x_theta: rho is 1. Where all noise is
    # masks, a token counts nothing (its weight is 0), and the gradient of its rho could overflow.
    is_apart = (x_t == kernel.mask_token_id) | (noise.token <= 0.0)
    q_over_b = torch.where(is_apart, torch.zeros_like(b), 1.0 + alpha / b * (x_t == x_0))
    per_token = [value.to(logits.dtype)[:, None] for value in (alpha, b, alpha / b, q_over_b)]
    return _Bracket.apply(logits, x_0[:, None], x_t[:, None], *per_token)[:, 0]


class _Bracket(torch.autograd.Function):
    """The formula of this file's docstring, with h_j = 1 / (1 + r x_theta(j)):

    d/dx_theta(j) = -alpha h_j - alpha r h_j 1[j = x_0] + (1 - rho) r h_j 1[j = z, z not the mask].
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        x_0: Tensor,
        x_t: Tensor,
        alpha: Tensor,
        b: Tensor,
        r: Tensor,
        q_over_b: Tensor,
    ) -> Tensor:
        belief = logits.softmax(-1)
        scaled = belief * r
        at_x_0, at_z = scaled.gather(-1, x_0), scaled.gather(-1, x_t)
        top = r.log1p()
        logs = scaled.log1p().sum(-1, keepdim=True)
        divergence = alpha * (top - at_x_0.log1p()) + b * (top - logs)
        is_token = q_over_b > 0.0
        rho = torch.where(is_token, q_over_b / (1.0 + at_z), 1.0)
        if ctx.needs_input_grad[0]:
            # Of the derivative the part without the factor -alpha, which `backward` puts in.
            slope = scaled.add_(1.0).reciprocal_()  # h
            at_x_0 = r * slope.gather(-1, x_0)
            at_z = torch.where(is_token, (rho - 1.0) / b * slope.gather(-1, x_t), 0.0)
            slope.scatter_add_(-1, x_0, at_x_0).scatter_add_(-1, x_t, at_z)
            with torch.autocast(logits.device.type, enabled=False):  # it would round to bfloat16
                mean = torch.linalg.vecdot(slope, belief)[:, None]
            ctx.save_for_backward(slope.sub_(mean).mul_(belief), alpha)
        return divergence + (rho - rho.log() - 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_logits, alpha = ctx.saved_tensors
        return (by_logits * (-alpha * grad), None, None, None, None, None, None)
