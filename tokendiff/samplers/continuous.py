"""Whole rows in flight: a few places that rows pass through.

Rows of some samplers end at different times, by their lengths, or where a stop token stands. A row
that is done leaves its place to the next one, so that a forward pass is as full as it can be. A
row's tokens and its number of model calls are those that it has in any batch, since its randomness
is keyed by its id.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from tokendiff.diffusion.interfaces import Denoiser, Figures, StepCallback
from tokendiff.diffusion.random import RowGenerator
from tokendiff.samplers.base import Predictor, Sampler
from tokendiff.samplers.hidden_states import fitted


@dataclass(frozen=True, kw_only=True)
class RowToFill:
    """
    Attributes:
        id: with the key it decides the row's randomness.
        tokens: [L] int64; read where `is_given`.
        is_given: [L] bool.
    """

    id: int
    tokens: Tensor
    is_given: Tensor


@dataclass(frozen=True, kw_only=True)
class FilledRow:
    """
    Attributes:
        tokens: [L], no mask among them.
        num_model_calls: forward passes that the row took part in.
    """

    id: int
    tokens: list[int]
    num_model_calls: int


@dataclass(kw_only=True)
class RowState:
    """Rows while they are filled.

    Attributes:
        x_t: [B, L] noisy tokens.
        is_left: [B, L] bool, open positions that are not final yet; a row without any is done.
        generator: one key per row.
        numbers: [B] each, what else a sampler keeps of a row.
    """

    x_t: Tensor
    is_left: Tensor
    generator: RowGenerator
    numbers: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ContinuousSampler(Sampler):
    """A sampler that works in rounds, of which rows need different numbers."""

    @abstractmethod
    def _round(self, rows: RowState, predictor: Predictor, on_step: StepCallback) -> None:
        """Make some positions final of each row that has any left, whatever round other rows are
        in; at least one.
        """

    def _numbers(self, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        """The `RowState.numbers` of rows that begin."""
        return {}

    def _denoise(
        self,
        x_t: Tensor,
        is_open: Tensor,
        predictor: Predictor,
        generator: RowGenerator,
        on_step: StepCallback,
    ) -> Tensor:
        self._check_length(x_t.shape[1])
        numbers = self._numbers(len(x_t), x_t.device)
        rows = RowState(x_t=x_t, is_left=is_open, generator=generator, numbers=numbers)
        while bool(rows.is_left.any()):
            self._round(rows, predictor, on_step)
        return rows.x_t

    def _check_length(self, length: int) -> None:
        """Raise ValueError where the sampler cannot fill rows of so few tokens."""

    @torch.no_grad()
    def stream(
        self,
        model: Denoiser,
        rows: Iterable[RowToFill],
        *,
        key: int,
        num_slots: int,
        on_step: Callable[[Callable[[], Figures]], None],
    ) -> Iterator[list[FilledRow]]:
        """Fill rows of any lengths, and of any number. Those in flight are on the CPU, whatever
        the model's device is; so a step waits for what is drawn, and no more.

        Args:
            rows: taken as places become free.
            key: with a row's id, decides its randomness.
            num_slots: rows in flight at most.
            on_step: called after every step with a function that says how far the rows in flight
                have got: the share of each row, and the tokens, that are no masks any more.

        Yields:
            the rows that a round finished, at least one.

        Raises:
            ValueError: a row is shorter than the sampler can fill.
        """
        waiting = iter(rows)
        flight = _Flight(self, model, key=key, num_slots=num_slots)
        while flight.fill(waiting):
            if done := flight.take_done():
                yield done
            else:
                self._round(flight.rows, flight.predictor, flight.step_callback(on_step))


class _Flight:
    """The places: what a batch is to `Sampler.sample`, where rows come and go."""

    def __init__(
        self,
        sampler: ContinuousSampler,
        model: Denoiser,
        *,
        key: int,
        num_slots: int,
    ) -> None:
        self._sampler, self._key = sampler, key
        nothing = torch.zeros(num_slots, 0, dtype=torch.int64)
        self.predictor = sampler._predictor(model, nothing.bool(), nothing.bool())
        self.rows = RowState(
            x_t=nothing,
            is_left=nothing.bool(),
            generator=RowGenerator(keys=nothing.new_zeros(num_slots)),
            numbers=sampler._numbers(num_slots, nothing.device),
        )
        self._held: dict[int, RowToFill] = {}  # by place

    def fill(self, waiting: Iterator[RowToFill]) -> bool:
        """Give free places to waiting rows; whether any place is taken then."""
        free = [at for at in range(len(self.rows.x_t)) if at not in self._held]
        new = dict(zip(free, islice(waiting, len(free)), strict=False))
        if new:
            self._held |= new
            self._place(new)
        return bool(self._held)

    def take_done(self) -> list[FilledRow]:
        """Take the rows out that have nothing left to fill."""
        is_left = self.rows.is_left.any(1).tolist()
        done = [at for at in self._held if not is_left[at]]
        calls = self.predictor.num_model_calls.tolist()
        return [
            FilledRow(
                id=row.id,
                tokens=self.rows.x_t[at, : len(row.tokens)].tolist(),
                num_model_calls=calls[at],
            )
            for at, row in ((at, self._held.pop(at)) for at in done)
        ]

    def step_callback(self, tell: Callable[[Callable[[], Figures]], None]) -> StepCallback:
        def on_step(time: float, x_t: Tensor) -> None:
            tell(lambda: self._under_way(x_t))

        return on_step

    def _under_way(self, x_t: Tensor) -> Figures:
        places = torch.tensor(list(self._held))
        is_open = ~self.predictor.is_given[places]
        num_open = is_open.sum(1)
        is_mask = x_t[places] == self._sampler.kernel.mask_token_id
        num_told = num_open - (is_open & is_mask).sum(1)
        return float((num_told / num_open.clamp(min=1)).sum()), int(num_told.sum())

    def _place(self, new: dict[int, RowToFill]) -> None:
        """Begin rows at their places; all tensors become as wide as the longest row needs."""
        width = max(len(row.tokens) for row in self._held.values())
        at = torch.tensor(list(new))
        shape = (len(new), width)
        tokens = torch.full(shape, self._sampler.kernel.mask_token_id, dtype=torch.int64)
        is_given, is_valid = torch.ones(shape, dtype=torch.bool), torch.zeros(shape).bool()
        for index, row in enumerate(new.values()):
            length = len(row.tokens)
            self._sampler._check_length(length)
            tokens[index, :length], is_given[index, :length] = row.tokens, row.is_given
            is_valid[index, :length] = True
        ids = torch.tensor([row.id for row in new.values()])
        generator = RowGenerator.for_rows(self._key, ids)
        rows = self.rows
        rows.x_t, rows.is_left = fitted(rows.x_t, width, 0), fitted(rows.is_left, width, False)
        rows.x_t[at] = self._sampler._start(tokens, is_given, generator)
        rows.is_left[at] = ~is_given
        rows.generator.keys[at] = generator.keys
        for name, start in self._sampler._numbers(len(new), at.device).items():
            rows.numbers[name][at] = start
        self.predictor.replace(at, is_given, is_valid)
