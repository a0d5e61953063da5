"""What speculative decoding is, whatever drafts: a block of drafted tokens is read by the target in
one pass, which says which of them it would have written itself (`acceptance`). What it accepts
stays in the cache, and one token of its own stands behind it. Rows accept different numbers of
tokens, and end at different times.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import causal_by_position
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import Decoder
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.acceptance import Verdict, accept_drawn, accept_own
from tokendiff.samplers.autoregressive import AutoregressiveSampler
from tokendiff.samplers.base import positions_at_once
from tokendiff.samplers.categorical import draw_by_logits, filter_logits, without_token
from tokendiff.samplers.slots import Slots

OWN, PROPOSAL, JUDGE = 0, 1, 2  # what a position's random numbers are for; OWN as in `ar`
GAINS = "gains"  # blocks of a row that gained 1, 2, ... tokens


@dataclass(frozen=True, kw_only=True)
class SpeculativeSampler(AutoregressiveSampler):
    """
    Attributes:
        draft_temperature: of the draft's proposals; None is `temperature`. Above 0 they are drawn
            and judged by p/q, and the text has the target's distribution. At 0 the draft proposes
            its likeliest tokens, and the text is the one that sampler `ar` writes with the same
            key, token for token, whatever the draft; but fewer are accepted where the target is not
            sure of itself: 1.41 tokens a block against 1.54 at temperature 0.5, 1.23 against 1.52
            at 0.8, 1.15 against 1.58 at 1, of a small target with a small draft.
    """

    draft_temperature: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.draft_temperature
        if given is not None and not given >= 0.0:
            raise ValueError(f"draft_temperature must not be negative, got {given}")
        if self.temperature == 0.0 and given:
            raise ValueError(
                f"draft_temperature must be 0 at temperature 0, got {given}: the argmax of the "
                "target is never a draw"
            )

    @property
    def proposal_temperature(self) -> float:
        return self.temperature if self.draft_temperature is None else self.draft_temperature

    @abstractmethod
    def _speculate(self, model: Decoder, slots: Slots, rows: Tensor) -> None:
        """Draft behind each of `rows` [n], whose last token is not in the cache, and keep what the
        target accepts.
        """

    @abstractmethod
    def _most_gained(self, model: Decoder) -> int:
        """Tokens that `_speculate` adds to a row at most."""

    def _slots(self, model: Decoder, *, num_slots: int, key: int) -> Slots:
        return Slots(
            model,
            num_slots=num_slots,
            max_new_tokens=self.max_new_tokens,
            seed_key=key,
            histograms={GAINS: self._most_gained(model)},
        )

    def _step(self, model: Decoder, slots: Slots) -> None:
        pending = slots["length"] - slots.cache.lengths[: slots.num_rows]
        prompts, ready = ((pending > 1).nonzero()[:, 0], (pending == 1).nonzero()[:, 0])
        if prompts.numel():
            self._advance(model, slots, prompts, pending[prompts])
        if ready.numel():
            self._speculate(model, slots, ready)

    def _propose(
        self, model: Decoder, hidden: Tensor, uniforms: Tensor, *, never: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens [n, D] for hidden states [n, D, H], by numbers [n, D], and, where they are drawn,
        what they are drawn from [n, D, V].

        Args:
            never: a token that is not proposed.
        """
        tokens, kept = [], []
        for chunk, uniform in _chunks(hidden, sent(uniforms, hidden.device)):
            logits = without_token(self._logits(model, chunk.flatten(0, 1)), never)
            if self.proposal_temperature == 0.0:
                tokens.append(logits.argmax(-1).view(chunk.shape[:2]))
                continue
            logits = self._filtered(logits, self.proposal_temperature)
            tokens.append(draw_by_logits(logits, uniform.flatten()).view(chunk.shape[:2]))
            kept.append(logits.view(*chunk.shape[:2], -1))
        return torch.cat(tokens), torch.cat(kept) if kept else None

    def _verify(
        self,
        model: Decoder,
        slots: Slots,
        rows: Tensor,
        drafted: Tensor,
        draft_logits: Tensor | None,
        uniforms: Tensor,
    ) -> Tensor:
        """Read the last token of `rows` [n] and what was drafted behind it [n, K - 1] in one pass,
        and keep what the target accepts of it.

        Args, and what is returned: as `_settle`.
        """
        room = (slots["limit"] - slots["length"])[rows]
        num_tokens = room.clamp(max=drafted.shape[1] + 1)  # what lies behind the limit is not read
        block = last_and(slots, rows, drafted)
        hidden = model.encode(block, num_tokens, slots.cache, rows, causal_by_position)
        slots["num_calls"][rows] += 1
        return self._settle(model, slots, rows, hidden, drafted, draft_logits, uniforms)

    def _settle(
        self,
        model: Decoder,
        slots: Slots,
        rows: Tensor,
        hidden: Tensor,
        drafted: Tensor,
        draft_logits: Tensor | None,
        uniforms: Tensor,
    ) -> Tensor:
        """Write what the target accepts of a draft, and one token of its own.

        Args:
            rows: [n].
            hidden: [n, K, D] states of the last token and of what was drafted behind it, which have
                just been read and are not kept yet.
            drafted: [n, K - 1].
            draft_logits: [n, K - 1, V] what was drawn from; None where nothing was drawn.
            uniforms: [n, K, 3] of the positions behind the last token.

        Returns:
            [n] tokens that were gained, 1..K.
        """
        length, room = slots["length"][rows], (slots["limit"] - slots["length"])[rows]
        size = drafted.shape[1] + 1
        place = torch.arange(size, device=rows.device)
        at = length[:, None] + place
        num_tokens = room.clamp(max=size)
        verdict = self._judge(model, hidden, drafted, draft_logits, uniforms)
        columns = (drafted, verdict.next_token[:, None], verdict.num_accepted[:, None])
        # The one thing that is asked of the device.
        *kept, own, num_accepted = torch.cat(columns, dim=1).to(rows.device).unbind(1)
        is_own = place == num_accepted[:, None]
        tokens = torch.where(is_own, own[:, None], torch.stack([*kept, kept[0]], dim=1))
        gained = torch.minimum(num_accepted + 1, num_tokens)
        stop = self._first_stop(tokens, place < gained[:, None])
        gained = torch.minimum(gained, stop + 1)
        is_gained = place < gained[:, None]
        row, _ = is_gained.nonzero(as_tuple=True)
        slots.tokens[rows[row], at[is_gained]] = tokens[is_gained]
        slots.cache.extend(rows, gained)
        slots["length"][rows] += gained
        return gained

    def _judge(
        self,
        model: Decoder,
        hidden: Tensor,
        drafted: Tensor,
        draft_logits: Tensor | None,
        uniforms: Tensor,
    ) -> Verdict:
        """What the target, whose hidden states [n, K, D] of the block these are, accepts of it."""
        parts = []
        for chunk, tokens, uniform in _chunks(hidden, drafted, sent(uniforms, hidden.device)):
            logits = self._logits(model, chunk.flatten(0, 1))
            if draft_logits is None:
                own = self._draw(logits, uniform[..., OWN].flatten())
                parts.append(accept_own(tokens, own.view(chunk.shape[:2])))
                continue
            done = sum(len(part.next_token) for part in parts)
            logits = self._filtered(logits, self.temperature).view(*chunk.shape[:2], -1)
            parts.append(
                accept_drawn(
                    tokens,
                    draft_logits=draft_logits[done : done + len(tokens)],
                    target_logits=logits,
                    judge=uniform[:, :-1, JUDGE],
                    redraw=uniform[..., OWN],
                )
            )
        return Verdict(
            num_accepted=torch.cat([part.num_accepted for part in parts]),
            next_token=torch.cat([part.next_token for part in parts]),
        )

    def _filtered(self, logits: Tensor, temperature: float) -> Tensor:
        return filter_logits(logits, temperature=temperature, top_k=self.top_k, top_p=self.top_p)


def last_and(slots: Slots, rows: Tensor, following: Tensor) -> Tensor:
    """[n, 1 + N] the last token of each of `rows` [n], and `following` [n, N] behind it."""
    last = slots.tokens[rows, slots["length"][rows] - 1]
    return torch.cat([sent(last, following.device)[:, None], following], dim=1)


def position_uniforms(generator: RowGenerator, at: Tensor) -> Tensor:
    """[n, K, 3] the numbers of each position `at` [n, K] of n rows.

    A position that is drafted again gets the same numbers again: those behind a refused token have
    decided nothing yet.
    """
    keys = generator.keys[:, None].expand_as(at).reshape(-1)
    return RowGenerator(keys=keys).fold_in(at.reshape(-1)).uniform(3).view(*at.shape, 3)


def _chunks(hidden: Tensor, *others: Tensor) -> "zip[tuple[Tensor, ...]]":
    """Rows in groups whose [n, K, D] hidden states make at most so many logits at once."""
    size = max(1, positions_at_once(hidden.device) // hidden.shape[1])
    return zip(*(values.split(size) for values in (hidden, *others)), strict=True)
