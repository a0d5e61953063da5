"""CSV, TSV and JSON arrays against the libraries that write them; columns by their paths."""

import codecs
import csv
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokendiff.artifacts.locations import RemotePath
from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.data import tables
from tokendiff.data.bad_rows import BadRow
from tokendiff.data.columns import arrow_cells
from tokendiff.data.sources import plan_partitions, read_documents
from tokendiff.errors import InputError

TEXTS = [
    "plain",
    "",
    "commas, and\ttabs",
    'a "quoted" word',
    "two\nlines\r\nand\rmore",
    "日本語 \u2028 \U0001f600",
    " spaces ",
    '"',
    "x" * 200_000,  # more than the csv module takes by default
]
DELIMITERS = {"csv": ",", "tsv": "\t"}


def read_all(name: str, path: "Path | RemotePath", **fields: Any) -> list[Any]:
    given = {"dataset_name": name, "data_files": [str(path)], **fields}
    partitions = plan_partitions(PreprocessConfig.model_validate(given))
    return [document for part in partitions for document in read_documents(part)]


def bad_rows(found: list[Any]) -> list[str]:
    return [str(item) for item in found if isinstance(item, BadRow)]


def good_rows(found: list[Any]) -> list[Any]:
    return [item for item in found if not isinstance(item, BadRow)]


@pytest.mark.parametrize("kind", DELIMITERS)
def test_fields_are_those_of_csv_writer_and_pandas(tmp_path: Path, kind: str) -> None:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    path = tmp_path / f"a.{kind}"
    rows = Dataset.from_dict({"id": range(len(TEXTS)), "text": TEXTS})
    rows.to_csv(path, sep=DELIMITERS[kind], index=True)  # by pandas
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert read_all(kind, path, partition_bytes=10) == TEXTS
    packed = tmp_path / f"a.{kind}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_all(kind, packed) == TEXTS
    for ending in ("\n", "\r\n", "\r"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=DELIMITERS[kind], lineterminator=ending)
            writer.writerows([["id", "text"], *enumerate(TEXTS)])
        assert read_all(kind, path) == TEXTS


def test_a_bad_row_of_csv_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(
        b"id,text\n"
        b'1,"two\nlines"\n'
        b"2,too,many\n"
        b"3\n"
        b"\n"
        b"4,caf\xe9\n"
        b'5,"never closed\n'
        b'6,"fine"\n'
        b'7,"a" b\n'
        b"8,fine too\n"
        b'9,"open to the end\n'
        b"10,last\n"
    )
    found = read_all("csv", path)
    assert good_rows(found) == ["two\nlines", "fine", "fine too", "last"]
    bad = bad_rows(found)
    assert [text.split(": ")[0] for text in bad] == [f"{path}:{n}" for n in (4, 5, 7, 8, 10, 12)]
    assert "has 3 fields, but the first row names 2" in bad[0]
    assert "'text' is not UTF-8 (byte 0xe9)" in bad[2]
    assert "not a row of CSV (',' expected after '\"')" in bad[3]
    assert "not a row of CSV (unexpected end of data)" in bad[5]
    assert [item.row for item in found if isinstance(item, BadRow)][3] == '5,"never closed'


def test_a_quote_that_is_never_closed_ends_somewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_MAX_FIELD_CHARS", 1000)
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + '1,"open\n' + "2,fine\n" * 1000)
    found = read_all("csv", path)
    assert good_rows(found) == ["fine"] * 1000
    assert [text.split(" (")[0] for text in bad_rows(found)] == [f"{path}:2: not a row of CSV"]


def test_columns_of_csv_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id;body\n1;a\n")
    with pytest.raises(InputError, match=r"a\.csv: no column 'text'.*'id;body'"):
        plan_partitions(PreprocessConfig(dataset_name="csv", data_files=[str(path)]))
    path.write_text("")
    assert read_all("csv", path) == []
    path.write_text("text\n")
    assert read_all("csv", path) == []


@pytest.mark.parametrize("read_chars", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_item_by_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_chars: int, indent: int | None
) -> None:
    monkeypatch.setattr(tables, "_READ_CHARS", read_chars)
    texts = [*TEXTS[:-1], "\\ \\u0041 \x07", "y" * 500]
    values = [1, -2.5e-7, True, None, "\ud83d\ude00", {"a": [1, {"b": []}]}]
    rows: list[Any] = [{"n": values, "text": text} for text in texts]
    path = tmp_path / "a.json"
    for ascii_only in (True, False):
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if ascii_only:
            assert read_all("json", path, partition_bytes=10) == texts
    path.write_text("\ufeff []")
    assert read_all("json", path) == []


@pytest.mark.parametrize("read_chars", [1, 1 << 20])
def test_a_bad_item_of_an_array_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_chars: int
) -> None:
    monkeypatch.setattr(tables, "_READ_CHARS", read_chars)
    path = tmp_path / "a.json"
    path.write_bytes(
        b'[{"text": "a"}, "b", 12, {"body": "c"}, {"text": 5}, {"text": "caf\xe9"}, {"text": "d"}]'
    )
    found = read_all("json", path)
    assert good_rows(found) == ["a", "d"]
    bad = bad_rows(found)
    assert [text.split(": ")[1] for text in bad] == [f"row {n}" for n in (2, 3, 4, 5, 6)]
    assert bad[1].endswith("got int 12")
    assert "no column 'text', only 'body'" in bad[2]
    assert "'text' is not UTF-8 (byte 0xe9)" in bad[4]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('{"text": "a"}\n{"text": "b"}', "expected one array .* dataset_name jsonl"),
        ('{"data": [{"text": "a"}]}', r"expected .*begins with '\{'.*jq -c '\.data\[\]'"),
        ('[{"text": "a"}, {"text": "b', "row 2: not JSON .*Unterminated string"),
        ('[{"text": "a"}, {"text": b}]', "row 2: not JSON .*where the next row begins cannot"),
        ('[{"text": "a"} {"text": "b"}]', "row 2: not JSON .no comma before it"),
        ('[{"text": "a"}', "row 2: not JSON .the array is cut off"),
        ('[{"text": "a"}] []', "behind row 1: not JSON .the array has ended"),
        ('[{"body": "a"}, {"title": "b"}]', "no column 'text'; .*'body'"),
    ],
)
def test_what_is_no_array_of_rows_is_refused(tmp_path: Path, data: str, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(data)
    with pytest.raises(InputError, match=rf"a\.json: {said}"):
        read_all("json", path)


def test_an_array_in_place_of_lines_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for indent in (None, 2):
        path.write_text(json.dumps([{"text": "a"}] * 50, indent=indent))
        for partition_bytes in (40, 1 << 20):
            config = PreprocessConfig(
                dataset_name="jsonl", data_files=[str(path)], partition_bytes=partition_bytes
            )
            told = pytest.raises(InputError, match=r"is one JSON array.*dataset_name json, .*jq -c")
            with told:
                plan_partitions(config)
            (first, *_) = plan_partitions(config.model_copy(update={"dataset_format": "text"}))
            with told:
                list(read_documents(first))


def test_an_error_in_an_array_is_found_without_reading_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_READ_CHARS", 1000)
    path = tmp_path / "a.json"
    path.write_text('[{"text": oops' + " " * 20_000_000)
    tracemalloc.start()
    with pytest.raises(InputError, match="row 1: not JSON"):
        read_all("json", path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000


# Columns by their paths

NESTED: list[dict[str, Any]] = [
    {"doc": {"text": "one", "n": 1}, "parts": ["a", "b"], "deep": {"in": {"parts": ["x"]}}},
    {"doc": {"text": "two", "n": 2}, "parts": [], "deep": {"in": {"parts": None}}},
    {"doc": None, "parts": None, "deep": {"in": None}},
    {"doc": {"text": None, "n": 4}, "parts": ["c", None], "deep": None},
]
BY_PATH = {
    "doc.text": ["one", "two", None, None],
    "parts": ["a", "b", None, "c", None],
    "deep.in.parts": ["x", None, None, None],
}


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset"])
def test_a_path_and_a_list_mean_the_same_in_every_format(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"train.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, NESTED)))
    elif kind == "json":
        path.write_text(json.dumps(NESTED))
    else:
        path = path.with_suffix(".parquet")
        pq.write_table(pa.Table.from_pylist(NESTED), path, row_group_size=3)
    for column, texts in BY_PATH.items():
        if kind == "dataset":
            config = PreprocessConfig(dataset_name=str(tmp_path), text_column=column)
            found = [d for part in plan_partitions(config) for d in read_documents(part)]
        else:
            found = read_all(kind, path, text_column=column, partition_bytes=1)
        assert found == texts, column


def test_a_column_with_a_dot_goes_before_a_path(tmp_path: Path) -> None:
    rows = [{"doc": {"text": "inside"}, "doc.text": "outside"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    for name in ("parquet", "jsonl"):
        assert read_all(name, tmp_path / f"a.{name}", text_column="doc.text") == ["outside"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_a_cell_that_is_not_utf8_costs_no_other(tmp_path: Path, kind: pa.DataType) -> None:
    cells = [b"ok", b"caf\xe9", None, b"too"]
    binary = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    column = pa.array(cells, binary.get(kind, pa.binary_view())).view(kind)
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column}), path)
    found = read_all("parquet", path)
    assert good_rows(found) == ["ok", None, "too"]
    assert bad_rows(found)[0].startswith(f"{path}: row 2: 'text' is not UTF-8 (byte 0xe9")

    values = pa.array([b"ok", b"caf\xe9", b"too"]).view(pa.string())
    encoded = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2]), values)
    assert arrow_cells(encoded, ["text"]) == cells


def test_bytes_that_are_text_are_text_and_rows_are_counted_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    cells = [b"a"] * 6 + [b"\xff", b"b"]
    lists = pa.array([[b"a", b"b"], [b"\xff"], None], pa.list_(pa.binary()))
    pq.write_table(pa.table({"text": cells}), path, row_group_size=3)
    found = read_all("parquet", path, partition_bytes=1)
    assert good_rows(found) == ["a"] * 6 + ["b"]
    assert bad_rows(found)[0].startswith(f"{path}: row 7: ")
    pq.write_table(pa.table({"text": lists.view(pa.list_(pa.string()))}), path)
    found = read_all("parquet", path)
    assert good_rows(found) == ["a", "b", None]
    assert "row 2: 'text[0]' is not UTF-8" in bad_rows(found)[0]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("number", "column 'number' holds int64, not text; .*'doc.text'.*Dataset.from_parquet"),
        ("doc", "column 'doc' holds struct"),
        ("chats", "column 'chats' holds list<.*struct"),
        ("doc.title", "no column 'doc.title'; .*'number', 'doc.text', 'doc.n', 'chats'"),
        ("number.text", "no column 'number.text'"),
    ],
)
def test_columns_without_text_are_named_at_once(tmp_path: Path, column: str, said: str) -> None:
    rows = [{"number": 1, "doc": {"text": "a", "n": 1}, "chats": [{"role": "user"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    by_file = {"dataset_name": "parquet", "data_files": [str(tmp_path / "train.parquet")]}
    for given in (by_file, {"dataset_name": str(tmp_path)}):
        config = PreprocessConfig.model_validate({**given, "text_column": column})
        with pytest.raises(InputError, match=said):
            plan_partitions(config)


def test_tables_behind_uris(s3: str) -> None:
    folder = RemotePath(s3) / "tables"
    (folder / "a.csv").write_bytes(b"text\na\nb\n")
    (folder / "a.json.gz").write_bytes(gzip.compress(b'[{"text": "c"}]'))
    assert read_all("csv", folder / "a.csv") == ["a", "b"]
    assert read_all("json", folder / "*.gz") == ["c"]
