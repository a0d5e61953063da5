"""First-hitting sampling: the times at which masks are revealed are drawn, not stepped towards.

Exact, with no time grid: one token is revealed per model call. Source: arXiv 2409.02908.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.interfaces import StepCallback
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.samplers.base import Predictor, check_absorbing
from tokendiff.samplers.continuous import ContinuousSampler, RowState


@dataclass(frozen=True, kw_only=True)
class FirstHittingSampler(ContinuousSampler):
    """`on_step` hears the latest time among the rows, those that are finished being at 0."""

    kernel: AbsorbingKernel

    def __post_init__(self) -> None:
        super().__post_init__()
        check_absorbing(self.kernel, "only a mask is revealed once, and then stays as it is")

    def num_steps(self, is_given: Tensor) -> int:
        return max((~is_given).sum(1).tolist(), default=0)

    def _numbers(self, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        one = torch.ones(num_rows, dtype=torch.float64, device=device)
        return {"masked_share": 1.0 - self.kernel.alpha(one)}

    def _round(self, rows: RowState, predictor: Predictor, on_step: StepCallback) -> None:
        """Reveal one token of each row."""
        num_masked = rows.is_left.sum(1)
        step = (~predictor.is_given).sum(1) - num_masked
        hit, place, token = rows.generator.fold_in(step).uniform(3).unbind(1)
        # Each mask's own share at its reveal is uniform below this one: theirs is the largest.
        masked_share = rows.numbers["masked_share"] * hit ** (1.0 / num_masked.clamp(min=1))
        rank = torch.minimum((place * num_masked).long(), num_masked - 1)
        is_hit = rows.is_left & (rows.is_left.cumsum(1) == rank[:, None] + 1)
        time = self.kernel.schedule.time(1.0 - masked_share)
        x_s = rows.x_t.clone()
        for row, position, logits in predictor.logits(rows.x_t, is_hit, time):
            x_s[row, position] = self._draw(logits, token[row])
        rows.x_t, rows.is_left = x_s, rows.is_left & ~is_hit
        rows.numbers["masked_share"] = masked_share
        on_step(float((time * rows.is_left.any(1)).max()), x_s)
