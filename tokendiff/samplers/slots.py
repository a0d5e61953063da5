"""Rows in flight: a few slots that prompts pass through.

A row that is finished leaves its slot to the next prompt at once, so that what is computed in a
step is computed for rows that need it. Rows in use are always the first ones: the cache reads them
without a copy, and where no prompt is left the last row moves into the gap.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import (
    Completion,
    Decoder,
    Figures,
    FinishReason,
    Request,
)
from tokendiff.diffusion.random import RowGenerator

_GROWTH = 256  # tokens


class Slots:
    """The state of rows in flight, a tensor per quantity; the first `num_rows` entries are in use.

    All but hidden states is on the CPU, wherever the model is: what is decided about rows depends
    on a few numbers of each, and to ask a device for them makes the CPU wait. A pass sends what the
    model reads, and gets back what was drawn.

    Args:
        num_slots: R, rows in flight at most.
        max_new_tokens: of every row.
        block_length: a row's tokens may be written up to the end of the block of this length that
            its last token is in.
        pad: what unknown tokens are, say the mask.
        seed_key: key of the whole job; a row's own key comes from it and the row's id.
        columns, counts: names of further numbers per row, 0 at its start; `counts` are reported.
        histograms: names and sizes of what is reported with several numbers per row.

    Attributes:
        cache: keys and values of the rows.
        tokens: [R, T] prompt and what followed so far.
        prompt_length, limit: [R] where new tokens begin, and where they end at the latest.
        length: [R] tokens that are settled: they will not change.
        block_begin: [R, T] the position that the block of each position begins at.
        num_calls: [R] forward passes so far.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_slots: int,
        max_new_tokens: int,
        block_length: int = 1,
        pad: int = 0,
        seed_key: int = 0,
        columns: Sequence[str] = (),
        counts: Sequence[str] = (),
        histograms: Mapping[str, int] | None = None,
    ) -> None:
        self.cache = model.new_cache(num_slots)
        self.num_rows = 0
        self._requests: list[Request] = []
        self._num_slots, self._max_new_tokens = num_slots, max_new_tokens
        self._block_length, self._pad, self._seed_key = block_length, pad, seed_key
        self.tokens = torch.full((num_slots, 0), pad, dtype=torch.int64)
        self.block_begin = torch.zeros_like(self.tokens)
        names = ("prompt_length", "limit", "length", "num_calls", "_keys", *columns, *counts)
        self._index: dict[str, int | slice] = {name: index for index, name in enumerate(names)}
        self._width = len(names)
        for name, size in (histograms or {}).items():
            self._index[name] = slice(self._width, self._width + size)
            self._width += size
        self._table = torch.zeros(num_slots, self._width, dtype=torch.int64)
        self._counts = (*counts, *(histograms or {}))
        self._kept: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        """[n] of the rows in use, or [n, size] of a histogram; may be written to."""
        return self._table[: self.num_rows, self._index[name]]

    def kept(self, rows: Tensor, *, like: Tensor | None = None, name: str = "state") -> Tensor:
        """[n, D] what `keep` was given of `rows` [n] under that name; zeros before.

        Args:
            like: [..., D] of the same kind; may be left out where something was kept of any row.
        """
        if name not in self._kept:
            assert like is not None, "nothing was kept yet"
            self._kept[name] = like.new_zeros(self._num_slots, like.shape[-1])
        return self._kept[name][sent(rows, self._kept[name].device)]

    def keep(self, rows: Tensor, states: Tensor, *, name: str = "state") -> None:
        """Keep a state [n, D] of each of `rows` [n]."""
        self.kept(rows, like=states, name=name)
        self._kept[name][sent(rows, states.device)] = states

    @property
    def rows(self) -> Tensor:
        """[n] 0..n-1."""
        return torch.arange(self.num_rows)

    def under_way(self) -> Figures:
        """How far the rows in use have got: each counts with the share of its most tokens that are
        settled.
        """
        num_new = int((self["length"] - self["prompt_length"]).clamp(min=0).sum())
        return num_new / self._max_new_tokens, num_new

    @property
    def generator(self) -> RowGenerator:
        """The randomness of the rows in use."""
        return RowGenerator(keys=self["_keys"])

    def fill(self, waiting: Iterator[Request]) -> bool:
        """Give free slots to waiting requests; whether any row is in flight then."""
        new = list(islice(waiting, self._num_slots - self.num_rows))
        if new:
            rows = range(self.num_rows, self.num_rows + len(new))
            self._requests += new
            self.num_rows += len(new)
            self._place(list(rows), new)
        return self.num_rows > 0

    def retire(
        self, is_done: Tensor, end: Tensor, is_stopped: Tensor, waiting: Iterator[Request]
    ) -> list[Completion]:
        """Take finished rows out and put waiting ones in their place.

        Args:
            is_done: [n] bool.
            end: [n] where the tokens end that a finished row keeps.
            is_stopped: [n] bool, whether that is at a stop token.
        """
        done = is_done.nonzero()[:, 0]
        if not done.numel():
            return []
        completions = self._completions(done, end[done], is_stopped[done])
        rows = done.tolist()
        new = list(islice(waiting, len(rows)))
        for row, request in zip(rows, new, strict=False):
            self._requests[row] = request
        if new:
            self._place(rows[: len(new)], new)
        for row in reversed(rows[len(new) :]):  # so that the last row is never one still to go
            last = self.num_rows - 1
            if row != last:
                self._move(last, row)
            self._requests.pop()
            self.num_rows -= 1
        return completions

    def _completions(self, rows: Tensor, end: Tensor, is_stopped: Tensor) -> list[Completion]:
        reasons: dict[bool, FinishReason] = {True: "stop", False: "length"}
        found = zip(
            rows.tolist(),
            self._table[rows].tolist(),
            self.tokens[rows].tolist(),
            end.tolist(),
            is_stopped.tolist(),
            strict=True,
        )
        return [
            Completion(
                id=self._requests[row].id,
                tokens=tokens[numbers[self._index["prompt_length"]] : last],
                finish_reason=reasons[stopped],
                num_model_calls=numbers[self._index["num_calls"]],
                counts={name: numbers[self._index[name]] for name in self._counts},
            )
            for row, numbers, tokens, last, stopped in found
        ]

    def _place(self, rows: list[int], requests: list[Request]) -> None:
        for request in requests:
            if not request.prompt:
                raise ValueError(f"row {request.id}: an empty prompt; there is nothing to continue")
        lengths = torch.tensor([len(request.prompt) for request in requests])
        limits = lengths + self._max_new_tokens
        # The last block ends at most so far behind the last token.
        self._reserve(int(limits.max()) + self._block_length - 1)
        width = self.tokens.shape[1]
        tokens = torch.full((len(rows), width), self._pad, dtype=torch.int64)
        place = torch.arange(width)
        begins = (place - place % self._block_length).repeat(len(rows), 1)
        for row, request in enumerate(requests):
            tokens[row, : len(request.prompt)] = torch.tensor(request.prompt)
            if request.block_starts:
                begins[row] = request.block_begins(self._block_length, width)
        ids = torch.tensor([request.id for request in requests])
        numbers = torch.zeros(len(rows), self._width, dtype=torch.int64)
        for name, values in (
            ("prompt_length", lengths),
            ("length", lengths),
            ("limit", limits),
            ("_keys", RowGenerator.for_rows(self._seed_key, ids).keys),
        ):
            numbers[:, self._index[name]] = values
        at = torch.tensor(rows)
        self.tokens[at], self.block_begin[at], self._table[at] = tokens, begins, numbers
        self.cache.crop(at, torch.zeros_like(at))

    def _move(self, source: int, target: int) -> None:
        for states in (self.tokens, self.block_begin, self._table, *self._kept.values()):
            states[target] = states[source]
        self._requests[target] = self._requests[source]
        self.cache.move(source, target)

    def _reserve(self, length: int) -> None:
        missing = length - self.tokens.shape[1]
        if missing > 0:
            grown = -(-missing // _GROWTH) * _GROWTH
            new = self.tokens.new_full((self._num_slots, grown), self._pad)
            self.tokens = torch.cat([self.tokens, new], dim=1)
            self.block_begin = torch.cat([self.block_begin, torch.zeros_like(new)], dim=1)
