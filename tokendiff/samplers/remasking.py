"""Ancestral sampling in which a revealed token may become a mask again, so that what was drawn
early can still be corrected. Source: ReMDM (arXiv 2503.00307).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.base import check_absorbing


def capped(sigma_max: Tensor, eta: float) -> Tensor:
    """ReMDM 4.1, "max-capped"."""
    return sigma_max.clamp(max=eta)


def rescaled(sigma_max: Tensor, eta: float) -> Tensor:
    """ReMDM 4.1, "rescaled"."""
    return eta * sigma_max


# From the largest remasking probability that the marginals allow, and eta, to the probability.
REMASKING_SCHEDULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "cap": capped,
    "rescale": rescaled,
}


@dataclass(frozen=True, kw_only=True)
class RemaskingSampler(AncestralSampler):
    """In a step from t to s a revealed token returns to the mask with probability sigma, and a
    masked one is revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t), which
    leaves the marginals q_t as they are.

    Attributes:
        eta: in [0, 1]; at 0 nothing is remasked, and the samples are the ancestral sampler's.
    """

    kernel: AbsorbingKernel
    eta: float
    remasking_schedule: Literal["cap", "rescale"] = "cap"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_absorbing(self.kernel, "only masks can be told from tokens that are clean")
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"eta must lie in [0, 1], got {self.eta}")
        if self.remasking_schedule not in REMASKING_SCHEDULES:
            raise ValueError(
                f"remasking_schedule must be one of {', '.join(REMASKING_SCHEDULES)}, got "
                f"{self.remasking_schedule!r}"
            )

    def _move_probability(
        self, x_t: Tensor, belief: Tensor, *, s: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        to_clean, to_noise = super()._move_probability(x_t, belief, s=s, t=t)
        alpha_t = self.kernel.alpha(t)
        alpha_s, _ = self.kernel.cleaner_end(s)
        sigma_max = ((1.0 - alpha_s) / alpha_t).clamp(max=1.0)
        sigma = REMASKING_SCHEDULES[self.remasking_schedule](sigma_max, self.eta)
        is_mask = x_t == self.kernel.mask_token_id
        return (
            torch.where(is_mask, to_clean + sigma * alpha_t / (1.0 - alpha_t), to_clean),
            torch.where(is_mask, to_noise, sigma),
        )
