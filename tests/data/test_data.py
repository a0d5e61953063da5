"""Sources, tokenizers and packing, in one process."""

import gzip
import io
import json
import os
import pickle
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.utils import httpx
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tests.builders import letter_tokenizer, save_ref, token_folder
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.cluster.preprocess import preprocess
from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.data import lines, packing
from tokendiff.data.bad_rows import BadRow
from tokendiff.data.hub import open_dataset
from tokendiff.data.lines import first_line, lines_in, num_lines_before
from tokendiff.data.packing import PackedRows, Packer, TokenizedDocuments, tokenize_stream
from tokendiff.data.partition import Partition, Piece, even_pieces, group_pieces
from tokendiff.data.rows import TokenData, TokenRows, too_few_rows
from tokendiff.data.sources import plan_input, plan_partitions, read_documents
from tokendiff.data.tokenizers import build_tokenizer, open_tokenizer
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.errors import InputError, outage_behind

NASTY = [
    "plain words, nothing else",
    "  two  spaces , and\ttabs\r\nand lines \n\n",
    "naïve café, Ελληνικά, 日本語, \U0001f600\U0001f468\u200d\U0001f469, e\u0301",
    "[MASK] [EOS][PAD] </s> <pad>",
    "\x00\x07\ufeff\u2028end",
    "x",
]


def config(**fields: Any) -> PreprocessConfig:
    return PreprocessConfig(**fields)


def read_all(preprocess: PreprocessConfig) -> list[Any]:
    return [cell for part in plan_partitions(preprocess) for cell in read_documents(part)]


def text_config(path: Path, **fields: Any) -> PreprocessConfig:
    return config(dataset_name="text", data_files=[str(path)], **fields)


# Sources


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_lines_come_once_and_in_order_wherever_the_file_is_cut(
    tmp_path: Path, ending: str, last: str
) -> None:
    lines = ["first", "", "ünï", "日本語", " ", "a much longer line than the others", "z"]
    path = tmp_path / "a.txt"
    path.write_bytes((ending.join(lines) + last.replace("\n", ending)).encode())
    for partition_bytes in range(1, path.stat().st_size + 2):
        assert read_all(text_config(path, partition_bytes=partition_bytes)) == lines


@pytest.mark.parametrize("block_bytes", [1, 2, 3, 1 << 16])
def test_lines_are_those_of_universal_newlines_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    """Python's own text files are the oracle, on ends of all kinds beside each other."""
    monkeypatch.setattr(lines, "_BLOCK_BYTES", block_bytes)
    path = tmp_path / "a.txt"
    rng = random.Random(block_bytes)
    for _ in range(30):
        text = "".join(rng.choice(["\r", "\n", "\r\n", "a", "ü", " \u2028"]) for _ in range(12))
        path.write_bytes(text.encode())
        with path.open(encoding="utf-8", newline=None) as file:
            expected = [line.removesuffix("\n") for line in file]
        for partition_bytes in range(1, path.stat().st_size + 2):
            assert read_all(text_config(path, partition_bytes=partition_bytes)) == expected
        offset = 0
        for number, line in enumerate(lines_in(io.BytesIO(text.encode()))):
            assert num_lines_before(io.BytesIO(text.encode()), offset) == number
            offset += len(line)


def test_a_line_longer_than_memory_is_not_read_once_per_piece(tmp_path: Path) -> None:
    """Nor is a file with the ends of old Macs, which is one line to readline."""
    file = CountingFile(b"x" * 3_000_000 + b"\r" + b"y\r" * 500_000)
    assert first_line(file, 1_000_000, 1_100_000) == 1_100_000
    assert file.num_read <= 100_001
    assert first_line(file, 3_000_000, 3_100_000) == 3_000_001
    file.seek(3_000_001)
    file.num_read = 0
    assert next(lines_in(file)) == b"y\r"
    assert file.num_read <= 1 << 16


class CountingFile(io.BytesIO):
    num_read = 0

    def read(self, size: int | None = -1, /) -> bytes:
        block = super().read(size)
        self.num_read += len(block)
        return block


def test_a_large_file_is_cut_into_equal_partitions_of_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big.txt").write_text("0123456\n" * 100)
    monkeypatch.chdir(tmp_path)
    partitions = plan_partitions(text_config(Path("big.txt"), partition_bytes=300))
    assert [[(p.start, p.stop) for p in part.pieces] for part in partitions] == [
        [(0, 266)],
        [(266, 533)],
        [(533, 800)],
    ]
    assert [part.index for part in partitions] == [0, 1, 2]
    assert {p.path for part in partitions for p in part.pieces} == {str(tmp_path / "big.txt")}
    # The key of a folder is made of what earlier versions cut: they know their folders again.
    _, as_before = plan_input(text_config(Path("big.txt"), partition_bytes=300))
    assert [(p.start, p.stop) for p in as_before] == [(0, 300), (300, 600), (600, 800)]


def sizes(preprocess: PreprocessConfig) -> list[int]:
    return [sum(p.num_bytes for p in part.pieces) for part in plan_partitions(preprocess)]


def test_no_partition_is_left_over(tmp_path: Path) -> None:
    """Files a little above partition_bytes, of every format that is cut, and one just below."""
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("0123456\n" * 126)
    texts = text_config(tmp_path / "*.txt", partition_bytes=1000)
    assert sizes(texts) == [504] * 8
    assert len(read_all(texts)) == 4 * 126
    assert sizes(text_config(tmp_path / "*.txt", partition_bytes=1008)) == [1008] * 4
    assert sizes(text_config(tmp_path / "*.txt", partition_bytes=504)) == [504] * 8  # as before

    cells = ["0123456"] * 1000
    path = tmp_path / "e.parquet"
    table = pa.table({"text": cells})
    pq.write_table(table, path, row_group_size=50, use_dictionary=False, compression=None)
    total = sizes(parquet_config(path))[0]
    smaller, larger = sizes(parquet_config(path, partition_bytes=total - 1))
    assert larger == smaller  # 10 of 20 row groups each, where it was 19 and 1
    pq.write_table(table, path, row_group_size=1000)
    assert len(sizes(parquet_config(path, partition_bytes=10))) == 1  # a row group stays whole

    from datasets import Dataset

    folder = tmp_path / "saved"
    Dataset.from_dict({"text": cells}).save_to_disk(str(folder))
    total = sizes(config(dataset_name=str(folder)))[0]
    rows = [
        [(p.start, p.stop) for p in part.pieces]
        for part in plan_partitions(config(dataset_name=str(folder), partition_bytes=total - 1))
    ]
    assert rows == [[(0, 500)], [(500, 1000)]]


def test_what_is_no_large_file_is_cut_as_before() -> None:
    def piece(path: str, start: int, stop: int, num_bytes: int) -> Piece:
        return Piece(path=path, start=start, stop=stop, num_bytes=num_bytes)

    documents = [piece("", index, index + 1, 40) for index in range(7)]  # builtin, dummy
    packed = [piece("a.gz", 0, 1000, 1000), piece("b.txt", 0, 90, 90)]  # never cut
    small = [piece("c.parquet", index, index + 1, 40) for index in range(2)]
    for pieces in (documents, packed, small):
        assert even_pieces(pieces, 100) == pieces


def test_small_files_share_partitions_in_order(tmp_path: Path) -> None:
    names = [f"{i:03}.txt" for i in range(200)]
    for name in names:
        (tmp_path / name).write_text(f"text {name}")
    (tmp_path / "large.txt").write_text("one\ndocument\n" * 100)
    preprocess = text_config(tmp_path / "*.txt", sample_by="document", partition_bytes=240)
    partitions = plan_partitions(preprocess)
    assert [len(part.pieces) for part in partitions] == [20] * 10 + [1]
    assert read_all(preprocess) == [f"text {n}" for n in names] + ["one\ndocument\n" * 100]


def test_neighbouring_pieces_join() -> None:
    def piece(path: str, start: int) -> Piece:
        return Piece(path=path, start=start, stop=start + 1, num_bytes=10)

    pieces = [*(piece("a", i) for i in range(5)), piece("b", 0), piece("b", 2)]
    groups = group_pieces(pieces, 40)
    spans = [[(p.path, p.start, p.stop, p.num_bytes) for p in group] for group in groups]
    assert spans == [
        [("a", 0, 4, 40)],
        [("a", 4, 5, 10), ("b", 0, 1, 10), ("b", 2, 3, 10)],
    ]


def test_files_are_sorted_and_taken_once(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    patterns = [str(tmp_path / p) for p in ("b.txt", "*.txt", "**/*.md", "a.txt")]
    assert read_all(config(dataset_name="text", data_files=patterns)) == ["a.txt", "b.txt", "c.md"]


@pytest.mark.parametrize(
    ("pattern", "said"), [("nothing*.txt", "matches no file"), (".", "folder")]
)
def test_a_pattern_without_files_is_refused(tmp_path: Path, pattern: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        plan_partitions(text_config(tmp_path / pattern))
    assert str(tmp_path) in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo", encoding="utf-8-sig")
    assert read_all(text_config(tmp_path / "a.txt")) == ["one", "two"]
    assert read_all(text_config(tmp_path / "a.txt", sample_by="document")) == ["one\ntwo"]


def test_jsonl_yields_texts_wherever_it_is_cut(tmp_path: Path) -> None:
    cells = ["text", None, "", "ünï\u2028", " "]
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"body": cell}) for cell in cells))
    for partition_bytes in (1, 20, 1000):
        files = [str(path)]
        preprocess = config(
            dataset_name="jsonl",
            data_files=files,
            text_column="body",
            partition_bytes=partition_bytes,
        )
        assert read_all(preprocess) == cells


BAD_LINES = [
    (b'{"text": "a"', "not a JSON value"),
    (b"[" * 10_000, "not a JSON value"),
    (b'["text"]', "expected an object"),
    (b'{"body": 1, "title": {"de": 2}}', "no column 'text', only 'body', 'title.de'"),
    (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9"),
    (b'{"text": 3}', "'text' must be a text or a list of texts, got int 3"),
    (b'{"text": {"en": "a"}}', "'text' must be a text or a list of texts, got dict"),
    (b'{"text": ["a", 3]}', "'text[1]' must be a text or a list of texts, got int 3"),
    (b'{"text": "\\ud800"}', "'text' is not valid Unicode (a lone surrogate, 0xd800)"),
    (b'{"a": ' * 600 + b"1" + b"}" * 600, "no column 'text', only 'a.a.a'"),
    (b'{"text": ' + b"[" * 600 + b"]" * 600 + b"}", "'text[0]' must be a text or a list of texts"),
]


@pytest.mark.parametrize(("line", "said"), BAD_LINES, ids=[said for _, said in BAD_LINES])
def test_a_bad_jsonl_line_is_named_and_costs_no_other(
    tmp_path: Path, line: bytes, said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\r\n{"text": "too"}\n')
    for partition_bytes in (1, 30, 1 << 20):
        found = read_all(
            config(dataset_name="jsonl", data_files=[str(path)], partition_bytes=partition_bytes)
        )
        assert [item for item in found if not isinstance(item, BadRow)] == ["fine", "too"]
        bad = found[1]
        assert bad.place == f"{path}:3"
        assert bad.reason.startswith(said)
        assert bad.row
        assert len(str(bad)) < 700


def error_of(partition: Partition) -> str:
    try:
        list(read_documents(partition))
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("partition_bytes", [1, 1 << 20])
def test_a_column_that_no_row_has_is_an_error_at_once(tmp_path: Path, partition_bytes: int) -> None:
    """One that a single row has, wherever it stands, is not: the others are bad rows."""
    lines = ['{"body": 1, "title": 2}', "cut off", '{"body": "a"}'] * 4
    path = tmp_path / "a.jsonl"
    preprocess = config(
        dataset_name="jsonl", data_files=[str(path)], partition_bytes=partition_bytes
    )
    path.write_text("\n".join(lines))
    said = [error_of(partition).split("; or,")[0] for partition in plan_partitions(preprocess)]
    there = f"{path}: no column 'text'; set text_column to one of those there: 'body', 'title'"
    assert said.count(there) == (8 if partition_bytes == 1 else 1)
    assert set(said) <= {there, ""}
    path.write_text("\n".join([*lines, '{"text": "here"}']))
    found = read_all(preprocess)
    assert found[-1] == "here"
    assert [bad.place for bad in found[:-1]] == [f"{path}:{n}" for n in range(1, len(lines) + 1)]


def test_jsonl_of_an_old_mac_is_read_and_a_value_spread_over_lines_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\r{"text": "two\\rtwo"}\r\r\n{"text": "three"}\r')
    for partition_bytes in (1, 20, 1000):
        preprocess = config(
            dataset_name="jsonl", data_files=[str(path)], partition_bytes=partition_bytes
        )
        assert read_all(preprocess) == ["one", "two\rtwo", "three"]
    path.write_bytes(b'{"text": "fine"}\r{"text":\r"white space to JSON"}\n')
    fine, *bad = read_all(config(dataset_name="jsonl", data_files=[str(path)]))
    assert fine == "fine"
    assert [row.place for row in bad] == [f"{path}:2", f"{path}:3"]
    assert bad[0].reason.startswith("not a JSON value")
    assert bad[1].reason.startswith("not a JSON value")


@pytest.mark.parametrize("sample_by", ["line", "document"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_in_another_encoding_is_a_bad_row(tmp_path: Path, sample_by: str, name: str) -> None:
    data = b"\xef\xbb\xbfeins\rzwei\r\ndrei\n" + "fünf\nsechs".encode("latin-1")
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for partition_bytes in (1, 20, 1000):
        found = read_all(text_config(path, sample_by=sample_by, partition_bytes=partition_bytes))
        (bad,) = [item for item in found if isinstance(item, BadRow)]
        assert bad.place == f"{path}:4"
        assert bad.reason.startswith("not UTF-8 (byte 0xfc: invalid start byte); convert the file")
        good = [item for item in found if item is not bad]
        assert good == ([] if sample_by == "document" else ["eins", "zwei", "drei", "sechs"])


def parquet_config(path: Path, **fields: Any) -> PreprocessConfig:
    return config(dataset_name="parquet", data_files=[str(path)], **fields)


def test_parquet_is_cut_by_row_groups(tmp_path: Path) -> None:
    cells = [None if i % 7 == 0 else f"row {i} " + "ü" * (i % 50) for i in range(1000)]
    table = pa.table({"id": range(1000), "text": cells})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100, use_dictionary=False)
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=1000)
    one_group = sum(len((cell or "").encode()) for cell in cells[:100])
    preprocess = parquet_config(tmp_path / "*.parquet", partition_bytes=3 * one_group)
    first = plan_partitions(preprocess)[0].pieces[0]
    assert (first.start, first.stop) in ((0, 2), (0, 3))
    assert read_all(preprocess) == cells * 2


def test_parquet_columns_of_other_types(tmp_path: Path) -> None:
    dictionary = pa.array(["a", None, "a"]).dictionary_encode()
    table = pa.table({"text": dictionary, "number": [1, 2, 3], "body.raw": ["x", "y", "z"]})
    pq.write_table(table, tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    assert read_all(parquet_config(path)) == ["a", None, "a"]
    with pytest.raises(InputError, match=r"a\.parquet: column 'number' holds int64, not text"):
        plan_partitions(parquet_config(path, text_column="number"))
    assert read_all(parquet_config(path, text_column="body.raw")) == ["x", "y", "z"]


def test_a_bad_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), path)
    with pytest.raises(InputError, match=r"a\.parquet: no column 'text'.*'body', 'id'"):
        plan_partitions(parquet_config(path))
    path.write_bytes(path.read_bytes()[:-4] + b"????")
    with pytest.raises(InputError, match=r"a\.parquet: not a readable parquet file"):
        plan_partitions(parquet_config(path))


def test_builtin_documents_are_all_of_cpythons_topics() -> None:
    from pydoc_data.topics import topics

    documents = read_all(config(partition_bytes=50_000))
    assert "".join("".join(documents).split()) == "".join(
        "".join(text for _, text in sorted(topics.items())).split()
    )
    assert 200 < len(documents) < 400
    assert max(map(len, documents)) < 8000
    assert len(plan_partitions(config(partition_bytes=50_000))) > 5


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """The same rows as jsonl, as parquet, and twice as `save_to_disk` writes them."""
    from datasets import Dataset, DatasetDict, Split, disable_progress_bars

    disable_progress_bars()
    rows = [{"text": f"document {i}", "id": i} for i in range(700)]
    made = {name: tmp_path / name for name in ("jsonl", "parquet", "dataset", "dict")}
    for name in ("jsonl", "parquet"):
        made[name].mkdir()
    (made["jsonl"] / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), made["parquet"] / "train-0.parquet")
    Dataset.from_list(rows, split=Split.TRAIN).save_to_disk(made["dataset"])
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(made["dict"])
    return made


@pytest.mark.slow
def test_datasets_are_read_by_ranges_of_rows(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in folders:
        preprocess = config(dataset_name=f"./{name}", partition_bytes=2000)
        partitions = plan_partitions(preprocess)
        assert len(partitions) > 3
        assert all(Path(p.path).is_absolute() for part in partitions for p in part.pieces)
        assert read_all(preprocess) == [f"document {i}" for i in range(700)]
    sliced = config(dataset_name="./jsonl", dataset_split="train[:10]")
    assert read_all(sliced) == [f"document {i}" for i in range(10)]


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("jsonl", {"dataset_split": "test"}, r"dataset_split 'test'.*\['train'\]"),
        ("dataset", {"dataset_split": "test"}, "dataset_split 'test'.*'train'"),
        ("dict", {"dataset_split": "test"}, "dataset_split 'test'.*'train'"),
        ("jsonl", {"dataset_config_name": "en"}, r"dataset_config_name 'en'.*\['default'\]"),
        ("dict", {"dataset_config_name": "en"}, "dataset_config_name 'en'"),
        ("parquet", {"text_column": "body"}, "no column 'body'.*'text', 'id'"),
        ("jsonl/train.jsonl", {}, "is a file; give it as data_files"),
    ],
)
def test_what_a_dataset_has_not_is_named(
    folders: dict[str, Path], name: str, fields: dict[str, Any], said: str
) -> None:
    path = folders["jsonl"].parent / name
    with pytest.raises(InputError, match=said):
        plan_partitions(config(dataset_name=str(path), **fields))


def test_a_dataset_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'no/such'.*local folder"):
        plan_partitions(config(dataset_name="no/such"))
    with pytest.raises(InputError, match="doesn't contain any data files"):
        plan_partitions(config(dataset_name=str(tmp_path)))
    (tmp_path / "train.jsonl").write_text('{"text": 1\nnope')
    said = (
        r"dataset_name .*JSON parse error.*; data_files, with dataset_name jsonl, .* leave bad rows"
    )
    with pytest.raises(InputError, match=said):
        plan_partitions(config(dataset_name=str(tmp_path)))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (httpx.ReadError("cut off"), ConnectionError),
        (httpx.RemoteProtocolError("cut off"), ConnectionError),
        (ConnectionError("no/such is not reached (LocalEntryNotFoundError)"), ConnectionError),
        (ConnectionError("no/such is not reached (OfflineModeIsEnabled)"), InputError),
        (httpx.UnsupportedProtocol("no http"), httpx.UnsupportedProtocol),  # with its traceback
    ],
)
def test_a_hub_that_does_not_answer_for_a_dataset_is_no_bad_input(
    raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise raised

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(expected) as caught:
        plan_partitions(config(dataset_name="no/such"))
    assert caught.type is expected
    assert "'no/such'" in str(caught.value) or caught.value is raised


def test_a_dataset_may_be_named_with_its_revision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(name: str, *_: Any, revision: str | None = None, **__: Any) -> Any:
        asked.append((name, revision))
        return SimpleNamespace(cache_files=[])

    monkeypatch.setattr("datasets.load_dataset", load)
    local = tmp_path / "of@b"
    local.mkdir()
    for name in ("some/text", "some/text@v1", str(local)):
        open_dataset(name, None, "train")
    assert asked == [("some/text", None), ("some/text", "v1"), (str(local), None)]
    monkeypatch.chdir(tmp_path)
    Path("of").mkdir()
    with pytest.raises(InputError, match=r"of@c: there is no such folder, and of, .* leave @c out"):
        open_dataset("of@c", None, "train")


OLD, NEW = "a" * 40, "b" * 40  # commits


@pytest.fixture
def loaded_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub dataset of which two commits were loaded, the branch main last of all; no hub is there
    any more.
    """
    for place, commit in enumerate((OLD, NEW)):
        folder = tmp_path / "some___text/default/0.0.0" / commit
        folder.mkdir(parents=True)
        with ArrowWriter(path=str(folder / "text-train.arrow")) as writer:
            for _ in range(4):
                writer.write({"text": commit[0] * 8})
            num_examples, num_bytes = writer.finalize()
        split = SplitInfo("train", num_bytes, num_examples)
        DatasetInfo(
            features=Features({"text": Value("string")}),
            splits=SplitDict({"train": split}),
            dataset_name="text",
            config_name="default",
        ).write_to_directory(str(folder))
        os.utime(folder, (place, place))
    for ref, commit in (("main", NEW), ("v1", OLD), ("gone", "c" * 40)):
        save_ref(tmp_path / "datasets--some--text", ref, commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    return "some/text"


@pytest.mark.parametrize(
    ("revision", "letter"),
    [("", "b"), ("@main", "b"), ("@v1", "a"), (f"@{OLD}", "a"), (f"@{NEW}", "b")],
)
def test_a_dataset_is_of_its_revision_where_the_hub_is_not_asked(
    loaded_twice: str, revision: str, letter: str
) -> None:
    """`datasets` alone gives what it loaded last, whichever revision is asked for."""
    named = config(dataset_name=loaded_twice + revision)
    assert read_all(named) == [letter * 8] * 4
    assert {p.commit for part in plan_partitions(named) for p in part.pieces} == {letter * 40}


@pytest.mark.parametrize("revision", ["@nowhere", "@gone", f"@{'c' * 40}"])
def test_another_revision_is_not_taken_for_one_that_is_not_there(
    loaded_twice: str, revision: str
) -> None:
    said = rf"'{revision[1:]}' is not in the cache .* has {NEW}.* or give some/text@{NEW}"
    with pytest.raises(InputError, match=said):
        open_dataset(loaded_twice + revision, None, "train")


def test_a_hub_that_was_down_for_a_revision_is_no_bad_input(
    loaded_twice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*args: Any, **kwargs: Any) -> Any:
        raise httpx.ConnectError("connection refused")

    loaded = open_dataset(loaded_twice, None, "train")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: loaded)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", ask)
    with pytest.raises(ConnectionError, match=r"'some/text@gone'.*connection refused"):
        open_dataset(f"{loaded_twice}@gone", None, "train")


def test_a_branch_that_moved_since_it_was_noted_is_of_the_hubs_word(
    loaded_twice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program noted it, whose files `datasets` does not have."""
    save_ref(tmp_path / "datasets--some--text", "main", "c" * 40)
    with pytest.raises(InputError, match="its newest revision is not in the cache"):
        open_dataset(loaded_twice, None, "train")
    loaded = open_dataset(f"{loaded_twice}@{NEW}", None, "train")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: loaded)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *args, **kwargs: SimpleNamespace(sha=NEW)
    )
    assert open_dataset(loaded_twice, None, "train") is loaded


def test_every_task_reads_the_commit_that_the_job_began_with(
    loaded_twice: str, tmp_path: Path
) -> None:
    (partition,) = plan_partitions(config(dataset_name=f"{loaded_twice}@v1"))
    save_ref(tmp_path / "datasets--some--text", "v1", NEW)
    assert list(read_documents(partition)) == ["a" * 8] * 4


def test_the_shards_manifest_names_the_commit(
    in_this_process: None, loaded_twice: str, tmp_path: Path
) -> None:
    manifest = preprocess(
        config(dataset_name=f"{loaded_twice}@v1", heldout_fraction=0.0),
        tokenizer_name_or_path="bytes",
        output_dir=tmp_path / "shards",
    )
    assert manifest.metadata["commits"] == {"dataset_name": OLD}


def test_a_dataset_that_the_hub_does_not_show_may_need_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise DatasetNotFoundError("Dataset 'no/such' is a gated dataset on the Hub.")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(InputError, match=r"gated dataset on the Hub.; .* set HF_TOKEN"):
        plan_partitions(config(dataset_name="no/such"))


def test_a_hub_that_could_not_be_asked_is_found_behind_a_file_that_is_not_there() -> None:
    def say_that_nothing_is_there() -> None:  # as `datasets` does
        try:
            raise httpx.ConnectError("connection refused")
        except httpx.ConnectError:
            raise FileNotFoundError("no data file") from None

    with pytest.raises(FileNotFoundError) as caught:
        say_that_nothing_is_there()
    assert isinstance(outage_behind(caught.value), httpx.ConnectError)
    assert outage_behind(FileNotFoundError("no data file")) is None


def tokenized(
    tokenizer: Any, texts: list[str], **options: Any
) -> list[tuple[list[int], list[int]]]:
    """(tokens, bytes of each token) of each text."""
    found = []
    for batch, documents in tokenize_stream(tokenizer, texts, **options):
        assert len(batch) == len(documents.lengths)
        assert documents.bytes_before is not None
        cuts = np.cumsum(documents.lengths)[:-1]
        ids_of, columns = np.split(documents.tokens, cuts), documents.num_bytes.tolist()
        for ids, total, before in zip(ids_of, columns, documents.bytes_before, strict=True):
            places = [before(token) for token in range(len(ids))]
            found.append((ids.tolist(), np.diff([*places, total][: len(ids) + 1]).tolist()))
            assert len(ids) > 0 or total == 0
    assert len(found) == len(texts)
    return found


# Tokenizers


def ours(name: str, documents: list[str] | None = None) -> Any:
    corpus = documents or read_all(config())[:40]
    return build_tokenizer(name, documents=corpus, vocab_size=400)[0]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_our_tokenizers_are_lossless_and_survive_saving(tmp_path: Path, name: str) -> None:
    tokenizer = ours(name)
    assert len(tokenizer) == {"bytes": 259, "bpe": 400}[name]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.all_special_ids == tokenizer.all_special_ids
    for text in NASTY:
        ((tokens, _),) = tokenized(tokenizer, [text])
        assert tokenized(loaded, [text])[0][0] == tokens
        assert loaded.decode(tokens[:-1]) == text
        assert not set(tokens[:-1]) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "gpt2", "bert"])
def test_our_tokenizers_stay_what_they_are_beside_the_config_of_a_model(
    tmp_path: Path, model_type: str
) -> None:
    """AutoTokenizer goes by the model's type before the tokenizer's own: a Qwen2Tokenizer would
    normalize, cut words otherwise, and add a token that the model has no embedding for.
    """
    tokenizer = ours("bpe")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    opened = open_tokenizer(tmp_path, field="checkpoint_path")
    assert opened.get_vocab() == tokenizer.get_vocab()
    for text in (*NASTY, "e\u0301 12345 don't  \n\n x"):
        assert tokenized(opened, [text])[0][0] == tokenized(tokenizer, [text])[0][0]


def test_bpe_is_the_same_each_time_and_needs_no_full_vocabulary() -> None:
    first, second = ours("bpe"), ours("bpe")
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    tokenizer, notes = build_tokenizer("bpe", documents=["aaa bbb"], vocab_size=400)
    assert len(tokenizer) < 400
    assert "vocab_size 400" in notes[0]


def wordpiece(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "the", "mask", "[", "]", *"abcdefgh"]
    model = models.WordPiece(vocab={t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_what_a_foreign_tokenizer_lacks_is_added_and_told(tmp_path: Path) -> None:
    wordpiece(
        unk_token="[UNK]", sep_token="[SEP]", cls_token="[CLS]", pad_token="[PAD]"
    ).save_pretrained(tmp_path)
    tokenizer, notes = build_tokenizer(str(tmp_path), documents=(), vocab_size=400)
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (16, 2, 3)
    assert len(notes) == 2
    assert "[MASK] as id 16" in notes[0]
    assert tokenized(tokenizer, ["[ the"])[0][0] == [6, 4, 2]

    wordpiece(unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer, notes = build_tokenizer(str(tmp_path), documents=(), vocab_size=400)
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (16, 17, 17)
    assert len(tokenizer) == 18
    assert len(notes) == 2


def test_a_tokenizer_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    for name in ("no/such-model", str(tmp_path)):
        with pytest.raises(InputError, match=f"tokenizer_name_or_path '{name}'.* no tokenizer"):
            build_tokenizer(name, documents=(), vocab_size=400)


# Packing


def test_a_documents_tokens_are_the_tokenizers_own_and_eos() -> None:
    tokenizer = ours("bpe")
    documents = [*read_all(config())[:20], "a", "日本"]
    for batch_chars in (1, 3000, 1 << 20):
        done = tokenized(tokenizer, documents, batch_chars=batch_chars)
        for text, (tokens, _) in zip(documents, done, strict=True):
            assert tokens == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("name", ["bytes", "bpe", "wordpiece", "slow"])
def test_every_byte_of_a_document_belongs_to_a_token(name: str) -> None:
    tokenizer: Any
    if name == "wordpiece":
        tokenizer = wordpiece(unk_token="[UNK]", eos_token="[SEP]")
    else:
        tokenizer = ByT5Tokenizer() if name == "slow" else ours(name)
    assert tokenizer.is_fast == (name != "slow")
    for text, (_, num_bytes) in zip(NASTY, tokenized(tokenizer, NASTY), strict=True):
        assert sum(num_bytes) == len(text.encode())
        assert min(num_bytes) >= 0
        assert num_bytes[-1] == 0
        assert name != "slow" or max(num_bytes[:-1]) - min(num_bytes[:-1]) <= 1


def test_bytes_of_a_token_are_those_of_its_text() -> None:
    tokenizer = ours("bpe")
    text = "def loss(x):\n    return x * 2  # naïve 日本\n"
    ((tokens, num_bytes),) = tokenized(tokenizer, [text])
    decoded = tokenizer.convert_ids_to_tokens(tokens[:-1])
    # A byte-level token is written with one character for each byte it stands for.
    sizes = np.array([len(token) for token in decoded])
    ends, told = np.cumsum(sizes), np.cumsum(num_bytes[:-1])
    # The bytes of one character may be given to the last of the tokens that share it, no later.
    whole = [i for i, end in enumerate(ends) if _is_whole(text.encode()[:end])]
    assert len(whole) > 20
    assert told[whole].tolist() == ends[whole].tolist()


def _is_whole(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("text", ["wörd " * 500, "日本語" * 400, "a " + "x" * 3000])
def test_a_long_document_is_tokenized_in_parts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ours("bpe")
    (whole,) = tokenized(tokenizer, [text])
    monkeypatch.setattr(packing, "_MAX_PART_CHARS", 100)
    before, (tokens, num_bytes), after = tokenized(tokenizer, ["a", text, "b"], batch_chars=250)
    assert tokenizer.decode(tokens[:-1]) == text
    assert sum(num_bytes) == len(text.encode())
    assert tokens.index(tokenizer.eos_token_id) == len(tokens) - 1
    assert [before, after] == tokenized(tokenizer, ["a", "b"])
    if text.count(" ") > 9:  # cut at spaces, the parts give the tokens of the whole
        assert (tokens, num_bytes) == whole


@pytest.mark.parametrize("batch_chars", [1, 1000])
def test_a_document_without_tokens_takes_no_part(batch_chars: int) -> None:
    tokenizer = wordpiece(eos_token="[SEP]", unk_token="[UNK]")
    tokenizer.backend_tokenizer.normalizer = (
        normalizers.BertNormalizer()
    )  # drops control characters
    empty, eos = "\u200b\x01", tokenizer.eos_token_id
    done = tokenized(tokenizer, [empty, "the", empty, "a é", empty], batch_chars=batch_chars)
    assert done == [
        ([], []),
        ([4, eos], [3, 0]),
        ([], []),
        ([8, 12, eos], [2, 2, 0]),
        ([], []),
    ]


def packed_by_hand(
    documents: list[tuple[list[int], list[int]]], max_length: int
) -> list[tuple[list[int], list[int], int]]:
    """(tokens, run lengths, bytes) of each row, token by token."""
    rows: list[tuple[list[int], list[int], int]] = []
    tokens: list[int] = []
    runs: list[int] = []
    size = 0
    for ids, num_bytes in documents:
        is_new = True
        for token, token_bytes in zip(ids, num_bytes, strict=True):
            if is_new or not tokens:
                runs.append(0)
            is_new = False
            tokens.append(token)
            runs[-1] += 1
            size += token_bytes
            if len(tokens) == max_length:
                rows.append((tokens, runs, size))
                tokens, runs, size = [], [], 0
    return [*rows, (tokens, runs, size)] if tokens else rows


def rows_of(packed: PackedRows) -> list[tuple[list[int], list[int], int]]:
    def split(values: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        return [part.tolist() for part in np.split(values, np.cumsum(lengths)[:-1])]

    tokens = split(packed.tokens, packed.row_lengths)
    runs = split(packed.document_lengths, packed.documents_per_row)
    return list(zip(tokens, runs, packed.num_bytes.tolist(), strict=True))


def sum_of_first(sizes: np.ndarray, count: int) -> int:
    return int(sizes[:count].sum())


@pytest.mark.parametrize("max_length", [2, 7, 16])
@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
def test_rows_are_those_of_packing_by_hand(max_length: int, rows_at_once: int) -> None:
    generator = np.random.default_rng(max_length * rows_at_once)
    lengths = [0, *generator.integers(0, 40, 60), max_length, 2 * max_length, 1, 1000, 0, 1]
    documents = []
    for length in lengths:
        ids = generator.integers(0, 50, length).astype(np.int32)
        documents.append((ids, generator.integers(0, 9, length).astype(np.int32)))
    batches = [
        TokenizedDocuments(
            tokens=np.concatenate([ids for ids, _ in some]),
            num_bytes=np.array([sizes.sum() for _, sizes in some]),
            lengths=np.array([len(ids) for ids, _ in some]),
            bytes_before=[partial(sum_of_first, sizes) for _, sizes in some],
        )
        for some in (documents[i : i + 3] for i in range(0, len(documents), 3))
    ]
    packer = Packer(max_length, rows_at_once)
    as_lists = [(ids.tolist(), sizes.tolist()) for ids, sizes in documents]
    expected = packed_by_hand(as_lists, max_length)
    for _ in range(2):  # once more by the same packer, which is as new
        given = [rows for batch in batches if (rows := packer.add(batch)) is not None]
        assert all(len(rows) % rows_at_once == 0 for rows in given)
        if (rest := packer.flush()) is not None:
            given.append(rest)
        assert packer.flush() is None
        assert [row for rows in given for row in rows_of(rows)] == expected


def test_a_packer_keeps_nothing_of_what_it_has_handed_out() -> None:
    document = TokenizedDocuments(
        tokens=np.zeros(300, dtype=np.int32),
        num_bytes=np.full(100, 3),
        lengths=np.full(100, 3),
        bytes_before=[partial(sum_of_first, np.ones(3))] * 100,
    )
    packer, sizes = Packer(8, 1), []
    for _ in range(50):
        packer.add(document)
        sizes.append(len(pickle.dumps(packer)))
    assert max(sizes) < 1.2 * sizes[0]


def test_a_split_of_too_few_rows_is_told_what_gives_it_more() -> None:
    parts = {name: {"rows": rows, "documents": 7} for name, rows in (("train", 1), ("heldout", 0))}
    metadata = {"splits": parts, "config": {"heldout_fraction": 0.25}}
    told = too_few_rows(metadata, "train")
    assert told.startswith("split 'train' has 1 row, and an evaluation takes at least 2; lower ")
    assert "heldout_fraction (it is 0.25)" in told
    told = too_few_rows(metadata, "heldout")
    assert told.startswith("split 'heldout' has no rows, and an evaluation takes at least 2; raise")
    parts["train"]["rows"] = 2
    assert too_few_rows(metadata, "train") == ""
    one = {"train": {"rows": 1, "documents": 1}, "heldout": {"rows": 0, "documents": 0}}
    for fields, remedy in (({"sample_by": "document"}, "sample_by line"), ({}, "more documents")):
        assert remedy in too_few_rows({"splits": one, "config": fields}, "heldout")


def test_other_tokens_in_as_many_bytes_are_other_data(tmp_path: Path) -> None:
    tokens = [list(range(4, 12)), list(range(5, 13))]
    fingerprints = []
    for name, rows in (("one", tokens), ("other", tokens[::-1])):
        folder = token_folder(
            tmp_path / name, files=[rows], max_length=8, tokenizer=letter_tokenizer()
        )
        fingerprints.append(TokenData.open(folder, split="train").fingerprint)
    (one, other) = (load_manifest(tmp_path / name).files for name in ("one", "other"))
    assert {n: e["size"] for n, e in one.items()} == {n: e["size"] for n, e in other.items()}
    assert fingerprints[0] != fingerprints[1]


def test_rows_know_where_their_documents_begin(tmp_path: Path) -> None:
    runs: list[list[int]] = [[4, 1, 3], [8], [2, 2], [1], [5, 3], [1, 1, 1, 1, 1, 1, 1, 1]]
    rows = [[index] * sum(lengths) for index, lengths in enumerate(runs)]
    folder = token_folder(
        tmp_path,
        files=[rows],
        max_length=8,
        tokenizer=letter_tokenizer(),
        row_group_rows=4,
        runs_of=lambda row: runs[row[0]],
    )
    data = TokenData.open(folder, split="train")
    chosen = [5, 0, 3, 2, 4, 1]
    read = data.read(*np.divmod(np.array(chosen), 4))
    batch = TokenBatch.of_rows(*map(torch.from_numpy, (read.tokens, read.lengths, read.is_start)))
    for document, row in zip(batch.document.tolist(), chosen, strict=True):
        expected = [index for index, length in enumerate(runs[row]) for _ in range(length)]
        assert document == expected + [-1] * (8 - len(expected))
    assert torch.equal(batch.is_valid, batch.document >= 0)
    lengths = [sum(runs[row]) for row in chosen]
    for count in (0, 2, 6, 99):
        assert read.first(count) == (len(lengths[:count]), sum(lengths[:count]))
    # Row groups are kept for the next call alone, however many there are.
    kept: dict[int, TokenRows] = {}
    for some in ([0, 5], [4], [1, 0], [3, 4]):
        again = data.read(*np.divmod(np.array(some), 4), kept=kept)
        assert [row[0] for row in again.tokens.tolist()] == some
        assert kept.keys() == {row // 4 for row in some}


def test_a_document_that_ends_with_its_row_has_its_own_bytes() -> None:
    """Of samples the bytes are spread over the tokens before EOS, whose place has none."""

    def before(size: int, num_tokens: int, token: int) -> int:
        return token * size // num_tokens

    packer = Packer(8, 1)
    found: list[int] = []
    for length, size in ((8, 21), (5, 8), (3, 6), (12, 22)):
        documents = TokenizedDocuments(
            tokens=np.zeros(length, dtype=np.int32),
            lengths=np.array([length]),
            num_bytes=np.array([size]),
            bytes_before=[partial(before, size, length - 1)],
        )
        rows = packer.add(documents)
        found += [] if rows is None else rows.num_bytes.tolist()
    rest = packer.flush()
    assert rest is not None
    assert [*found, *rest.num_bytes.tolist()] == [21, 8 + 6, 16, 22 - 16]


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ([60, 60, 60], [60, 60, 60]),
        ([20] * 10, [100, 100]),
        ([1] * 101, [51, 50]),
        ([120, 10, 10], [120, 20]),
    ],
)
def test_whole_row_groups_are_spread_evenly_below_the_limit(
    sizes: list[int], wanted: list[int]
) -> None:
    pieces = [
        Piece(path="a", start=at, stop=at + 1, num_bytes=size) for at, size in enumerate(sizes)
    ]
    groups = group_pieces(even_pieces(pieces, 100), 100)
    assert [sum(piece.num_bytes for piece in group) for group in groups] == wanted
