"""Hugging Face datasets: a name on the hub, a local folder, or one that `save_to_disk` wrote."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.model_folders import hub_name
from tokendiff.config.preprocess import FILE_FORMATS
from tokendiff.data.bad_rows import Document
from tokendiff.data.columns import arrow_cells, arrow_path, row_place, texts_of
from tokendiff.data.partition import Piece
from tokendiff.errors import InputError, raise_outage

if TYPE_CHECKING:
    from datasets import Dataset

_SLICE_ROWS = 256
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_dataset(name: str, config_name: str | None, split: str) -> "Dataset":
    """Load one split, from the cache of `datasets` where it has been loaded before.

    Raises:
        InputError: no such dataset, configuration or split, or its files cannot be read.
        ConnectionError: the hub does not answer, and the dataset is not in the cache.
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
        is_local = os.path.exists(name)
        repository, revision = (name, None) if is_local else hub_name(name)
        dataset = load_dataset(repository, config_name, split=split, revision=revision)
    except InputError:
        raise
    except Exception as error:  # of the client of a hub too, whose errors have no class in common
        place = f"dataset_name {name!r}, dataset_config_name {config_name!r}, "
        place += f"dataset_split {split!r}"
        raise_outage(error, place)
        if not isinstance(error, DatasetsError | OSError | ValueError | RuntimeError):
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(f"{place}: {reason}{_remedy(error)}") from error
    if revision is not None:
        _check_commit(dataset, repository, revision)
    return dataset


def _check_commit(dataset: "Dataset", repository: str, revision: str) -> None:
    """See that a dataset is of the revision that was asked for: where `datasets` cannot ask the
    hub, it takes the newest in its cache, of any revision.

    Raises:
        InputError: it is of another one, offline.
        ConnectionError: it is, and the hub does not answer.
    """
    from datasets import config
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository, repo_type="dataset")
    ref = Path(constants.HF_HUB_CACHE, folder, "refs", revision)
    commit = ref.read_text().strip() if ref.is_file() else revision
    # The folder of a dataset in the cache is named after its commit; of old versions it was not.
    found = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    others = [name for name in found if _COMMIT.fullmatch(name) and not name.startswith(commit)]
    if not others:
        return
    problem = f"dataset_name '{repository}@{revision}': the newest in the cache is of another "
    problem += f"commit, {others[0]}, and the hub "
    if config.HF_HUB_OFFLINE:
        raise InputError(f"{problem}is not asked (HF_HUB_OFFLINE is set); load it once without")
    raise ConnectionError(f"{problem}does not answer as it should")


def dataset_columns(name: str, config_name: str | None, split: str) -> list[str]:
    """
    Raises:
        InputError: as `open_dataset`.
    """
    return list(open_dataset(_local_path(name), config_name, split).column_names)


def dataset_pieces(
    name: str,
    config_name: str | None,
    split: str,
    columns: Sequence[str],
    max_bytes: int,
    *,
    holds_text: bool = True,
) -> Iterator[Piece]:
    """Runs of rows that hold about `max_bytes` in these columns each.

    Args:
        holds_text: of the one column, which must be there.

    Raises:
        InputError: as `open_dataset`, or no such column.
    """
    path = _local_path(name)
    dataset = open_dataset(path, config_name, split)
    place = f"dataset_name {name!r}, split {split!r}"
    outer = [column for column in columns if column in dataset.column_names]
    if holds_text:
        (column,) = columns
        outer = arrow_path(dataset.features.arrow_schema, column, place)[:1]
    num_bytes = max(sum(dataset.data.column(name).nbytes for name in outer), 1)
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

    place = partial(row_place, f"dataset_name {piece.path!r}, split {split!r}")
    dataset = open_dataset(piece.path, config_name, split)
    names = arrow_path(dataset.features.arrow_schema, column, place(1))
    dataset = dataset.select_columns(names[:1]).with_format("arrow")
    _check_length(dataset, piece)
    for start in range(piece.start, piece.stop, _SLICE_ROWS):
        table = dataset[start : min(start + _SLICE_ROWS, piece.stop)]
        for number, cell in enumerate(arrow_cells(table.column(0), names), start=start + 1):
            yield from texts_of(cell, column, number, place=place)


def dataset_rows(
    piece: Piece, config_name: str | None, split: str, columns: Sequence[str]
) -> Iterator[tuple[Callable[[], str], dict[str, Any]]]:
    """The piece's rows, of those columns that are there, each with what says its place."""
    dataset = open_dataset(piece.path, config_name, split)
    there = [name for name in columns if name in dataset.column_names]
    dataset = dataset.select_columns(there).with_format("arrow")
    _check_length(dataset, piece)
    name = f"dataset_name {piece.path!r}, split {split!r}"
    for start in range(piece.start, piece.stop, _SLICE_ROWS):
        table = dataset[start : min(start + _SLICE_ROWS, piece.stop)]
        for number, row in enumerate(table.to_pylist(), start=start + 1):
            yield partial(row_place, name, number), row


def _check_length(dataset: "Dataset", piece: Piece) -> None:
    if len(dataset) < piece.stop:
        raise InputError(
            f"dataset_name {piece.path!r}: has {len(dataset)} rows on this node, but more than "
            f"{piece.stop - 1} where the job was started; every node must see the same version"
        )


def _local_path(name: str) -> str:
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def _was_saved_to_disk(folder: str) -> bool:
    return any(
        os.path.isfile(os.path.join(folder, name)) for name in ("dataset_dict.json", "state.json")
    )


def _load_from_disk(folder: str, config_name: str | None, split: str) -> "Dataset":
    from datasets import DatasetDict, load_from_disk

    if config_name is not None:
        raise InputError(
            f"dataset_config_name {config_name!r}: {folder} was written by save_to_disk and "
            "has no configurations; remove it"
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
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    if isinstance(error, DatasetNotFoundError):
        return (
            "; give a hub name or a folder with data files, and for a private or gated dataset set "
            "HF_TOKEN to a token that may read it"
        )
    if isinstance(error, ConnectionError):
        return "; give a local folder, or load the dataset once while the hub can be reached"
    if isinstance(error, FileNotFoundError):
        return "; give a hub name or a folder with data files"
    if isinstance(error, DatasetGenerationError):
        return "; data_files, with dataset_name jsonl, json, csv or parquet, leave bad rows out"
    return ""
