"""Hugging Face datasets: a name on the hub, a local folder, or one that `save_to_disk` wrote."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokendiff.config.preprocess import FILE_FORMATS
from tokendiff.data.bad_rows import Document
from tokendiff.data.columns import arrow_cells, arrow_path, texts_of
from tokendiff.data.partition import Piece
from tokendiff.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_SLICE_ROWS = 256


def open_dataset(name: str, config_name: str | None, split: str) -> "Dataset":
    """Load one split, from the cache of `datasets` where it has been loaded before.

    Raises:
        InputError: no such dataset, configuration or split, or its files cannot be read.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    if os.path.isfile(name):
        raise InputError(
            f"dataset_name {name!r} is a file; give it as data_files, with dataset_name "
            f"{', '.join(FILE_FORMATS)}"
        )
    try:
        if _was_saved_to_disk(name):
            return _load_from_disk(name, config_name, split)
        return load_dataset(name, config_name, split=split)
    except InputError:
        raise
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(
            f"dataset_name {name!r}, dataset_config_name {config_name!r}, dataset_split {split!r}: "
            f"{reason}{_remedy(error)}"
        ) from error


def dataset_pieces(
    name: str, config_name: str | None, split: str, column: str, max_bytes: int
) -> Iterator[Piece]:
    """Runs of rows that hold about `max_bytes` of text each.

    Raises:
        InputError: as `open_dataset`, or no such column.
    """
    path = (
        os.path.abspath(os.path.expanduser(name))
        if os.path.exists(os.path.expanduser(name))
        else name
    )
    dataset = open_dataset(path, config_name, split)
    place = f"dataset_name {name!r}, split {split!r}"
    outer = arrow_path(dataset.features.arrow_schema, column, place)[0]
    num_bytes = max(dataset.data.column(outer).nbytes, 1)
    step = max(1, max_bytes * len(dataset) // num_bytes)
    for start in range(0, len(dataset), step):
        stop = min(start + step, len(dataset))
        yield Piece(
            path=path, start=start, stop=stop, num_bytes=num_bytes * (stop - start) // len(dataset)
        )


def read_dataset(
    piece: Piece, config_name: str | None, split: str, column: str
) -> Iterator[Document]:
    """The cells of `column` in the piece's rows."""

    def place(row: int) -> str:
        return f"dataset_name {piece.path!r}, split {split!r}: row {row}"

    dataset = open_dataset(piece.path, config_name, split)
    names = arrow_path(dataset.features.arrow_schema, column, place(1))
    dataset = dataset.select_columns(names[:1]).with_format("arrow")
    if len(dataset) < piece.stop:
        raise InputError(
            f"dataset_name {piece.path!r}: has {len(dataset)} rows on this node, but more than "
            f"{piece.stop - 1} where the job was started; every node must see the same version"
        )
    for start in range(piece.start, piece.stop, _SLICE_ROWS):
        table = dataset[start : min(start + _SLICE_ROWS, piece.stop)]
        for number, cell in enumerate(arrow_cells(table.column(0), names), start=start + 1):
            yield from texts_of(cell, column, number, place=place)


def _was_saved_to_disk(folder: str) -> bool:
    return any(
        os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json")
    )


def _load_from_disk(folder: str, config_name: str | None, split: str) -> "Dataset":
    from datasets import DatasetDict, load_from_disk

    if config_name is not None:
        raise InputError(
            f"dataset_config_name {config_name!r}: {folder}, written by save_to_disk, has none"
        )
    dataset = load_from_disk(folder)
    # A dataset saved alone may know the split that it was; one made from scratch does not.
    splits = dataset if isinstance(dataset, DatasetDict) else {str(dataset.split or split): dataset}
    if split not in splits:
        raise InputError(
            f"dataset_split {split!r} is not in {folder}; it has {', '.join(map(repr, splits))}"
        )
    return splits[split]


def _remedy(error: Exception) -> str:
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, ConnectionError):
        return "; give a local folder, or load the dataset once while the hub can be reached"
    if isinstance(error, FileNotFoundError):
        return "; give a hub name or a folder with data files"
    if isinstance(error, DatasetGenerationError):
        return "; data_files, with dataset_name jsonl, json, csv or parquet, leave bad rows out"
    return ""
