"""Rows in flight: a few slots that prompts pass through.

A row that is finished leaves its slot to the next prompt at once, so that what is computed in a
step is computed for rows that need it. Rows in use are always the first ones: the cache reads them
without a copy, and where no prompt is left the last row moves into the gap.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tokendiff.interfaces import Completion, Decoder, FinishReason, Request
from tokendiff.random import RowGenerator

_GROWTH = 256  # tokens


class Slots:
    """The state of rows in flight, a tensor per quantity; the first `num_rows` entries are in use.

    Args:
        num_slots: R, rows in flight at most.
        max_new_tokens: of every row.
        block_length: a row's tokens may be written up to the end of the block of this length that
            its last token is in.
        pad: what unknown tokens are, say the mask.
        seed_key: key of the whole job; a row's own key comes from it and the row's id.

    Attributes:
        cache: keys and values of the rows.
        tokens: [R, T] prompt and what followed so far.
        prompt_length, limit: [R] where new tokens begin, and where they end at the latest.
        length: [R] tokens that are settled: they will not change.
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
        counts: Sequence[str] = (),
        histograms: Mapping[str, int] | None = None,
    ) -> None:
        self.cache = model.new_cache(num_slots)
        self.num_rows = 0
        self._requests: list[Request] = []
        self._num_slots, self._max_new_tokens = num_slots, max_new_tokens
        self._block_length, self._pad, self._seed_key = block_length, pad, seed_key
        self._device = model.device
        self.tokens = torch.full((num_slots, 0), pad, dtype=torch.int64, device=model.device)
        names = ("prompt_length", "limit", "length", "num_calls", "_keys", *counts)
        self._columns = {
            name: torch.zeros(num_slots, dtype=torch.int64, device=model.device) for name in names
        }
        for name, size in (histograms or {}).items():
            self._columns[name] = self.tokens.new_zeros(num_slots, size)
        self._counts = (*counts, *(histograms or {}))

    def __getitem__(self, name: str) -> Tensor:
        """[n] of the rows in use, or [n, size] of a histogram; may be written to."""
        return self._columns[name][: self.num_rows]

    @property
    def rows(self) -> Tensor:
        """[n] 0..n-1."""
        return torch.arange(self.num_rows, device=self._device)

    @property
    def generator(self) -> RowGenerator:
        """The randomness of the rows in use."""
        return RowGenerator(keys=self["_keys"])

    def fill(self, waiting: Iterator[Request]) -> bool:
        """Give free slots to waiting requests; whether any row is in flight then."""
        while self.num_rows < self._num_slots and (request := next(waiting, None)) is not None:
            self._requests.append(request)
            self.num_rows += 1
            self._place(self.num_rows - 1, request)
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
        done = is_done.nonzero()[:, 0].tolist()
        completions = [self._completion(row, int(end[row]), bool(is_stopped[row])) for row in done]
        for row in reversed(done):  # so that the last row is never one that is still to go
            request = next(waiting, None)
            if request is not None:
                self._requests[row] = request
                self._place(row, request)
                continue
            last = self.num_rows - 1
            if row != last:
                self._move(last, row)
            self._requests.pop()
            self.num_rows -= 1
        return completions

    def _completion(self, row: int, end: int, is_stopped: bool) -> Completion:
        reason: FinishReason = "stop" if is_stopped else "length"
        begin = int(self._columns["prompt_length"][row])
        return Completion(
            id=self._requests[row].id,
            tokens=self.tokens[row, begin:end].tolist(),
            finish_reason=reason,
            num_model_calls=int(self._columns["num_calls"][row]),
            counts={name: self._columns[name][row].tolist() for name in self._counts},
        )

    def _place(self, row: int, request: Request) -> None:
        if not request.prompt:
            raise ValueError(f"row {request.id}: an empty prompt; there is nothing to continue")
        length = len(request.prompt)
        limit = length + self._max_new_tokens
        self._reserve(-(-limit // self._block_length) * self._block_length)
        self.tokens[row] = self._pad
        self.tokens[row, :length] = torch.tensor(request.prompt, device=self._device)
        for column in self._columns.values():
            column[row] = 0
        self._columns["prompt_length"][row] = self._columns["length"][row] = length
        self._columns["limit"][row] = limit
        ids = torch.tensor([request.id], device=self._device)
        self._columns["_keys"][row] = RowGenerator.for_rows(self._seed_key, ids).keys[0]
        self.cache.crop(*torch.tensor([[row], [0]], device=self._device).unbind())

    def _move(self, source: int, target: int) -> None:
        for column in (self.tokens, *self._columns.values()):
            column[target] = column[source]
        self._requests[target] = self._requests[source]
        self.cache.move(source, target)

    def _reserve(self, length: int) -> None:
        missing = length - self.tokens.shape[1]
        if missing > 0:
            grown = -(-missing // _GROWTH) * _GROWTH
            new = self.tokens.new_full((self._num_slots, grown), self._pad)
            self.tokens = torch.cat([self.tokens, new], dim=1)
