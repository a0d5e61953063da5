"""First-hitting sampling: the times at which masks are revealed are drawn, not stepped towards.

Exact, with no time grid: one token is revealed per model call. Source: arXiv 2409.02908.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.interfaces import StepCallback
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.base import Predictor, Sampler, check_absorbing


@dataclass(frozen=True, kw_only=True)
class FirstHittingSampler(Sampler):
    """`on_step` hears the latest time among the rows, those that are finished being at 0."""

    kernel: AbsorbingKernel

    def __post_init__(self) -> None:
        super().__post_init__()
        check_absorbing(self.kernel, "only a mask is revealed once, and then stays as it is")

    def num_steps(self, is_given: Tensor) -> int:
        return max((~is_given).sum(1).tolist(), default=0)

    def _denoise(
        self,
        x_t: Tensor,
        is_open: Tensor,
        predictor: Predictor,
        generator: RowGenerator,
        on_step: StepCallback,
    ) -> Tensor:
        one = torch.ones(len(x_t), dtype=torch.float64, device=x_t.device)
        masked_share = 1.0 - self.kernel.alpha(one)
        is_masked = is_open
        for step in range(self.num_steps(~is_open)):
            hit, place, token = generator.fold_in(step).uniform(3).unbind(1)
            num_masked = is_masked.sum(1)
            # Each mask's own share at its reveal is uniform below this one: theirs is the largest.
            masked_share = masked_share * hit ** (1.0 / num_masked.clamp(min=1))
            rank = torch.minimum((place * num_masked).long(), num_masked - 1)
            is_hit = is_masked & (is_masked.cumsum(1) == rank[:, None] + 1)
            time = self.kernel.schedule.time(1.0 - masked_share)
            x_s = x_t.clone()
            for row, position, logits in predictor.logits(x_t, is_hit, time):
                x_s[row, position] = self._draw(logits, token[row])
            x_t, is_masked = x_s, is_masked & ~is_hit
            on_step(float((time * is_masked.any(1)).max()), x_t)
        return x_t
