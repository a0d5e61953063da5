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
_TIMEOUT_SECONDS = 30
_COMMIT = re.compile(r"[0-9a-f]{40}")


def open_dataset(
    name: str, config_name: str | None, split: str, *, commit: str | None = None
) -> "Dataset":
    """Load one split, from the cache of `datasets` where it has been loaded before.

    Args:
        commit: of a dataset of the hub, in place of what its name says.

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
        if os.path.exists(name):
            return load_dataset(name, config_name, split=split)
        repository, revision = hub_name(name)
        revision = commit or revision
        dataset = load_dataset(repository, config_name, split=split, revision=revision)
        return _of_revision(dataset, repository, revision, split)
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


def _commit_of(dataset: "Dataset") -> str | None:
    """The commit of a dataset of the hub, by the folder that `datasets` keeps it in; None of
    others.
    """
    files = dataset.cache_files
    folder = Path(files[0]["filename"]).parent.name if files else ""
    return folder if _COMMIT.fullmatch(folder) else None


def _of_revision(
    dataset: "Dataset", repository: str, revision: str | None, split: str
) -> "Dataset":
    """The dataset, if it is of that revision. Where the hub cannot be asked, `datasets` gives
    whichever revision it has loaded last; the right one is then taken from its cache.

    Raises:
        InputError: it is not there.
        Exception: of the hub's client; what is wrong with the hub, where it was to be asked.
    """
    from datasets import config
    from datasets.packaged_modules.cache.cache import Cache
    from huggingface_hub import HfApi

    wanted, found = _cached_commit(repository, revision), _commit_of(dataset)
    if found is None or wanted == found or (wanted is None and revision is None):
        return dataset
    here = Path(dataset.cache_files[0]["filename"]).parent
    if wanted is None or not (here.parent / wanted).is_dir():
        if not config.HF_HUB_OFFLINE:
            asked = HfApi().dataset_info(repository, revision=revision, timeout=_TIMEOUT_SECONDS)
            if asked.sha == found:
                return dataset
        of = "its newest revision" if revision is None else f"revision {revision!r}"
        raise InputError(
            f"dataset_name {repository!r}: {of} is not in the cache of this machine, which has "
            f"{found}, and the hub could not be asked; load it once while the hub can be reached, "
            f"or give {repository}@{found}"
        )

    builder = Cache(
        dataset_name=repository.rpartition("/")[2],
        repo_id=repository,
        config_name=here.parent.parent.name,
        version=here.parent.name,
        hash=wanted,
    )
    builder.download_and_prepare()
    opened: Dataset = builder.as_dataset(split=split)
    return opened


def _cached_commit(repository: str, revision: str | None) -> str | None:
    """What a revision stood for when the hub was last asked, or does by itself."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    folder = repo_folder_name(repo_id=repository, repo_type="dataset")
    reference = Path(constants.HF_HUB_CACHE) / folder / "refs" / (revision or "main")
    return reference.read_text() if reference.is_file() else None


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
    commit = _commit_of(dataset)
    place = f"dataset_name {name!r}, split {split!r}"
    outer = [column for column in columns if column in dataset.column_names]
    if holds_text:
        (column,) = columns
        outer = arrow_path(dataset.features.arrow_schema, column, place)[:1]
    num_bytes = max(sum(dataset.data.column(name).nbytes for name in outer), 1)
    step = max(1, max_bytes * len(dataset) // num_bytes)
    for start in range(0, len(dataset), step):
        stop = min(start + step, len(dataset))
        size = num_bytes * (stop - start) // len(dataset)
        yield Piece(path=path, start=start, stop=stop, num_bytes=size, commit=commit)


def read_dataset(
    piece: Piece, config_name: str | None, split: str, column: str
) -> Iterator[Document]:
    """The cells of `column` in the piece's rows."""

    place = partial(row_place, f"dataset_name {piece.path!r}, split {split!r}")
    dataset = open_dataset(piece.path, config_name, split, commit=piece.commit)
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
    dataset = open_dataset(piece.path, config_name, split, commit=piece.commit)
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
