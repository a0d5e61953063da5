"""Text to a committed folder of token shards, one Ray Data task per partition; a single partition
needs no Ray.
"""

import os
import pickle
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.identity import file_identity
from tokendiff.artifacts.locations import Location, files_under, location, remove, upload
from tokendiff.artifacts.manifest import (
    COMMITS,
    Manifest,
    claim_folder,
    commit,
    fingerprint,
    is_committed,
    sha256_of,
    verify,
)
from tokendiff.cluster.progress import JobProgress, Reporter
from tokendiff.cluster.session import at_node, data_context, need_ray, works_here
from tokendiff.config.preprocess import FILE_FORMATS, SAMPLES
from tokendiff.data.bad_rows import ERRORS, ErrorCount, bad_rows_in_words
from tokendiff.data.chat_documents import ChatOptions
from tokendiff.data.partition import Partition, Piece
from tokendiff.data.preprocess import (
    ROW_GROUP_ROWS,
    SPLITS,
    PartitionStats,
    preprocess_partition,
    training_text,
)
from tokendiff.data.rows import KIND, too_few_rows
from tokendiff.data.sources import (
    file_identities,
    format_note,
    left_out_in_words,
    plan_input,
    plan_partitions,
    tool_columns,
)
from tokendiff.data.streams import is_compressed
from tokendiff.data.templates import ChatRenderer, read_template
from tokendiff.data.tokenizers import build_tokenizer, is_of_tokenizer
from tokendiff.errors import InputError, naming_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tokendiff.config.preprocess import PreprocessConfig
    from tokendiff.diffusion.interfaces import Figures, OnProgress
    from tokendiff.training.trainer import OnEvent

_MEMORY_REMEDY = "lower partition_bytes, or give more memory"
_MAX_BLOCKS = 1000
_CACHE_FILE = re.compile(r"(^|/)cache-[^/]*\.arrow$")
Row = dict[str, Any]

_tokenizers: dict[tuple[tuple[str, str], ...], Any] = {}  # of this process, by what is in its files


def preprocess(
    config: "PreprocessConfig",
    *,
    tokenizer_name_or_path: str,
    output_dir: str | Location,
    fill_answers: bool = False,
    on_event: "OnEvent" = lambda event, **fields: None,
) -> Manifest:
    """Tokenize, pack and split the configured text on the Ray cluster, or in this process.

    The folder's content is a function of the input and the config alone. One that was already made
    is returned as it is, after a check that its files are there.

    Args:
        tokenizer_name_or_path: as `data.tokenizers.build_tokenizer` takes it.
        output_dir: a URI, or a folder that every node sees under the same path.
        fill_answers: of conversations; see `tokendiff.data.chat_documents.ChatOptions`. The config
            says so too, where it is not left open for the objective to decide.
        on_event: hears "warning" and "progress", in this process.

    Raises:
        InputError: the input, the tokenizer or the folder cannot be used, or more than max_errors
            rows cannot; nothing is committed.
        CorruptFileError: the folder was committed, but a file is missing or cut short.
    """
    output_dir = location(output_dir)
    if isinstance(output_dir, Path):
        output_dir = output_dir.absolute()
    partitions, pieces = plan_input(config)
    if not partitions:
        raise InputError(f"dataset_name {config.dataset_name!r}: the corpus is empty (0 bytes)")
    chats = ChatOptions.of(config, partitions[0].dataset_format, fill_answers=fill_answers)
    key = _key(config, tokenizer_name_or_path, pieces, chats)
    folders = _folders(config, tokenizer_name_or_path)
    if is_committed(output_dir):
        return _committed(output_dir, key, folders)
    mark = _claim(output_dir)
    tokenizer, notes = _make_tokenizer(config, tokenizer_name_or_path, partitions, on_event)
    if chats is not None:
        ChatRenderer(tokenizer=tokenizer, train_on=chats.train_on).check(chats.dataset_format)
    tokenizer_files = _save_tokenizer(tokenizer, output_dir)
    # Asked of the input now: it may be away by the time that the work is done.
    note, tools = format_note(config), [] if chats is None else tool_columns(config)
    errors = ErrorCount(
        config.max_errors,
        what="rows",
        folder=output_dir / ERRORS,
        remedy="mend them, or raise max_errors to leave them out",
    )
    stats = []
    if not works_here(len(partitions)):
        need_ray()
    with JobProgress(on_event) as progress:
        total = sum(map(_num_bytes, partitions))
        progress.begin("bytes", total=total, tokens_per_row=config.max_length)
        for done in _run(config, partitions, chats, output_dir, tokenizer_files, progress.reporter):
            stats.append(done)
            if done.errors is not None:
                errors.add(done.index, done.errors.num_rows, done.errors.first)
            shards = done.shards.values()
            figures = (_num_bytes(partitions[done.index]), sum(shard.tokens for shard in shards))
            num_rows = sum(shard.rows for shard in shards)
            progress.finish(done.index, figures, rows=num_rows, errors=errors.num_rows)
    stats.sort(key=lambda partition: partition.index)
    metadata = _metadata(config, tokenizer_name_or_path, tokenizer, stats, chats, tools)
    warnings = _check_corpus(config, metadata, errors)
    for message in warnings:
        on_event("warning", message=message)
    if left_out := metadata.get("chats", {}).get("left_out"):
        on_event(
            "advice",
            message=f"the model does not see {left_out}; write what it should see into the content "
            "of the messages",
        )
    if num_joined := sum(partition.joined for partition in stats):
        on_event("advice", message=_joined_in_words(num_joined))
    if note is not None:
        metadata["dataset_format"] = "text"
        on_event("advice", message=note)
    known_sha256 = {file.path: file.sha256 for part in stats for file in part.files}
    _check_files(output_dir, known_sha256)
    metadata |= {"key": key, "notes": notes + warnings, "trained_on": file_identities(config)}
    metadata |= {"errors": errors.num_rows, "folders": folders}
    if (sha := partitions[0].pieces[0].commit) is not None:
        metadata[COMMITS] = {"dataset_name": sha}
    manifest = commit(output_dir, kind=KIND, metadata=metadata, known_sha256=known_sha256)
    mark.unlink()
    return manifest


def _key(
    config: "PreprocessConfig",
    tokenizer: str,
    pieces: Sequence[Piece],
    chats: ChatOptions | None,
) -> str:
    """Changes with the config and with the input; the input may be moved as a whole."""
    runs = [[Path(p.path).name, p.start, p.stop, p.num_bytes] for p in pieces]
    paths = sorted({piece.path for piece in pieces if piece.path})
    files = [file_identity(path) for path in map(location, paths) if path.is_file()]
    of_chats: dict[str, Any] = {}
    if chats is not None:
        of_chats["chats"] = vars(chats)
        if config.chat_template is not None:
            of_chats["chat_template"] = file_identity(location(config.chat_template))
    return fingerprint(
        {
            **{"config": config.result_fields(), "tokenizer": tokenizer, "pieces": runs},
            **{"files": files, **of_chats},
        }
    )


def _folders(config: "PreprocessConfig", tokenizer: str) -> dict[str, Any]:
    """The content of a dataset and a tokenizer that are folders on this machine. Not part of the
    key: those of committed folders know the names and the sizes alone.
    """
    found: dict[str, Any] = {}
    if config.dataset_name not in ("builtin", SAMPLES, *FILE_FORMATS) and not config.use_dummy_data:
        dataset = location(config.dataset_name)
        if isinstance(dataset, Path) and dataset.is_dir():
            # What `datasets` keeps of a map or a shuffle is written beside what it is of.
            names = [name for name in files_under(dataset) if not _CACHE_FILE.search(name)]
            found["dataset"] = [file_identity(dataset / name) for name in names]
    if tokenizer not in ("bytes", "bpe"):
        folder = location(tokenizer)
        if isinstance(folder, Path) and folder.is_dir():
            # A model's folder has weights beside it, which may change.
            files = sorted(
                path
                for path in folder.iterdir()
                if path.is_file() and (is_of_tokenizer(path) or "chat_template" in path.name)
            )
            found["tokenizer"] = [file_identity(path) for path in files]
    return found


def _committed(output_dir: Location, key: str, folders: dict[str, Any]) -> Manifest:
    manifest = verify(output_dir, kind=KIND, hashes=False)
    metadata = manifest.metadata
    # What is not there now cannot have changed, and an earlier version noted nothing.
    noted = {name: there for name, there in metadata.get("folders", {}).items() if name in folders}
    if metadata.get("key") != key or any(folders[name] != noted[name] for name in noted):
        raise InputError(
            f"output_dir {output_dir} holds token shards of another config or of other input; "
            "choose another output_dir, or delete this one"
        )
    return manifest


def _claim(output_dir: Location) -> Location:
    """Make the folder ready, emptied of what an attempt that was never committed left behind.

    Returns:
        The mark of an unfinished attempt: only a folder that has it is emptied. To be removed once
        the folder is committed.
    """
    mark = claim_folder(output_dir, kind=KIND)
    for name in (*SPLITS, ERRORS, "tokenizer"):
        remove(output_dir / name)
    return mark


def _save_tokenizer(tokenizer: Any, output_dir: Location) -> dict[str, bytes]:
    """Write the tokenizer beside the shards; returns its files where tasks cannot open those."""
    if isinstance(output_dir, Path):
        tokenizer.save_pretrained(output_dir / "tokenizer")
        return {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    for name, data in files.items():
        (output_dir / "tokenizer" / name).write_bytes(data)
    return files


def _make_tokenizer(
    config: "PreprocessConfig",
    name_or_path: str,
    partitions: Sequence[Partition],
    on_event: "OnEvent",
) -> tuple["PreTrainedTokenizerBase", list[str]]:
    notes = []
    source = partitions
    if config.use_dummy_data and name_or_path == "bpe":
        source = plan_partitions(type(config)())
        notes.append("bpe is trained on the builtin corpus, since dummy data has no text")
    if config.dataset_name == SAMPLES and name_or_path == "bpe":
        raise InputError(
            f"tokenizer_name_or_path {name_or_path!r}: samples are token ids; give the tokenizer "
            "of the model that wrote them, a transformers name or path"
        )
    if name_or_path == "bpe":
        on_event("doing", what=f"training a tokenizer of {config.vocab_size:,} tokens")
    documents = training_text(source, config.heldout_fraction)
    tokenizer, more = build_tokenizer(
        name_or_path, documents=documents, vocab_size=config.vocab_size
    )
    if config.chat_template is not None:
        tokenizer.chat_template = read_template(config.chat_template)
    return tokenizer, notes + more


def _run(
    config: "PreprocessConfig",
    partitions: Sequence[Partition],
    chats: ChatOptions | None,
    output_dir: Location,
    tokenizer_files: dict[str, bytes],
    reporter: Reporter,
) -> Iterator[PartitionStats]:
    """Preprocess the partitions in tasks of one CPU, or a single one in this process; yields them
    in the order of completion.
    """
    work = _task(config, chats, output_dir, tokenizer_files, reporter)
    # Pickled here: Ray Data would warn that these are not Arrow values, and pickle them itself.
    items = [{"partition": pickle.dumps(partition)} for partition in partitions]
    for row in map(work, items) if works_here(len(items)) else _by_tasks(work, items):
        if row["error"]:
            raise InputError(row["error"])
        yield pickle.loads(row["stats"])


def _by_tasks(work: Callable[[Row], Row], items: list[Row]) -> Iterator[Row]:
    import ray.data

    driver = ray.util.get_node_ip_address()

    def on_worker(row: Row) -> Row:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task owns one CPU
        done = work(row)
        if done["is_missing"]:
            done["error"] = str(at_node(InputError(done["error"]), driver))
        return done

    with data_context():
        source = ray.data.from_items(items, override_num_blocks=min(len(items), _MAX_BLOCKS))
        yield from source.map(on_worker).iter_rows()


def _num_bytes(partition: Partition) -> int:
    return sum(piece.num_bytes for piece in partition.pieces)


def _task(
    config: "PreprocessConfig",
    chats: ChatOptions | None,
    output_dir: Location,
    tokenizer_files: dict[str, bytes],
    reporter: Reporter,
) -> Callable[[Row], Row]:
    max_length, heldout_fraction = config.max_length, config.heldout_fraction
    max_errors = config.max_errors

    def work(row: Row) -> Row:
        partition = pickle.loads(row["partition"])
        try:
            with (
                naming_memory(lambda: _place_of(partition), _MEMORY_REMEDY),
                _on_this_machine(output_dir, tokenizer_files) as folder,
            ):
                stats = preprocess_partition(
                    partition,
                    tokenizer=tokenizer_in(folder / "tokenizer"),
                    max_length=max_length,
                    heldout_fraction=heldout_fraction,
                    output_dir=folder,
                    max_errors=max_errors,
                    chats=chats,
                    on_progress=_of_partition(partition, reporter),
                )
                if not isinstance(output_dir, Path):
                    upload(folder, output_dir, [file.path for file in stats.files])
        except InputError as error:
            # As a value: Ray would log and wrap an exception, and bad input is no crash.
            is_missing = isinstance(error.__cause__, FileNotFoundError)
            return {"stats": b"", "error": str(error), "is_missing": is_missing}
        return {"stats": pickle.dumps(stats), "error": "", "is_missing": False}

    return work


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer in a folder. It is kept for the next partition, which may have the same one in
    another folder.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = tuple((str(path.relative_to(folder)), sha256_of(path)) for path in paths)
    opened = _tokenizers.get(files)
    if opened is None:
        from transformers import AutoTokenizer

        opened = AutoTokenizer.from_pretrained(folder)
        _tokenizers.clear()
        _tokenizers[files] = opened
    return opened


def _place_of(partition: Partition) -> str:
    first, last = partition.pieces[0], partition.pieces[-1]
    return (
        f"partition {partition.index}, from {first.path} at {first.start:,} to {last.path} at "
        f"{last.stop:,}"
    )


def _of_partition(partition: Partition, reporter: Reporter) -> "OnProgress":
    """Counts text in the bytes that it takes in files; of packed ones nothing, until they are done:
    how much text is in them is not known.
    """
    most = _num_bytes(partition)
    if any(is_compressed(piece.path) for piece in partition.pieces):
        most = 0
    tell = reporter.of(partition.index)

    def on_progress(figures: "Callable[[], Figures]") -> None:
        def in_files() -> "Figures":
            num_bytes, num_tokens = figures()
            return min(num_bytes, most), num_tokens

        tell(in_files)

    return on_progress


@contextmanager
def _on_this_machine(output_dir: Location, tokenizer_files: dict[str, bytes]) -> Iterator[Path]:
    """The folder itself, or one in its place that has the tokenizer, and is deleted afterwards."""
    if isinstance(output_dir, Path):
        if not (output_dir / "tokenizer").is_dir():
            raise InputError(_not_shared(output_dir))
        yield output_dir
        return
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "tokenizer").mkdir()
        for file, data in tokenizer_files.items():
            (Path(name) / "tokenizer" / file).write_bytes(data)
        yield Path(name)


def _metadata(
    config: "PreprocessConfig",
    tokenizer_name_or_path: str,
    tokenizer: "PreTrainedTokenizerBase",
    stats: Sequence[PartitionStats],
    chats: ChatOptions | None,
    tools: Sequence[str],
) -> dict[str, Any]:
    splits = {split: _split_totals(stats, split) for split in SPLITS}
    num_tokens = sum(split["tokens"] for split in splits.values())
    capacity = config.max_length * sum(split["rows"] for split in splits.values())
    return {
        "config": config.result_fields(),
        "tokenizer": tokenizer_name_or_path,
        "vocab_size": len(tokenizer),
        "max_length": config.max_length,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "padded_fraction": 1.0 - num_tokens / capacity if capacity else 0.0,
        "dropped": {
            "empty": sum(partition.dropped_empty for partition in stats),
            "not_text": sum(partition.dropped_not_text for partition in stats),
        },
        "splits": splits,
        **({"isolate_documents": True} if config.isolate_documents else {}),
        **({} if chats is None else _of_chats(config, stats, chats, tools)),
    }


def _of_chats(
    config: "PreprocessConfig",
    stats: Sequence[PartitionStats],
    chats: ChatOptions,
    tools: Sequence[str],
) -> dict[str, Any]:
    isolate = config.isolate_documents
    left_out = left_out_in_words(tools, sum(partition.without_reasoning for partition in stats))
    return {
        "chats": {
            **vars(chats),
            "num_too_long": sum(partition.dropped_too_long for partition in stats),
            "num_cut": sum(partition.cut for partition in stats),
            "example": next((part.example for part in stats if part.example), ""),
            **({"left_out": left_out} if left_out else {}),
        },
        "isolate_documents": True if isolate is None else isolate,
    }


def _joined_in_words(count: int) -> str:
    return (
        f"in {count:,} conversations the text before an answer ends in a blank, which the "
        "tokenizer joins to the answer's first word; a prompt that ends in that blank ends in a "
        "token which is not seen in training. Let the chat template (or the prompts, where there "
        "is none) ask for an answer without a blank at the end, and begin the answer with it"
    )


def _split_totals(stats: Sequence[PartitionStats], split: str) -> dict[str, Any]:
    shards = [partition.shards[split] for partition in stats if split in partition.shards]
    return {
        "rows": sum(shard.rows for shard in shards),
        "tokens": sum(shard.tokens for shard in shards),
        "bytes": sum(shard.num_bytes for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "highest_token": max((shard.highest_token for shard in shards), default=-1),
        "row_group_rows": ROW_GROUP_ROWS,
        "files": [{"path": shard.path, "rows": shard.rows} for shard in shards],
    }


def _check_corpus(
    config: "PreprocessConfig", metadata: dict[str, Any], errors: ErrorCount
) -> list[str]:
    """Warnings; a corpus that leaves nothing to train on is an error."""
    splits, dropped = metadata["splits"], metadata["dropped"]
    train, heldout = splits["train"]["rows"], splits["heldout"]["rows"]
    too_long = longer = ""
    if num_too_long := metadata.get("chats", {}).get("num_too_long", 0):
        too_long = f"; {num_too_long} conversations too long for max_length {config.max_length}"
        longer = "raise max_length, or "
    if train + heldout == 0:
        where = "the data" if "chats" in metadata else "the data and text_column"
        raise InputError(
            f"dataset_name {config.dataset_name!r}: the corpus is empty ({dropped['empty']} empty "
            f"and {dropped['not_text']} null cells; "
            f"{bad_rows_in_words(errors.num_rows, errors.first)}{too_long}); "
            f"{longer}check {where}"
        )
    if train == 0 and config.heldout_fraction < 1.0:
        raise InputError(
            f"heldout_fraction {config.heldout_fraction} left no document for training, of "
            f"{splits['heldout']['documents']}{too_long}; {longer}lower it, or give more documents"
        )
    warnings = []
    if errors.num_rows:
        told = bad_rows_in_words(errors.num_rows, errors.first)
        warnings.append(f"left out, see {ERRORS}/: {told}")
    if config.heldout_fraction > 0.0 and (problem := too_few_rows(metadata, "heldout")):
        warnings.append(problem)
    return warnings


def _check_files(output_dir: Location, known_sha256: dict[str, str]) -> None:
    """Leave the files of these tasks alone in the folder; all of them must have arrived there."""
    names = files_under(output_dir)
    for name in names:
        if name.split("/")[0] in (*SPLITS, ERRORS) and name not in known_sha256:
            # The temporary file of a task whose worker was lost.
            (output_dir / name).unlink(missing_ok=True)
    # A store's listing may be behind, so what it lacks is asked for by name.
    if not all((output_dir / name).is_file() for name in known_sha256.keys() - names.keys()):
        raise InputError(_not_shared(output_dir))


def _not_shared(output_dir: Location) -> str:
    return (
        f"output_dir {output_dir} is not the same on every node; choose a folder on shared storage"
    )
