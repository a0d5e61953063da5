"""Block after block, from left to right: the blocks before are given, those behind still noise."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.interfaces import StepCallback
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.ancestral import AncestralSampler
from tokendiff.samplers.base import Predictor, check_absorbing


@dataclass(frozen=True, kw_only=True)
class BlockwiseSampler(AncestralSampler):
    """Ancestral sampling of one block at a time; `on_step` hears the active block's own time.

    Attributes:
        block_size: positions [k block_size, (k + 1) block_size) are a block, wherever a prompt
            ends; the last may be shorter.
        num_inference_steps: of each block that is not given as a whole.
    """

    kernel: AbsorbingKernel
    block_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_absorbing(
            self.kernel,
            "while a block is sampled those behind it stay pure noise, and a model of another "
            "kernel was trained on rows of which every position is at the same time",
        )
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")

    def num_steps(self, is_given: Tensor) -> int:
        blocks = (~is_given).any(0).split(self.block_size)
        return self.num_inference_steps * sum(bool(block.any()) for block in blocks)

    def _denoise(
        self,
        x_t: Tensor,
        is_open: Tensor,
        predictor: Predictor,
        generator: RowGenerator,
        on_step: StepCallback,
    ) -> Tensor:
        length = x_t.shape[1]
        if self.block_size > length:
            raise ValueError(f"block_size {self.block_size} must not exceed seq_len {length}")
        block_of = torch.arange(length, device=x_t.device) // self.block_size
        for block in range(int(block_of[-1]) + 1):
            is_active = is_open & (block_of == block)
            if bool(is_active.any()):
                x_t = super()._denoise(x_t, is_active, predictor, generator.fold_in(block), on_step)
        return x_t

    def _model_time(self, t: Tensor, x_t: Tensor, is_open: Tensor, is_given: Tensor) -> Tensor:
        """The time at which plain sampling expects as many masks as there are: those of the active
        block at t, and those of all blocks behind.
        """
        is_behind = (x_t == self.kernel.mask_token_id) & ~is_open & ~is_given
        num_masks = is_open.sum(1) * (1.0 - self.kernel.alpha(t)) + is_behind.sum(1)
        return self.kernel.schedule.time(1.0 - num_masks / (~is_given).sum(1).clamp(min=1))
