"""One partition of text to its token shards, in one process and in bounded memory."""

import hashlib
import os
import sys
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokendiff.artifacts.locations import to_disk
from tokendiff.artifacts.manifest import sha256_of
from tokendiff.data.bad_rows import BadRow, BadRowFile, BadRowSieve, ErrorStats, bad_rows_in_words
from tokendiff.data.chat_documents import ChatDocuments, ChatOptions, marked
from tokendiff.data.chats import Conversation
from tokendiff.data.fitting import Fitter
from tokendiff.data.packing import (
    BATCH_CHARS,
    PackedRows,
    Packer,
    TokenizedDocuments,
    tokenize_stream,
)
from tokendiff.data.partition import Partition
from tokendiff.data.sources import (
    FILE_FORMATS,
    dummy_rows,
    find_dataset_format,
    format_note,
    holds_chats,
    plan_input,
    read_conversations,
    read_documents,
    sample_records,
)
from tokendiff.data.templates import ChatRenderer, read_template
from tokendiff.data.tokenizers import build_tokenizer
from tokendiff.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokendiff.config.preprocess import PreprocessConfig
    from tokendiff.diffusion.interfaces import Figures, OnProgress

SPLITS = ("train", "heldout")
ROW_GROUP_ROWS = 512
_HELDOUT_BIT = 1 << 62
_TRAINING_TEXT_BYTES = 32 << 20
_TRAINING_TEXT_PARTITIONS = 64


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """What one partition gave to one split.

    Attributes:
        path: relative to the output folder.
        rows: in row groups of ROW_GROUP_ROWS, all but the last.
        highest_token: the largest id.
        num_bytes: UTF-8 bytes of the source text.
    """

    path: str
    sha256: str
    rows: int
    highest_token: int
    tokens: int
    num_bytes: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class PartitionStats:
    """What became of one partition; a split that got nothing is not in `shards`.

    Attributes:
        dropped_empty: texts without tokens.
        dropped_not_text: null cells.
        dropped_too_long, cut: conversations longer than a row that were left out, or cut.
        without_reasoning: conversations that are used, but for thoughts beside their answers.
        joined: conversations with an answer whose first token holds the blank before it.
        example: the first conversation that is trained on, its answers marked; "" of text.
        errors: its bad rows; None where there are none.
    """

    index: int
    shards: dict[str, ShardStats]
    dropped_empty: int
    dropped_not_text: int
    dropped_too_long: int = 0
    cut: int = 0
    without_reasoning: int = 0
    joined: int = 0
    example: str = ""
    errors: ErrorStats | None = None

    @property
    def files(self) -> list[ShardStats | ErrorStats]:
        """All that it wrote."""
        errors = [] if self.errors is None else [self.errors]
        return [*self.shards.values(), *errors]


def preprocess_partition(
    partition: Partition,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    heldout_fraction: float,
    output_dir: Path,
    max_errors: int | None = None,
    chats: ChatOptions | None = None,
    batch_chars: int = BATCH_CHARS,
    on_progress: "OnProgress" = lambda figures: None,
) -> PartitionStats:
    """Stream a partition into `train/part-NNNNN.parquet` and `heldout/part-NNNNN.parquet`.

    The files' bytes depend on the partition, the tokenizer, max_length and heldout_fraction alone;
    doing it again replaces them. Equal documents fall on the same side of the split wherever they
    stand. Bad rows are left out, and named in `errors/part-NNNNN.jsonl`.

    Args:
        chats: of a partition of conversations, which are packed whole (`tokendiff.data.fitting`).
        max_errors: with more bad rows than this the partition is given up and leaves no shards.
        on_progress: told of bytes of text that are read, and their tokens.

    Raises:
        InputError: the input cannot be read as what it is said to be.
    """
    dropped: Counter[str] = Counter()
    num_bytes = num_tokens = 0

    def figures() -> "Figures":
        return num_bytes, num_tokens

    packer = Packer if chats is None else Fitter
    writers = {
        split: _ShardWriter(output_dir, split, partition.index, packer(max_length, ROW_GROUP_ROWS))
        for split in SPLITS
    }
    example = ""
    bad_rows = BadRowFile(output_dir, partition.index, max_errors=max_errors)
    try:
        if partition.format == "dummy":
            batches = _dummy_documents(partition, tokenizer, max_length)
        elif partition.format == "samples":
            batches = _sample_documents(partition, tokenizer, dropped)
        elif chats is not None:
            conversations = _conversations(partition, bad_rows, heldout_fraction)
            documents_of = ChatDocuments(
                tokenizer=tokenizer, options=chats, max_length=max_length, dropped=dropped
            )
            batches = documents_of.of(conversations, bad_rows.refuse)
        else:
            held_fraction = None if partition.is_new else heldout_fraction
            texts = _texts(bad_rows.sift(read_documents(partition)), dropped)
            batches = _text_documents(texts, tokenizer, dropped, batch_chars, held_fraction)
        for contents, documents in batches:
            held = []
            for content in contents:
                held.append(is_heldout(content, heldout_fraction))
                num_bytes += len(content)
            is_held = np.array(held)
            if chats is not None and not example and not is_held.all():
                example = marked(tokenizer, documents.select(~is_held))
            num_tokens += len(documents.tokens)
            writers["train"].add(documents.select(~is_held))
            writers["heldout"].add(documents.select(is_held))
            on_progress(figures)
        finished = {} if bad_rows.is_too_many else writers
        shards = {split: writer.finish() for split, writer in finished.items()}
        errors = bad_rows.finish()
    finally:
        bad_rows.close()
        for writer in writers.values():
            writer.close()
    return PartitionStats(
        index=partition.index,
        shards={split: shard for split, shard in shards.items() if shard is not None},
        dropped_empty=dropped["empty"],
        dropped_not_text=dropped["not text"],
        dropped_too_long=dropped["too long"],
        cut=dropped["cut"],
        without_reasoning=dropped["reasoning"],
        joined=dropped["joined"],
        example=example,
        errors=errors,
    )


def is_heldout(content: bytes, heldout_fraction: float) -> bool:
    """Whether a document is kept for evaluation, by the hash of what it says."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") < heldout_fraction * 2**64


def check_chats(config: "PreprocessConfig", tokenizer_name_or_path: str) -> None:
    """Check, before anything starts, that conversations can be written out.

    Raises:
        InputError: there is no such template, it does not work, or there is none.
    """
    template = None if config.chat_template is None else read_template(config.chat_template)
    if holds_chats(config):
        tokenizer = _chat_tokenizer(config, tokenizer_name_or_path, template)
        ChatRenderer(tokenizer=tokenizer).check(find_dataset_format(config))


def _chat_tokenizer(config: "PreprocessConfig", name: str, template: str | None) -> Any:
    if name == "bpe":  # is trained on the conversations; its words have no part in this
        name = "bytes"
    tokenizer, _ = build_tokenizer(name, documents=(), vocab_size=config.vocab_size)
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def first_conversation(config: "PreprocessConfig", tokenizer_name_or_path: str) -> dict[str, str]:
    """The format of conversations that was found in files, and the first that can be used, written
    out with its answers in [[ ]]; of text that fits a chat format too, that it does; {} of other
    text, and of a dataset, which would have to be fetched.

    Raises:
        InputError: as `check_chats`, or the input cannot be read.
    """
    if config.dataset_name not in FILE_FORMATS:
        return {}
    if not holds_chats(config):
        note = format_note(config)
        return {} if note is None else {"dataset_format": "text", "note": note}
    template = None if config.chat_template is None else read_template(config.chat_template)
    tokenizer = _chat_tokenizer(config, tokenizer_name_or_path, template)
    ChatRenderer(tokenizer=tokenizer).check(find_dataset_format(config))
    partitions, _ = plan_input(config)
    for partition in partitions:
        options = ChatOptions.of(config, partition.dataset_format, fill_answers=False)
        assert options is not None
        # Whole, however long: a bpe that is still to be trained makes fewer tokens of it.
        documents = ChatDocuments(
            tokenizer=tokenizer, options=options, max_length=sys.maxsize, dropped=Counter()
        )
        rows = read_conversations(partition)
        found = (row for row in rows if not isinstance(row, BadRow))
        for _, some in documents.of(found, lambda bad: None):
            example = marked(tokenizer, some)
            return {"dataset_format": options.dataset_format, "example": example}
    return {}


def training_text(partitions: Sequence[Partition], heldout_fraction: float) -> Iterator[str]:
    """Training-side documents for a tokenizer to learn from: 32 MiB, an equal share per partition.

    Of many partitions, 64 that are evenly spread.

    Raises:
        InputError: there are none.
    """
    places = np.linspace(0, len(partitions) - 1, _TRAINING_TEXT_PARTITIONS)
    chosen = np.unique(places.round().astype(int))
    share = _TRAINING_TEXT_BYTES // len(chosen)
    seen: Counter[str] = Counter()
    bad = BadRowSieve()
    for index in chosen:
        left = share
        for document in _texts(bad.sift(_learnable(partitions[index])), seen):
            content = document.encode()
            is_kept = not is_heldout(content, heldout_fraction)
            seen["training" if is_kept else "held-out"] += 1
            if is_kept:
                yield content[:left].decode(errors="ignore")
                left -= len(content)
            if left <= 0:
                break
    if not seen["training"]:
        holds_chats = partitions[0].dataset_format != "text"
        raise InputError(
            "the corpus has no training text to make a tokenizer from "
            f"({seen['empty']} empty cells, {seen['not text']} that are not text, "
            f"{seen['held-out']} held-out documents, "
            f"{bad_rows_in_words(bad.num_rows, ''.join(bad.first[:1]))}); check the data, "
            f"{'' if holds_chats else 'text_column, '}heldout_fraction"
        )


def _learnable(partition: Partition) -> Iterator[str | BadRow | None]:
    """What a tokenizer learns from: texts, or all that is said in conversations."""
    if partition.dataset_format == "text":
        yield from read_documents(partition)
        return
    for conversation in read_conversations(partition):
        if isinstance(conversation, BadRow):
            yield conversation
        else:
            yield "\n".join(message.content for message in conversation.messages)


def _text_documents(
    texts: Iterator[str],
    tokenizer: "PreTrainedTokenizerBase",
    dropped: Counter[str],
    batch_chars: int,
    held_fraction: float | None,
) -> Iterator[tuple[Iterable[bytes], TokenizedDocuments]]:
    """Batches of documents: what each says, and their tokens.

    Args:
        held_fraction: leave out the documents that are not held out at this fraction.
    """
    if held_fraction is not None:
        texts = (text for text in texts if is_heldout(text.encode(), held_fraction))
    for batch, documents in tokenize_stream(tokenizer, texts, batch_chars=batch_chars):
        dropped["empty"] += int((documents.lengths == 0).sum())
        yield (text.encode() for text in batch), documents


def _conversations(
    partition: Partition, bad_rows: BadRowFile, heldout_fraction: float
) -> Iterator[Conversation]:
    for conversation in bad_rows.sift(read_conversations(partition)):
        is_wanted = partition.is_new or is_heldout(
            conversation.prompt.encode("utf-8", "replace"), heldout_fraction
        )
        if is_wanted:
            yield conversation


def _dummy_documents(
    partition: Partition, tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Iterator[tuple[Iterable[bytes], TokenizedDocuments]]:
    ordinary = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    for row in dummy_rows(partition, np.array(ordinary, dtype=np.int32), max_length):
        documents = TokenizedDocuments(
            tokens=row,
            lengths=np.array([max_length]),
            num_bytes=np.array([0]),
            bytes_before=[lambda token: 0],
        )
        yield [row.tobytes()], documents


def _sample_documents(
    partition: Partition, tokenizer: "PreTrainedTokenizerBase", dropped: Counter[str]
) -> Iterator[tuple[Iterable[bytes], TokenizedDocuments]]:
    """Samples as the tokens that the model chose: its own text, encoded again, may be other ones.

    All samples of a prompt fall on the same side of the split, or held-out rows would begin with
    trained ones.
    """
    for record in sample_records(partition):
        tokens = record["tokens"]
        if not tokens:
            dropped["empty"] += 1
            continue
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        if text != record["text"]:
            raise InputError(
                f"{partition.pieces[0].path}: sample {record['id']} reads {record['text'][:40]!r}, "
                f"but {text[:40]!r} with this tokenizer; give the tokenizer of the model that "
                "wrote the samples (tokenizer_name_or_path)"
            )
        if tokens[-1] != tokenizer.eos_token_id:
            tokens = [*tokens, tokenizer.eos_token_id]
        size, last = len(text.encode()), len(tokens) - 1 or 1
        documents = TokenizedDocuments(
            tokens=np.array(tokens, dtype=np.int32),
            lengths=np.array([len(tokens)]),
            num_bytes=np.array([size]),
            # Bytes are spread evenly over the tokens but EOS; the sum is right.
            bytes_before=[partial(_evenly, size, last)],
        )
        yield [(record["prompt"] or text).encode("utf-8", "replace")], documents


def _evenly(num_bytes: int, num_tokens: int, token: int) -> int:
    return token * num_bytes // num_tokens


def _texts(documents: Iterable[str | None], dropped: Counter[str]) -> Iterator[str]:
    """The documents that say something; the others are counted."""
    for document in documents:
        if document is None:
            dropped["not text"] += 1
        elif not document or document.isspace():
            dropped["empty"] += 1
        else:
            yield document


class _ShardWriter:
    """Packs the documents of one split and writes full row groups as they come."""

    def __init__(self, output_dir: Path, split: str, index: int, packer: Packer | Fitter) -> None:
        self._packer = packer
        self._name = f"{split}/part-{index:05d}.parquet"
        self._path = output_dir / self._name
        # Its own name for every attempt: a task that is thought lost may still be writing.
        self._temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex[:8]}.tmp")
        self._next_row_id = (index << 32) + (_HELDOUT_BIT if split == "heldout" else 0)
        self._num_rows, self._highest_token = 0, 0
        self._totals: Counter[str] = Counter(documents=0, tokens=0, num_bytes=0)
        self._writer: Any = None

    def add(self, documents: TokenizedDocuments) -> None:
        self._totals.update(
            documents=int((documents.lengths > 0).sum()),
            tokens=len(documents.tokens),
            num_bytes=int(documents.num_bytes.sum()),
        )
        if (rows := self._packer.add(documents)) is not None:
            self._write(rows)

    def finish(self) -> ShardStats | None:
        """Write what is left and give the file its name; None where the split got no rows."""
        if (rows := self._packer.flush()) is not None:
            self._write(rows)
        if self._writer is None:
            self._path.unlink(missing_ok=True)
            return None
        self._writer.close()
        to_disk(self._temporary)
        digest = sha256_of(self._temporary)
        os.replace(self._temporary, self._path)
        return ShardStats(
            path=self._name,
            sha256=digest,
            rows=self._num_rows,
            highest_token=self._highest_token,
            **self._totals,
        )

    def close(self) -> None:
        """Leave nothing unfinished behind."""
        if self._writer is not None:
            self._writer.close()
            self._temporary.unlink(missing_ok=True)

    def _write(self, rows: PackedRows) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        row_ids = np.arange(self._next_row_id, self._next_row_id + len(rows), dtype=np.int64)
        self._next_row_id += len(rows)
        columns = {
            "row_id": pa.array(row_ids),
            "tokens": _list_array(rows.tokens, rows.row_lengths),
            "document_lengths": _list_array(rows.document_lengths, rows.documents_per_row),
            "num_bytes": pa.array(rows.num_bytes),
        }
        if rows.is_target is not None:
            columns["is_target"] = _list_array(rows.is_target, rows.row_lengths)
            columns["num_filler"] = pa.array(rows.num_filler)
        table = pa.table(columns)
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._temporary, table.schema, compression="zstd", write_page_checksum=True
            )
        self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        self._num_rows += len(rows)
        self._highest_token = max(self._highest_token, int(rows.tokens.max()))


def _list_array(values: np.ndarray, lengths: np.ndarray) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
