"""Block after block, committing what the model is sure of, and thinking again about what stands.

Sources: LLaDA2.0 and 2.1 technical reports; the released pipeline and scheduler of diffusers
(LLaDA2Pipeline, BlockRefinementScheduler) are what one row's greedy tokens are held against. Where
they depart from their own description, the description is followed: the mask is never a candidate;
EOS inside the prompt does not keep a row from ending; after its last mask is gone a block has at
most `max_post_steps` passes of editing, and has them whether or not its steps are used up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import MaskRule, causal_by_position
from tokendiff.diffusion.devices import sent
from tokendiff.samplers.block_decoding import BlockSampler, BlockState
from tokendiff.samplers.commit_rules import Candidates, commit_confident, edit_confident, quotas
from tokendiff.samplers.slots import Slots


@dataclass(frozen=True, kw_only=True)
class BlockRefinementSampler(BlockSampler):
    """
    Attributes:
        num_inference_steps: a block is spread over so many, the remainder over the first ones; over
            no more than max_new_tokens // minimal_topk.
        threshold: every candidate of more confidence is committed; above 1, the quota alone is.
        editing_threshold: a committed token gives way to another of more confidence than this; None
            is off. Tokens of the prompt stay.
        max_post_steps: see above.
        minimal_topk: a step commits at least so many, where so many masks are left.
        attention_mask_mode: "2d", a causal model as it is, in which a mask sees only what is left
            of it; "4d", a block sees itself whole. As the model was trained.
        sees_tail: in mode 4d the last block is seen whole, with the masks behind the last token
            that is wanted: as a model met it whose training filled blocks up, and as the
            `generate` of LLaDA2 does. By default, as the pipeline does, nothing sees those.
    """

    block_length: int = 32
    num_inference_steps: int = 32
    threshold: float = 0.7
    editing_threshold: float | None = None
    max_post_steps: int = 16
    minimal_topk: int = 1
    attention_mask_mode: str = "2d"
    sees_tail: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be at least 1, got {self.num_inference_steps}"
            )
        if not self.threshold >= 0.0:
            raise ValueError(f"threshold must not be negative, got {self.threshold}")
        if self.editing_threshold is not None and not self.editing_threshold > 0.0:
            raise ValueError(f"editing_threshold must be above 0, got {self.editing_threshold}")
        if self.max_post_steps < 0:
            raise ValueError(f"max_post_steps must not be negative, got {self.max_post_steps}")
        if not 1 <= self.minimal_topk <= self.max_new_tokens:
            raise ValueError(
                f"minimal_topk must lie between 1 and the {self.max_new_tokens} new tokens, got "
                f"{self.minimal_topk}"
            )
        if self.attention_mask_mode not in ("2d", "4d"):
            raise ValueError(
                f"attention_mask_mode must be 2d or 4d, got {self.attention_mask_mode!r}"
            )

    @property
    def _is_causal(self) -> bool:
        return self.attention_mask_mode == "2d"

    @property
    def _edits(self) -> bool:
        return self.editing_threshold is not None

    @property
    def _num_post_steps(self) -> int:
        return self.max_post_steps if self._edits else 0

    def _rule(self, slots: Slots, rows: Tensor, device: torch.device) -> MaskRule:
        inside = causal_by_position if self._is_causal else super()._rule(slots, rows, device)
        if self.sees_tail:
            return inside
        limit = sent(slots["limit"][rows], device)
        return lambda b, q, kv: inside(b, q, kv) & (kv < limit[b])

    def _commit(self, block: BlockState, candidates: Candidates) -> Tensor:
        num_steps = min(self.num_inference_steps, self.max_new_tokens // self.minimal_topk)
        by_step = quotas(self.block_length, num_steps).clamp(min=self.minimal_topk)
        quota = by_step.to(block.step.device)[block.step.clamp(max=num_steps - 1)]
        is_written = commit_confident(
            candidates.confidence, block.is_masked, quota, threshold=self.threshold
        )
        if self.editing_threshold is None:
            return is_written
        return is_written | edit_confident(
            candidates.confidence,
            candidates.tokens,
            block.tokens,
            is_editable=~block.is_masked & ~block.is_given,
            threshold=self.editing_threshold,
        )
