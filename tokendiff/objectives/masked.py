"""What the losses at masked positions share: a weighted cross-entropy, and the confidence term."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import LossOutput
from tokendiff.objectives.chunked import (
    confidence_weights,
    is_likeliest,
    negative_log_likelihood,
    reduce_through_head,
    tempered_entropy,
    without_mask,
)


@dataclass(frozen=True, kw_only=True)
class MaskedTokens:
    """The N masked tokens of B rows.

    Attributes:
        hidden: [N, D] states at their places.
        targets: [N] clean tokens.
        row: [N] which row each is in.
        weight: [N] what the negative log-likelihood of each counts.
        row_tokens: [B] tokens that a row's mean confidence counts for.
        num_tokens: scalar, what the loss is a mean over.
    """

    hidden: Tensor
    targets: Tensor
    row: Tensor
    weight: Tensor
    row_tokens: Tensor
    num_tokens: Tensor

    def beside_states(self) -> "MaskedTokens":
        """All of them on the device of the states."""
        columns = {name: sent(column, self.hidden.device) for name, column in vars(self).items()}
        return MaskedTokens(**columns)


def masked_loss(
    head: Callable[[Tensor], Tensor],
    masked: MaskedTokens,
    *,
    mask_token_id: int,
    max_weight: float | None,
    lambda_conf: float,
    conf_temperature: float,
) -> LossOutput:
    """Sum of the weighted negative log-likelihoods, the mask having probability 0, and of the
    confidence term.

    Args:
        head: logits [n, V] of hidden states [n, D].
        max_weight: clips the weights.
        lambda_conf: of the confidence term: per row, the mean entropy of
            softmax(logits / conf_temperature) over the correctly predicted tokens.

    Returns:
        metrics `masked_nll`, `masked_accuracy`; where clipping or confidence change the loss, also
        `elbo`, what it would be without, and `confidence_entropy`.
    """
    masked, num_masked = masked.beside_states(), torch.tensor(len(masked.targets))
    clipped = masked.weight.clamp(max=max_weight or torch.inf)
    columns = [masked.targets, clipped, masked.weight]
    has_confidence = lambda_conf > 0.0
    if has_confidence:
        columns.append(
            confidence_weights(
                head,
                masked.hidden,
                masked.targets,
                masked.row,
                masked.row_tokens,
                mask_token_id=mask_token_id,
            )
        )

    def loss_of(
        logits: Tensor,
        targets: Tensor,
        clipped: Tensor,
        weight: Tensor,
        conf_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        logits = without_mask(logits, mask_token_id)
        nll = negative_log_likelihood(logits, targets)
        loss = (clipped.to(nll.dtype) * nll).sum()
        known = nll.detach()
        sums = [known.sum(), is_likeliest(logits, targets).sum(), (weight * known).sum()]
        if conf_weight is not None:
            entropy = tempered_entropy(logits, conf_temperature)
            confidence = (conf_weight.to(entropy.dtype) * entropy).sum()
            loss = loss + lambda_conf * confidence
            sums.append(confidence.detach())
        return loss, torch.stack([value.double() for value in sums])

    loss_sum, sums = reduce_through_head(head, masked.hidden, tuple(columns), loss_of)
    metrics = {
        "masked_nll": (sums[0], num_masked),
        "masked_accuracy": (sums[1], num_masked),
    }
    if has_confidence or max_weight is not None:
        metrics["elbo"] = (sums[2], masked.num_tokens)
    if has_confidence:
        metrics["confidence_entropy"] = (sums[3], masked.num_tokens)
    return LossOutput(loss_sum=loss_sum, num_tokens=masked.num_tokens, metrics=metrics)


def check_loss_fields(
    max_loss_weight: float | None, lambda_conf: float, conf_temperature: float
) -> None:
    """Checks that objectives share; raises ValueError."""
    if max_loss_weight is not None and max_loss_weight <= 0.0:
        raise ValueError(f"max_loss_weight must be positive, got {max_loss_weight}")
    if lambda_conf < 0.0:
        raise ValueError(f"lambda_conf must not be negative, got {lambda_conf}")
    if conf_temperature <= 0.0:
        raise ValueError(f"conf_temperature must be positive, got {conf_temperature}")


def check_fields(
    min_time: float,
    max_loss_weight: float | None,
    lambda_conf: float,
    conf_temperature: float,
) -> None:
    """As `check_loss_fields`, for objectives whose noise has a time."""
    if not 0.0 < min_time < 1.0:
        raise ValueError(f"min_time must lie strictly between 0 and 1, got {min_time}")
    check_loss_fields(max_loss_weight, lambda_conf, conf_temperature)
