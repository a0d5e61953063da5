"""Block after block behind a cache of finished blocks: what all samplers share that decode so.

Blocks are counted from the first token of the prompt, so the block in which the prompt ends starts
partly given; or, where a request says so, from the prompt's end, as a model met them in training
whose blocks start anew with each answer (`tokendiff.objectives.blocks`). In each step the active
block is encoded behind the cached ones. Tokens of a block that was just finished are encoded once
more as they are now, in the pass in which the next block begins, since their keys and values were
those of a block that was not finished.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import MaskRule, block_causal_by_begin, causal_up_to
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import Decoder
from tokendiff.samplers.open_ended import PREFILL_CHUNK, OpenEndedSampler, encode_known
from tokendiff.samplers.slots import Slots


@dataclass(frozen=True, kw_only=True)
class CachedBlockSampler(OpenEndedSampler):
    """
    Attributes:
        mask_token_id: never a candidate, so it is in no completion.
        block_length: K, as the model was trained.
        context_is_causal: tokens before the active block see only up to themselves.
        predicts_next: the state before a token tells it.
    """

    # Numbers that a sampler keeps per row, beside those that all keep.
    columns: ClassVar[tuple[str, ...]] = ()

    mask_token_id: int
    block_length: int
    context_is_causal: bool = False
    predicts_next: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")

    @abstractmethod
    def _denoise(self, model: Decoder, slots: Slots, rows: Tensor) -> None:
        """One step of the active blocks of `rows` [n], all before which is read or was finished
        last.
        """

    def _rule(self, slots: Slots, rows: Tensor, device: torch.device) -> MaskRule:
        """What a position sees, in rows [n], as the model on a device asks for it."""
        if self.context_is_causal:
            return causal_up_to(sent(self._begin(slots)[rows], device))
        return block_causal_by_begin(sent(slots.block_begin[rows], device))

    def _slots(self, model: Decoder, *, num_slots: int, key: int) -> Slots:
        return Slots(
            model,
            num_slots=num_slots,
            max_new_tokens=self.max_new_tokens,
            block_length=self.block_length,
            pad=self.mask_token_id,
            seed_key=key,
            columns=("step", "num_draws", "is_done", "end", "is_stopped", *self.columns),
        )

    def _step(self, model: Decoder, slots: Slots) -> None:
        begin = self._begin(slots)
        pending = begin - slots.cache.lengths[: slots.num_rows]
        is_read = pending <= self.block_length
        if (rows := (~is_read).nonzero()[:, 0]).numel():
            chunk = max(PREFILL_CHUNK // self.block_length, 1) * self.block_length
            counts = self._whole_blocks(slots, rows, begin[rows], chunk)
            encode_known(model, slots, rows, counts, self._rule(slots, rows, model.device))
            slots.cache.extend(rows, counts)
        # A finished block before the active one makes a row twice as wide: on a GPU that is nearly
        # free, on a CPU the others are better off without it.
        is_wide = pending > 0
        apart = (is_read & is_wide, is_read & ~is_wide)
        for group in apart if model.device.type == "cpu" else (is_read,):
            if (rows := group.nonzero()[:, 0]).numel():
                self._denoise(model, slots, rows)

    def _begin(self, slots: Slots) -> Tensor:
        """[n] where each row's active block begins: all before it is settled."""
        return slots.block_begin[slots.rows, slots["length"]]

    def _whole_blocks(self, slots: Slots, rows: Tensor, begin: Tensor, most: int) -> Tensor:
        """[n]: how many tokens to read of what stands before `begin` [n], at most `most`: a block
        is read as a whole, since its tokens see each other. The state that tells the first token of
        the active block is to come with it.
        """
        cached = slots.cache.lengths[rows]
        stop = torch.minimum(cached + most, begin - int(self.predicts_next))
        return slots.block_begin[rows, stop] - cached

    def _shifted(self, hidden: Tensor, offset: Tensor, slots: Slots, rows: Tensor) -> Tensor:
        """[n, K, D] the states that tell the active block, which begins at `offset` [n] of hidden
        states [n, N, D]. The one before the block is read with its first pass, and kept.
        """
        offset = sent(offset, hidden.device)
        place = offset[:, None] - 1 + torch.arange(self.block_length, device=hidden.device)
        states = hidden.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
        before = torch.where(offset[:, None] > 0, states[:, 0], slots.kept(rows, like=states))
        slots.keep(rows, before)
        return torch.cat([before[:, None], states[:, 1:]], dim=1)

    def _finished(self, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
        return slots["is_done"].bool(), slots["end"], slots["is_stopped"].bool()
