"""Speculative decoding with a draft that fills a block in one pass, or finds the candidates for it.

The token that is known last anchors a block; the draft fills it; the target judges it
(`speculation`), and its own token behind what it accepts is the next anchor. Source: DFlash (arXiv
2602.06036).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.candidates import Candidates
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import Decoder, DraftedDecoder
from tokendiff.samplers.categorical import draw_by_logits
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
        anchors = slots.tokens[rows, length - 1]
        draft = drafted.draft(anchors, slots.cache, rows)
        numbers = uniforms[:, :-1, PROPOSAL]
        if isinstance(draft, Candidates):
            proposed = self._walk(draft, sent(anchors, draft.tokens.device), numbers)
        else:
            proposed = self._propose(model, draft, numbers)
        gained = self._verify(model, slots, rows, *proposed, uniforms)
        slots[GAINS][rows, gained - 1] += 1

    def _walk(
        self, draft: Candidates, anchors: Tensor, uniforms: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """A path [n, D] through the candidates of n blocks behind `anchors` [n]; and, where it is
        drawn, what each of its tokens is drawn from, given the one before it: [n, D, V].
        """
        if self.proposal_temperature == 0.0:
            return draft.likeliest(anchors), None
        uniforms = sent(uniforms, draft.tokens.device)
        before, path, kept = anchors, [], []
        for place in range(draft.tokens.shape[1]):
            tokens = draft.tokens[:, place]
            scores = self._filtered(draft.scores(place, before), self.proposal_temperature)
            drawn = draw_by_logits(scores, uniforms[:, place])
            before = tokens.gather(-1, drawn[:, None])[:, 0]
            path.append(before)
            every = scores.new_full((len(scores), draft.vocab_size), -torch.inf)
            kept.append(every.scatter_(-1, tokens, scores))
        return torch.stack(path, dim=1), torch.stack(kept, dim=1)


def _drafted(model: Decoder) -> DraftedDecoder:
    if not isinstance(model, DraftedDecoder):
        raise TypeError(f"sampler dflash needs a model with a draft, got {type(model).__name__}")
    return model
