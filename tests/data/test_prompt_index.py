"""Prompts found and read in runs: the rows of a list, from any place, in bounded memory."""

import gzip
import json
import random
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tests.builders import generation_rows
from tokendiff.config.generate import GenerateConfig
from tokendiff.data import prompt_index
from tokendiff.data.prompt_index import (
    IndexedRow,
    PromptFile,
    PromptIndex,
    prompt_paths,
)
from tokendiff.errors import InputError


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return str(path)


def random_lines(count: int, seed: int = 0) -> list[str]:
    """Texts of any length, blank lines among them, and separators that are no line ends."""
    rng = random.Random(seed)
    kinds = ["", "  ", "a\u2028b", "é" * 40, "word " * 7, "x"]
    return [f"{rng.choice(kinds)}{number if rng.random() < 0.7 else ''}" for number in range(count)]


def all_rows(index: PromptIndex, size: int) -> list[IndexedRow]:
    starts = range(0, index.num_rows, size)
    return [row for at in starts for row in index.rows(at, min(at + size, index.num_rows))]


@pytest.mark.parametrize("max_marks", [1, 3, 1000])
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_rows_read_in_runs_are_those_of_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_marks: int, size: int
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(prompt_index, "_MAX_MARKS", max_marks)
    lines = random_lines(150)
    write_lines(tmp_path / "a.txt", ["\ufeff" + lines[0], *lines[1:]])
    records = [json.dumps({"prompt": line}) for line in random_lines(40, seed=1)]
    write_lines(tmp_path / "b.jsonl", [*records, ""])
    write_lines(tmp_path / "c.txt", [])
    cells = random_lines(33, seed=2)
    pq.write_table(pa.table({"prompt": cells}), tmp_path / "d.parquet", row_group_size=10)
    config = GenerateConfig(
        prompt=["first", "second"],
        prompts=[str(tmp_path / name) for name in ("d.parquet", "*.txt", "b.jsonl")],
        num_samples=3,
    )
    expected = [
        "first",
        "second",
        *cells,
        *(line for line in lines if line.strip()),
        *(json.loads(record)["prompt"] for record in records),
    ]
    index = PromptIndex.of(config)
    rows = all_rows(index, size)
    assert [row.error for row in rows] == [None] * len(rows)
    assert [row.row.id for row in rows] == list(range(3 * len(expected)))
    assert [row.row.prompt for row in rows] == [text for text in expected for _ in range(3)]
    assert [row.row for row in rows] == generation_rows(config)
    counts = [("d.parquet", len(cells)), ("a.txt", len([x for x in lines if x.strip()]))]
    sources = [name for name, count in [*counts, ("b.jsonl", 40)] for _ in range(3 * count)]
    assert [row.row.source for row in rows] == [None] * 6 + sources
    assert all(len(file.marks) <= max_marks for file in index.files)


def test_places_are_those_an_editor_shows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", ["one", "", "two\r", " \rthree", "four"])
    index = PromptIndex.of(GenerateConfig(prompts=[path], num_samples=1))
    found = [(row.place, row.row.prompt) for row in index.rows(0, 4)]
    texts = {1: "one", 3: "two", 5: "three", 6: "four"}
    assert found == [(f"{path}:{line}", text) for line, text in texts.items()]


def test_prompts_of_the_command_line_are_counted_from_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", ["of a file"])
    config = GenerateConfig(prompt=["a", "b", "c"], prompts=[path], num_samples=2)
    found = [(row.place, row.row.prompt) for row in PromptIndex.of(config).rows(1, 7)]
    expected = ["prompt 1", "prompt 2", "prompt 2", "prompt 3", "prompt 3", f"{path}:1"]
    assert found == list(zip(expected, ["a", "b", "b", "c", "c", "of a file"], strict=True))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_lines_may_end_as_on_any_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(prompt_index, "_MAX_MARKS", 3)
    texts = [text for text in random_lines(60) if text.strip()]
    lines = [json.dumps({"prompt": text}) for text in texts] if "json" in name else texts
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / name).write_bytes(end.join(lines).encode())
        index = PromptIndex.of(GenerateConfig(prompts=[str(tmp_path / name)], num_samples=1))
        assert [row.row.prompt for row in all_rows(index, 7)] == texts


BAD_LINES = [
    ('{"prompt": "cut off', "not a JSON line"),
    ("[" * 100_000, "not a JSON line"),
    ('{"text": "other field"}', 'needs a field "prompt"'),
    ('{"prompt": 5}', "must be a string"),
    ('["a"]', 'needs a field "prompt"'),
    ('{"prompt": "\\ud800"}', "not valid Unicode"),
    ("\ud800", "not UTF-8"),
    ('{"messages": [{"role": "user"}]}', 'needs the strings "role" and "content"'),
    ("5", 'needs a field "prompt"'),
    ('{"prompt": null}', 'needs a field "prompt"'),
    *(
        (f'{{"prompt": {value}}}', "must be a string")
        for value in ("0", "1.5", "NaN", "true", "false", "[]", '["a"]', "{}", '{"a": 1}')
    ),
    *(
        (f'{{"messages": {value}}}', "must be a list of at least one")
        for value in ("5", "true", "NaN", '"hello"', "{}", '{"role": "user", "content": "a"}', "[]")
    ),
    *(
        (f'{{"messages": [{value}]}}', 'needs the strings "role" and "content"')
        for value in ("5", "null", '"a"', "[]", '{"role": 1, "content": "a"}', '{"content": "a"}')
    ),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[line[:40] for line, _ in BAD_LINES])
def test_a_bad_line_is_an_error_in_its_place(tmp_path: Path, line: str, reason: str) -> None:
    good = '{"prompt": "good"}'
    path = write_lines(tmp_path / "a.jsonl", [good, line, good])
    index = PromptIndex.of(GenerateConfig(prompts=[path], num_samples=2))
    rows = all_rows(index, 5)
    assert [row.row.prompt for row in rows] == ["good"] * 2 + [None] * 2 + ["good"] * 2
    assert [row.error is None for row in rows] == [True] * 2 + [False] * 2 + [True] * 2
    assert reason in str(rows[2].error)
    assert str(rows[2].error).startswith(f"{path}:2")
    with pytest.raises(InputError, match=r":2: "):
        generation_rows(GenerateConfig(prompts=[path]))


@pytest.mark.parametrize(
    "cells",
    [
        [5, 7],
        [1.5, float("nan")],
        [True, False],
        [["a"], ["b"]],
        [{"a": 1}, {"a": 2}],
        [b"a", b"b"],
    ],
    ids=str,
)
def test_cells_that_are_no_texts_are_errors_in_their_place(
    tmp_path: Path, cells: list[Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for column, reason in (
        ("prompt", '"prompt" must be a string, got'),
        ("messages", '"messages" must be a list|needs the strings "role" and "content", got'),
    ):
        path = tmp_path / f"{column}.parquet"
        pq.write_table(pa.table({column: cells}), path)
        index = PromptIndex.of(GenerateConfig(prompts=[str(path)], num_samples=1))
        rows = list(index.rows(0, 2))
        assert [row.row.prompt for row in rows] == [None, None]
        for number, row in enumerate(rows, start=1):
            assert re.match(rf"{path}: row {number}: .*({reason})", str(row.error))


def test_the_identity_changes_with_any_prompt(tmp_path: Path) -> None:
    def identity(lines: list[str], **fields: Any) -> list[Any]:
        path = write_lines(tmp_path / "a.txt", lines)
        return PromptIndex.of(GenerateConfig(prompts=[path], **fields)).identity()

    same = identity(["a", "b"])
    assert identity(["a", "b"]) == same
    others = [
        identity(["b", "a"]), identity(["a"]), identity(["a", "", "b"]),
        identity(["a", "b"], prompt=["c"]), identity(["a", "b"], num_samples=5),
    ]  # fmt: skip
    assert same not in others


def test_files_that_are_of_no_use_are_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"not Parquet")
    (tmp_path / "c.jsonl").write_text('[\n  {"prompt": "a"}\n]')
    (tmp_path / "d.txt").write_bytes(b" \n\n")
    cases = {
        "a.parquet": 'needs a column "prompt" or "messages"; it has text',
        "b.parquet": "cannot be read as Parquet",
        "c.jsonl": "is one JSON array, not an object a line; .* jq -c",
        "d.txt": "the files hold no prompt",
        "e.txt": "no such file",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            PromptIndex.of(GenerateConfig(prompts=[str(tmp_path / name)]))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path: Path) -> None:
    """Sixteen times as many prompts take no more memory to find, and the index is no larger."""

    def peak(count: int) -> tuple[int, int]:
        path = tmp_path / f"{count}.txt"
        with path.open("w") as file:
            for number in range(count):
                file.write(f"a prompt of some length, number {number}\n")
        tracemalloc.start()
        index = PromptFile.index(str(path))
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert index.num_prompts == count
        return len(index.marks), most

    small_marks, small = peak(8_000)
    large_marks, large = peak(128_000)
    assert small_marks <= prompt_index._MAX_MARKS
    assert large_marks <= prompt_index._MAX_MARKS
    assert large < 1.3 * small
    assert large < 3_000_000  # the file has 5.6 million bytes, its lines as a list 12 million


def test_remote_prompts_are_read_in_place(s3: str, tmp_path: Path) -> None:
    from tokendiff.artifacts.locations import RemotePath

    lines = random_lines(60)
    path = write_lines(tmp_path / "a.txt", lines)
    for name in ("one", "two"):
        (RemotePath(s3) / "prompts" / f"{name}.txt").write_bytes(Path(path).read_bytes())
    assert prompt_paths([f"{s3}/prompts/*.txt"]) == [
        f"{s3}/prompts/one.txt",
        f"{s3}/prompts/two.txt",
    ]
    index = PromptIndex.of(GenerateConfig(prompts=[f"{s3}/prompts/*.txt"], num_samples=1))
    texts = [line for line in lines if line.strip()]
    assert [row.row.prompt for row in all_rows(index, 9)] == texts * 2
    with pytest.raises(InputError, match="no such file"):
        prompt_paths([f"{s3}/prompts/*.jsonl"])


def test_a_prompt_not_utf8_in_parquet_costs_no_other(tmp_path: Path) -> None:
    """As pyarrow reads it: bytes in a column of text are looked at when they become Python's."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = pa.array([b"one", b"caf\xe9", b"three"], pa.binary()).view(pa.string())
    path = tmp_path / "not_utf8_in_parquet.parquet"
    pq.write_table(pa.table({"prompt": cells}), path)
    index = PromptFile.index(str(path))
    (_, one), (place, bad), (_, three) = index.read(0, 3)
    assert (one, three) == ("one", "three")
    assert place == f"{path}: row 2"
    assert isinstance(bad, InputError)
    assert "not UTF-8 (byte 0xe9" in str(bad)


def test_a_file_that_two_patterns_name_is_read_once(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "b.txt", ["of b"])
    write_lines(tmp_path / "a.txt", ["of a"])
    config = GenerateConfig(prompts=[path, str(tmp_path / "*.txt"), path], num_samples=1)
    rows = all_rows(PromptIndex.of(config), 5)
    assert [row.row.prompt for row in rows] == ["of b", "of a"]


@pytest.mark.parametrize("name", ["a.ndjson", "a.JSONL", "a.jsonl.GZ"])
def test_records_are_told_by_any_of_their_endings(tmp_path: Path, name: str) -> None:
    data = b'{"prompt": "one"}\n{"prompt": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    rows = all_rows(PromptIndex.of(GenerateConfig(prompts=[str(tmp_path / name)])), 8)
    assert [row.row.prompt for row in rows[::4]] == ["one", "two"]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz"])
def test_a_table_is_not_taken_for_prompts(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / name, ["prompt", "one"])
    with pytest.raises(InputError, match=r"files are not read; write the column of prompts as"):
        prompt_paths([str(tmp_path / name)])
