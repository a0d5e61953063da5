"""Masked diffusion in continuous time.

    L = E_{t ~ U(0,1)} [ -alpha'_t / (1 - alpha_t) * sum over masked positions of -ln x_theta(x_0) ]

Source: MDLM (arXiv 2406.07524), eq. 10, with SUBS: the mask is never predicted, an unmasked token
is itself.
"""

from dataclasses import dataclass

from torch import Tensor

from tokendiff.diffusion.devices import sent_at
from tokendiff.diffusion.interfaces import Denoiser, LossOutput, TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.objectives.masked import MaskedTokens, check_fields, masked_loss


@dataclass(frozen=True, kw_only=True)
class MDLM:
    """
    Attributes:
        max_loss_weight: clips the weight -alpha'/(1 - alpha).
        lambda_conf: weight of the confidence term: per row, the mean entropy of
            softmax(logits / conf_temperature) over the correctly predicted masked tokens.
        predicts_next: the state before a token tells it, so that a first token is told by none and
            is given; see `TokenBatch.without_first_tokens`.

    Where clipping or confidence change the loss, the bound itself is logged beside it as `elbo`.
    """

    kernel: AbsorbingKernel
    min_time: float = 1e-3  # the weight -alpha'/(1 - alpha) is infinite at t = 0
    max_loss_weight: float | None = None
    lambda_conf: float = 0.0
    conf_temperature: float = 1.0
    predicts_next: bool = False

    def __post_init__(self) -> None:
        check_fields(self.min_time, self.max_loss_weight, self.lambda_conf, self.conf_temperature)

    def loss(self, model: Denoiser, batch: TokenBatch, generator: RowGenerator) -> LossOutput:
        """Draw a time and a noisy sequence per row, and take the loss there.

        The sum estimates the integral over [min_time, 1]; what lies below min_time is the
        reconstruction of the last few tokens, and belongs to the reported bound
        (`tokendiff.evaluation.bound`), not to training.
        """
        batch = self._rows(batch)
        t = self.min_time + (1.0 - self.min_time) * generator.stratified()
        uniform = generator.uniform(batch.tokens.shape[1])
        # A literal mask token in the text has no likelihood under SUBS: it is context, never a
        # target.
        is_target = batch.is_target & (batch.tokens != self.kernel.mask_token_id)
        x_t = self.kernel.corrupt(batch.tokens, t, uniform=uniform, is_noisable=is_target)
        return self.loss_at(model, batch, x_t, t)

    def loss_at(self, model: Denoiser, batch: TokenBatch, x_t: Tensor, t: Tensor) -> LossOutput:
        """The loss at given times t [B] and noisy tokens x_t [B, L]; nothing is drawn here."""
        batch = self._rows(batch)
        x_0, mask = batch.tokens, self.kernel.mask_token_id
        is_target = batch.is_target & (x_0 != mask)
        is_masked = is_target & (x_t == mask)
        at = is_masked.nonzero(as_tuple=True)
        hidden = model.encode(x_t, batch.is_valid, t, batch.isolated)
        share = 1.0 - self.min_time
        return masked_loss(
            model.head,
            MaskedTokens(
                hidden=hidden[sent_at(at, hidden.device)],
                targets=x_0[at],
                row=at[0],
                weight=share * self.kernel.masked_loss_weight(t)[at[0]],
                row_tokens=is_target.sum(1),
                num_tokens=is_target.sum(),
            ),
            mask_token_id=mask,
            max_weight=None if self.max_loss_weight is None else share * self.max_loss_weight,
            lambda_conf=self.lambda_conf,
            conf_temperature=self.conf_temperature,
        )

    def _rows(self, batch: TokenBatch) -> TokenBatch:
        return batch.without_first_tokens() if self.predicts_next else batch
