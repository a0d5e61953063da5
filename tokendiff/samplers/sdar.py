"""Block diffusion decoding: a few denoising steps per block, behind a cache of finished blocks.

Sources: SDAR (arXiv 2510.06303), BD3-LM (arXiv 2503.09573).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.samplers.block_decoding import BlockSampler, BlockState, Candidates
from tokendiff.samplers.commit_rules import (
    commit_confident,
    commit_entropy_bounded,
    commit_leftmost,
    commit_most_confident,
    quotas,
)


@dataclass(frozen=True, kw_only=True)
class SDARSampler(BlockSampler):
    """
    Attributes:
        denoising_steps: of a block; the block is spread over them, and what is left at the last of
            them is committed there.
        remasking_strategy: which candidates a step commits, see `commit_rules`: "sequential",
            "low_confidence_static", "low_confidence_dynamic" or "entropy_bounded".
        confidence_threshold: of low_confidence_dynamic.
        entropy_threshold: of entropy_bounded, nats.
    """

    block_length: int = 4
    denoising_steps: int = 4
    remasking_strategy: str = "low_confidence_dynamic"
    confidence_threshold: float = 0.85
    entropy_threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.denoising_steps < 1:
            raise ValueError(f"denoising_steps must be at least 1, got {self.denoising_steps}")
        if self.remasking_strategy not in _STRATEGIES:
            raise ValueError(
                f"remasking_strategy must be one of {', '.join(_STRATEGIES)}, got "
                f"{self.remasking_strategy!r}"
            )
        if not self.confidence_threshold >= 0.0:
            raise ValueError(
                f"confidence_threshold must not be negative, got {self.confidence_threshold}"
            )
        if not self.entropy_threshold >= 0.0:
            raise ValueError(
                f"entropy_threshold must not be negative, got {self.entropy_threshold}"
            )

    def _commit(self, block: BlockState, candidates: Candidates) -> Tensor:
        step = block.step.clamp(max=self.denoising_steps - 1)
        quota = quotas(self.block_length, self.denoising_steps).to(step.device)[step]
        chosen = _STRATEGIES[self.remasking_strategy](self, block.is_masked, candidates, quota)
        is_last = block.step >= self.denoising_steps - 1
        return torch.where(is_last[:, None], block.is_masked, chosen)


# The closed table behind `remasking_strategy`.
_STRATEGIES: dict[str, Callable[[SDARSampler, Tensor, Candidates, Tensor], Tensor]] = {
    "sequential": lambda sampler, is_masked, candidates, quota: commit_leftmost(is_masked, quota),
    "low_confidence_static": lambda sampler, is_masked, candidates, quota: commit_most_confident(
        candidates.confidence, is_masked, quota
    ),
    "low_confidence_dynamic": lambda sampler, is_masked, candidates, quota: commit_confident(
        candidates.confidence, is_masked, quota, threshold=sampler.confidence_threshold
    ),
    "entropy_bounded": lambda sampler, is_masked, candidates, quota: commit_entropy_bounded(
        candidates.entropy, is_masked, bound=sampler.entropy_threshold
    ),
}
