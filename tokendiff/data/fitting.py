"""Whole documents into rows: conversations are not cut, as text is, where a row ends.

Best fit, the longest first: each document goes to the fullest row that has room for it. Of lengths
that are a quarter of a row on average, more than 99 % of the rows' tokens are filled.
"""

from bisect import bisect_left, insort
from typing import Any

import numpy as np

from tokendiff.data.packing import PackedRows, TokenizedDocuments

_FULL = 0.97  # a row that is less full waits for the next documents
_ROUNDS = 4  # as many rows are gathered as are handed out this often, so that there is a choice


def fit(lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """Best-fit decreasing.

    Args:
        lengths: [D] none above max_length.

    Returns:
        The documents of each row, by their places.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        at = bisect_left(room, (length, -1))
        if at == len(room):
            rows.append([])
            left, row = max_length, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(document)
        if left > length:
            insort(room, (left - length, row))
    return rows


class Fitter:
    """Gathers documents and hands out rows of whole ones; the rest waits.

    What it hands out depends on the documents and their order alone.

    Args:
        rows_at_once: rows are handed out in multiples of it.
    """

    def __init__(self, max_length: int, rows_at_once: int) -> None:
        self._max_length, self._rows_at_once = max_length, rows_at_once
        self._waiting: list[TokenizedDocuments] = []
        self._num_tokens = 0

    def add(self, documents: TokenizedDocuments) -> PackedRows | None:
        """Append documents, none longer than a row; returns rows, once there are enough."""
        if len(documents.tokens) > 0:
            self._waiting.append(documents)
        self._num_tokens += len(documents.tokens)
        if self._num_tokens < _ROUNDS * self._rows_at_once * self._max_length:
            return None
        return self._take(is_last=False)

    def flush(self) -> PackedRows | None:
        """The rows that are left, the last ones less full."""
        return self._take(is_last=True) if self._num_tokens > 0 else None

    def _take(self, *, is_last: bool) -> PackedRows:
        documents = _joined(self._waiting)
        rows = fit(documents.lengths, self._max_length)
        filled = np.array([documents.lengths[row].sum() for row in rows])
        order = np.argsort(-filled, kind="stable")
        if not is_last:
            # At least a round, so that what waits does not grow without end.
            num_full = int((filled >= _FULL * self._max_length).sum())
            rounds = max(1, num_full // self._rows_at_once)
            order = order[: rounds * self._rows_at_once]
        chosen = [rows[index] for index in order]
        is_taken = np.zeros(len(documents.lengths), dtype=bool)
        is_taken[[document for row in chosen for document in row]] = True
        rest = documents.select(~is_taken)
        self._waiting, self._num_tokens = [rest], len(rest.tokens)
        return _packed(documents, chosen)


def _joined(parts: list[TokenizedDocuments]) -> TokenizedDocuments:
    names = ("tokens", "num_bytes", "lengths", "is_target", "num_filler")
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in names
    }
    return TokenizedDocuments(**columns)


def _packed(documents: TokenizedDocuments, rows: list[list[int]]) -> PackedRows:
    assert documents.is_target is not None
    assert documents.num_filler is not None
    order = np.array([document for row in rows for document in row])
    lengths = documents.lengths[order]
    starts = (np.cumsum(documents.lengths) - documents.lengths)[order]
    places = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    per_row = np.array([len(row) for row in rows])
    first = np.cumsum(per_row) - per_row
    row_lengths = np.add.reduceat(lengths, first)
    return PackedRows(
        tokens=documents.tokens[places],
        row_lengths=row_lengths,
        document_lengths=lengths.astype(np.int32),
        documents_per_row=per_row,
        num_bytes=np.add.reduceat(documents.num_bytes[order], first).astype(np.int32),
        is_target=documents.is_target[places],
        num_filler=np.add.reduceat(documents.num_filler[order], first).astype(np.int32),
    )
