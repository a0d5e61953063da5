"""Where text comes from: the plan of what each task reads, and the reading."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tokendiff.artifacts.identity import content_identity
from tokendiff.artifacts.locations import location, size_of
from tokendiff.config.preprocess import FILE_FORMATS
from tokendiff.data import files, hub, tables
from tokendiff.data.bad_rows import BadRow, Document
from tokendiff.data.chats import (
    FORMATS,
    REASONING_FIELDS,
    Conversation,
    check_format,
    find_format,
)
from tokendiff.data.columns import row_place, shown
from tokendiff.data.partition import Partition, Piece, even_pieces, group_pieces
from tokendiff.data.samples import find_sample_folders, read_part, sample_pieces
from tokendiff.errors import InputError

if TYPE_CHECKING:
    from tokendiff.config.preprocess import PreprocessConfig

_TOOL_COLUMNS = ("tools", "functions")  # what a conversation might have called
_BUILTIN_DOCUMENT_CHARS = 2000
_DUMMY_SEED = 0


def plan_partitions(config: "PreprocessConfig") -> list[Partition]:
    """Cut the input into partitions of `partition_bytes` or less, about; the same on any cluster.

    Raises:
        InputError: a file, dataset, split or column is not there, or a file is not what it is said
            to be.
    """
    return plan_input(config)[0]


def plan_input(config: "PreprocessConfig") -> tuple[list[Partition], list[Piece]]:
    """`plan_partitions`, and the same input as earlier versions cut it: the keys of committed
    folders are made of that, so that theirs are known again.
    """
    rows_are = find_dataset_format(config)
    kind, found = _pieces(config, rows_are)
    pieces, old, size = list(found), known_files(config), config.partition_bytes
    as_before: list[Piece] = []
    groups: list[tuple[tuple[Piece, ...], bool]] = []
    for is_new in (True, False):
        chosen = [piece for piece in pieces if (piece.path not in old) == is_new]
        as_before += (piece for group in group_pieces(chosen, size) for piece in group)
        groups += ((group, is_new) for group in group_pieces(even_pieces(chosen, size), size))
    partitions = [
        Partition(
            index=index,
            format=kind,
            pieces=group,
            text_column=config.text_column,
            sample_by=config.sample_by,
            dataset_config_name=config.dataset_config_name,
            dataset_split=config.dataset_split,
            is_new=is_new,
            dataset_format=rows_are,
        )
        for index, (group, is_new) in enumerate(groups)
    ]
    return partitions, as_before


def known_files(config: "PreprocessConfig") -> set[str]:
    """The files of this config that the model of `new_since` was trained on."""
    if config.new_since is None:
        return set()
    known = {tuple(identity) for identity in trained_on(config)}
    paths = files.find_files(config.data_files)
    return {path for path in paths if tuple(content_identity(location(path))) in known}


def trained_on(config: "PreprocessConfig") -> list[list[Any]]:
    """The identities that the file `new_since` lists.

    Raises:
        InputError: it is no such file.
    """
    if config.new_since is None:
        return []
    try:
        identities: list[list[Any]] = json.loads(location(config.new_since).read_text())
    except ConnectionError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"new_since {config.new_since}: not a list of files ({error}); write models:/NAME@ALIAS"
        ) from error
    return identities


def file_identities(config: "PreprocessConfig") -> list[list[Any]]:
    """The files that a model trained on this data has seen, also before it started here."""
    is_of_files = config.dataset_name in FILE_FORMATS
    paths = files.find_files(config.data_files) if is_of_files else []
    here = [content_identity(location(path)) for path in paths]
    unique = {json.dumps(identity): identity for identity in [*trained_on(config), *here]}
    return [unique[key] for key in sorted(unique)]


def read_documents(partition: Partition) -> Iterator[Document]:
    """Stream the texts of a partition, or what stands in the place of one that is none.

    Raises:
        InputError: a file cannot be read as what it is said to be, or no row of it has the column.
    """
    for piece in partition.pieces:
        yield from _read_piece(partition, piece)


def read_conversations(partition: Partition) -> Iterator[Conversation | BadRow]:
    """Stream the conversations of a partition, or what stands in the place of one that is none.

    Raises:
        InputError: a file cannot be read as what it is said to be.
    """
    form = FORMATS[partition.dataset_format]
    for piece in partition.pieces:
        for place, row in _read_rows(partition, piece, form.columns):
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                if not form.is_in(row):
                    raise ValueError(
                        f"no {partition.dataset_format} row: it has the columns "
                        f"{', '.join(map(repr, row)) or 'none'}"
                    )
                conversation = form.read(row)
            except ValueError as error:
                yield BadRow(place=place(), reason=str(error), row=shown(row))
            else:
                yield replace(conversation, place=place)


def find_dataset_format(config: "PreprocessConfig") -> str:
    """What the rows are: text, or one of `tokendiff.data.chats.FORMATS`, by the config or else by
    their columns.

    Raises:
        InputError: the columns are not those of the format that the config names, or cannot be
            read.
    """
    takes_rows = config.dataset_name not in ("builtin", "text", "samples")
    is_text = config.dataset_format == "text" or "text_column" in config.model_fields_set
    if config.use_dummy_data or not takes_rows or is_text:
        return "text"
    columns = _columns(config)
    if config.dataset_format is not None:
        if columns:
            check_format(
                config.dataset_format, columns, place=f"dataset_name {config.dataset_name!r}"
            )
        return config.dataset_format
    return "text" if config.text_column in columns else find_format(columns) or "text"


def format_note(config: "PreprocessConfig") -> str | None:
    """What to say of rows that are read as text because they have such a column, where the config
    says nothing, and that fit a chat format too; None of all others.
    """
    is_told = config.dataset_format is not None or "text_column" in config.model_fields_set
    if is_told or config.use_dummy_data or config.dataset_name in ("builtin", "text", "samples"):
        return None
    with suppress(InputError):
        columns = _columns(config)
        other = find_format(columns)
        if other is not None and config.text_column in columns:
            return (
                f"the rows have a column {config.text_column!r} and are read as text; they fit a "
                f"chat format too: set dataset_format {other} to train on their answers, or "
                "dataset_format text if they are meant as text"
            )
    return None


def tool_columns(config: "PreprocessConfig") -> list[str]:
    """The columns of conversations that say what could have been called."""
    with suppress(InputError):
        return [name for name in _columns(config) if name in _TOOL_COLUMNS]
    return []


def left_out_in_words(columns: Sequence[str], num_without_reasoning: int) -> str:
    """What conversations hold that no model gets to see; "" where there is nothing.

    Args:
        columns: from `tool_columns`.
    """
    found = [f"the column {name!r}" for name in columns]
    if num_without_reasoning:
        names = " or ".join(REASONING_FIELDS)
        found.append(f"the {names} of {num_without_reasoning:,} conversations")
    return ", and ".join(found)


def holds_chats(config: "PreprocessConfig") -> bool:
    """Whether the rows are known to be conversations: by the config, or by files that are there.
    A dataset of the hub is not asked.
    """
    if config.dataset_format is not None or config.dataset_name not in FILE_FORMATS:
        return config.dataset_format not in (None, "text")
    with suppress(InputError):
        return find_dataset_format(config) != "text"
    return False


def _columns(config: "PreprocessConfig") -> list[str]:
    """The columns of the first file that has rows, or of the dataset."""
    name = config.dataset_name
    if name not in FILE_FORMATS:
        return hub.dataset_columns(name, config.dataset_config_name, config.dataset_split)
    for path in files.find_files(config.data_files):
        if name == "parquet":
            return files.parquet_columns(path)
        if name in ("csv", "tsv"):
            columns = tables.csv_columns(path, name)
        elif name == "json":
            columns = _first_names(row for _, row in tables.json_rows(path)) if _size(path) else []
        else:
            whole = Piece(path=path, start=0, stop=_size(path), num_bytes=0)
            columns = _first_names(row for _, row in files.jsonl_rows(whole))
        if columns:
            return columns
    return []


def _size(path: str) -> int:
    return size_of(location(path))


def _first_names(rows: Iterator[dict[str, Any] | BadRow]) -> list[str]:
    return next((list(row) for row in rows if not isinstance(row, BadRow)), [])


def _read_rows(
    partition: Partition, piece: Piece, columns: Sequence[str]
) -> Iterator[tuple[Callable[[], str], Any]]:
    """Rows as objects, of which these columns are wanted, each with what says its place."""
    match partition.format:
        case "jsonl":
            return files.jsonl_rows(piece)
        case "json":
            rows = tables.json_rows(piece.path)
            return ((partial(row_place, piece.path, number), row) for number, row in rows)
        case "csv" | "tsv" as kind:
            rows = tables.csv_rows(piece.path, kind)
            return ((partial(tables.line_place, piece.path, line), row) for line, row in rows)
        case "parquet":
            return files.parquet_rows(piece, columns)
        case "datasets":
            return hub.dataset_rows(
                piece, partition.dataset_config_name, partition.dataset_split, columns
            )
    raise AssertionError(f"no reader of rows for format {partition.format!r}")


def sample_records(partition: Partition) -> Iterator[dict[str, Any]]:
    """The records of a partition of samples, in the order of their ids."""
    for piece in partition.pieces:
        yield from read_part(location(piece.path))


def dummy_rows(
    partition: Partition, token_ids: np.ndarray, max_length: int
) -> Iterator[np.ndarray]:
    """Rows of random tokens, [max_length] int32 each, decided by the row's number."""
    for piece in partition.pieces:
        for row in range(piece.start, piece.stop):
            generator = np.random.default_rng([_DUMMY_SEED, row])
            yield generator.choice(token_ids, max_length).astype(np.int32)


def _pieces(config: "PreprocessConfig", rows_are: str) -> tuple[str, Iterator[Piece]]:
    name, is_text = config.dataset_name, rows_are == "text"
    columns = (config.text_column,) if is_text else FORMATS[rows_are].columns
    if config.use_dummy_data:
        row_bytes = 4 * config.max_length
        return "dummy", _one_by_one([row_bytes] * config.num_dummy_samples)
    if name == "builtin":
        return "builtin", _one_by_one([len(document.encode()) for document in builtin_documents()])
    if name == "samples":
        folders = find_sample_folders(config.data_files)
        return name, (piece for folder in folders for piece in sample_pieces(folder))
    if name == "parquet":
        return name, (
            p
            for path in files.find_files(config.data_files)
            for p in files.parquet_pieces(path, *columns, holds_text=is_text)
        )
    if name in ("csv", "tsv"):
        return name, (
            p
            for path in files.find_files(config.data_files)
            for p in (
                tables.csv_pieces(path, name, config.text_column)
                if is_text
                else tables.whole_piece(path)
            )
        )
    if name == "json":
        return name, (
            p for path in files.find_files(config.data_files) for p in tables.whole_piece(path)
        )
    if name in ("text", "jsonl"):
        is_whole = name == "text" and config.sample_by == "document"
        max_bytes = None if is_whole else config.partition_bytes
        paths = files.find_files(config.data_files)
        return name, (p for path in paths for p in files.text_pieces(path, max_bytes=max_bytes))
    return "datasets", hub.dataset_pieces(
        name,
        config.dataset_config_name,
        config.dataset_split,
        columns,
        config.partition_bytes,
        holds_text=is_text,
    )


def _read_piece(partition: Partition, piece: Piece) -> Iterator[Document]:
    match partition.format:
        case "builtin":
            return iter(builtin_documents()[piece.start : piece.stop])
        case "text" if partition.sample_by == "document":
            return files.read_whole(piece)
        case "text":
            return files.read_lines(piece)
        case "jsonl":
            return files.read_jsonl(piece, partition.text_column)
        case "json":
            return tables.read_json(piece, partition.text_column)
        case "csv" | "tsv" as kind:
            return tables.read_csv(piece, kind, partition.text_column)
        case "parquet":
            return files.read_parquet(piece, partition.text_column)
        case "datasets":
            return hub.read_dataset(
                piece, partition.dataset_config_name, partition.dataset_split, partition.text_column
            )
    raise AssertionError(f"no reader of text for format {partition.format!r}")


def _one_by_one(sizes: list[int]) -> Iterator[Piece]:
    for index, size in enumerate(sizes):
        yield Piece(path="", start=index, stop=index + 1, num_bytes=size)


@cache
def builtin_documents() -> tuple[str, ...]:
    """CPython's own documentation: neighbouring paragraphs of a topic, about 2,000 characters each.

    Whole topics are too few (79) and too unequal for a split by document.
    """
    from pydoc_data.topics import topics

    documents = []
    for _, text in sorted(topics.items()):
        document = ""
        for paragraph in text.split("\n\n"):
            if document and len(document) + len(paragraph) > _BUILTIN_DOCUMENT_CHARS:
                documents.append(document)
                document = ""
            document += paragraph + "\n\n"
        documents.append(document)
    return tuple(document.strip("\n") for document in documents)
