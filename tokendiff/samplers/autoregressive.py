"""Token after token, from left to right: what diffusion decoders are measured against, and what
regenerates the text that drafts learn from.
"""

from dataclasses import dataclass

from torch import Tensor

from tokendiff.diffusion.attention_masks import causal_by_position
from tokendiff.diffusion.devices import sent, sent_at
from tokendiff.diffusion.interfaces import Decoder
from tokendiff.samplers.categorical import without_token
from tokendiff.samplers.open_ended import PREFILL_CHUNK, OpenEndedSampler, encode_known
from tokendiff.samplers.slots import Slots


@dataclass(frozen=True, kw_only=True)
class AutoregressiveSampler(OpenEndedSampler):
    """At temperature 0 its tokens are those of transformers' `generate(do_sample=False)`.

    Attributes:
        never_token_id: a token that is not written: the mask, of a model that was trained with one.
    """

    never_token_id: int | None = None

    def _slots(self, model: Decoder, *, num_slots: int, key: int) -> Slots:
        return Slots(model, num_slots=num_slots, max_new_tokens=self.max_new_tokens, seed_key=key)

    def _step(self, model: Decoder, slots: Slots) -> None:
        pending = slots["length"] - slots.cache.lengths[: slots.num_rows]
        # Prompts in a pass of their own: beside them every row would be as wide.
        for is_chosen in (pending > 1, pending == 1):
            rows = is_chosen.nonzero()[:, 0]
            if rows.numel():
                self._advance(model, slots, rows, pending[rows])

    def _advance(self, model: Decoder, slots: Slots, rows: Tensor, pending: Tensor) -> None:
        """Read on in `rows` [n], of whose tokens `pending` [n] are not in the cache yet, and write
        a token where that was all of them.
        """
        counts = pending.clamp(max=PREFILL_CHUNK)
        hidden = encode_known(model, slots, rows, counts, causal_by_position)
        slots.cache.extend(rows, counts)
        chosen = (slots.cache.lengths[rows] == slots["length"][rows]).nonzero()[:, 0]
        if not chosen.numel():
            return
        last = sent_at((chosen, counts[chosen] - 1), hidden.device)
        logits = self._logits(model, hidden[last])
        rows = rows[chosen]
        at = slots["length"][rows]
        uniform = slots.generator.select(rows).fold_in(at).uniform(1)[:, 0]
        drawn = self._draw(logits, sent(uniform, logits.device))
        slots.tokens[rows, at] = drawn.to(at.device)
        slots["length"][rows] += 1

    def _logits(self, model: Decoder, hidden: Tensor) -> Tensor:
        """[n, V] float32 of hidden states [n, D], before temperature and filters."""
        return without_token(model.head(hidden), self.never_token_id)

    def _finished(self, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
        end = slots["length"].clone()
        newest = slots.tokens[slots.rows, end - 1]
        is_new = end > slots["prompt_length"]
        is_stopped = self._first_stop(newest[:, None], is_new[:, None]) == 0
        return is_stopped | (end == slots["limit"]), end, is_stopped
