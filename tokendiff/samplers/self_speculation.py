"""Speculative decoding of a model by itself: it drafts a block as a diffusion model, and judges it
as the autoregressive one that it is too. One set of weights, one cache.

Two passes take turns, both behind the causal cache of the text so far:

- the last token, read from left to right, and a block of K masks behind it, which sees itself
  whole: the first gives the next token, which is the model's own and stands; the masks give a draft
  of those behind that;
- the next token and the draft, read from left to right, as `speculation` has it: the longest prefix
  that the model would have written itself stays, and one token more.

So two passes give two tokens at least, as many as decoding token by token, and K + 1 at most.

With `draft_ahead` the second pass does the work of the first too. Which of the K tokens that it
reads will stand is not known yet, so K blocks of masks come along, one for the text behind each; of
these the one is kept that the verdict points to. So one pass gives one token at least and K at
most. It reads K + K^2 tokens, where the others read K + 1 and K.

Sources: Nemotron-Labs-Diffusion (2026-05), self-speculation; TiDAR (arXiv 2511.08923) for drafts of
every outcome in one pass; acceptance as in arXiv 2211.17192.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import causal_up_to, masks_behind_each
from tokendiff.diffusion.interfaces import Decoder, SelfDraftingDecoder
from tokendiff.samplers.slots import Slots
from tokendiff.samplers.speculation import (
    GAINS,
    OWN,
    PROPOSAL,
    SpeculativeSampler,
    last_and,
    position_uniforms,
)

_HAS_DRAFT = "has_draft"


@dataclass(frozen=True, kw_only=True)
class SelfSpeculationSampler(SpeculativeSampler):
    """The text of sampler `ar`, in fewer passes.

    Attributes:
        mask_token_id: never drafted.
        block_length: K masks are drafted from at once, as the model was trained.
        predicts_next: the state before a token tells it; see `objectives.blocks.BlockSight`.
        draft_steps: passes over the masks of a draft. Each settles its share of the draft, from the
            left, and the next one sees what is settled.
        draft_ahead: draft in the pass that verifies.
        keeps_base: the model has adapters, which count where it drafts.
    """

    mask_token_id: int
    block_length: int
    predicts_next: bool = False
    draft_steps: int = 1
    draft_ahead: bool = False
    keeps_base: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_length < 2:
            raise ValueError(
                f"block_length must be at least 2, got {self.block_length}: the first token of a "
                "block is the model's own, and nothing would be drafted"
            )
        if not 1 <= self.draft_steps < self.block_length:
            raise ValueError(
                f"draft_steps must lie in 1..{self.block_length - 1}, the tokens of a draft, got "
                f"{self.draft_steps}"
            )
        if self.draft_ahead and self.draft_steps > 1:
            raise ValueError(
                f"draft_ahead drafts in the pass that verifies, so draft_steps must be 1, got "
                f"{self.draft_steps}"
            )

    def _most_gained(self, model: Decoder) -> int:
        return self.block_length + (0 if self.draft_ahead else 1)

    def _slots(self, model: Decoder, *, num_slots: int, key: int) -> Slots:
        return Slots(
            model,
            num_slots=num_slots,
            max_new_tokens=self.max_new_tokens,
            seed_key=key,
            columns=(_HAS_DRAFT,),
            histograms={GAINS: self._most_gained(model)},
        )

    def _speculate(self, model: Decoder, slots: Slots, rows: Tensor) -> None:
        if not self.draft_ahead:
            states = self._draft(model, slots, rows)
            gained = torch.ones_like(rows)
            going_on = self._going_on(slots, rows)
            if going_on.numel():
                some = rows[going_on]
                gained[going_on] += self._verify_draft(model, slots, some, states[going_on])
            slots[GAINS][rows, gained - 1] += 1
            return
        has_draft = slots[_HAS_DRAFT][rows].bool()
        if (started := rows[has_draft]).numel():
            gained = self._verify_and_draft(model, slots, started)
            slots[GAINS][started, gained - 1] += 1
        if (new := rows[~has_draft]).numel():
            _keep(slots, new, self._draft(model, slots, new))
            slots[_HAS_DRAFT][new] = 1
            slots[GAINS][new, 0] += 1

    def _going_on(self, slots: Slots, rows: Tensor) -> Tensor:
        """Which of `rows`, as indices: those that neither the newest token nor the limit ends."""
        newest = slots.tokens[rows, slots["length"][rows] - 1][:, None]
        is_stopped = self._first_stop(newest, torch.ones_like(newest, dtype=torch.bool)) == 0
        return (~is_stopped & (slots["length"] < slots["limit"])[rows]).nonzero()[:, 0]

    def _draft(self, model: Decoder, slots: Slots, rows: Tensor) -> Tensor:
        """Read the last token and a block of masks; write the next token, which is the model's own.

        Returns:
            [n, K - 1, D] states that tell the tokens behind that.
        """
        length, room = slots["length"][rows], (slots["limit"] - slots["length"])[rows]
        tokens = last_and(slots, rows, self._masks(rows, self.block_length))
        num_tokens = 1 + room.clamp(max=self.block_length)
        is_mask = torch.arange(tokens.shape[1], device=rows.device).expand_as(tokens) > 0
        hidden = cast(SelfDraftingDecoder, model).encode(
            tokens, num_tokens, slots.cache, rows, causal_up_to(length), **self._drafted(is_mask)
        )
        slots["num_calls"][rows] += 1
        slots.cache.extend(rows, torch.ones_like(length))
        uniforms = position_uniforms(slots.generator.select(rows), length[:, None])
        own = self._draw(model.head(hidden[:, 0]).float(), uniforms[:, 0, OWN])
        slots.tokens[rows, length] = own
        slots["length"][rows] += 1
        return self._telling(hidden[:, 1:])

    def _verify_draft(self, model: Decoder, slots: Slots, rows: Tensor, states: Tensor) -> Tensor:
        """[n] tokens that are gained by what states [n, K - 1, D] of a first pass tell."""
        uniforms = self._uniforms(slots, rows)
        tokens, logits = self._proposed(model, slots, rows, states, uniforms)
        num_drafted = self.block_length - 1
        for step in range(1, self.draft_steps):
            settled = num_drafted * step // self.draft_steps
            states = self._draft_on(model, slots, rows, tokens[:, :settled])
            again, of_again = self._proposed(model, slots, rows, states, uniforms)
            tokens = torch.cat([tokens[:, :settled], again[:, settled:]], dim=1)
            if logits is not None and of_again is not None:
                logits = torch.cat([logits[:, :settled], of_again[:, settled:]], dim=1)
        return self._verify(model, slots, rows, tokens, logits, uniforms)

    def _draft_on(self, model: Decoder, slots: Slots, rows: Tensor, settled: Tensor) -> Tensor:
        """[n, K - 1, D] states that tell a draft of which the first tokens are `settled` [n, S]."""
        length, room = slots["length"][rows], (slots["limit"] - slots["length"])[rows]
        masks = self._masks(rows, self.block_length - 1 - settled.shape[1])
        tokens = last_and(slots, rows, torch.cat([settled, masks], dim=1))
        num_tokens = (1 + room).clamp(max=self.block_length)
        is_draft = torch.ones_like(tokens, dtype=torch.bool)
        rule = causal_up_to(length - 1)
        hidden = cast(SelfDraftingDecoder, model).encode(
            tokens, num_tokens, slots.cache, rows, rule, **self._drafted(is_draft)
        )
        slots["num_calls"][rows] += 1
        return self._telling(hidden)

    def _verify_and_draft(self, model: Decoder, slots: Slots, rows: Tensor) -> Tensor:
        """[n] tokens that are gained by the drafts that were kept; keep the next ones."""
        size = self.block_length
        uniforms = self._uniforms(slots, rows)
        states = slots.kept(rows).unflatten(1, (size - 1, -1))
        tokens, logits = self._proposed(model, slots, rows, states, uniforms)
        read = torch.cat([last_and(slots, rows, tokens), self._masks(rows, size * size)], dim=1)
        is_mask = torch.arange(read.shape[1], device=rows.device).expand_as(read) >= size
        length, limit = slots["length"][rows], slots["limit"][rows]
        place = torch.arange(size, device=rows.device)
        from_last = torch.cat([place, (place[:, None] + 1 + place).flatten()])
        positions = length[:, None] - 1 + from_last
        hidden = cast(SelfDraftingDecoder, model).encode(
            read,
            torch.full_like(length, read.shape[1]),
            slots.cache,
            rows,
            masks_behind_each(length - 1, limit, size),
            # Nothing is kept of what lies behind the limit, where a model may have no positions.
            positions=torch.minimum(positions, limit[:, None] - 1),
            **self._drafted(is_mask),
        )
        slots["num_calls"][rows] += 1
        gained = self._settle(model, slots, rows, hidden[:, :size], tokens, logits, uniforms)
        groups = hidden[:, size:].unflatten(1, (size, size))
        _keep(slots, rows, self._telling(groups[torch.arange(len(rows)), gained - 1]))
        return gained

    def _proposed(
        self, model: Decoder, slots: Slots, rows: Tensor, states: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """As `_propose`, for `rows` [n] whose draft states [n, K - 1, D] tell."""
        at = uniforms[:, :-1, PROPOSAL]
        return self._propose(model, states, at, never=self.mask_token_id)

    def _telling(self, states: Tensor) -> Tensor:
        """[n, K - 1, D] of states [n, K, D] of a block, whose first token is not drafted."""
        return states[:, :-1] if self.predicts_next else states[:, 1:]

    def _uniforms(self, slots: Slots, rows: Tensor) -> Tensor:
        """[n, K, 3] the numbers of the positions behind the last token."""
        at = slots["length"][rows, None] + torch.arange(self.block_length, device=rows.device)
        return position_uniforms(slots.generator.select(rows), at)

    def _masks(self, rows: Tensor, count: int) -> Tensor:
        return torch.full_like(rows[:, None].expand(-1, count), self.mask_token_id)

    def _drafted(self, is_draft: Tensor) -> dict[str, Any]:
        """What a model with adapters for its drafts is told of."""
        return {"is_draft": is_draft} if self.keeps_base else {}


def _keep(slots: Slots, rows: Tensor, states: Tensor) -> None:
    slots.keep(rows, states.flatten(1))
