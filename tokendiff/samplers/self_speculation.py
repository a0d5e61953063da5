"""Speculative decoding of a model by itself: it drafts a block as a diffusion model, and judges it
as the autoregressive one that it is too. One set of weights, one cache.

Two passes take turns, both behind the causal cache of the text so far:

- the last token, read from left to right, and a block of masks behind it, which sees itself whole:
  the first gives the next token, which is the model's own and stands; the masks give a draft of
  those behind that;
- the next token and the draft, read from left to right, as `speculation` has it: the longest prefix
  that the model would have written itself stays, and one token more.

So two passes give two tokens at least, as many as decoding token by token, and K + 1 at most.
Sources: Nemotron-Labs-Diffusion (2026-05), self-speculation; acceptance as in arXiv 2211.17192.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import causal_up_to
from tokendiff.diffusion.interfaces import Decoder
from tokendiff.samplers.slots import Slots
from tokendiff.samplers.speculation import (
    GAINS,
    OWN,
    PROPOSAL,
    SpeculativeSampler,
    position_uniforms,
)


@dataclass(frozen=True, kw_only=True)
class SelfSpeculationSampler(SpeculativeSampler):
    """The text of sampler `ar`, in fewer passes.

    Attributes:
        mask_token_id: never drafted.
        block_length: K masks are drafted from at once, as the model was trained.
        predicts_next: the state before a token tells it; see `objectives.blocks.BlockSight`.
    """

    mask_token_id: int
    block_length: int
    predicts_next: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_length < 2:
            raise ValueError(
                f"block_length must be at least 2, got {self.block_length}: the first token of a "
                "block is the model's own, and nothing would be drafted"
            )

    def _most_gained(self, model: Decoder) -> int:
        return self.block_length + 1

    def _speculate(self, model: Decoder, slots: Slots, rows: Tensor) -> None:
        states = self._draft(model, slots, rows)
        length, room = slots["length"][rows], (slots["limit"] - slots["length"])[rows]
        newest = slots.tokens[rows, length - 1]
        everything = torch.ones_like(newest[:, None], dtype=torch.bool)
        is_stopped = self._first_stop(newest[:, None], everything) == 0
        gained = torch.ones_like(length)
        going_on = (~is_stopped & (room > 0)).nonzero()[:, 0]
        if going_on.numel():
            some = rows[going_on]
            place = torch.arange(self.block_length, device=rows.device)
            at = slots["length"][some][:, None] + place
            uniforms = position_uniforms(slots.generator.select(some), at)
            proposed = self._propose(
                model,
                states[going_on],
                uniforms[:, :-1, PROPOSAL],
                never=self.mask_token_id,
            )
            gained[going_on] += self._verify(model, slots, some, *proposed, uniforms)
        slots[GAINS][rows, gained - 1] += 1

    def _draft(self, model: Decoder, slots: Slots, rows: Tensor) -> Tensor:
        """Read the last token and a block of masks; write the next token, which is the model's own.

        Returns:
            [n, K - 1, D] states that tell the tokens behind that.
        """
        length, room = slots["length"][rows], (slots["limit"] - slots["length"])[rows]
        masks = torch.full_like(length[:, None].expand(-1, self.block_length), self.mask_token_id)
        tokens = torch.cat([slots.tokens[rows, length - 1][:, None], masks], dim=1)
        num_tokens = 1 + room.clamp(max=self.block_length)
        hidden = model.encode(tokens, num_tokens, slots.cache, rows, causal_up_to(length))
        slots["num_calls"][rows] += 1
        slots.cache.extend(rows, torch.ones_like(length))
        uniforms = position_uniforms(slots.generator.select(rows), length[:, None])
        own = self._draw(model.head(hidden[:, 0]).float(), uniforms[:, 0, OWN])
        slots.tokens[rows, length] = own
        slots["length"][rows] += 1
        return hidden[:, 1:-1] if self.predicts_next else hidden[:, 2:]
