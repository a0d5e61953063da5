"""Compressed files read like plain ones, as text and as prompts; what is no text is named."""

import bz2
import gzip
import io
import lzma
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from tokendiff.artifacts.locations import RemotePath
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.preprocess import PreprocessConfig
from tokendiff.data.prompt_index import PromptIndex
from tokendiff.data.sources import plan_partitions, read_documents
from tokendiff.data.streams import is_compressed, open_stream, plain_name
from tokendiff.errors import InputError


def by_arrow(codec: str) -> Callable[[bytes], bytes]:
    def compress(data: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, codec) as stream:
            stream.write(data)
        return bytes(sink.getvalue())

    return compress


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    ".zst": by_arrow("zstd"),
    ".lz4": by_arrow("lz4"),
    ".br": by_arrow("brotli"),
}
LINES = [f"line {number} ü {number % 7}" for number in range(1000)]
DATA = "\n".join(LINES).encode()


def read_all(path: "Path | RemotePath", name: str = "text", **fields: object) -> list[object]:
    given = {"dataset_name": name, "data_files": [str(path)], **fields}
    partitions = plan_partitions(PreprocessConfig.model_validate(given))
    return [document for part in partitions for document in read_documents(part)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_text_reads_like_plain_text(tmp_path: Path, suffix: str) -> None:
    """A file of two streams, one behind the other, is what `cat` and parallel compressors make."""
    path = tmp_path / f"a.txt{suffix}"
    compress = COMPRESS[suffix]
    streams = [DATA[:5000], DATA[5000:]] if suffix != ".br" else [DATA]
    path.write_bytes(b"".join(map(compress, streams)))
    assert read_all(path, partition_bytes=100) == LINES
    assert len(plan_partitions(PreprocessConfig(dataset_name="text", data_files=[str(path)]))) == 1
    assert read_all(path, sample_by="document") == [DATA.decode()]

    path.write_bytes(compress(DATA)[:-20])
    with pytest.raises(InputError, match=rf"a\.txt\{suffix}: cannot be read \("):
        read_all(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match=rf"a\.txt\{suffix}: cannot be read \("):
        read_all(path)


def test_what_the_command_line_tools_write(tmp_path: Path) -> None:
    for tool, suffix in (("xz", ".xz"), ("zstd", ".zst"), ("lz4", ".lz4"), ("bzip2", ".bz2")):
        try:
            done = subprocess.run([tool, "-c"], input=DATA, capture_output=True, check=True)
        except FileNotFoundError:
            continue
        (tmp_path / f"a.txt{suffix}").write_bytes(done.stdout)
        assert read_all(tmp_path / f"a.txt{suffix}") == LINES


def test_xz_loses_nothing_behind_its_first_stream(tmp_path: Path) -> None:
    """The lzma module ends in silence at a second stream that is damaged."""
    first, second = lzma.compress(DATA[:5000]), lzma.compress(DATA[5000:])
    path = tmp_path / "a.txt.xz"
    path.write_bytes(first + bytes(8) + second + bytes(4))  # padding is allowed between streams
    assert read_all(path) == LINES
    path.write_bytes(first + b"\xff" + second[1:])
    assert len(lzma.decompress(path.read_bytes())) == 5000
    with pytest.raises(InputError, match=r"a\.txt\.xz: cannot be read"):
        read_all(path)


def test_large_streams_pass_through_small_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(30_000) + bytes(100_000)
    monkeypatch.setattr("tokendiff.data.streams.BUFFER_BYTES", 1024)
    for suffix, compress in COMPRESS.items():
        (tmp_path / f"a{suffix}").write_bytes(compress(data))
        with open_stream(str(tmp_path / f"a{suffix}")) as file:
            assert isinstance(file, io.BufferedReader)
            assert file.read() == data


@pytest.mark.parametrize("suffix", ["", *COMPRESS])
def test_compressed_prompts_are_those_of_the_plain_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr("tokendiff.data.prompt_index._MAX_MARKS", 9)
    records = [f'{{"prompt": "{line}"}}' for line in LINES[:300]]
    compress = COMPRESS.get(suffix, bytes)
    for name, lines in (("a.txt", LINES[:300]), ("b.jsonl", records)):
        (tmp_path / f"{name}{suffix}").write_bytes(compress("\n".join(lines).encode()))
    config = GenerateConfig(prompts=[str(tmp_path / "*")], num_samples=1)
    index = PromptIndex.of(config)
    assert index.num_rows == 600
    rows = [item for at in range(0, 600, 50) for item in index.rows(at, at + 50)]
    assert [item.row.prompt for item in rows] == LINES[:300] * 2
    assert rows[299].place == f"{tmp_path}/a.txt{suffix}:300"
    assert rows[-1].row.source == f"b.jsonl{suffix}"


def test_compressed_files_behind_uris(s3: str) -> None:
    folder = RemotePath(s3) / "compressed"
    for suffix, compress in COMPRESS.items():
        (folder / f"a.txt{suffix}").write_bytes(compress(DATA))
        assert read_all(folder / f"a.txt{suffix}") == LINES
    index = PromptIndex.of(GenerateConfig(prompts=[f"{folder}/*.xz"], num_samples=1))
    assert [item.row.prompt for item in index.rows(990, 1000)] == LINES[990:]


def test_names() -> None:
    assert is_compressed("a/b.JSONL.GZ")
    assert not is_compressed("a.gz/b.txt")
    assert plain_name("a.jsonl.zst") == "a.jsonl"
    assert plain_name("s3://bucket/a.txt") == "s3://bucket/a.txt"


ARCHIVES = {
    "a.zip": "is a zip archive, not text; unpack it, for example with unzip",
    "a.tar.gz": "is a tar archive.*tar xf",
    "a.tgz": "is a tar archive",
    "a.txt.Z": "compressed with compress.*uncompress",
    "a.7z": "7z x",
    "a.jsonl.snappy": "compressed with snappy",
    "a.parquet.gz": "a Parquet file is compressed inside",
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_what_nothing_here_reads_is_told_by_its_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"?")
    for use in (
        lambda path: read_all(path),
        lambda path: PromptIndex.of(GenerateConfig(prompts=[str(path)])),
    ):
        with pytest.raises(InputError, match=f"{name}: .*{ARCHIVES[name]}"):
            use(tmp_path / name)


def tar_of(data: bytes) -> bytes:
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def zip_of(data: bytes) -> bytes:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


def parquet_of(data: bytes) -> bytes:
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": [data.decode()]}), sink)
    return bytes(sink.getvalue())


CONTENTS = {
    **{
        f"{suffix} inside": (COMPRESS[suffix](DATA), rf"does not say; rename it to a\.txt\{suffix}")
        for suffix in (".gz", ".bz2", ".xz", ".zst", ".lz4")
    },
    "zip": (zip_of(DATA), "is a zip archive, not text"),
    "tar": (tar_of(DATA), "is a tar archive, not text"),
    "parquet": (parquet_of(DATA), r"is no text but a \.parquet file.*dataset_name parquet"),
    "utf-16": (DATA.decode().encode("utf-16"), "UTF-16; .* iconv -f utf-16 -t utf-8"),
    "utf-32": (DATA.decode().encode("utf-32"), "UTF-32; .* iconv -f utf-32 -t utf-8"),
}


@pytest.mark.parametrize("what", CONTENTS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_what_is_no_text_is_told_by_its_first_bytes(tmp_path: Path, what: str, suffix: str) -> None:
    """In every piece of a file: else its pieces would be told as rows that are not UTF-8."""
    data, said = CONTENTS[what]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(gzip.compress(data) if suffix else data)
    if suffix and "inside" in what:
        said = r"what is inside is compressed again \(\.\w+\); unpack it once"
    partitions = plan_partitions(
        PreprocessConfig(dataset_name="text", data_files=[str(path)], partition_bytes=500)
    )
    for partition in (partitions[0], partitions[-1]):
        with pytest.raises(InputError, match=rf"a\.txt{suffix}: .*{said}"):
            list(read_documents(partition))
    with pytest.raises(InputError, match=said):
        PromptIndex.of(GenerateConfig(prompts=[str(path)]))
