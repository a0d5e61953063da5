"""Forward processes: how clean tokens become noise, and how one step back is taken.

Per position and independent across positions, q_t(z | x) = alpha_t 1[z = x] + b_t(z) with
sum_z b_t(z) = 1 - alpha_t. Here: the absorbing kernel, b_t(z) = (1 - alpha_t) 1[z = m].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.schedules import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class AbsorbingKernel:
    """A token becomes the mask and stays it. Sources: MDLM (arXiv 2406.07524), MD4 (arXiv
    2406.04329).
    """

    schedule: NoiseSchedule
    mask_token_id: int

    def __post_init__(self) -> None:
        if self.mask_token_id < 0:
            raise ValueError(f"mask_token_id must be a token id, got {self.mask_token_id}")

    def corrupt(self, x_0: Tensor, t: Tensor, *, uniform: Tensor, is_noisable: Tensor) -> Tensor:
        """A sample of q_t(. | x_0), in O(B L).

        Args:
            x_0: [B, L] clean tokens.
            t: [B] times.
            uniform: [B, L] draws from (0, 1), compared with 1 - alpha_t.
            is_noisable: [B, L]; elsewhere (padding, prompt) the clean token stays.

        Returns:
            [B, L] noisy tokens; `x_0` is not written to.
        """
        masked_share = 1.0 - self.schedule.alpha(t)
        return x_0.masked_fill(is_noisable & (uniform < masked_share[:, None]), self.mask_token_id)

    def loss_weight(self, t: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t), of the shape of `t`: what the NLL of a masked token counts at
        time t.

        Source: MDLM eq. 10.
        """
        return -self.schedule.alpha_prime(t) / (1.0 - self.schedule.alpha(t))

    def reveal_probability(self, s: Tensor, t: Tensor) -> Tensor:
        """Probability that a token masked at t is unmasked at the earlier time s, of the broadcast
        shape.

        (alpha_s - alpha_t) / (1 - alpha_t), and exactly 1 at s = 0: the last step removes all
        noise, also where the schedule leaves alpha_0 a little below 1.

        Raises:
            ValueError: if s >= t or either lies outside [0, 1].
        """
        if not bool(((s >= 0) & (s < t) & (t <= 1)).all()):
            raise ValueError(f"need 0 <= s < t <= 1, got s = {s.tolist()}, t = {t.tolist()}")
        alpha_s = torch.where(s == 0, torch.ones_like(s), self.schedule.alpha(s))
        alpha_t = self.schedule.alpha(t)
        return (alpha_s - alpha_t) / (1.0 - alpha_t)
