"""Checkpoints that are written while training goes on.

Training stands still while the state is copied to the memory of the host. From a GPU all tensors
are copied into locked memory, one behind the other, and waited for once. A thread then writes the
copy, hashes it as it is written, and commits the folder. The next save waits for the last one.
Where the model is sharded every worker copies the parts that it holds. The threads put them
together, each for its share of the tensors, by a process group of their own, and the main worker
commits once all shares are written. A share is of whole tensors and not of their parts, so that the
files are those of any other tool and say nothing of how many workers there were.

A kill at any moment leaves the checkpoint before: what is being written stands in a folder of
another name, or, behind a URI, without a manifest.
"""

import json
import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokendiff.artifacts.checkpoint import KIND
from tokendiff.artifacts.locations import Location, files_under, to_disk, upload
from tokendiff.artifacts.manifest import MANIFEST_NAME, RECORD_FOLDER, commit
from tokendiff.artifacts.tensor_files import (
    file_name,
    index_name,
    index_text,
    lies_in_rows,
    local_part,
    whole,
    write_tensors,
)
from tokendiff.errors import naming, reason_of
from tokendiff.training.world import World

logger = logging.getLogger(__name__)

# Names and tensors, made one by one: the same on every worker, in the same order.
NamedTensors = Iterable[tuple[str, Tensor]]
_POLL_SECONDS, _REMOTE_POLL_SECONDS = 0.05, 1.0
_CLOSE_SECONDS, _SHARE_SECONDS = 60.0, 3600.0


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: by the stem of the files that they go to.
        header: metadata of the files of a stem, as safetensors has it.
        files: name to content; read on the main worker alone, as are the other fields.
        beside: a folder whose files are copied.
        metadata: of the manifest.
    """

    tensors: Mapping[str, NamedTensors]
    header: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    beside: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Staged:
    """What a worker holds of a tensor that goes into a checkpoint.

    Attributes:
        held: on the host, what this worker holds.
        owner: rank of the worker that writes it.
        shape: of the whole tensor where `held` is some of its rows; None where it is all of it.
    """

    held: Tensor
    owner: int
    shape: torch.Size | None


Staged = dict[str, dict[str, _Staged]]  # by stem, by name


@dataclass(frozen=True, kw_only=True)
class Replica:
    """The workers that hold all of the model between them, seen from one of them.

    Attributes:
        group: of its own, so that threads may talk while the workers train.
    """

    ranks: Sequence[int]
    rank: int
    group: Any

    @classmethod
    def of(cls, world: World, size: int) -> "Replica":
        """Every worker must ask for it.

        Args:
            size: workers of a replica; their ranks follow one another.
        """
        found = None
        for first in range(0, world.size, size):
            ranks = range(first, first + size)
            group = dist.new_group(ranks, backend="gloo")
            if world.rank in ranks:
                found = cls(ranks=ranks, rank=world.rank, group=group)
        assert found is not None
        return found

    def gather(self, held: Tensor, shape: torch.Size, owner: int) -> Tensor | None:
        """The whole of a tensor whose rows lie on the workers as `torch.chunk` deals them out; None
        on all but the owner.
        """
        rows = -(-shape[0] // len(self.ranks))
        padded = held.new_zeros(rows, *shape[1:])
        padded[: len(held)] = held
        if self.rank != owner:
            dist.gather(padded, None, dst=owner, group=self.group)
            return None
        full = held.new_empty(rows * len(self.ranks), *shape[1:])
        dist.gather(padded, list(full.split(rows)), dst=owner, group=self.group)
        return full[: shape[0]]


class CheckpointSaver:
    """Writes the checkpoints of a run, one at a time.

    Args:
        replica_size: workers that hold all of the model between them, where it is sharded: every
            worker writes a share then. None: the main one writes all.
        after: called by the thread of the main worker once a folder is committed.

    Raises, from `save`, `poll` and `wait`:
        OSError: the last checkpoint could not be written.
    """

    def __init__(
        self,
        output_dir: Location,
        world: World,
        *,
        replica_size: int | None = None,
        after: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._output_dir, self._world, self._after = output_dir, world, after
        self._num_writers = 1 if replica_size is None else world.size
        self._replica = None if replica_size is None else Replica.of(world, replica_size)
        self._kept: dict[tuple[str, str], Tensor] = {}
        self._copying: set[torch.device] = set()  # from which copies are under way
        self._locks_memory = True
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._then: Callable[[], None] = lambda: None

    def save(
        self,
        name: str,
        make: Callable[[], Contents],
        *,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Stage a checkpoint, and have it written. Every worker must call this alike.

        Args:
            make: called once the last checkpoint is written.
            then: called by `poll` or `wait` of the main worker once this one is.
        """
        self.wait()
        if not self._writes:
            return
        key = self._begin(name)
        contents = make()
        staged = self._stage(contents.tensors)
        self._then = then
        self._thread = threading.Thread(
            target=self._write_noting_errors, args=(name, key, staged, contents), daemon=True
        )
        self._thread.start()

    def poll(self) -> None:
        """Note that the last checkpoint is written, if it is."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def close(self) -> None:
        """Let the last checkpoint be written, whatever ends the run. Where workers share it, one of
        them may be gone, and this does not wait for long.
        """
        if self._thread is not None:
            self._thread.join(None if self._num_writers == 1 else _CLOSE_SECONDS)

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        if self._world.is_main:
            self._then()

    @property
    def _writes(self) -> bool:
        return self._world.is_main or self._num_writers > 1

    def _begin(self, name: str) -> str:
        """A key that all writers share; the place that they write to is ready."""
        number = uuid.uuid4().int % 2**32 if self._world.is_main else 0
        if self._world.is_main:
            target = self._output_dir / name
            if isinstance(target, Path):
                for leftover in target.parent.glob(".*.tmp"):  # of an attempt that failed
                    shutil.rmtree(leftover, ignore_errors=True)
                _beside(target, f"{number:08x}").mkdir(parents=True)
            else:
                (target / MANIFEST_NAME).unlink(missing_ok=True)
        if self._num_writers > 1:
            shared = torch.tensor([number], dtype=torch.int64, device=self._world.device)
            number = int(self._world.sum(shared))
        return f"{number:08x}"

    def _stage(self, tensors: Mapping[str, NamedTensors]) -> Staged:
        """What this worker holds of its share and of the shares of its replica, on the host."""
        load = [0] * self._num_writers
        staged: Staged = {stem: {} for stem in tensors}
        for stem, pairs in tensors.items():
            for name, tensor in pairs:
                # All workers see the same tensors, and come to the same shares.
                owner = load.index(min(load))
                load[owner] += tensor.nbytes
                is_apart = self._replica is not None and lies_in_rows(tensor)
                if is_apart:
                    assert self._replica is not None
                    is_kept, held = owner in self._replica.ranks, local_part(tensor)[0]
                else:
                    is_kept, held = owner == self._world.rank, whole(tensor).detach()
                if is_kept:
                    staged[stem][name] = _Staged(
                        held=self._on_host((stem, name), held),
                        owner=owner,
                        shape=tensor.shape if is_apart else None,
                    )
        # Nothing reads a copy, and training does not go on, before all of them are there. What
        # changes weights between two copies is queued on the device behind the first.
        for device in self._copying:
            torch.cuda.synchronize(device)
        self._copying.clear()
        return staged

    def _on_host(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        """A copy, in the memory of the last copy of the tensor, which is written by now. That is
        kept: training goes on beside it in any case, and new memory takes as long as the copying.

        A copy from a GPU is under way when this returns.
        """
        is_late = _is_on_gpu(tensor)
        kept = self._kept.get(key)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = self._kept[key] = self._host_memory(tensor, is_locked=is_late)
        if is_late:
            self._copying.add(tensor.device)
        return kept.copy_(tensor, non_blocking=is_late)

    def _host_memory(self, like: Tensor, *, is_locked: bool) -> Tensor:
        """Memory for a copy, locked where there is such memory: a GPU writes to that by itself."""
        if is_locked and self._locks_memory:
            try:
                return _locked_memory(like)
            except RuntimeError as error:  # often there may be only so much of it
                self._locks_memory = False
                logger.warning(
                    "no more memory can be locked for copies of checkpoints, so that copying them "
                    "takes longer (%s)",
                    reason_of(error),
                )
        return torch.empty(like.shape, dtype=like.dtype)

    def _share(self, staged: Staged) -> dict[str, dict[str, Tensor]]:
        """The tensors that this worker writes, whole; in the thread."""
        mine: dict[str, dict[str, Tensor]] = {stem: {} for stem in staged}
        for stem, tensors in staged.items():
            for name in list(tensors):
                each = tensors.pop(name)
                if each.shape is None:
                    mine[stem][name] = each.held
                    continue
                assert self._replica is not None
                full = self._replica.gather(each.held, each.shape, each.owner)
                if full is not None:
                    mine[stem][name] = full
        return mine

    def _write_noting_errors(self, name: str, key: str, staged: Staged, contents: Contents) -> None:
        target = self._output_dir / name
        try:
            if isinstance(target, Path):
                with naming(target):
                    self._write_into(_beside(target, key), target, key, staged, contents)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    self._write_into(Path(folder), target, key, staged, contents)
        except BaseException as error:
            self._error = error
            # Where others still write there, the next save removes it.
            if self._num_writers == 1 and isinstance(target, Path):
                shutil.rmtree(_beside(target, key), ignore_errors=True)

    def _write_into(
        self,
        folder: Path,
        target: Location,
        key: str,
        staged: Staged,
        contents: Contents,
    ) -> None:
        rank = self._world.rank
        share: dict[str, Any] = {"sha256": {}, "names": {}, "bytes": {}}
        place: Location = folder if isinstance(target, Path) else target
        try:
            for stem, tensors in self._share(staged).items():
                if not tensors and self._num_writers > 1:
                    continue
                file = file_name(stem, rank, self._num_writers)
                share["sha256"][file] = write_tensors(
                    folder / file, tensors, metadata=contents.header.get(stem)
                )
                share["names"].setdefault(stem, {})[file] = list(tensors)
                share["bytes"][stem] = sum(tensor.nbytes for tensor in tensors.values())
                tensors.clear()
                if isinstance(target, Path):
                    to_disk(folder / file)
                else:
                    upload(folder, target, [file])
                    (folder / file).unlink()
        except BaseException as error:
            if not self._world.is_main:
                number = error.errno if isinstance(error, OSError) else None
                told = {"error": f"worker {rank}: {error}", "errno": number}
                _announce(place, key, rank, told)
            raise
        if not self._world.is_main:
            _announce(place, key, rank, share)
            return
        shares = [share, *(_await(place, key, r) for r in range(1, self._num_writers))]
        self._commit(folder, target, shares, contents)

    def _commit(
        self, folder: Path, target: Location, shares: list[dict[str, Any]], contents: Contents
    ) -> None:
        for name, text in contents.files.items():
            (folder / name).write_text(text)
        if contents.beside is not None:
            # Not copytree: its error lists them all, and has no errno that tells of a full disk.
            for name in files_under(contents.beside):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(contents.beside / name, folder / name)
        if self._num_writers > 1:
            for stem in contents.tensors:
                files = {f: n for share in shares for f, n in share["names"].get(stem, {}).items()}
                total = sum(share["bytes"].get(stem, 0) for share in shares)
                (folder / index_name(stem)).write_text(index_text(files, total))
        known = {file: digest for share in shares for file, digest in share["sha256"].items()}
        metadata = dict(contents.metadata)
        if isinstance(target, Path):
            for name in files_under(folder).keys() - known.keys():
                to_disk(folder / name)
            commit(folder, kind=KIND, metadata=metadata, known_sha256=known)
            before = _beside(target, "before")
            if target.exists():
                target.rename(before)  # whole: its manifest would vouch for what is left of it
            folder.rename(target)
            shutil.rmtree(before, ignore_errors=True)
        else:
            small = list(files_under(folder))
            upload(folder, target, small)
            for name in files_under(target).keys() - set(small) - known.keys():
                if not name.startswith(f"{RECORD_FOLDER}/"):  # of an attempt that was cut off
                    (target / name).unlink(missing_ok=True)
            commit(target, kind=KIND, metadata=metadata, known_sha256=known)
        self._after(target.name)


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _locked_memory(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _beside(target: Path, key: str) -> Path:
    """Where a local checkpoint is written before it takes its place."""
    return target.with_name(f".{target.name}.{key}.tmp")


def _announce(place: Location, key: str, rank: int, share: dict[str, Any]) -> None:
    """Tell the main worker what a share holds; in one piece, since it looks for the file."""
    path = place / f".share-{key}-{rank}.json"
    text = json.dumps(share).encode()
    if not isinstance(path, Path):
        path.write_bytes(text)
        return
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(text)
    unfinished.replace(path)


def _await(place: Location, key: str, rank: int) -> dict[str, Any]:
    """What another worker tells, which is forgotten then."""
    path, begun = place / f".share-{key}-{rank}.json", time.monotonic()
    pause = _POLL_SECONDS if isinstance(path, Path) else _REMOTE_POLL_SECONDS
    while not path.is_file():
        time.sleep(pause)
        if time.monotonic() - begun > _SHARE_SECONDS:
            raise OSError(f"{place}: worker {rank} has not written its share within an hour")
    share: dict[str, Any] = json.loads(path.read_bytes())
    path.unlink()
    if "error" in share:
        if share["errno"] is not None:  # which tells of a full disk
            raise OSError(share["errno"], f"could not be written: {share['error']}", str(place))
        raise OSError(f"{place} could not be written: {share['error']}")
    return share
