"""Block after block, from left to right: the blocks before are given, those behind still noise.

By default a block is sampled ancestrally, on a grid of times. With a `remasking_strategy` a step
draws a candidate at each mask of the block and commits some of them by how sure the model is: the
published decoding of LLaDA (arXiv 2502.09992) is "low_confidence_static".

With a `cache` a pass reads less than the whole row: keys and values of what lies before the active
block (prefix), or on both sides of it (dual), are kept from the pass that the block began with.
They are those of tokens that were masks then, so the samples are an approximation. Source:
Fast-dLLM (arXiv 2505.22618).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokendiff.diffusion.interfaces import Denoiser, StepCallback
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.ancestral import TOKEN, AncestralSampler
from tokendiff.samplers.base import Predictor, check_absorbing
from tokendiff.samplers.commit_rules import CommitRule
from tokendiff.samplers.continuous import ContinuousSampler, RowState

ANCESTRAL = "ancestral"


@dataclass(frozen=True, kw_only=True)
class BlockwiseSampler(ContinuousSampler, AncestralSampler):
    """`on_step` hears the time of the active blocks. Each row has its own: its first that is not
    filled in.

    Attributes:
        block_size: positions [k block_size, (k + 1) block_size) are a block, wherever a prompt
            ends; the last may be shorter.
        num_inference_steps: of each block that is not given as a whole; by a rule, at most.
        remasking_strategy: "ancestral", or the strategy of a `CommitRule`, whose quota spreads a
            block's masks over the steps.
        confidence_threshold, entropy_threshold: see `CommitRule`.
        begins_at_answer: a row's blocks are counted from its first open position.
        stop_token_ids: a row ends with the block in which one of these tokens is sampled. Open
            positions in later blocks of the row are filled with the first of these ids.
        cache: "none", "prefix" or "dual".
        cache_refresh_steps: passes of a block, at most, from one over the whole row to the next; 1
            gives the tokens of cache "none". None: one such pass for each block.
    """

    kernel: AbsorbingKernel
    block_size: int
    remasking_strategy: str = ANCESTRAL
    confidence_threshold: float = 0.85
    entropy_threshold: float = 0.5
    begins_at_answer: bool = False
    stop_token_ids: tuple[int, ...] = ()
    cache: str = "none"
    cache_refresh_steps: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_absorbing(
            self.kernel,
            "while a block is sampled those behind it stay pure noise, and a model of another "
            "kernel was trained on rows of which every position is at the same time",
        )
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {self.block_size}")
        if self.remasking_strategy != ANCESTRAL:
            self._commit_rule()
        if self.cache not in ("none", "prefix", "dual"):
            raise ValueError(f"cache must be none, prefix or dual, got {self.cache!r}")
        if self.cache_refresh_steps is not None and self.cache_refresh_steps < 1:
            raise ValueError(
                f"cache_refresh_steps must be at least 1, got {self.cache_refresh_steps}"
            )

    def _predictor(self, model: Denoiser, is_given: Tensor, is_valid: Tensor | None) -> Predictor:
        return Predictor(
            self,
            model,
            is_given,
            is_valid,
            has_memory=self.cache != "none",
            passes_per_refresh=self.cache_refresh_steps,
        )

    def _commit_rule(self) -> CommitRule:
        return CommitRule(
            strategy=self.remasking_strategy,
            confidence_threshold=self.confidence_threshold,
            entropy_threshold=self.entropy_threshold,
        )

    def num_steps(self, is_given: Tensor) -> int:
        block_of = self._blocks(~is_given).masked_fill(is_given, -1).sort(1).values
        is_first = (block_of >= 0) & (block_of != block_of.roll(1, 1))
        is_first[:, :1] = block_of[:, :1] >= 0
        return self.num_inference_steps * max(is_first.sum(1).tolist(), default=0)

    def _blocks(self, is_open: Tensor) -> Tensor:
        """[B, L] the number of each position's block; below 0 in front of an answer."""
        position = torch.arange(is_open.shape[1], device=is_open.device)
        if not self.begins_at_answer:
            return (position // self.block_size).expand(is_open.shape)
        begin = is_open.long().argmax(1)  # the first that is open
        return torch.div(position - begin[:, None], self.block_size, rounding_mode="floor")

    def _check_length(self, length: int) -> None:
        if self.block_size > length and not self.begins_at_answer:
            raise ValueError(f"block_size {self.block_size} must not exceed seq_len {length}")

    def _round(self, rows: RowState, predictor: Predictor, on_step: StepCallback) -> None:
        """Fill in the next block of each row."""
        block_of = self._blocks(~predictor.is_given)
        none = int(block_of.max()) + 1  # of rows that are done
        block = block_of.masked_fill(~rows.is_left, none).amin(1)
        is_active = rows.is_left & (block_of == block[:, None])
        if self.cache != "none":
            is_dual = self.cache == "dual"
            is_read = block_of == block[:, None] if is_dual else block_of >= block[:, None]
            predictor.move_window(is_read & predictor.is_valid)
        is_ancestral = self.remasking_strategy == ANCESTRAL
        fill = partial(AncestralSampler._denoise, self) if is_ancestral else self._by_rule
        x_t = fill(rows.x_t, is_active, predictor, rows.generator.fold_in(block), on_step)
        is_left = rows.is_left & ~is_active
        stops = torch.tensor(self.stop_token_ids, dtype=x_t.dtype, device=x_t.device)
        is_over = (is_active & torch.isin(x_t, stops)).any(1)
        if bool(is_over.any()):
            x_t = x_t.masked_fill(is_over[:, None] & is_left, self.stop_token_ids[0])
        rows.x_t, rows.is_left = x_t, is_left & ~is_over[:, None]

    def _by_rule(
        self,
        x_t: Tensor,
        is_open: Tensor,
        predictor: Predictor,
        generator: RowGenerator,
        on_step: StepCallback,
    ) -> Tensor:
        """The active block filled in by a rule."""
        rule, steps, mask = self._commit_rule(), self.num_inference_steps, self.kernel.mask_token_id
        num_masks = (is_open & (x_t == mask)).sum(1)
        for step in range(steps):
            is_masked = is_open & (x_t == mask)
            if not bool(is_masked.any()):
                break
            time = self._time_of_masks(x_t, predictor.is_given)
            uniform = generator.fold_in(step).fold_in(TOKEN).uniform(x_t.shape[1])
            candidates = predictor.candidates(x_t, is_masked, time, uniform)
            quota = (num_masks // steps + (step < num_masks % steps).long()).clamp(min=1)
            is_chosen = is_masked if step == steps - 1 else rule(candidates, is_masked, quota)
            x_t = torch.where(is_chosen, candidates.tokens, x_t)
            on_step(1.0 - (step + 1) / steps, x_t)
        return x_t

    def _time_of_masks(self, x_t: Tensor, is_given: Tensor) -> Tensor:
        """[B] the time at which plain sampling expects as many masks as a row has."""
        num_masks = ((x_t == self.kernel.mask_token_id) & ~is_given).sum(1)
        return self._time_of(num_masks.double(), is_given)

    def _model_time(self, t: Tensor, x_t: Tensor, is_open: Tensor, is_given: Tensor) -> Tensor:
        """The time at which plain sampling expects as many masks as there are: those of the active
        block at t, and those of all blocks behind.
        """
        is_behind = (x_t == self.kernel.mask_token_id) & ~is_open & ~is_given
        num_masks = is_open.sum(1) * (1.0 - self.kernel.alpha(t)) + is_behind.sum(1)
        return self._time_of(num_masks, is_given)

    def _time_of(self, num_masks: Tensor, is_given: Tensor) -> Tensor:
        return self.kernel.schedule.time(1.0 - num_masks / (~is_given).sum(1).clamp(min=1))
