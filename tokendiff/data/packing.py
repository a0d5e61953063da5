"""Documents to token ids, and token ids to rows of a fixed length.

Documents, each ended by EOS, are laid end to end and cut every max_length tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Handed to the tokenizer at once; it takes some 250 bytes of memory for each token that it returns.
BATCH_CHARS = 1 << 18
_MAX_PART_CHARS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class TokenizedDocument:
    """
    Attributes:
        text: the document.
        tokens: [n] int32, EOS last; empty where the tokenizer makes nothing of the text.
        num_bytes: [n] int32, UTF-8 bytes of `text` that each token stands for; they sum to all.
    """

    text: str
    tokens: np.ndarray
    num_bytes: np.ndarray


@dataclass(frozen=True, kw_only=True)
class PackedRows:
    """R rows, their values laid end to end.

    Attributes:
        tokens: [sum of row_lengths] int32.
        row_lengths: [R] all max_length, but for the last one.
        document_lengths: [sum of documents_per_row] int32, lengths of the runs of one document
            inside a row; they sum to the row's length.
        documents_per_row: [R]
        num_bytes: [R] int32, UTF-8 bytes of source text.
    """

    tokens: np.ndarray
    row_lengths: np.ndarray
    document_lengths: np.ndarray
    documents_per_row: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.row_lengths)


def tokenize_documents(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[str],
    *,
    batch_chars: int = BATCH_CHARS,
) -> Iterator[TokenizedDocument]:
    """Tokenize a stream, in order, `batch_chars` at a time; the batches do not show in the result.

    Nothing is added but EOS: no BOS, CLS or SEP. A special token spelled out in a document is text.
    A document of more than 262,144 characters is tokenized in parts, cut before a space where there
    is one: tokens may differ there from those of the whole.
    """
    eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    for batch in _batched(documents, batch_chars):
        parts = [_parts(document) for document in batch]
        encoded = (
            result
            for texts in _batched((text for document in parts for text in document), batch_chars)
            for result in _encode(tokenizer, texts)
        )
        for document, texts in zip(batch, parts, strict=True):
            ids, starts, base = [], [], 0
            for text, (part_ids, part_starts) in zip(
                texts, islice(encoded, len(texts)), strict=True
            ):
                ids.append(part_ids)
                starts.append(part_starts + base)
                base += _num_bytes(text)
            tokens = np.concatenate(ids)
            if len(tokens) > 0:
                tokens = np.concatenate([tokens, eos])
            num_bytes = _bytes_between(np.concatenate(starts), base)
            yield TokenizedDocument(text=document, tokens=tokens, num_bytes=num_bytes)


class Packer:
    """Joins documents and hands out rows in multiples of `rows_at_once`; the rest waits."""

    def __init__(self, max_length: int, rows_at_once: int) -> None:
        self._max_length = max_length
        self._rows_at_once = rows_at_once
        self._tokens: list[np.ndarray] = []
        self._num_bytes: list[np.ndarray] = []
        self._lengths: list[int] = []  # of the waiting documents, or of what is left of the first
        self._num_tokens = 0

    def add(self, tokens: np.ndarray, num_bytes: np.ndarray) -> PackedRows | None:
        """Append a document; returns the rows that are full now, if at least `rows_at_once`."""
        self._tokens.append(tokens)
        self._num_bytes.append(num_bytes)
        self._lengths.append(len(tokens))
        self._num_tokens += len(tokens)
        unit = self._max_length * self._rows_at_once
        return self._take(self._num_tokens // unit * unit) if self._num_tokens >= unit else None

    def flush(self) -> PackedRows | None:
        """The rows that are left; the last one may be short."""
        return self._take(self._num_tokens) if self._num_tokens > 0 else None

    def _take(self, count: int) -> PackedRows:
        tokens, num_bytes = np.concatenate(self._tokens), np.concatenate(self._num_bytes)
        ends = np.cumsum(self._lengths)
        num_whole = int(np.searchsorted(ends, count, side="right"))
        taken = np.diff(ends[:num_whole], prepend=0)
        cut_off = count - int(taken.sum())  # of the document that goes on in the next rows
        left = self._lengths[num_whole:]
        if cut_off > 0:
            taken = np.append(taken, cut_off)
            left[0] -= cut_off
        # Copies: a view would keep all that was taken in memory.
        self._tokens, self._num_bytes = [tokens[count:].copy()], [num_bytes[count:].copy()]
        self._lengths = left
        self._num_tokens -= count
        return cut_rows(tokens[:count], num_bytes[:count], taken, self._max_length)


def cut_rows(
    tokens: np.ndarray, num_bytes: np.ndarray, document_lengths: np.ndarray, max_length: int
) -> PackedRows:
    """Cut a run of documents into rows.

    Args:
        tokens, num_bytes: [n] ids, and the bytes each stands for.
        document_lengths: tokens of each document; they sum to n.
    """
    row_starts = np.arange(0, len(tokens), max_length)
    run_ends = np.union1d(np.cumsum(document_lengths), row_starts[1:])
    run_lengths = np.diff(run_ends, prepend=0)
    row_of_run = (run_ends - 1) // max_length
    return PackedRows(
        tokens=tokens,
        row_lengths=np.diff(row_starts, append=len(tokens)),
        document_lengths=run_lengths.astype(np.int32),
        documents_per_row=np.bincount(row_of_run, minlength=len(row_starts)),
        num_bytes=np.add.reduceat(num_bytes, row_starts).astype(np.int32),
    )


def _encode(
    tokenizer: "PreTrainedTokenizerBase", texts: list[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, byte in the text at which each id begins) of each text."""
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,  # a document that spells out [MASK] must not hold the mask token
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids = [np.asarray(row, dtype=np.int32) for row in encoding["input_ids"]]
    if not tokenizer.is_fast:
        # No offsets to be had: a text's bytes are spread evenly over its tokens; the sum is right.
        return [
            (row, np.arange(len(row)) * _num_bytes(text) // max(len(row), 1))
            for row, text in zip(ids, texts, strict=True)
        ]
    offsets = [np.asarray(row, dtype=np.int64).reshape(-1, 2) for row in encoding["offset_mapping"]]
    return [
        (row, _byte_places(text, spans[:, 0]))
        for row, text, spans in zip(ids, texts, offsets, strict=True)
    ]


def _byte_places(text: str, chars: np.ndarray) -> np.ndarray:
    """Places in characters as places in UTF-8 bytes."""
    if text.isascii():
        return chars
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])[chars]


def _bytes_between(starts: np.ndarray, total: int) -> np.ndarray:
    """Bytes of each token, to where the next begins; the first and last take the ends, EOS none."""
    if len(starts) == 0:
        return np.zeros(0, dtype=np.int32)
    starts = np.maximum.accumulate(starts)  # a normaliser may have reordered combining marks
    starts[0] = 0
    return np.diff(starts, append=[total, total]).astype(np.int32)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _parts(document: str) -> list[str]:
    """The document in parts of at most _MAX_PART_CHARS, cut before a space where one is near."""
    parts, start = [], 0
    while len(document) - start > _MAX_PART_CHARS:
        limit = start + _MAX_PART_CHARS
        space = document.rfind(" ", start + _MAX_PART_CHARS // 2, limit)
        stop = space if space > 0 else limit
        parts.append(document[start:stop])
        start = stop
    return [*parts, document[start:]]


def _batched(texts: Iterable[str], num_chars: int) -> Iterator[list[str]]:
    """Runs of texts, each ended by the one that brings it to `num_chars`."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= num_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
