"""What samplers share that continue prompts until a stop token or a number of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import MaskRule
from tokendiff.diffusion.interfaces import (
    Completion,
    Decoder,
    Figures,
    OnProgress,
    Request,
    SelfDraftingDecoder,
    unwatched,
)
from tokendiff.samplers.categorical import check_filters, draw_by_logits, filter_logits
from tokendiff.samplers.slots import Slots

# Tokens of a prompt that are read in one forward pass, between steps of the rows already under way.
PREFILL_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class OpenEndedSampler(ABC):
    """Continuous batching around a sampler's own step.

    Attributes:
        max_new_tokens: a completion has exactly so many tokens, or ends at a stop token.
        temperature: 0 is argmax.
        top_k, top_p: see `categorical.filter_logits`.
        stop_token_ids: the first of these ends a completion and is its last token.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        check_filters(self.temperature, self.top_k, self.top_p)

    @torch.no_grad()
    def complete(
        self,
        model: Decoder,
        requests: Iterable[Request],
        *,
        key: int,
        num_slots: int,
        on_progress: OnProgress = unwatched,
        on_step: Callable[[Tensor], None] | None = None,
    ) -> Iterator[Completion]:
        """Completions in the order in which they are finished.

        Args:
            requests: taken one by one, as slots become free.
            key: with a request's id, decides the row's randomness. Its tokens depend on nothing
                else: not on the rows beside it, its slot or the order.
            num_slots: rows in flight at most.
            on_progress: a row in flight counts with the share of `max_new_tokens` that it has.
            on_step: hears the tokens [rows in flight, T] after each step, with what the sampler
                writes for unknown ones.
        """
        waiting = iter(requests)
        slots = self._slots(model, num_slots=num_slots, key=key)
        num_rows = num_tokens = 0

        def figures() -> Figures:
            rows, tokens = slots.under_way()
            return num_rows + rows, num_tokens + tokens

        while slots.fill(waiting):
            self._step(model, slots)
            if on_step is not None:
                on_step(slots.tokens[: slots.num_rows])
            for completion in slots.retire(*self._finished(slots), waiting):
                num_rows += 1
                num_tokens += len(completion.tokens)
                yield completion
            on_progress(figures)

    @abstractmethod
    def _slots(self, model: Decoder, *, num_slots: int, key: int) -> Slots: ...

    @abstractmethod
    def _step(self, model: Decoder, slots: Slots) -> None:
        """One step of every row in flight."""

    @abstractmethod
    def _finished(self, slots: Slots) -> tuple[Tensor, Tensor, Tensor]:
        """(is_done, end, is_stopped), as `Slots.retire` takes them."""

    def _first_stop(self, tokens: Tensor, is_open: Tensor) -> Tensor:
        """[n] index of the first stop token among those of tokens [n, N] that are open; N where
        there is none.
        """
        stops = torch.tensor(self.stop_token_ids, dtype=torch.int64, device=tokens.device)
        is_stop = is_open & torch.isin(tokens, stops)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.where(is_stop, index, tokens.shape[1]).amin(1)

    def _draw(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """[n] tokens from logits [n, V], by numbers [n] in (0, 1)."""
        if self.temperature == 0.0:
            return logits.argmax(-1)
        logits = filter_logits(
            logits, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p
        )
        return draw_by_logits(logits, uniform)


def encode_known(
    model: Decoder,
    slots: Slots,
    rows: Tensor,
    counts: Tensor,
    rule: MaskRule,
    *,
    drafts_from: Tensor | None = None,
) -> Tensor:
    """Hidden states [n, N, D] of the next `counts` [n] tokens of `rows` [n] that are not in the
    cache; they stay out of it.

    Args:
        drafts_from: [n] the position from which on they are read as a draft, by a
            `SelfDraftingDecoder`.
    """
    width = int(counts.max())
    begin = slots.cache.lengths[rows]
    at = begin[:, None] + torch.arange(width, device=rows.device)
    tokens = slots.tokens[rows[:, None], at.clamp(max=slots.tokens.shape[1] - 1)]
    slots["num_calls"][rows] += 1
    if drafts_from is None:
        return model.encode(tokens, counts, slots.cache, rows, rule)
    is_draft = at >= drafts_from[:, None]
    drafting = cast(SelfDraftingDecoder, model)
    return drafting.encode(tokens, counts, slots.cache, rows, rule, is_draft=is_draft)
