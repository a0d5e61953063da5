"""Reading packed token shards: in order (evaluation), or the rows of given steps (training)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokendiff.artifacts.locations import (
    Location,
    fits_cache,
    has_copy,
    local_copy,
    location,
    open_binary,
)
from tokendiff.artifacts.manifest import Manifest, fetch, fingerprint, load_manifest, verify
from tokendiff.data.order import RowOrder
from tokendiff.data.shard_index import ShardIndex
from tokendiff.errors import CorruptFileError, InputError

if TYPE_CHECKING:
    import torch

    from tokendiff.config.train import TrainConfig
    from tokendiff.diffusion.interfaces import Figures, TokenBatch

KIND = "tokens"
_WINDOWS_PER_CHUNK = 8  # of nine, since most begin in the middle of one
_MAX_GROUP_BYTES = 4 << 30  # of a row group, which is read at once
_LEAST_ROWS_TO_JUDGE = 2  # of fewer there is no standard error


def check_rows_to_judge(folder: Location, split: str) -> None:
    """Raise InputError where a split of committed token shards has too few rows to evaluate on."""
    if problem := too_few_rows(load_manifest(folder, kind=KIND).metadata, split):
        raise InputError(f"data_path {folder}: {problem}")


def too_few_rows(metadata: Mapping[str, Any], split: str) -> str:
    """Why a split cannot be evaluated on, and the remedy; empty where it can.

    Args:
        metadata: of the manifest of token shards.
    """
    rows = metadata["splits"][split]["rows"]
    if rows >= _LEAST_ROWS_TO_JUDGE:
        return ""
    has = f"split {split!r} has {rows or 'no'} row{'s' * (rows != 1)}"
    needs = f"an evaluation takes at least {_LEAST_ROWS_TO_JUDGE}"
    return f"{has}, and {needs}; {_more_rows(metadata, split)}"


def _more_rows(metadata: Mapping[str, Any], split: str) -> str:
    """What gives a split of these token shards more rows."""
    config = metadata.get("config", {})
    documents = sum(part.get("documents", 0) for part in metadata["splits"].values())
    if documents == 1 and config.get("sample_by") == "document":
        return "all text is one document: make each of its lines one (sample_by line)"
    if documents == 1:
        return "all text is one document: give more documents"
    change = "raise" if split == "heldout" else "lower"
    now = f" (it is {config['heldout_fraction']:g})" if "heldout_fraction" in config else ""
    return f"{change} preprocess.heldout_fraction{now}, or give more documents"


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Packed rows as arrays.

    Attributes:
        tokens: [n, max_length] int32, padded at the right with 0; `lengths` says where padding
            begins.
        lengths: [n] int32.
        is_start: [n, max_length] bool, where a document begins; what a row continues begins at 0.
        is_target: [n, max_length] bool, tokens that are learnt and judged; False on padding.
        row_ids: [n] int64, stable across runs.
        num_bytes: [n] int32, UTF-8 bytes of source text that the row stands for: of its targets,
            where those are told apart.
        num_filler: [n] int32, targets that answers were filled up with, which are no text.
        isolates_documents: as in TokenBatch.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    is_start: np.ndarray
    is_target: np.ndarray
    row_ids: np.ndarray
    num_bytes: np.ndarray
    num_filler: np.ndarray
    isolates_documents: bool

    def __len__(self) -> int:
        return len(self.lengths)

    def first(self, count: int) -> "Figures":
        """How many the first `count` rows are (fewer, where there are fewer), and their tokens."""
        lengths = self.lengths[:count]
        return len(lengths), int(lengths.sum())

    def take(self, index: np.ndarray | slice) -> "TokenRows":
        return replace(self, **{name: getattr(self, name)[index] for name in _ARRAYS})

    def batch(self, device: "torch.device | str" = "cpu") -> "TokenBatch":
        """All of them as an objective takes them."""
        # Here, since Ray Train's manager of datasets imports this module, and torch takes seconds.
        import torch

        from tokendiff.diffusion.interfaces import TokenBatch

        columns = (self.tokens, self.lengths, self.is_start, self.is_target)
        return TokenBatch.of_rows(
            *(torch.as_tensor(column, device=device) for column in columns),
            isolates_documents=self.isolates_documents,
        )


_COLUMNS = frozenset({"row_id", "tokens", "document_lengths", "num_bytes"})
_CHAT_COLUMNS = frozenset({"is_target", "num_filler"})
_OF_DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, NotImplementedError)
_ARRAYS = ("tokens", "lengths", "is_start", "is_target", "row_ids", "num_bytes", "num_filler")


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenData:
    """One split of a folder that jobs.preprocess wrote; remote shards are copied when read,
    or read in place.

    Attributes:
        metadata: that of the folder's manifest, but for the files of the splits.
        fingerprint: changes where any token of any shard does.
        shards: of every split.
    """

    folder: Location
    split: str
    metadata: Mapping[str, Any]
    fingerprint: str
    shards: Mapping[str, ShardIndex]

    @classmethod
    def of(cls, folder: Location, manifest: Manifest, *, split: str) -> "TokenData":
        splits = manifest.metadata["splits"]
        without_files = {
            name: {key: value for key, value in figures.items() if key != "files"}
            for name, figures in splits.items()
        }
        digests = {name: entry["sha256"] for name, entry in manifest.files.items()}
        return cls(
            folder=folder,
            split=split,
            metadata={**manifest.metadata, "splits": without_files},
            fingerprint=fingerprint(digests),
            shards={name: ShardIndex.of(manifest, name) for name in {*splits, split}},
        )

    def other_split(self, split: str) -> "TokenData":
        """Another split of the same folder, which may have no rows."""
        return replace(self, split=split)

    @classmethod
    def open(cls, folder: str | Location, *, split: str) -> "TokenData":
        """Open and check presence and size of every shard; content is checked as it is read, by
        the checksums of the Parquet pages.

        Raises:
            InputError: no such folder, not committed, or the split has no rows.
            CorruptFileError: a shard does not match the manifest.
        """
        path = location(folder)
        path = path.resolve() if isinstance(path, Path) else path
        try:
            manifest = verify(path, kind=KIND, hashes=False)
        except FileNotFoundError as error:
            raise InputError(
                f"data_path {folder}: no committed token shards there (no MANIFEST.json); run "
                "jobs.preprocess"
            ) from error
        data = cls.of(path, manifest, split=split)
        if not data.num_rows:
            remedy = _more_rows(manifest.metadata, split)
            raise InputError(
                f"data_path {folder}: split {split!r} has no rows; {remedy}, and preprocess again"
            )
        return data

    @property
    def row_group_sizes(self) -> np.ndarray:
        """[row groups] int32, rows of each, in the order of the shards."""
        return self.shards[self.split].row_group_sizes

    @property
    def num_rows(self) -> int:
        return int(self.row_group_sizes.sum(dtype=np.int64))

    @property
    def max_length(self) -> int:
        return int(self.metadata["max_length"])

    @property
    def isolates_documents(self) -> bool:
        """Whether the documents of a row must not see each other, in whatever model."""
        return bool(self.metadata.get("isolate_documents", False))

    @property
    def train_on(self) -> str:
        """Which tokens are targets: "answers" or the "last_answer" of chats, or "all"."""
        return str((self.metadata.get("chats") or {}).get("train_on", "all"))

    @property
    def tokenizer_path(self) -> Path:
        return fetch(self.folder, under="tokenizer/") / "tokenizer"

    def highest_token(self) -> int | None:
        """The largest token id in the rows of all splits; None where that is not known.

        It is in the metadata, or else in the statistics of the shards' footers; no row is read.
        """
        import pyarrow.parquet as pq

        highest = -1
        for split, shards in self.shards.items():
            figures = self.metadata["splits"].get(split, {})
            if "highest_token" in figures:
                highest = max(highest, figures["highest_token"])
                continue
            for name in shards.names:
                with open_binary(self.folder / name) as file:
                    footer = pq.read_metadata(file)
                for group in range(footer.num_row_groups):
                    columns = map(footer.row_group(group).column, range(footer.num_columns))
                    column = next(c for c in columns if c.path_in_schema.startswith("tokens."))
                    if column.statistics is None or not column.statistics.has_min_max:
                        return None
                    highest = max(highest, column.statistics.max)
        return highest

    @contextmanager
    def _shard(self, name: str, digest: str) -> Iterator[Any]:
        """A shard as a file to read from: a remote one as a copy, unless all of them would take
        more than a quarter of the cache's disk; its row groups are then read in place.
        """
        path = self.folder / name
        is_copied = has_copy(path, sha256=digest)
        if is_copied or fits_cache(self.shards[self.split].num_bytes):
            yield local_copy(path, sha256=digest)
        else:
            with open_binary(path) as file:
                yield file

    def read_group(self, group: int) -> TokenRows:
        """All rows of one row group, in order."""
        import pyarrow.parquet as pq

        name, digest, index = self.shards[self.split].find(group)
        rows = int(self.row_group_sizes[group])
        with self._shard(name, digest) as file:
            try:
                opened = pq.ParquetFile(file, page_checksum_verification=True)
                num_bytes = opened.metadata.row_group(index).total_byte_size
                if max(num_bytes, 4 * rows * self.max_length) > _MAX_GROUP_BYTES:
                    raise InputError(
                        f"{self.folder}: row group {index} of {name} has {rows:,} rows of "
                        f"{self.max_length:,} tokens in {num_bytes:,} bytes, more than "
                        f"{_MAX_GROUP_BYTES:,} at once; run jobs.preprocess with a smaller "
                        "max_length"
                    )
                return self._rows_of(opened.read_row_group(index), rows)
            except (InputError, ConnectionError, TimeoutError):
                raise
            # Pages have checksums, the footer has none: a damaged one raises any of these.
            except _OF_DAMAGE as error:
                raise CorruptFileError(
                    f"{self.folder}: {name} cannot be read ({type(error).__name__}: {error}); run "
                    "jobs.preprocess again"
                ) from error

    def _rows_of(self, table: Any, rows: int) -> TokenRows:
        """The rows of a row group.

        Raises:
            ValueError: its columns, or the number of its rows, are not what jobs.preprocess writes.
        """
        names = set(table.column_names)
        if names not in (_COLUMNS, _COLUMNS | _CHAT_COLUMNS) or len(table) != rows:
            raise ValueError(f"{len(table)} rows of {', '.join(sorted(names))}")
        lengths, values = _lists(table.column("tokens"))
        is_token = np.arange(self.max_length) < lengths[:, None]
        tokens = np.zeros((rows, self.max_length), dtype=np.int32)
        tokens[is_token] = values
        is_target = is_token.copy()
        if "is_target" in names:  # of text all tokens are targets
            is_target[is_token] = _lists(table.column("is_target"))[1]
        runs_of_row, run_lengths = _lists(table.column("document_lengths"))
        # Runs lie end to end as tokens do: where each begins, less where its row begins.
        starts = np.cumsum(run_lengths) - run_lengths
        row_of_run = np.repeat(np.arange(rows), runs_of_row)
        is_start = np.zeros((rows, self.max_length), dtype=bool)
        is_start[row_of_run, starts - (np.cumsum(lengths) - lengths)[row_of_run]] = True
        return TokenRows(
            tokens=tokens,
            lengths=lengths,
            is_start=is_start,
            is_target=is_target,
            isolates_documents=self.isolates_documents,
            # Arrow's memory is read-only, which torch takes amiss.
            row_ids=np.array(table.column("row_id")),
            num_bytes=np.array(table.column("num_bytes")),
            num_filler=_column_or_zeros(table, "num_filler"),
        )

    def read(
        self, groups: np.ndarray, rows: np.ndarray, *, kept: dict[int, TokenRows] | None = None
    ) -> TokenRows:
        """Rows (row group, row within it), in the order asked for; each row group is read once.

        Args:
            kept: row groups that the call before has read, which this one replaces by its own.
        """
        needed, firsts = np.unique(np.sort(groups), return_index=True)
        before = {} if kept is None else {g: kept[g] for g in needed.tolist() if g in kept}
        if kept is not None:
            kept.clear()
        by_group = np.argsort(groups, kind="stable")
        found = []
        for group, places in zip(needed.tolist(), np.split(by_group, firsts[1:]), strict=True):
            whole = before[group] if group in before else self.read_group(group)
            found.append(whole.take(rows[places]))
            if kept is not None:
                kept[group] = whole
        back = np.argsort(by_group)
        return TokenRows(
            **{
                name: np.concatenate([getattr(part, name) for part in found])[back]
                for name in _ARRAYS
            },
            isolates_documents=self.isolates_documents,
        )


def _column_or_zeros(table: Any, name: str) -> np.ndarray:
    """A column of int32 that shards of plain text lack."""
    if name not in table.column_names:
        return np.zeros(len(table), dtype=np.int32)
    return np.array(table.column(name))


def _lists(column: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lengths [n] int32 of the lists in a Parquet column, and their values end to end."""
    lists = column.combine_chunks()
    offsets, values = lists.offsets.to_numpy(), lists.values.to_numpy(zero_copy_only=False)
    return np.diff(offsets).astype(np.int32), values[offsets[0] : offsets[-1]]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """Which rows each step of a run trains on, and which of them one worker gets."""

    order: RowOrder
    rows_per_step: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.rows_per_step < self.world_size:
            raise InputError(
                f"a step of {self.rows_per_step} rows cannot be shared by {self.world_size} "
                "workers; "
                "raise global_batch_size or lower num_workers"
            )

    @property
    def positions(self) -> np.ndarray:
        """This worker's places in the global batch: every world_size-th."""
        return np.arange(self.rank, self.rows_per_step, self.world_size)

    @property
    def window_steps(self) -> int:
        """As many steps as a shuffle window has rows for."""
        return max(1, min(self.order.window_rows, self.order.num_rows) // self.rows_per_step)

    def chunks(self, first_step: int, stop_step: int) -> list[tuple[int, int]]:
        """Runs of steps [start, stop) that cover first_step..stop_step-1, each read by one task."""
        size = _WINDOWS_PER_CHUNK * self.window_steps
        return [(s, min(s + size, stop_step)) for s in range(first_step, stop_step, size)]

    def read(self, data: TokenData, start: int, stop: int) -> Iterator[dict[str, np.ndarray]]:
        """This worker's rows of steps start..stop-1 as columns, step after step, some steps at a
        time.

        A window at a time, about, so that memory is bounded; what two of them share is read once.
        """
        kept: dict[int, TokenRows] = {}
        for first in range(start, stop, self.window_steps):
            yield self._read(data, first, min(first + self.window_steps, stop), kept)

    def _read(
        self, data: TokenData, start: int, stop: int, kept: dict[int, TokenRows]
    ) -> dict[str, np.ndarray]:
        places = (np.arange(start, stop)[:, None] * self.rows_per_step + self.positions).ravel()
        first = start * self.rows_per_step
        epochs, groups, rows = self.order.rows(first, stop * self.rows_per_step)
        chosen = places - first
        read = data.read(groups[chosen], rows[chosen], kept=kept)
        return {
            "tokens": read.tokens,
            "length": read.lengths,
            "is_start": read.is_start,
            "is_target": read.is_target,
            "row_id": read.row_ids,
            "epoch": epochs[chosen].astype(np.int64),
        }


def step_plan(config: "TrainConfig", data: TokenData, *, rank: int, world_size: int) -> StepPlan:
    order = RowOrder(row_group_sizes=data.row_group_sizes, seed=config.seed)
    return StepPlan(
        order=order, rows_per_step=config.rows_per_step, rank=rank, world_size=world_size
    )


def step_batches(
    data: TokenData, plan: StepPlan, first_step: int, stop_step: int
) -> Iterator[dict[str, Any]]:
    """One worker's rows of each step, read in this process; what Ray Data delivers, without Ray."""
    size = len(plan.positions)
    for columns in plan.read(data, first_step, stop_step):
        for offset in range(0, len(columns["length"]), size):
            yield {name: column[offset : offset + size] for name, column in columns.items()}
