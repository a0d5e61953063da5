"""A `transformers` cache whose rows have their own lengths.

Rows that share a batch have prompts of different lengths, accept different numbers of tokens and
end at different times. Here each row's keys and values begin at 0 and end at its own length, so
that prompts need no padding at the left, positions are true positions, a row can be cut back alone,
and its place can be given to another text.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tokendiff.diffusion.devices import sent
from tokendiff.models.cuda_graphs import Pass, Recorder, Replays

_GROWTH = 128  # tokens; capacity is a multiple


@dataclass(frozen=True)
class _Call:
    """Where the keys and values of the forward pass in progress go.

    Attributes:
        rows: [n] rows of the cache.
        positions: [n, N] where each new token stands in its row.
        width: tokens of the longest of these rows, the new ones included.
        is_leading: whether `rows` are 0..n-1, which are read without a copy.
    """

    rows: Tensor
    positions: Tensor
    width: int
    is_leading: bool


@dataclass(frozen=True)
class CacheView:
    """What is kept of n rows: keys and values [n, heads, width, D] of each layer; of no layer where
    the width is 0.
    """

    layers: list[tuple[Tensor, Tensor]]
    width: int


class _RaggedLayer(CacheLayerMixin):
    """One layer: keys and values [R, heads, capacity, D].

    Args:
        moved: hears of keys and values that were moved to a larger place.
    """

    def __init__(self, num_rows: int, *, moved: Callable[[], None]) -> None:
        super().__init__()
        self.num_rows, self._moved = num_rows, moved
        self.call: _Call | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not just any memory: what a mask hides is still multiplied, by 0.
        self.keys, self.values = (
            states.new_zeros(self.num_rows, states.shape[1], 0, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind each row's end; return all of the call's rows."""
        assert self.call is not None, "RaggedCache.begin comes first"
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        before = self.keys
        self.keys = _written(self.keys, key_states, self.call)
        self.values = _written(self.values, value_states, self.call)
        if self.keys is not before:
            self._moved()
        return _read(self.keys, self.call), _read(self.values, self.call)

    def kept(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the call's rows."""
        assert self.call is not None, "RaggedCache.begin comes first"
        assert self.keys is not None
        assert self.values is not None
        return _read(self.keys, self.call), _read(self.values, self.call)

    def move(self, source: int, target: int) -> None:
        for states in (self.keys, self.values):
            if states is not None:
                states[target] = states[source]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.call is not None
        return self.call.width, 0

    def get_seq_length(self) -> int:
        return 0 if self.call is None else self.call.width - self.call.positions.shape[1]

    def get_max_length(self) -> int:
        return -1  # none


class RaggedCache(Cache):
    """`tokendiff.diffusion.interfaces.DecodingCache` for any transformers model that keeps plain
    keys and values in every layer.

    Args:
        num_rows: R.
        device: of the model.
        recorder: of the model's passes, where they are replayed; the number of keys that a pass
            sees is then rounded up to a multiple of 128, so that passes have equal shapes.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        num_layers: int,
        device: torch.device | str,
        recorder: Recorder | None = None,
    ) -> None:
        self._replays = None if recorder is None else Replays(recorder)
        moved = self._replays.forget if self._replays is not None else _nothing
        self._layers = [_RaggedLayer(num_rows, moved=moved) for _ in range(num_layers)]
        super().__init__(layers=list(self._layers))
        self._device = torch.device(device)
        self._call: _Call | None = None
        self._lengths = torch.zeros(num_rows, dtype=torch.int64)  # of the CPU, wherever keys are

    @property
    def lengths(self) -> Tensor:
        return self._lengths

    def begin(self, rows: Tensor, num_new: int) -> tuple[Tensor, int]:
        """Say where the next forward pass writes: `num_new` tokens behind the end of each row.

        Returns:
            positions [n, num_new] of the new tokens, and the number of keys that the pass will see.
        """
        offsets = torch.arange(num_new)
        return self.begin_at(rows, offsets.expand(len(rows), num_new))

    def begin_at(self, rows: Tensor, offsets: Tensor) -> tuple[Tensor, int]:
        """As `begin`, for tokens at `offsets` [n, N] behind the end of their rows, a permutation of
        0..N-1 in each row.
        """
        rows, offsets = rows.to("cpu"), offsets.to("cpu")
        lengths = self._lengths[rows]
        positions = lengths[:, None] + offsets
        width = int(lengths.max()) + offsets.shape[1]
        if self._replays is not None:
            width = -(-width // _GROWTH) * _GROWTH
        self.begin_within(rows, positions, width)
        return positions, width

    def begin_within(self, rows: Tensor, positions: Tensor, width: int) -> None:
        """Say that the next forward pass writes at `positions` [n, N], over what stands there, and
        sees the first `width` keys of each row.
        """
        leading = torch.arange(len(rows), device=rows.device)
        self._begin(
            _Call(
                rows=sent(rows, self._device),
                positions=sent(positions, self._device),
                width=width,
                is_leading=bool((rows == leading).all()),
            )
        )

    def _begin(self, call: _Call) -> None:
        self._call = call
        for layer in self._layers:
            layer.call = call

    def run(
        self, forward: Pass, inputs: dict[str, Any], *, facts: tuple[Hashable, ...] = ()
    ) -> list[Tensor]:
        """`forward(inputs)`, the pass that was begun; replayed where one like it was recorded.

        Args:
            inputs, facts: see `Replays.__call__`.
        """
        if self._replays is None:
            return forward(inputs)
        call = self._call
        assert call is not None, "RaggedCache.begin comes first"

        def begun(given: dict[str, Any]) -> list[Tensor]:
            self._begin(replace(call, rows=given["rows"], positions=given["positions"]))
            return forward(given["inputs"])

        return self._replays(
            begun,
            {"rows": call.rows, "positions": call.positions, "inputs": inputs},
            num_tokens=call.positions.numel(),
            facts=(call.width, call.is_leading, *facts),
        )

    def view(self, rows: Tensor) -> CacheView:
        """What is kept of rows [n], as wide as the longest of them."""
        rows = rows.to("cpu")
        width = int(self._lengths[rows].max())
        if width == 0:
            return CacheView(layers=[], width=0)
        self.begin_within(rows, torch.zeros(len(rows), 0, dtype=torch.int64), width)
        return CacheView(layers=[layer.kept() for layer in self._layers], width=width)

    def extend(self, rows: Tensor, counts: Tensor) -> None:
        self._lengths[rows.to("cpu")] += counts.to("cpu")

    def crop(self, rows: Tensor, lengths: Tensor) -> None:  # type: ignore[override]
        rows, lengths = rows.to("cpu"), lengths.to("cpu")
        self._lengths[rows] = torch.minimum(self._lengths[rows], lengths)

    def move(self, source: int, target: int) -> None:
        for layer in self._layers:
            layer.move(source, target)
        self._lengths[target] = self._lengths[source]


def _nothing() -> None:
    pass


def _written(buffer: Tensor, new: Tensor, call: _Call) -> Tensor:
    """The buffer [R, heads, capacity, D] with `new` [n, heads, N, D] in it, longer if need be."""
    missing = call.width - buffer.shape[2]
    if missing > 0:
        grown = -(-missing // _GROWTH) * _GROWTH
        buffer = torch.cat([buffer, buffer.new_zeros(*buffer.shape[:2], grown, buffer.shape[3])], 2)
    buffer[call.rows[:, None], :, call.positions] = new.transpose(1, 2).to(buffer.dtype)
    return buffer


def _read(buffer: Tensor, call: _Call) -> Tensor:
    """[n, heads, width, D]."""
    if call.is_leading:
        return buffer[: len(call.rows), :, : call.width]
    return buffer[call.rows, :, : call.width]
