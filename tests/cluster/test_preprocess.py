"""Shards of one partition, and the job that makes them on Ray Data."""

import dataclasses
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.builders import letter_tokenizer
from tokendiff.artifacts.locations import RemotePath, location
from tokendiff.artifacts.manifest import MANIFEST_NAME, commit, sha256_of, verify
from tokendiff.cluster.preprocess import tokenizer_in
from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.data.partition import Partition, Piece
from tokendiff.data.preprocess import is_heldout, preprocess_partition, training_text
from tokendiff.data.rows import TokenData
from tokendiff.data.samples import read_samples, write_part
from tokendiff.data.sources import (
    file_identities,
    known_files,
    plan_partitions,
    read_documents,
)
from tokendiff.data.tokenizers import build_tokenizer
from tokendiff.errors import InputError

BYTES = build_tokenizer("bytes", documents=(), vocab_size=300)[0]
EOS = BYTES.eos_token_id


def shards_of(config: PreprocessConfig, output_dir: Path, **options: Any) -> list[Any]:
    return [
        preprocess_partition(
            partition,
            tokenizer=options.get("tokenizer", BYTES),
            max_length=config.max_length,
            heldout_fraction=config.heldout_fraction,
            output_dir=output_dir,
            max_errors=options.get("max_errors"),
            batch_chars=options.get("batch_chars", 1 << 20),
        )
        for partition in plan_partitions(config)
    ]


def texts_in(partition: Partition) -> list[str]:
    return [document for document in read_documents(partition) if isinstance(document, str)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of the splits, hidden ones too."""
    paths = [path for split in ("train", "heldout") for path in (folder / split).glob("*")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def jsonl(path: Path, cells: list[Any]) -> list[str]:
    path.write_text("\n".join(json.dumps({"text": cell}) for cell in cells))
    return [str(path)]


def documents_of(rows: dict[str, list[Any]]) -> list[list[int]]:
    """The rows joined and cut again after every EOS."""
    tokens = [token for row in rows["tokens"] for token in row]
    ends = [i + 1 for i, token in enumerate(tokens) if token == EOS]
    return [tokens[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def test_the_rows_of_a_split_are_its_documents_end_to_end(tmp_path: Path) -> None:
    config = PreprocessConfig(max_length=100, heldout_fraction=0.3, partition_bytes=200_000)
    all_stats = shards_of(config, tmp_path)
    assert len(all_stats) > 1
    for partition, stats in zip(plan_partitions(config), all_stats, strict=True):
        texts = texts_in(partition)
        for split, shard in stats.shards.items():
            of_split = [t for t in texts if is_heldout(t.encode(), 0.3) == (split == "heldout")]
            file = pq.ParquetFile(tmp_path / shard.path)
            rows = file.read().to_pydict()
            assert documents_of(rows) == [[*BYTES(t)["input_ids"], EOS] for t in of_split]
            lengths = [len(row) for row in rows["tokens"]]
            assert set(lengths[:-1]) == {100}
            assert [sum(runs) for runs in rows["document_lengths"]] == lengths
            assert sum(rows["num_bytes"]) == sum(len(t.encode()) for t in of_split)
            first = partition.index * 2**32 + (2**62 if split == "heldout" else 0)
            assert rows["row_id"] == list(range(first, first + len(lengths)))
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            assert shard.rows == sum(groups)
            assert set(groups[:-1]) <= {512}
            assert shard.highest_token == max(map(max, rows["tokens"]))
            assert shard.documents == len(of_split)
            assert shard.tokens == sum(lengths)
            assert shard.num_bytes == sum(rows["num_bytes"])
            assert shard.sha256 == sha256_of(tmp_path / shard.path)


def test_document_lengths_end_where_documents_end(tmp_path: Path) -> None:
    shards_of(PreprocessConfig(max_length=64, heldout_fraction=0.0), tmp_path)
    rows = pq.read_table(tmp_path / "train/part-00000.parquet").to_pydict()
    for tokens, runs in zip(rows["tokens"], rows["document_lengths"], strict=True):
        ends = {i + 1 for i, token in enumerate(tokens) if token == EOS} | {len(tokens)}
        assert set(np.cumsum(runs).tolist()) == ends


def test_shards_do_not_depend_on_the_batches_of_the_tokenizer(tmp_path: Path) -> None:
    config = PreprocessConfig(partition_bytes=200_000)
    stats = shards_of(config, tmp_path / "one")
    assert shards_of(config, tmp_path / "two", batch_chars=1) == stats
    assert shards_of(config, tmp_path / "two", batch_chars=5000) == stats  # replaces them
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_partition_tells_how_far_it_is(tmp_path: Path) -> None:
    (partition,) = plan_partitions(PreprocessConfig())
    told: list[tuple[float, float]] = []
    stats = preprocess_partition(
        partition,
        tokenizer=BYTES,
        max_length=128,
        heldout_fraction=0.1,
        output_dir=tmp_path,
        batch_chars=50_000,
        on_progress=lambda figures: told.append(figures()),
    )
    assert len(told) > 5
    assert told == sorted(set(told))
    num_tokens = sum(shard.tokens for shard in stats.shards.values())
    assert told[-1] == (sum(piece.num_bytes for piece in partition.pieces), num_tokens)


@pytest.mark.parametrize(("suffix", "bytes_told"), [("", 90), (".gz", 0)])
def test_text_counts_in_the_bytes_of_its_files(suffix: str, bytes_told: int) -> None:
    """Never more than they hold; in packed ones, nobody knows how much there is."""
    from tokendiff.cluster.preprocess import _of_partition

    told: list[Any] = []

    class Silent:
        def of(self, unit: int) -> Any:
            return lambda figures: told.append((unit, figures()))

    piece = Piece(path=f"a.txt{suffix}", start=0, stop=90, num_bytes=90)
    (partition,) = plan_partitions(PreprocessConfig())
    partition = dataclasses.replace(partition, index=3, pieces=(piece,))
    _of_partition(partition, Silent())(lambda: (200, 50))  # type: ignore[arg-type]
    assert told == [(3, (bytes_told, 50))]


def test_equal_documents_fall_on_the_same_side_and_the_share_is_kept(tmp_path: Path) -> None:
    cells = [f"document {i % 2000}" for i in range(4000)]
    files = jsonl(tmp_path / "a.jsonl", cells)
    config = PreprocessConfig(
        dataset_name="jsonl", data_files=files, heldout_fraction=0.25, partition_bytes=10_000
    )
    stats = shards_of(config, tmp_path)
    sides: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        found = [
            str(BYTES.decode(ids[:-1]))
            for part in stats
            for ids in documents_of(pq.read_table(tmp_path / part.shards[split].path).to_pydict())
        ]
        sides[split] = set(found)
        assert len(found) == 2 * len(sides[split])
    assert not sides["train"] & sides["heldout"]
    assert len(sides["train"] | sides["heldout"]) == 2000
    assert abs(len(sides["heldout"]) - 500) < 4 * (2000 * 0.25 * 0.75) ** 0.5


def errors_of(folder: Path) -> list[dict[str, str]]:
    """The records of all errors files, in their order."""
    paths = sorted((folder / "errors").glob("*"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def test_a_row_without_text_is_dropped_and_counted(tmp_path: Path) -> None:
    files = jsonl(tmp_path / "a.jsonl", ["a", "", " \n\t", None, ["x", None, ""], "b"])
    config = PreprocessConfig(dataset_name="jsonl", data_files=files, heldout_fraction=0.0)
    (stats,) = shards_of(config, tmp_path)
    assert (stats.dropped_empty, stats.dropped_not_text) == (3, 2)
    assert stats.errors is None
    assert not (tmp_path / "errors").exists()
    assert stats.shards.keys() == {"train"}
    assert stats.shards["train"].documents == 3
    rows = pq.read_table(tmp_path / "train/part-00000.parquet").to_pydict()
    assert [BYTES.decode(ids[:-1]) for ids in documents_of(rows)] == ["a", "x", "b"]


BAD_LINES = [b'{"text": "cut off', b'{"body": 1}', b'{"text": 3}', b'{"text": "caf\xe9"}', b"\xff"]


def with_bad_lines(path: Path, cells: list[str]) -> tuple[list[str], list[int]]:
    """A file with a bad line behind every fifth good one, and the numbers of those."""
    lines: list[bytes] = []
    bad: list[int] = []
    for index, cell in enumerate(cells):
        lines.append(json.dumps({"text": cell}).encode())
        if index % 5 == 4:
            lines.append(BAD_LINES[len(bad) % len(BAD_LINES)])
            bad.append(len(lines))
    path.write_bytes(b"\n".join(lines))
    return [str(path)], bad


@pytest.mark.slow
def test_shards_are_those_of_the_good_rows_and_the_bad_are_named(tmp_path: Path) -> None:
    cells = [f"document {index} " * (index % 9) + "." for index in range(100)]
    files, bad = with_bad_lines(tmp_path / "a.jsonl", cells)
    config = PreprocessConfig(dataset_name="jsonl", data_files=files, heldout_fraction=0.3)
    (dirty,) = shards_of(config, tmp_path / "dirty")
    clean = config.model_copy(update={"data_files": jsonl(tmp_path / "clean.jsonl", cells)})
    (expected,) = shards_of(clean, tmp_path / "clean")
    assert contents(tmp_path / "dirty") == contents(tmp_path / "clean")
    assert dirty.shards == expected.shards

    errors = errors_of(tmp_path / "dirty")
    assert [error["place"] for error in errors] == [f"{files[0]}:{number}" for number in bad]
    assert errors[0]["reason"].startswith("not a JSON value")
    assert errors[0]["row"] == '{"text": "cut off'
    assert errors[3]["row"] == '{"text": "caf\ufffd"}'
    assert dirty.errors.num_rows == len(bad) == 20
    assert dirty.errors.sha256 == sha256_of(tmp_path / "dirty" / dirty.errors.path)
    assert dirty.errors.first[0].startswith(f"{files[0]}:{bad[0]}: not a JSON value")
    for partition_bytes in (1, 100, 1000):  # however it is cut
        cut = config.model_copy(update={"partition_bytes": partition_bytes})
        shards_of(cut, tmp_path / str(partition_bytes))
        assert errors_of(tmp_path / str(partition_bytes)) == errors


def test_a_partition_with_too_many_bad_rows_is_given_up(tmp_path: Path) -> None:
    cells = [f"document {index} " * 100 for index in range(300)]
    files, bad = with_bad_lines(tmp_path / "a.jsonl", cells)
    config = PreprocessConfig(dataset_name="jsonl", data_files=files)
    (stats,) = shards_of(config, tmp_path / "out", max_errors=len(bad))
    assert (stats.errors.num_rows, stats.shards.keys()) == (60, {"train", "heldout"})
    (stats,) = shards_of(config, tmp_path / "less", max_errors=39, batch_chars=1000)
    assert (stats.errors.num_rows, stats.shards) == (40, {})
    assert (tmp_path / "less" / "train").is_dir()  # it had begun to write
    assert contents(tmp_path / "less") == {}
    assert errors_of(tmp_path / "less") == errors_of(tmp_path / "out")[:40]


def test_a_tokenizer_learns_from_the_good_rows(tmp_path: Path) -> None:
    files, _ = with_bad_lines(tmp_path / "a.jsonl", [f"document {n}" for n in range(50)])
    config = PreprocessConfig(dataset_name="jsonl", data_files=files, partition_bytes=100)
    expected = [f"document {n}" for n in range(50)]
    assert list(training_text(plan_partitions(config), 0.0)) == expected
    (tmp_path / "a.jsonl").write_text("bad\n" * 20)
    with pytest.raises(InputError, match=r"no training text .* bad rows, the first: .*:1: not a J"):
        list(training_text(plan_partitions(config), 0.0))


def test_a_text_without_tokens_counts_as_empty(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"[EOS]": 0, "a": 1, "b": 2}))
    words.normalizer = normalizers.BertNormalizer()  # drops control characters
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[EOS]")
    files = jsonl(tmp_path / "a.jsonl", ["a", "\x01\x02", "b", "\x03"])
    config = PreprocessConfig(dataset_name="jsonl", data_files=files, heldout_fraction=0.0)
    (stats,) = shards_of(config, tmp_path, tokenizer=tokenizer)
    assert (stats.dropped_empty, stats.dropped_not_text) == (2, 0)
    assert (stats.shards["train"].documents, stats.shards["train"].num_bytes) == (2, 2)
    rows = pq.read_table(tmp_path / "train/part-00000.parquet").to_pydict()
    assert rows["tokens"] == [[1, 0, 2, 0]]
    assert rows["document_lengths"] == [[2, 2]]


def test_dummy_rows_are_full_of_ordinary_tokens_and_decided_by_their_number(tmp_path: Path) -> None:
    config = PreprocessConfig(
        use_dummy_data=True, num_dummy_samples=600, max_length=8, heldout_fraction=0.1
    )
    (one,) = shards_of(config, tmp_path / "one")
    assert sum(shard.rows for shard in one.shards.values()) == 600
    cut = config.model_copy(update={"partition_bytes": 3200})
    cut_stats = shards_of(cut, tmp_path / "cut")
    assert len(cut_stats) == 6
    for split in ("train", "heldout"):
        whole = pq.read_table(tmp_path / "one" / split).to_pydict()
        parts = pq.read_table(tmp_path / "cut" / split).to_pydict()
        assert whole["tokens"] == parts["tokens"]
        assert whole["document_lengths"] == [[8]] * len(whole["tokens"])
        assert not {t for row in whole["tokens"] for t in row} & set(BYTES.all_special_ids)


def test_a_partition_that_fails_leaves_nothing(tmp_path: Path) -> None:
    lines = "\n".join(["bad", *(json.dumps({"text": f"fine {n} " * 100}) for n in range(2000))])
    packed = gzip.compress(lines.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-100])  # an archive that is cut off
    files = [str(tmp_path / "a.jsonl.gz")]
    config = PreprocessConfig(dataset_name="jsonl", data_files=files)
    with pytest.raises(InputError, match=r"a\.jsonl\.gz: cannot be read"):
        shards_of(config, tmp_path / "out", batch_chars=1000)
    assert (tmp_path / "out" / "train").is_dir()  # it had begun to write
    assert (tmp_path / "out" / "errors").is_dir()
    assert contents(tmp_path / "out") == {}
    assert list((tmp_path / "out" / "errors").iterdir()) == []


def test_a_tokenizer_is_trained_on_the_training_side_of_all_partitions() -> None:
    partitions = plan_partitions(PreprocessConfig(partition_bytes=50_000))
    texts = [text for part in partitions for text in texts_in(part)]
    expected = [text for text in texts if not is_heldout(text.encode(), 0.4)]
    assert list(training_text(partitions, 0.4)) == expected
    with pytest.raises(InputError, match=f"{len(texts)} held-out documents"):
        list(training_text(partitions, 1.0))


def test_the_text_for_a_tokenizer_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"line {i:05}" for i in range(1000)))
    files = [str(tmp_path / "a.txt")]
    config = PreprocessConfig(dataset_name="text", data_files=files, partition_bytes=1100)
    monkeypatch.setattr("tokendiff.data.preprocess._TRAINING_TEXT_BYTES", 1000)
    taken = list(training_text(plan_partitions(config), 0.0))
    assert sum(map(len, taken)) == 1000
    assert {int(line.split()[1]) // 100 for line in taken} == set(range(10))  # of every partition


_PEAKS = """
import resource, sys
from pathlib import Path
from tests.builders import letter_tokenizer
from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.data.preprocess import preprocess_partition
from tokendiff.data.sources import plan_partitions
from tokendiff.data.tokenizers import build_tokenizer

tokenizer = build_tokenizer("bytes", documents=(), vocab_size=300)[0]
folder = Path(sys.argv[1])
for name in ("small.txt", "large.txt"):
    config = PreprocessConfig(dataset_name="text", data_files=[str(folder / name)])
    (partition,) = plan_partitions(config)
    stats = preprocess_partition(
        partition, tokenizer=tokenizer, max_length=128, heldout_fraction=0.0, output_dir=folder
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(stats.shards["train"].tokens, peak // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    line = "The quick brown fox jumps over the lazy dog, again and again. " * 16 + "\n"
    for name, num_lines in (("small.txt", 2000), ("large.txt", 10_000)):
        (tmp_path / name).write_text(line * num_lines)
    command = [sys.executable, "-c", _PEAKS, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (small_tokens, small_peak), (large_tokens, large_peak) = (
        map(int, told.split()) for told in output.splitlines()
    )
    assert (small_tokens, large_tokens) == (2000 * len(line), 10_000 * len(line))
    # 8 million tokens more would take 64 MiB, were they kept with the bytes they stand for.
    assert large_peak - small_peak < 32, f"peak memory in MiB: {small_peak}, then {large_peak}"


# On Ray


def run(config: PreprocessConfig, output_dir: "Path | RemotePath", **options: Any) -> Any:
    from tokendiff.cluster.preprocess import preprocess

    options = {"tokenizer_name_or_path": "bytes", **options}
    return preprocess(config, output_dir=output_dir, **options)


@pytest.mark.ray
def test_the_job_makes_the_shards_of_one_process(tmp_path: Path, ray_session: None) -> None:
    config = PreprocessConfig(partition_bytes=60_000, vocab_size=400, heldout_fraction=0.1)
    events: list[tuple[str, dict[str, Any]]] = []
    manifest = run(
        config,
        tmp_path / "ray",
        tokenizer_name_or_path="bpe",
        on_event=lambda event, **fields: events.append((event, fields)),
    )
    total = len(plan_partitions(config))
    assert total > 4
    progress = [fields for event, fields in events if event == "progress"]
    sizes = [sum(p.num_bytes for p in part.pieces) for part in plan_partitions(config)]
    assert {(p["unit"], p["total"]) for p in progress} == {("bytes", sum(sizes))}
    assert [p["done"] for p in progress] == sorted(p["done"] for p in progress)
    assert progress[-1]["done"] == sum(sizes)
    splits = manifest.metadata["splits"].values()
    assert progress[-1]["tokens"] == sum(split["tokens"] for split in splits)
    assert progress[-1]["rows"] == sum(split["rows"] for split in splits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ray" / "tokenizer")
    stats = shards_of(config, tmp_path / "plain", tokenizer=tokenizer)
    assert contents(tmp_path / "ray") == contents(tmp_path / "plain")

    verify(tmp_path / "ray", kind="tokens")
    metadata = manifest.metadata
    assert metadata["vocab_size"] == len(tokenizer) == 400
    assert metadata["mask_token_id"] == tokenizer.mask_token_id
    assert metadata["dropped"] == {"empty": 0, "not_text": 0}
    assert metadata["notes"] == []
    assert 0.0 < metadata["padded_fraction"] < 0.01
    assert metadata["config"]["heldout_fraction"] == 0.1
    for split in ("train", "heldout"):
        shards = [partition.shards[split] for partition in stats]
        told = metadata["splits"][split]
        assert [file["path"] for file in told["files"]] == [shard.path for shard in shards]
        assert told["bytes"] == sum(shard.num_bytes for shard in shards)
        data = TokenData.open(tmp_path / "ray", split=split)
        assert data.num_rows == told["rows"]
        read = [data.read_group(i) for i in range(len(data.row_group_sizes))]
        assert sum(int(rows.lengths.sum()) for rows in read) == told["tokens"]

    before = contents(tmp_path / "ray"), (tmp_path / "ray" / MANIFEST_NAME).stat().st_mtime_ns
    assert run(config, tmp_path / "ray", tokenizer_name_or_path="bpe").files == manifest.files
    after = contents(tmp_path / "ray"), (tmp_path / "ray" / MANIFEST_NAME).stat().st_mtime_ns
    assert before == after
    with pytest.raises(InputError, match="another config"):
        run(config, tmp_path / "ray", tokenizer_name_or_path="bytes")


@pytest.mark.ray
def test_bad_input_in_a_task_is_told_plainly(
    tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "fine"}\n' * 10)
    files = [str(tmp_path / "a.jsonl")]
    config = PreprocessConfig(dataset_name="jsonl", data_files=files, partition_bytes=40)
    with pytest.raises(InputError) as caught:
        run(config, tmp_path / "out")
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl: no column 'text'")
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    assert "Traceback" not in capfd.readouterr().err

    # The same folder, once the file is mended; of the attempt that failed, nothing stays.
    for name in ("train/part-00099.parquet", "errors/part-00099.jsonl"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"stale")
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 10)
    manifest = run(config, tmp_path / "out")
    assert not [name for name in manifest.files if "00099" in name]
    assert manifest.metadata["splits"]["train"]["documents"] == 10
    assert manifest.metadata["errors"] == 0
    notes = manifest.metadata["notes"]
    assert ["split 'heldout' has no rows" in note for note in notes] == [True]
    (tmp_path / "a.jsonl").write_text('{"text": "more"}\n' * 11)
    with pytest.raises(InputError, match="other input"):
        run(config, tmp_path / "out")


@pytest.mark.ray
def test_bad_rows_fail_a_job_only_where_they_are_too_many(
    tmp_path: Path, ray_session: None, s3: str
) -> None:
    files, bad = with_bad_lines(tmp_path / "a.jsonl", [f"document {n}" for n in range(60)])
    config = PreprocessConfig(
        dataset_name="jsonl", data_files=files, partition_bytes=500, max_errors=len(bad) - 1
    )
    out = tmp_path / "out"
    with pytest.raises(InputError) as caught:
        run(config, out)
    said = str(caught.value)
    assert said.startswith(f"{len(bad)} rows cannot be used, more than max_errors {len(bad) - 1}; ")
    assert said.count(f"{files[0]}:") == 3
    assert f"; the first: {files[0]}:{bad[0]}: not a JSON value" in said
    assert f"{out}/errors names them; mend them, or raise max_errors" in said
    assert not (out / MANIFEST_NAME).exists()
    assert errors_of(out)

    # The same folder goes on with a larger limit: what one process makes, named by the manifest.
    enough = config.model_copy(update={"max_errors": len(bad)})
    manifest = run(enough, out)
    shards_of(enough, tmp_path / "plain")
    assert contents(out) == contents(tmp_path / "plain")
    assert errors_of(out) == errors_of(tmp_path / "plain")
    verify(out, kind="tokens")
    errors = {name for name in manifest.files if name.startswith("errors/")}
    assert errors == {f"errors/{path.name}" for path in (tmp_path / "plain" / "errors").iterdir()}
    assert len(errors) > 2
    assert manifest.metadata["errors"] == len(bad)
    assert manifest.metadata["notes"][0].startswith(f"left out, see errors/: {len(bad)} bad rows")
    assert run(config, out).files == manifest.files  # it is finished, whatever the limit

    remote = location(f"{s3}/bad-rows")
    there = run(enough, remote)
    assert {name for name in there.files if name.startswith("errors/")} == errors
    assert all((remote / name).read_bytes() == (out / name).read_bytes() for name in errors)


@pytest.mark.ray
def test_a_folder_with_files_of_others_is_left_alone(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "part-00000.parquet").write_text("precious")
    with pytest.raises(InputError, match=r"holds other files \(train\)"):
        run(PreprocessConfig(), tmp_path)
    assert (tmp_path / "train" / "part-00000.parquet").read_text() == "precious"


@pytest.mark.ray
@pytest.mark.parametrize(
    ("cells", "fields", "said"),
    [
        ([None, "", " "], {}, "corpus is empty.*2 empty and 1 null cells"),
        ([], {}, "corpus is empty"),
        ([3, ["a", 4]], {}, "corpus is empty.*2 bad rows, the first: .*a.jsonl:1: 'text' must be"),
        (["only one"], {"heldout_fraction": 0.999999}, "left no document for training, of 1"),
    ],
)
def test_a_corpus_without_training_rows_is_refused(
    tmp_path: Path, ray_session: None, cells: list[Any], fields: dict[str, Any], said: str
) -> None:
    files = jsonl(tmp_path / "a.jsonl", cells)
    config = PreprocessConfig(dataset_name="jsonl", data_files=files, **fields)
    with pytest.raises(InputError, match=said):
        run(config, tmp_path / "out")
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()


@pytest.mark.ray
def test_dummy_data_needs_no_corpus(tmp_path: Path, ray_session: None) -> None:
    config = PreprocessConfig(
        use_dummy_data=True, num_dummy_samples=100, max_length=8, vocab_size=300
    )
    manifest = run(config, tmp_path, tokenizer_name_or_path="bpe")
    splits = manifest.metadata["splits"]
    assert splits["train"]["rows"] + splits["heldout"]["rows"] == 100
    assert manifest.metadata["padded_fraction"] == 0.0
    assert "builtin corpus" in manifest.metadata["notes"][0]


def samples_folder(folder: Path, prompts: list[str | None], *, suffix: str = "jsonl") -> Path:
    """What jobs.generate leaves: answers whose tokens are others than those of their text."""
    records = [
        {
            "id": index,
            "prompt": prompt,
            "num_prompt_tokens": len(prompt or ""),
            "gaps": [],
            "tokens": [*BYTES(f"{prompt or ''} answer {index}")["input_ids"], *[EOS] * (index % 2)],
            "text": f"{prompt or ''} answer {index}",
            "num_model_calls": 1,
            "seconds": 0.0,
        }
        for index, prompt in enumerate(prompts)
    ]
    folder.mkdir()
    for part in (0, 1):
        write_part(folder / f"part-0000{part}.{suffix}", records[part::2])
    commit(folder, kind="samples", metadata={})
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_samples_are_a_source_of_tokens_split_by_their_prompt(tmp_path: Path, suffix: str) -> None:
    prompts = [f"prompt {index // 4}" for index in range(160)]
    folder = samples_folder(tmp_path / "samples", [*prompts, None], suffix=suffix)
    config = PreprocessConfig(
        dataset_name="samples", data_files=[str(folder)], heldout_fraction=0.3, max_length=32
    )
    [stats] = shards_of(config, tmp_path)
    records = {record["id"]: record for record in read_samples(folder)}
    sides = {}
    for split, shard in stats.shards.items():
        rows = pq.read_table(tmp_path / shard.path).to_pydict()
        sides[split] = documents_of(rows)
        assert sum(rows["num_bytes"]) == sum(len(BYTES.decode(ids[:-1])) for ids in sides[split])
    got = sorted([*sides["train"], *sides["heldout"]])
    assert got == sorted(
        [*record["tokens"], *[EOS] * (record["tokens"][-1] != EOS)] for record in records.values()
    )
    begins = {
        split: {str(BYTES.decode(ids)).split(" answer")[0] for ids in documents}
        for split, documents in sides.items()
    }
    assert begins["train"]
    assert begins["heldout"]
    assert not begins["train"] & begins["heldout"]


def test_samples_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    config = PreprocessConfig(
        dataset_name="samples", data_files=[str(samples_folder(tmp_path / "samples", ["a"]))]
    )
    with pytest.raises(InputError, match=r"sample 0 reads 'a answer 0', but .* this tokenizer"):
        shards_of(config, tmp_path, tokenizer=letter_tokenizer())


def test_samples_that_are_not_committed_are_no_source(tmp_path: Path) -> None:
    folder = samples_folder(tmp_path / "samples", ["a"])
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(InputError, match="no committed samples there"):
        plan_partitions(PreprocessConfig(dataset_name="samples", data_files=[str(folder)]))
    with pytest.raises(InputError, match="matches no folder"):
        plan_partitions(PreprocessConfig(dataset_name="samples", data_files=[f"{folder}/none"]))


def test_files_that_a_model_was_trained_on_give_held_out_rows_alone(tmp_path: Path) -> None:
    """Old and new text: the held-out rows of both, the training rows of the new."""
    for name in ("old", "new"):
        lines = [f"{name} line {number}" for number in range(200)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    moved = tmp_path / "moved.txt"  # by its content it is the old one
    fields = {"dataset_name": "text", "heldout_fraction": 0.2, "max_length": 32}
    known = tmp_path / "trained_on.json"
    old = PreprocessConfig.model_validate({**fields, "data_files": [str(tmp_path / "old.txt")]})
    known.write_text(json.dumps(file_identities(old)))
    (tmp_path / "old.txt").rename(moved)
    since = PreprocessConfig.model_validate(
        {**fields, "data_files": [str(tmp_path / "*.txt")], "new_since": str(known)}
    )
    assert known_files(since) == {str(moved)}
    shards_of(since, tmp_path / "since")
    whole = since.model_copy(update={"new_since": None})
    shards_of(whole, tmp_path / "whole")

    def texts(folder: str, split: str) -> set[str]:
        paths = sorted((tmp_path / folder / split).glob("*.parquet"))
        rows = [
            document for path in paths for document in documents_of(pq.read_table(path).to_pydict())
        ]
        return {str(BYTES.decode(row, skip_special_tokens=True)) for row in rows}

    assert texts("since", "heldout") == texts("whole", "heldout")
    assert any(text.startswith("old") for text in texts("since", "heldout"))
    new = {text for text in texts("whole", "train") if text.startswith("new")}
    assert texts("since", "train") == new
    assert len(new) > 100
    # What is trained on it was trained on both.
    assert len(file_identities(since)) == 2
    with pytest.raises(InputError, match=r"new_since .*: not a list of files"):
        known_files(since.model_copy(update={"new_since": str(tmp_path / "nowhere")}))


def test_a_tokenizer_is_opened_once_while_its_files_stay_the_same(tmp_path: Path) -> None:
    tokenizer, _ = build_tokenizer("bytes", documents=(), vocab_size=0)
    for name in ("a", "b"):
        tokenizer.save_pretrained(tmp_path / name)
    opened = tokenizer_in(tmp_path / "a")
    assert tokenizer_in(tmp_path / "b") is opened  # that of another attempt
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "a")
    changed = tokenizer_in(tmp_path / "a")
    assert changed.chat_template == "{{ messages }}"
    assert changed is not opened


@pytest.mark.slow
def test_a_dataset_or_tokenizer_that_changed_in_its_folder_is_noticed(
    in_this_process: None, tmp_path: Path
) -> None:
    """Its name stayed the same, and so did the number of rows and bytes."""
    from datasets import Dataset, load_from_disk

    for text in ("one", "two"):
        Dataset.from_dict({"text": [text] * 9}).save_to_disk(tmp_path / text)

    def put(text: str) -> None:
        shutil.rmtree(tmp_path / "dataset", ignore_errors=True)
        shutil.copytree(tmp_path / text, tmp_path / "dataset")

    def again() -> Any:
        return run(config, tmp_path / "out", tokenizer_name_or_path=str(tmp_path / "model"))

    put("one")
    tokenizer = build_tokenizer("bytes", documents=(), vocab_size=0)[0]
    tokenizer.save_pretrained(tmp_path / "model")
    config = PreprocessConfig(dataset_name=str(tmp_path / "dataset"), heldout_fraction=0.0)
    made = again()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    assert again() == made
    put("two")
    with pytest.raises(InputError, match="of another config or of other input"):
        again()
    put("one")
    load_from_disk(str(tmp_path / "dataset")).shuffle(seed=0)
    assert list((tmp_path / "dataset").glob("cache-*"))
    assert again() == made
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="of another config or of other input"):
        again()
    shutil.rmtree(tmp_path / "model")
    assert again() == made  # what is away cannot be asked
