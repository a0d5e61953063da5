"""Files of samples: written whole or not at all, read back in the order of their ids; and samples
as a source of text to train on.
"""

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokendiff.artifacts.locations import (
    Location,
    is_uri,
    local_path,
    location,
    open_binary,
    size_of,
)
from tokendiff.artifacts.manifest import Manifest, verify, write_atomically
from tokendiff.data.partition import Piece
from tokendiff.errors import InputError

KIND = "samples"


def write_part(path: Location, records: list[dict[str, Any]]) -> None:
    """Write records as JSON lines or Parquet, by the name's ending, so that the file is whole or
    not there.
    """
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomically(path, text.encode())
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {
            "id": pa.int64(),
            "prompt": pa.string(),
            "num_prompt_tokens": pa.int64(),
            "gaps": pa.list_(pa.int32()),
            "tokens": pa.list_(pa.int32()),
            "text": pa.string(),
            "completion": pa.string(),
            "finish_reason": pa.string(),
            "num_model_calls": pa.int64(),
            "tokens_per_forward": pa.float64(),
            "blocks_by_gain": pa.list_(pa.int32()),
            "source": pa.string(),
        }
    )
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema) as writer:
        if records:  # `datasets` fails at a row group without rows
            writer.write_table(pa.Table.from_pylist(records, schema=schema))
    write_atomically(path, sink.getvalue().to_pybytes())


def num_new_tokens(record: Mapping[str, Any]) -> int:
    """Tokens of a record that were not given."""
    return len(record["tokens"]) - record["num_prompt_tokens"] + len(record["gaps"])


def given_text(record: Mapping[str, Any]) -> str:
    """The front of a record's text, up to the first token that the model chose."""
    text, prompt = record["text"], record["prompt"] or ""
    if record["gaps"] or "completion" not in record:
        return text[: num_alike(text, prompt)]
    # Alone a completion may begin otherwise than behind its prompt: with "##", or without a blank.
    return text[: len(text) - num_alike(text[::-1], record["completion"][::-1])]


def num_alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many letters or tokens both begin with."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in same)


def read_samples(folder: Location) -> list[dict[str, Any]]:
    """All records of a committed samples folder, in the order of their ids.

    Raises:
        InputError: nothing was committed there.
        CorruptFileError: a part does not match the manifest.
    """
    manifest = verified(folder)
    return [record for name in part_names(manifest) for record in read_part(folder / name)]


def first_records(folder: Location, count: int) -> list[dict[str, Any]]:
    """The first records of a committed samples folder, whose files are there.

    Raises:
        InputError: nothing was committed there.
        CorruptFileError: a part is missing or has another size.
    """
    records: list[dict[str, Any]] = []
    for name in part_names(verified(folder, hashes=False)):
        records += read_part(folder / name)
        if len(records) >= count:
            break
    return records[:count]


def part_names(manifest: Manifest) -> list[str]:
    """The part files of a samples folder, in the order of their ids."""
    return sorted(
        name
        for name in manifest.files
        if name.startswith("part-") and name.endswith((".jsonl", ".parquet"))
    )


def read_part(path: Location) -> list[dict[str, Any]]:
    """The records of one part file."""
    if path.suffix == ".jsonl":
        # Not splitlines(): a text may hold other line separators than the newline between records.
        with open_binary(path) as file:
            return [json.loads(line) for line in file]
    import pyarrow.parquet as pq

    with open_binary(path) as file:
        return list(pq.read_table(file).to_pylist())


def find_sample_folders(patterns: Sequence[str]) -> list[Location]:
    """The samples folders that paths, globs and URIs name, each once, sorted.

    Raises:
        InputError: a pattern matches no folder.
    """
    found: set[Location] = set()
    for pattern in patterns:
        if is_uri(pattern):
            found.add(location(pattern))
            continue
        path = local_path(pattern).absolute()
        folders = [
            Path(match)
            for match in ([str(path)] if path.is_dir() else glob.glob(str(path), recursive=True))
            if Path(match).is_dir()
        ]
        if not folders:
            raise InputError(
                f"data_files {pattern!r} matches no folder (looked for {path}); dataset_name "
                "'samples' reads folders that jobs.generate wrote"
            )
        found.update(folders)
    return sorted(found, key=str)


def sample_pieces(folder: Location) -> Iterator[Piece]:
    """One piece per part file of a committed samples folder.

    Raises:
        InputError: nothing was committed there.
        CorruptFileError: a part does not match the manifest.
    """
    for name in part_names(verified(folder)):
        path = folder / name
        yield Piece(path=str(path), start=0, stop=1, num_bytes=size_of(path))


def verified(folder: Location, *, hashes: bool = True) -> Manifest:
    """The manifest of a samples folder, whose files are as it says.

    Args:
        hashes: False looks at presence and size only.

    Raises:
        InputError: nothing was committed there.
        CorruptFileError: a part does not match the manifest.
    """
    try:
        return verify(folder, kind=KIND, hashes=hashes)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: no committed samples there (no MANIFEST.json); run jobs.generate"
        ) from error
