"""Documents to token ids, and token ids to rows of a fixed length.

Documents, each ended by EOS, are laid end to end and cut every max_length tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, compress, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from tokendiff.data.encoding import Encoded, Encoder, utf8_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Handed to the tokenizer at once; it takes some 250 bytes of memory for each token that it returns.
BATCH_CHARS = 1 << 18
_MAX_PART_CHARS = 1 << 18


# Of a document: a place among its tokens -> UTF-8 bytes of text that the ones before it stand for.
BytesBefore = Callable[[int], int]


@dataclass(frozen=True, kw_only=True)
class TokenizedDocuments:
    """D documents, their tokens laid end to end.

    Attributes:
        tokens: [sum of lengths] int32, EOS at the end of each document.
        lengths: [D] int64; 0 where the tokenizer makes nothing of a text.
        num_bytes: [D] int64, UTF-8 bytes of text that the tokens stand for; EOS has none.
        bytes_before: [D], where documents may be cut. It is asked where rows end alone: to say for
            every token how many bytes it stands for takes as long as to tokenize.
        is_target: [sum of lengths] bool, what is learnt of conversations; None where that is all.
        num_filler: [D] int64, EOS that fills a conversation's last answer up; None without targets.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    bytes_before: Sequence[BytesBefore] | None = None
    is_target: np.ndarray | None = None
    num_filler: np.ndarray | None = None

    def select(self, is_chosen: np.ndarray) -> "TokenizedDocuments":
        """The documents for which `is_chosen` ([D] bool) holds."""
        of_chosen = np.repeat(is_chosen, self.lengths)
        return TokenizedDocuments(
            tokens=self.tokens[of_chosen],
            lengths=self.lengths[is_chosen],
            num_bytes=self.num_bytes[is_chosen],
            bytes_before=self.bytes_before and [*compress(self.bytes_before, is_chosen)],
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
    # A document that spells out [MASK] must not hold the mask token.
    encoder, eos = _encoder(tokenizer, len(tokenizer)), tokenizer.eos_token_id
    for batch in _batched(documents, batch_chars):
        yield batch, _tokenize(encoder, batch, batch_chars, eos)


@lru_cache(maxsize=1)
def _encoder(tokenizer: Any, num_tokens: int) -> Encoder:
    """Kept for the next partition, with what it has found out about the tokens. Of changes to the
    tokenizer it notices more tokens alone.
    """
    return Encoder(tokenizer, splits_special=True)


def _tokenize(
    encoder: Encoder, documents: list[str], batch_chars: int, eos: int
) -> TokenizedDocuments:
    texts = [_parts(document) for document in documents]
    parts: list[Encoded] = []
    for batch in _batched(chain.from_iterable(texts), batch_chars):
        parts += encoder(batch)
    rest = iter(parts)
    places = [_Places([*islice(rest, len(of_document))]) for of_document in texts]
    counts = np.array([each.num_tokens for each in places])
    is_kept = counts > 0
    ids = np.concatenate([part.ids for part in parts])
    return TokenizedDocuments(
        tokens=np.insert(ids, np.cumsum(counts)[is_kept], eos),
        lengths=counts + is_kept,
        num_bytes=np.array([each.num_bytes for each in places]) * is_kept,
        bytes_before=places,
    )


class Packer:
    """Joins documents and hands out rows in multiples of `rows_at_once`; the rest waits."""

    def __init__(self, max_length: int, rows_at_once: int) -> None:
        self._max_length = max_length
        self._rows_at_once = rows_at_once
        self._tokens: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._num_tokens = 0
        self._row_bytes: list[int] = []  # of the rows that are full
        self._open_bytes = 0  # of the row that is not

    def add(self, documents: TokenizedDocuments) -> PackedRows | None:
        """Append documents; returns the rows that are full now, if at least `rows_at_once`."""
        assert documents.bytes_before is not None
        self._count_bytes(documents, documents.bytes_before)
        self._tokens.append(documents.tokens)
        self._lengths.append(documents.lengths)
        self._num_tokens += len(documents.tokens)
        unit = self._max_length * self._rows_at_once
        return self._take(self._num_tokens // unit * unit) if self._num_tokens >= unit else None

    def flush(self) -> PackedRows | None:
        """The rows that are left; the last one may be short."""
        return self._take(self._num_tokens) if self._num_tokens > 0 else None

    def _count_bytes(
        self, documents: TokenizedDocuments, bytes_before: Sequence[BytesBefore]
    ) -> None:
        room = self._max_length - self._num_tokens % self._max_length
        columns = (documents.lengths.tolist(), documents.num_bytes.tolist(), bytes_before)
        for length, size, before in zip(*columns, strict=True):
            counted = 0
            while length >= room:  # the row ends here
                stop = size if length == room else before(room)
                self._row_bytes.append(self._open_bytes + stop - counted)
                self._open_bytes, counted = 0, stop
                room += self._max_length
            self._open_bytes += size - counted
            room -= length

    def _take(self, count: int) -> PackedRows:
        tokens, lengths = np.concatenate(self._tokens), np.concatenate(self._lengths)
        ends = np.cumsum(lengths)
        taken = np.diff(np.minimum(ends, count), prepend=0)
        left = lengths - taken  # of the document that is cut, what goes on in the next rows
        # Copies: a view would keep all that was taken in memory.
        self._tokens, self._lengths = [tokens[count:].copy()], [left[left > 0]]
        self._num_tokens -= count
        if count % self._max_length:
            self._row_bytes.append(self._open_bytes)
            self._open_bytes = 0
        num_rows = -(-count // self._max_length)
        num_bytes = np.array(self._row_bytes[:num_rows], dtype=np.int32)
        del self._row_bytes[:num_rows]
        return cut_rows(tokens[:count], num_bytes, taken[taken > 0], self._max_length)


def cut_rows(
    tokens: np.ndarray, num_bytes: np.ndarray, document_lengths: np.ndarray, max_length: int
) -> PackedRows:
    """Cut a run of documents into rows.

    Args:
        tokens: [n] ids.
        num_bytes: [R] of each row.
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
        documents_per_row=np.bincount(row_of_run),
        num_bytes=num_bytes,
    )


class _Places:
    """BytesBefore of a document in parts."""

    def __init__(self, parts: list[Encoded]) -> None:
        self._parts = parts
        self.num_tokens = sum(len(part.ids) for part in parts)
        self.num_bytes = sum(utf8_bytes(part.text) for part in parts)

    def __call__(self, token: int) -> int:
        if token == 0:
            return 0  # also of what the tokenizer makes nothing of at its beginning
        before = 0
        for part in self._parts:
            if token < len(part.ids):
                return before + part.bytes_before(token)
            token -= len(part.ids)
            before += utf8_bytes(part.text)
        return before


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
