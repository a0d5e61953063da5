"""Documents to token ids, and token ids to rows of a fixed length.

Documents, each ended by EOS, are laid end to end and cut every max_length tokens.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Handed to the tokenizer at once; it takes some 250 bytes of memory for each token that it returns.
BATCH_CHARS = 1 << 18
_MAX_PART_CHARS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class TokenizedDocuments:
    """D documents, their tokens laid end to end.

    Attributes:
        tokens: [sum of lengths] int32, EOS at the end of each document.
        num_bytes: [sum of lengths] int32, UTF-8 bytes of text that each token stands for: those of
            a document's tokens sum to all of its bytes; EOS has none.
        lengths: [D] int64; 0 where the tokenizer makes nothing of a text.
        is_target: [sum of lengths] bool, what is learnt of conversations; None where that is all.
        num_filler: [D] int64, EOS that fills a conversation's last answer up; None without targets.
    """

    tokens: np.ndarray
    num_bytes: np.ndarray
    lengths: np.ndarray
    is_target: np.ndarray | None = None
    num_filler: np.ndarray | None = None

    def select(self, is_chosen: np.ndarray) -> "TokenizedDocuments":
        """The documents for which `is_chosen` ([D] bool) holds."""
        of_chosen = np.repeat(is_chosen, self.lengths)
        return TokenizedDocuments(
            tokens=self.tokens[of_chosen],
            num_bytes=self.num_bytes[of_chosen],
            lengths=self.lengths[is_chosen],
            is_target=None if self.is_target is None else self.is_target[of_chosen],
            num_filler=None if self.num_filler is None else self.num_filler[is_chosen],
        )


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
        is_target, num_filler: as in TokenizedDocuments; num_filler [R] int32 by row.
    """

    tokens: np.ndarray
    row_lengths: np.ndarray
    document_lengths: np.ndarray
    documents_per_row: np.ndarray
    num_bytes: np.ndarray
    is_target: np.ndarray | None = None
    num_filler: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.row_lengths)


def tokenize_stream(
    tokenizer: "PreTrainedTokenizerBase",
    documents: Iterable[str],
    *,
    batch_chars: int = BATCH_CHARS,
) -> Iterator[tuple[list[str], TokenizedDocuments]]:
    """Tokenize documents in order, about `batch_chars` at a time; the batches change no token.

    Nothing is added but EOS: no BOS, CLS or SEP. A special token spelled out in a document is text.
    A document of more than 262,144 characters is tokenized in parts, cut before a space where there
    is one: tokens may differ there from those of the whole.
    """
    for batch in _batched(documents, batch_chars):
        yield batch, _tokenize(tokenizer, batch, batch_chars)


def _tokenize(
    tokenizer: "PreTrainedTokenizerBase", documents: list[str], batch_chars: int
) -> TokenizedDocuments:
    parts = [_parts(document) for document in documents]
    ids, starts, counts = [], [], []
    base = 0
    for texts in _batched((text for of_document in parts for text in of_document), batch_chars):
        text_ids, text_starts, text_counts = _encode(tokenizer, texts)
        ids.append(text_ids)
        starts.append(text_starts + base)
        counts.append(text_counts)
        base += sum(map(_num_bytes, texts))
    document_of_part = np.repeat(np.arange(len(documents)), [len(texts) for texts in parts])
    num_tokens = np.bincount(document_of_part, weights=np.concatenate(counts)).astype(np.int64)

    is_kept = num_tokens > 0
    ends = np.cumsum(num_tokens)[is_kept]
    byte_ends = np.cumsum([_num_bytes(document) for document in documents])
    byte_starts = np.concatenate([[0], byte_ends[:-1]])
    tokens = np.insert(np.concatenate(ids), ends, tokenizer.eos_token_id)
    # A token's bytes reach to where the next one begins, EOS beginning where its document ends.
    places = np.insert(np.concatenate(starts), ends, byte_ends[is_kept])
    is_eos = np.zeros(len(tokens), dtype=bool)
    is_eos[ends + np.arange(len(ends))] = True
    is_first = np.roll(is_eos, 1)
    places[is_first] = byte_starts[is_kept]
    num_bytes = np.diff(places, append=base)
    num_bytes[is_eos] = 0  # what follows a document's end is of one that has no tokens
    return TokenizedDocuments(
        tokens=tokens, num_bytes=num_bytes.astype(np.int32), lengths=num_tokens + is_kept
    )


class Packer:
    """Joins documents and hands out rows in multiples of `rows_at_once`; the rest waits."""

    def __init__(self, max_length: int, rows_at_once: int) -> None:
        self._max_length = max_length
        self._rows_at_once = rows_at_once
        self._waiting: list[TokenizedDocuments] = []
        self._num_tokens = 0

    def add(self, documents: TokenizedDocuments) -> PackedRows | None:
        """Append documents; returns the rows that are full now, if at least `rows_at_once`."""
        if len(documents.tokens) > 0:
            self._waiting.append(documents)
        self._num_tokens += len(documents.tokens)
        unit = self._max_length * self._rows_at_once
        return self._take(self._num_tokens // unit * unit) if self._num_tokens >= unit else None

    def flush(self) -> PackedRows | None:
        """The rows that are left; the last one may be short."""
        return self._take(self._num_tokens) if self._num_tokens > 0 else None

    def _take(self, count: int) -> PackedRows:
        tokens, num_bytes, lengths = (
            np.concatenate([getattr(documents, name) for documents in self._waiting])
            for name in ("tokens", "num_bytes", "lengths")
        )
        ends = np.cumsum(lengths)
        taken = np.diff(np.minimum(ends, count), prepend=0)
        left = lengths - taken  # of the document that is cut, what goes on in the next rows
        # Copies: a view would keep all that was taken in memory.
        rest = TokenizedDocuments(
            tokens=tokens[count:].copy(), num_bytes=num_bytes[count:].copy(), lengths=left[left > 0]
        )
        self._waiting = [rest]
        self._num_tokens -= count
        return cut_rows(tokens[:count], num_bytes[:count], taken[taken > 0], self._max_length)


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, the byte at which each begins in the texts laid end to end, and ids of each text."""
    encoding = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,  # a document that spells out [MASK] must not hold the mask token
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    counts = np.array([len(row) for row in encoding["input_ids"]])
    ids = np.fromiter(chain.from_iterable(encoding["input_ids"]), np.int32, counts.sum())
    if tokenizer.is_fast:
        spans = np.array([*chain.from_iterable(encoding["offset_mapping"])]).reshape(-1, 2)
        text_starts = np.cumsum([0, *map(len, texts[:-1])])
        chars = spans[:, 0].astype(np.int64) + np.repeat(text_starts, counts)
        return ids, _byte_places("".join(texts), chars), counts
    # No offsets to be had: a text's bytes are spread evenly over its tokens; the sum is right.
    sizes = np.array([_num_bytes(text) for text in texts])
    place_in_text = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    evenly = place_in_text * np.repeat(sizes, counts) // np.repeat(counts, counts)
    return ids, evenly + np.repeat(np.cumsum(sizes) - sizes, counts), counts


def _byte_places(text: str, chars: np.ndarray) -> np.ndarray:
    """Places in characters as places in UTF-8 bytes."""
    if text.isascii():
        return chars
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])[chars]


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
