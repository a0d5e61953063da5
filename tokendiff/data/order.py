"""The order in which rows are trained on: a function of (seed, epoch) alone, readable from any
place in it.

A two-level shuffle, so that reading stays sequential and memory bounded: row groups are permuted,
and within each window of consecutive permuted row groups the rows are. A resumed run, or one with
another number of workers, asks for the same places and gets the same rows.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """
    Attributes:
        row_group_sizes: rows of each row group, in the order of the shards.
        window_rows: rows that are shuffled together, about; a corpus smaller than that is shuffled
            fully.
    """

    row_group_sizes: tuple[int, ...]
    seed: int
    window_rows: int = 16384

    def __post_init__(self) -> None:
        if sum(self.row_group_sizes) == 0:
            raise ValueError("an order of no rows")
        if self.window_rows < 1:
            raise ValueError(f"window_rows must be at least 1, got {self.window_rows}")

    @cached_property
    def num_rows(self) -> int:
        return sum(self.row_group_sizes)

    @cached_property
    def _groups_per_window(self) -> int:
        return max(1, self.window_rows // max(self.row_group_sizes))

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
        groups, stops = _permuted_groups(
            self.row_group_sizes, self._groups_per_window, self.seed, epoch
        )
        window = int(np.searchsorted(stops, place, side="right"))
        chosen = groups[window * self._groups_per_window : (window + 1) * self._groups_per_window]
        return *_shuffled_window(
            self.row_group_sizes, tuple(chosen.tolist()), self.seed, epoch, window
        ), int(stops[window])


@lru_cache(maxsize=4)
def _permuted_groups(
    sizes: tuple[int, ...], per_window: int, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row groups in the epoch's order, and the place at which each window of them ends."""
    groups = _permutation(len(sizes), seed, "row groups", epoch)
    group_stops = np.cumsum(np.asarray(sizes, dtype=np.int64)[groups])
    last_of_window = np.minimum(
        np.arange(per_window - 1, len(sizes) + per_window - 1, per_window), len(sizes) - 1
    )
    return groups, group_stops[last_of_window]


@lru_cache(maxsize=4)
def _shuffled_window(
    sizes: tuple[int, ...], groups: tuple[int, ...], seed: int, epoch: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    counts = np.asarray([sizes[group] for group in groups], dtype=np.int64)
    group_of_row = np.repeat(np.asarray(groups, dtype=np.int64), counts)
    row_in_group = np.concatenate([np.arange(count) for count in counts])
    shuffled = _permutation(len(group_of_row), seed, "rows", epoch, window)
    return group_of_row[shuffled], row_in_group[shuffled]


def _permutation(n: int, *key: int | str) -> np.ndarray:
    # Here, since Ray Train's processes plan steps for others, and torch takes seconds to import.
    from tokendiff.diffusion.random import key_from, permutation

    permuted: np.ndarray = permutation(key_from(*key), n).numpy()
    return permuted
