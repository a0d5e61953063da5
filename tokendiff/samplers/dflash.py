"""Speculative decoding with a draft that fills a block in one pass.

The token that is known last anchors a block; the draft fills it; the target judges it
(`speculation`), and its own token behind what it accepts is the next anchor. Source: DFlash (arXiv
2602.06036).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.interfaces import Decoder, DraftedDecoder
from tokendiff.samplers.slots import Slots
from tokendiff.samplers.speculation import (
    GAINS,
    PROPOSAL,
    SpeculativeSampler,
    position_uniforms,
)


@dataclass(frozen=True, kw_only=True)
class DFlashSampler(SpeculativeSampler):
    """The target's own text, in fewer of its forward passes."""

    def _most_gained(self, model: Decoder) -> int:
        return _drafted(model).block_size

    def _speculate(self, model: Decoder, slots: Slots, rows: Tensor) -> None:
        drafted, length = _drafted(model), slots["length"][rows]
        at = length[:, None] + torch.arange(drafted.block_size, device=rows.device)
        uniforms = position_uniforms(slots.generator.select(rows), at)
        hidden = drafted.draft(slots.tokens[rows, length - 1], slots.cache, rows)
        proposed = self._propose(model, hidden, uniforms[:, :-1, PROPOSAL])
        gained = self._verify(model, slots, rows, *proposed, uniforms)
        slots[GAINS][rows, gained - 1] += 1


def _drafted(model: Decoder) -> DraftedDecoder:
    if not isinstance(model, DraftedDecoder):
        raise TypeError(f"sampler dflash needs a model with a draft, got {type(model).__name__}")
    return model
