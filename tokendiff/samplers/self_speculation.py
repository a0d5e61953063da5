"""Speculative decoding of a model by itself: it drafts a block as a diffusion model, and judges it
as the autoregressive one that it is too. One set of weights, one cache.

Passes take turns, all behind the causal cache of the text so far:

- The drafting pass reads the last token from left to right, and a block of K masks behind it that
  sees itself whole. The last token gives the next one, which is the model's own and stands; the
  masks give a draft of the K - 1 tokens behind that. With `draft_steps` S the draft takes S passes:
  each settles its share of the tokens, from the left, and the next pass sees what is settled.
- The verifying pass reads the next token and the draft from left to right, as `speculation` has it:
  the longest prefix that the model would have written itself stays, and one token more.

So S + 1 passes give two tokens at least, and K + 1 at most.

With `draft_ahead` the verifying pass drafts too. It cannot know how many of its K tokens will be
accepted, so it carries K blocks of masks, one for each outcome, and keeps the block of the outcome
that comes true. One pass then gives one token at least and K at most. It reads K + K^2 tokens; the
passes above read K + 1 and K.

Sources: Nemotron-Labs-Diffusion (2026-05), self-speculation; TiDAR (arXiv 2511.08923) for drafts of
every outcome in one pass; acceptance as in arXiv 2211.17192.
"""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import MaskRule, causal_up_to, masks_behind_each
from tokendiff.diffusion.devices import sent
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
    """The text of sampler `ar`, or text of the same distribution (`draft_temperature`), in fewer
    passes where enough is accepted.

    Attributes:
        mask_token_id: never drafted.
        block_length: K masks are drafted from at once, as the model was trained.
        predicts_next: the state before a token predicts it; see `objectives.blocks.BlockSight`.
        draft_steps: S, passes that a draft takes.
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
        drafting = cast(SelfDraftingDecoder, model)
        if not self.draft_ahead:
            states = self._draft(drafting, slots, rows)
            gained = torch.ones_like(rows)
            going_on = self._going_on(slots, rows)
            if going_on.numel():
                some = rows[going_on]
                states = states[sent(going_on, states.device)]
                gained[going_on] += self._verify_draft(drafting, slots, some, states)
            slots[GAINS][rows, gained - 1] += 1
            return
        has_draft = slots[_HAS_DRAFT][rows].bool()
        if (started := rows[has_draft]).numel():
            gained = self._verify_and_draft(drafting, slots, started)
            slots[GAINS][started, gained - 1] += 1
        if (new := rows[~has_draft]).numel():
            _keep(slots, new, self._draft(drafting, slots, new))
            slots[_HAS_DRAFT][new] = 1
            slots[GAINS][new, 0] += 1

    def _going_on(self, slots: Slots, rows: Tensor) -> Tensor:
        """Which of `rows`, as indices: those that neither the newest token nor the limit ends."""
        newest = slots.tokens[rows, slots["length"][rows] - 1][:, None]
        is_stopped = self._first_stop(newest, torch.ones_like(newest, dtype=torch.bool)) == 0
        return (~is_stopped & (slots["length"] < slots["limit"])[rows]).nonzero()[:, 0]

    def _draft(self, model: SelfDraftingDecoder, slots: Slots, rows: Tensor) -> Tensor:
        """Read the last token and a block of masks; write the next token, which is the model's own.

        Returns:
            [n, K - 1, D] states that predict the tokens behind that.
        """
        length = slots["length"][rows]
        tokens = last_and(slots, rows, self._masks(rows, self.block_length))
        is_mask = torch.arange(tokens.shape[1]) > 0
        rule = causal_up_to(sent(length, model.device))
        hidden = self._read(model, slots, rows, tokens, is_mask, rule=rule)
        slots.cache.extend(rows, torch.ones_like(length))
        uniforms = position_uniforms(slots.generator.select(rows), length[:, None])
        uniform = sent(uniforms[:, 0, OWN], hidden.device)
        own = self._draw(self._logits(model, hidden[:, 0]), uniform)
        slots.tokens[rows, length] = own.to(rows.device)
        slots["length"][rows] += 1
        return self._predicting(hidden[:, 1:])

    def _verify_draft(
        self, model: SelfDraftingDecoder, slots: Slots, rows: Tensor, states: Tensor
    ) -> Tensor:
        """[n] tokens that are gained by what states [n, K - 1, D] of a first pass predict."""
        uniforms = self._uniforms(slots, rows)
        tokens: list[Tensor] = []
        logits: list[Tensor] = []
        num_drafted, begin = self.block_length - 1, 0
        for step in range(1, self.draft_steps + 1):
            if step > 1:
                states = self._draft_on(model, slots, rows, torch.cat(tokens, dim=1))
            end = num_drafted * step // self.draft_steps
            share = self._proposed(model, states[:, begin:end], uniforms, begin)
            tokens.append(share[0])
            logits += [] if share[1] is None else [share[1]]
            begin = end
        drawn_from = torch.cat(logits, dim=1) if logits else None
        return self._verify(model, slots, rows, torch.cat(tokens, dim=1), drawn_from, uniforms)

    def _draft_on(
        self, model: SelfDraftingDecoder, slots: Slots, rows: Tensor, settled: Tensor
    ) -> Tensor:
        """[n, K - 1, D] states that predict a draft whose first tokens are `settled` [n, S]."""
        masks = sent(self._masks(rows, self.block_length - 1 - settled.shape[1]), settled.device)
        tokens = last_and(slots, rows, torch.cat([settled, masks], dim=1))
        is_draft = torch.ones(self.block_length, dtype=torch.bool)
        rule = causal_up_to(sent(slots["length"][rows] - 1, model.device))
        return self._predicting(self._read(model, slots, rows, tokens, is_draft, rule=rule))

    def _verify_and_draft(self, model: SelfDraftingDecoder, slots: Slots, rows: Tensor) -> Tensor:
        """[n] tokens that are gained by the drafts that were kept; keep the next ones."""
        size, there = self.block_length, model.device
        uniforms = self._uniforms(slots, rows)
        states = slots.kept(rows).unflatten(1, (size - 1, -1))
        tokens, logits = self._proposed(model, states, uniforms, 0)
        masks = sent(self._masks(rows, size * size), tokens.device)
        read = torch.cat([last_and(slots, rows, tokens), masks], dim=1)
        place = torch.arange(size)
        hidden = self._read(
            model,
            slots,
            rows,
            read,
            torch.arange(read.shape[1]) >= size,
            rule=masks_behind_each(sent(slots["length"][rows] - 1, there), size),
            offsets=torch.cat([place, (place[:, None] + 1 + place).flatten()]),
        )
        gained = self._settle(model, slots, rows, hidden[:, :size], tokens, logits, uniforms)
        groups = hidden[:, size:].unflatten(1, (size, size))
        own = groups[torch.arange(len(rows), device=there), sent(gained - 1, there)]
        _keep(slots, rows, self._predicting(own))
        return gained

    def _read(
        self,
        model: SelfDraftingDecoder,
        slots: Slots,
        rows: Tensor,
        tokens: Tensor,
        is_draft: Tensor,
        *,
        rule: MaskRule,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [n, N, D] of tokens [n, N] from the last one of `rows` [n] on.

        A draft is read whole also where it goes beyond the row's limit: with fewer masks it would
        be another than the model learnt.

        Args:
            is_draft: [N] bool.
            offsets: [N] of their positions, from that of the last token.
        """
        if offsets is None:
            offsets = torch.arange(tokens.shape[1], device=rows.device)
        positions = slots["length"][rows, None] - 1 + offsets
        if model.max_length is not None:  # nothing is kept of what is beyond
            positions = positions.clamp(max=model.max_length - 1)
        slots["num_calls"][rows] += 1
        return model.encode(
            tokens,
            torch.full_like(rows, tokens.shape[1]),
            slots.cache,
            rows,
            rule,
            positions=positions,
            **({"is_draft": is_draft.expand_as(tokens)} if self.keeps_base else {}),
        )

    def _proposed(
        self, model: Decoder, states: Tensor, uniforms: Tensor, begin: int
    ) -> tuple[Tensor, Tensor | None]:
        """As `_propose`, for the tokens of drafts from the `begin`-th on, as many as there are
        states [n, N, D], by the numbers [n, K, 3] of the drafts' positions.
        """
        at = uniforms[:, begin : begin + states.shape[1], PROPOSAL]
        return self._propose(model, states, at, never=self.mask_token_id)

    def _predicting(self, states: Tensor) -> Tensor:
        """[n, K - 1, D] of states [n, K, D] of a block, whose first token is not drafted."""
        return states[:, :-1] if self.predicts_next else states[:, 1:]

    def _uniforms(self, slots: Slots, rows: Tensor) -> Tensor:
        """[n, K, 3] the numbers of the positions behind the last token."""
        at = slots["length"][rows, None] + torch.arange(self.block_length, device=rows.device)
        return position_uniforms(slots.generator.select(rows), at)

    def _masks(self, rows: Tensor, count: int) -> Tensor:
        return torch.full_like(rows[:, None].expand(-1, count), self.mask_token_id)


def _keep(slots: Slots, rows: Tensor, states: Tensor) -> None:
    slots.keep(rows, states.flatten(1))
