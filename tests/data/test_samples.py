"""Files of samples as other tools read them."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from tokendiff.data.samples import write_part

RECORD: dict[str, Any] = {
    "id": 0,
    "prompt": "Why?",
    "num_prompt_tokens": 1,
    "gaps": [],
    "tokens": [5, 6],
    "text": "Why? So.",
    "completion": " So.",
    "finish_reason": "stop",
    "num_model_calls": 1,
    "tokens_per_forward": 1.0,
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_datasets_reads_parts_of_which_one_holds_bad_prompts_alone(
    suffix: str, tmp_path: Path
) -> None:
    paths = [tmp_path / f"part-0000{part}.{suffix}" for part in range(3)]
    for path, records in zip(paths, ([RECORD], [], [{**RECORD, "id": 2}]), strict=True):
        write_part(path, records)

    read = datasets.load_dataset(
        "json" if suffix == "jsonl" else suffix,
        data_files=[str(path) for path in paths],
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )

    assert read["id"][:] == [0, 2]
    assert read["text"][:] == ["Why? So."] * 2
