"""Block diffusion decoding: a few denoising steps per block, behind a cache of finished blocks.

Sources: SDAR (arXiv 2510.06303), BD3-LM (arXiv 2503.09573).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.samplers.block_decoding import BlockSampler, BlockState
from tokendiff.samplers.commit_rules import Candidates, CommitRule, quotas


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
        self._rule_of_step()

    def _rule_of_step(self) -> CommitRule:
        return CommitRule(
            strategy=self.remasking_strategy,
            confidence_threshold=self.confidence_threshold,
            entropy_threshold=self.entropy_threshold,
        )

    def _commit(self, block: BlockState, candidates: Candidates) -> Tensor:
        step = block.step.clamp(max=self.denoising_steps - 1)
        quota = quotas(self.block_length, self.denoising_steps).to(step.device)[step]
        chosen = self._rule_of_step()(candidates, block.is_masked, quota)
        is_last = block.step >= self.denoising_steps - 1
        return torch.where(is_last[:, None], block.is_masked, chosen)
