"""Blocks of masks that are filled in: what `sdar` and `block_refinement` share.

In each step the active block is encoded behind the cached ones (`block_cache`), candidates are
drawn at its masks, and a rule says which of them stay.

Causal attention (`2d`) allows more: a position's keys and values depend on nothing right of it, so
every token enters the cache as soon as all left of it are settled.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent, sent_at
from tokendiff.diffusion.interfaces import Decoder
from tokendiff.samplers.base import positions_at_once
from tokendiff.samplers.block_cache import CachedBlockSampler
from tokendiff.samplers.categorical import without_token
from tokendiff.samplers.commit_rules import Candidates
from tokendiff.samplers.open_ended import encode_known
from tokendiff.samplers.slots import Slots


@dataclass(frozen=True, kw_only=True)
class BlockState:
    """The active blocks of n rows.

    Attributes:
        tokens: [n, K].
        is_masked: [n, K] bool.
        is_given: [n, K] bool, positions of the prompt.
        step: [n] steps that the block has had.
    """

    tokens: Tensor
    is_masked: Tensor
    is_given: Tensor
    step: Tensor


@dataclass(frozen=True, kw_only=True)
class BlockSampler(CachedBlockSampler):
    """
    Attributes:
        keeps_base: the model has adapters, which count in active blocks.
    """

    columns = ("post_step",)

    keeps_base: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._is_causal and (self.context_is_causal or self.predicts_next):
            raise ValueError("a causal block has no use for context_is_causal or predicts_next")

    @abstractmethod
    def _commit(self, block: BlockState, candidates: Candidates) -> Tensor:
        """[n, K] bool: which candidates are written. At least one mask goes in every row that has
        any.
        """

    @property
    def _is_causal(self) -> bool:
        return False

    @property
    def _edits(self) -> bool:
        """Whether tokens of the active block may be replaced that were committed before."""
        return False

    @property
    def _num_post_steps(self) -> int:
        """Steps of a block, at most, in which tokens are replaced after its last mask is gone."""
        return 0

    def _denoise(self, model: Decoder, slots: Slots, rows: Tensor) -> None:
        cached = slots.cache.lengths[rows]
        begin = self._begin(slots)[rows]
        at = (rows[:, None], begin[:, None] + torch.arange(self.block_length, device=rows.device))
        is_given = at[1] < slots["prompt_length"][rows, None]
        tokens = slots.tokens[at]
        block = BlockState(
            tokens=tokens,
            is_masked=(tokens == self.mask_token_id) & ~is_given,
            is_given=is_given,
            step=slots["step"][rows],
        )
        rule = self._rule(slots, rows, model.device)
        counts = begin + self.block_length - cached
        drafts_from = begin if self.keeps_base else None
        hidden = encode_known(model, slots, rows, counts, rule, drafts_from=drafts_from)
        offset = begin - cached
        if self.predicts_next:
            hidden, offset = self._shifted(hidden, offset, slots, rows), torch.zeros_like(offset)
        candidates = self._candidates(model, hidden, offset, block, slots, rows)
        is_written = self._commit(block, candidates)
        tokens = torch.where(is_written, candidates.tokens, tokens)
        slots.tokens[at] = tokens
        slots.cache.extend(rows, begin + self._num_settled(block, is_written) - cached)
        self._conclude(slots, rows, block, tokens, is_written, begin)

    def _num_settled(self, block: BlockState, is_written: Tensor) -> Tensor:
        """[n]: tokens from the block's first whose keys and values of this pass are final."""
        is_final = ~(block.is_masked.any(1) | is_written.any(1))
        if self.context_is_causal or self.predicts_next:
            # Once the block is finished it is encoded as context, and tells what comes next.
            return torch.zeros_like(block.step)
        settled = is_final.long() * self.block_length
        if self._is_causal:
            is_kept = block.is_given if self._edits else ~block.is_masked
            settled = torch.maximum(settled, is_kept.long().cumprod(1).sum(1))
        return settled

    def _conclude(
        self,
        slots: Slots,
        rows: Tensor,
        block: BlockState,
        tokens: Tensor,
        is_written: Tensor,
        begin: Tensor,
    ) -> None:
        """Note which blocks are finished, and which rows."""
        index = torch.arange(self.block_length, device=rows.device)
        position, limit = begin[:, None] + index, slots["limit"][rows]
        is_masked = (tokens == self.mask_token_id) & ~block.is_given
        first_mask = torch.where(is_masked, index, self.block_length).amin(1)
        is_new = ~block.is_given & (index < first_mask[:, None]) & (position < limit[:, None])
        stop_at = self._first_stop(tokens, is_new)
        is_stopped = stop_at < self.block_length
        # A pass over a block without masks could only replace tokens.
        is_post = ~block.is_masked.any(1)
        post_step = slots["post_step"][rows] + is_post
        is_over = ~is_masked.any(1)
        if self._num_post_steps:
            is_over = is_post & (~is_written.any(1) | (post_step >= self._num_post_steps))
        settled = begin + (is_over * self.block_length if self._edits else first_mask)
        slots["is_done"][rows] = (is_stopped | (settled >= limit)).long()
        slots["end"][rows] = torch.where(is_stopped, begin + stop_at + 1, limit)
        slots["is_stopped"][rows] = is_stopped.long()
        slots["step"][rows] = torch.where(is_over, 0, block.step + 1)
        slots["post_step"][rows] = torch.where(is_over, 0, post_step)
        slots["length"][rows] = torch.where(
            is_over, begin + self.block_length, slots["length"][rows]
        )

    def _needs(self, block: BlockState) -> Tensor:
        """[n, K] bool: where candidates are drawn."""
        return ~block.is_given if self._edits else block.is_masked

    def _candidates(
        self,
        model: Decoder,
        hidden: Tensor,
        offset: Tensor,
        block: BlockState,
        slots: Slots,
        rows: Tensor,
    ) -> Candidates:
        """Candidates from hidden states [n, N, D], in which the block begins at `offset` [n] (below
        0 where its first tokens are cached).
        """
        generator = slots.generator.select(rows).fold_in(slots["num_draws"][rows])
        uniform = generator.uniform(self.block_length)
        slots["num_draws"][rows] += 1
        candidates = Candidates.none(block.tokens)
        which, position = self._needs(block).nonzero(as_tuple=True)
        size = positions_at_once(hidden.device)
        for row, place in zip(which.split(size), position.split(size), strict=True):
            at = sent_at((row, offset[row] + place), hidden.device)
            logits = without_token(model.head(hidden[at]), self.mask_token_id)
            drawn = self._draw(logits, sent(uniform[row, place], logits.device))
            candidates.put((row, place), drawn, logits)
        return candidates
