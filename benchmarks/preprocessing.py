"""Preprocessing beside its tokenizer alone, in one process, in turn within one run; and how full
the rows of conversations are, by best fit, cut every max_length tokens, and one padded row each.

    python -m benchmarks.preprocessing [--megabytes 8]

The text is Python's own documentation and source, the tokenizers are a WordPiece like BERT's and a
byte-level BPE like GPT-2's, made of it. Conversations are as long as those of UltraChat: some 1,100
tokens on average, log-normal.
"""

import argparse
import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.data.chat_documents import ChatOptions
from tokendiff.data.packing import BATCH_CHARS
from tokendiff.data.partition import Partition
from tokendiff.data.preprocess import preprocess_partition
from tokendiff.data.sources import plan_partitions

LENGTH, REPEATS, VOCAB = 512, 5, 30_000
CHAT_LENGTH, MEAN_CHAT = 2048, 1100
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def paragraphs() -> Iterator[str]:
    from pydoc_data.topics import topics

    for text in topics.values():
        yield from filter(str.strip, text.split("\n\n"))
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield from filter(str.strip, path.read_text(errors="replace").split("\n\n"))


def documents(num_bytes: int) -> list[str]:
    """Of about 2 kB each, from paragraphs in a drawn order."""
    rng, source = np.random.default_rng(0), list(paragraphs())
    found: list[str] = []
    size = 0
    while size < num_bytes:
        chosen = rng.integers(len(source), size=rng.integers(1, 12))
        found.append("\n\n".join(source[index] for index in chosen))
        size += len(found[-1].encode())
    return found


def conversations(num_bytes: int) -> list[list[dict[str, str]]]:
    rng, source = np.random.default_rng(1), list(paragraphs())
    found: list[list[dict[str, str]]] = []
    size = 0
    while size < num_bytes:
        chars = 3.5 * rng.lognormal(np.log(MEAN_CHAT) - 0.18, 0.6)
        turns: list[dict[str, str]] = []
        while chars > 0:
            question = source[rng.integers(len(source))][:300]
            answer = "\n\n".join(source[i] for i in rng.integers(len(source), size=4))
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer[: max(40, int(chars))]})
            chars -= len(question) + len(turns[-1]["content"])
        found.append(turns)
        size += sum(len(turn["content"].encode()) for turn in turns)
    return found


def wordpiece(texts: list[str]) -> Any:
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(texts, vocab_size=VOCAB, show_progress=False)
    return _ended(PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer))


def byte_level_bpe(texts: list[str]) -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=VOCAB, show_progress=False)
    return _ended(PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer))


def _ended(tokenizer: Any) -> Any:
    words = ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens({"eos_token": "[EOS]", "additional_special_tokens": words})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tokenize_alone(tokenizer: Any, texts: list[str]) -> None:
    """All that the tokenizer takes to give ids, as much at once as preprocessing hands it."""
    waiting = iter(texts)
    per_batch = max(1, round(BATCH_CHARS / (sum(map(len, texts)) / len(texts))))
    while batch := list(islice(waiting, per_batch)):
        tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )


def ratios(one: Callable[[], None], other: Callable[[], None]) -> list[float]:
    """Time of `one` over that of `other`, in turn."""
    found = []
    for _ in range(REPEATS + 1):
        start = time.process_time()
        one()
        middle = time.process_time()
        other()
        found.append((middle - start) / (time.process_time() - middle))
    return sorted(found[1:])  # the first warms up


def partition_of(path: Path) -> Partition:
    config = PreprocessConfig.model_validate(
        {"dataset_name": "jsonl", "data_files": [str(path)], "dataset_split": "train"}
    )
    (partition,) = plan_partitions(config)
    return partition


def show(what: str, tokenizer: Any, texts: list[str], job: Callable[[], None]) -> None:
    start = time.process_time()
    tokenize_alone(tokenizer, texts)
    alone = time.process_time() - start
    low, *_, high = found = ratios(lambda: tokenize_alone(tokenizer, texts), job)
    num_bytes = sum(len(text.encode()) for text in texts)
    print(
        f"  {what:<24} tokenizer alone {num_bytes / alone / 1e6:.2f} MB/s; the job reaches "
        f"{statistics.median(found):.0%} of it ({low:.0%}-{high:.0%})",
        flush=True,
    )


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def filling(folder: Path) -> None:
    """What share of the positions that a model computes are tokens of a conversation."""
    import pyarrow.parquet as pq

    per_row = [
        lengths
        for path in (folder / "train").glob("*.parquet")
        for lengths in pq.read_table(path)["document_lengths"].to_pylist()
    ]
    documents, rows = np.concatenate(per_row), len(per_row)
    total = documents.sum()
    cut = -(-total // CHAT_LENGTH)
    crossed = len(np.unique(np.cumsum(documents)[:-1] // CHAT_LENGTH))
    print(f"rows of {CHAT_LENGTH} tokens for {len(documents):,} conversations, {total:,} tokens:")
    print(f"  best fit           {rows:>6} rows, {total / rows / CHAT_LENGTH:.1%} filled")
    print(
        f"  cut every {CHAT_LENGTH:,}    {cut:>6} rows, {total / cut / CHAT_LENGTH:.1%} filled, "
        f"{crossed:,} conversations cut in the middle"
    )
    print(
        f"  one padded row each{len(documents):>6} rows, {documents.mean() / CHAT_LENGTH:.1%} "
        f"filled; best fit trains {len(documents) / rows:.2f} times the tokens of a row"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Preprocessing beside its tokenizer alone.")
    parser.add_argument("--megabytes", type=float, default=8)
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task owns one CPU
    num_bytes = int(args.megabytes * 1e6)
    texts, talks = documents(num_bytes), conversations(num_bytes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "text.jsonl", [{"text": text} for text in texts])
        write(folder / "chats.jsonl", [{"messages": turns} for turns in talks])
        print(f"{args.megabytes:g} MB each; times of the processor, {REPEATS} turns")
        for make in (wordpiece, byte_level_bpe):
            tokenizer = make(texts)
            common = {
                "tokenizer": tokenizer,
                "heldout_fraction": 0.05,
                "output_dir": folder / "out",
            }

            def text_job(common: dict[str, Any] = common) -> None:
                part = partition_of(folder / "text.jsonl")
                preprocess_partition(part, max_length=LENGTH, **common)

            def chat_job(common: dict[str, Any] = common) -> None:
                part = partition_of(folder / "chats.jsonl")
                chats = ChatOptions(dataset_format="messages")
                preprocess_partition(part, max_length=CHAT_LENGTH, chats=chats, **common)

            what = make.__name__.replace("_", " ")
            show(f"{what}, text", tokenizer, texts, text_job)
            said = tokenizer.apply_chat_template(talks, tokenize=False)
            show(f"{what}, chats", tokenizer, said, chat_job)
        filling(folder / "out")


if __name__ == "__main__":
    main()
