"""Files of samples: written whole or not at all, read back in the order of their ids."""

import json
from pathlib import Path
from typing import Any

from tokendiff.errors import InputError
from tokendiff.manifest import verify, write_atomically

KIND = "samples"


def write_part(path: Path, records: list[dict[str, Any]]) -> None:
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
            "num_model_calls": pa.int64(),
            "seconds": pa.float64(),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records, schema=schema), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """All records of a committed samples folder, in the order of their ids.

    Raises:
        InputError: nothing was committed there.
        CorruptFileError: a part does not match the manifest.
    """
    try:
        manifest = verify(folder, kind=KIND)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: no committed samples there (no MANIFEST.json); run jobs.generate"
        ) from error
    records: list[dict[str, Any]] = []
    for name in sorted(manifest.files):
        if name.endswith(".jsonl") and name.startswith("part-"):
            # Not splitlines(): a text may hold other line separators than the newline between
            # records.
            with open(folder / name, encoding="utf-8", newline="\n") as file:
                records += [json.loads(line) for line in file]
        elif name.endswith(".parquet"):
            import pyarrow.parquet as pq

            records += pq.read_table(folder / name).to_pylist()
    return records
