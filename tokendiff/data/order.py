"""The order in which rows are trained on: a function of (seed, epoch) alone, readable from any
place in it.

A two-level shuffle, so that reading stays sequential and memory bounded: row groups are permuted,
and within each window of consecutive permuted row groups the rows are. A resumed run, or one with
another number of workers, asks for the same places and gets the same rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from tokendiff.diffusion.splitmix import GAMMA, key_from, mix


@dataclass(frozen=True, kw_only=True, eq=False)
class RowOrder:
    """
    Attributes:
        row_group_sizes: [row groups] of rows in each, in the order of the shards.
        window_rows: rows that are shuffled together, about; a corpus smaller than that is shuffled
            fully.
    """

    row_group_sizes: np.ndarray | Sequence[int]
    seed: int
    window_rows: int = 16384

    def __post_init__(self) -> None:
        if self.num_rows == 0:
            raise ValueError("an order of no rows")
        if self.window_rows < 1:
            raise ValueError(f"window_rows must be at least 1, got {self.window_rows}")

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept: another process may need other windows."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @cached_property
    def num_rows(self) -> int:
        return int(np.sum(self.row_group_sizes, dtype=np.int64))

    @cached_property
    def _sizes(self) -> np.ndarray:
        return np.asarray(self.row_group_sizes)

    @cached_property
    def _groups_per_window(self) -> int:
        return max(1, self.window_rows // int(self._sizes.max()))

    # Of this order alone: to know another by its sizes would take a look at all of them.
    @cached_property
    def _groups_of(self) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
        return lru_cache(maxsize=2)(self._permuted_groups)

    @cached_property
    def _rows_of(self) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
        return lru_cache(maxsize=4)(self._shuffled_window)

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows at places start..stop-1 of the endless sequence epoch 0, epoch 1, ...

        Returns:
            epoch, row group and row within the row group, each [stop - start] int64.
        """
        parts = []
        while start < stop:
            epoch, place = divmod(start, self.num_rows)
            groups, rows, window_stop = self._window_at(epoch, place)
            taken = min(stop - start, window_stop - place)
            first = len(rows) - (window_stop - place)
            window = slice(first, first + taken)
            parts.append((np.full(taken, epoch), groups[window], rows[window]))
            start += taken
        epochs, groups, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
        return epochs, groups, rows

    def _window_at(self, epoch: int, place: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Shuffled (row group, row) of the window that holds `place` of an epoch, and the place
        where it ends.
        """
        _, stops = self._groups_of(epoch)
        window = int(np.searchsorted(stops, place, side="right"))
        return *self._rows_of(epoch, window), int(stops[window])

    def _permuted_groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row groups in the epoch's order, and the place at which each window of them ends."""
        count, per_window = len(self._sizes), self._groups_per_window
        groups = permutation(key_from(self.seed, "row groups", epoch), count).astype(np.int32)
        group_stops = np.cumsum(self._sizes[groups], dtype=np.int64)
        last_of_window = np.minimum(
            np.arange(per_window - 1, count + per_window - 1, per_window), count - 1
        )
        return groups, group_stops[last_of_window]

    def _shuffled_window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Row group and row in it of each place of a window."""
        first = window * self._groups_per_window
        groups = self._groups_of(epoch)[0][first : first + self._groups_per_window]
        counts = self._sizes[groups].astype(np.int64)
        group_of_row = np.repeat(groups.astype(np.int64), counts)
        row_in_group = np.concatenate([np.arange(count) for count in counts])
        shuffled = permutation(key_from(self.seed, "rows", epoch, window), len(group_of_row))
        return group_of_row[shuffled], row_in_group[shuffled]


def permutation(key: int, n: int) -> np.ndarray:
    """[n] int64: a permutation of 0..n-1 that depends on `key` and n alone, on any platform and
    version.
    """
    order: np.ndarray = mix(np.int64(key) + np.arange(1, n + 1, dtype=np.int64) * GAMMA)
    return np.argsort(order, kind="stable")
