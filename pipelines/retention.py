"""Deleting what old runs of a pipeline left: `jobs.pipeline clean`, and `runner.keep_runs`.

Kept is what the newest runs used, made or not: the last `keep_runs` that came to an end by
themselves, and every run since the oldest of these, so that a week of failures costs no result.
Kept besides is every checkpoint that a version of a registered model holds, with the promotion that
registered it, and what MLflow has yet to get. Records of runs stay as long as without this.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.lock import alone
from pipelines.paths import RUNS
from pipelines.record import RunRecord
from pipelines.schedule import FACTS_NAME
from tokendiff.artifacts.checkpoint import FINAL
from tokendiff.artifacts.identity import checkpoint_identity
from tokendiff.artifacts.locations import Location, files_under, folders_in, mirror_of, remove
from tokendiff.artifacts.manifest import (
    MANIFEST_NAME,
    RECORD_FOLDER,
    is_committed,
    is_temporary,
    load_manifest,
)
from tokendiff.config.pipeline import Config
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.tracking.mlflow_outbox import is_waiting
from tokendiff.tracking.registry import Registry

_STAGE_FOLDER = re.compile(r".+-[0-9a-f]{12}")
_ENDED = ("succeeded", "rejected")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A folder of a stage, or a temporary file, and what is to become of it.

    Attributes:
        why: it is kept, in the words of a table; empty where it is deleted.
    """

    path: Location
    num_bytes: int
    why: str = ""


def clean(config: Config, root: Location, *, is_dry_run: bool = False) -> list[Item]:
    """Delete what no run that is kept needs.

    Args:
        root: the folder or URI that the pipeline's own folder is in.
        is_dry_run: nothing is deleted.

    Returns:
        The pipeline's stage folders, kept or deleted, and the temporary files that were left.

    Raises:
        InputError: runner.keep_runs is not set, or the registered models cannot be asked for.
        BlockingIOError: a run of this pipeline is under way.
    """
    folder = root / config.name
    if config.runner.keep_runs is None:
        raise InputError(
            "runner.keep_runs: null keeps every run; say how many are to stay, for example "
            "-o runner.keep_runs=7"
        )
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; pipeline {config.name} has never run here")
    with alone(folder):
        return clean_held(config, root, is_dry_run=is_dry_run)


def clean_held(config: Config, root: Location, *, is_dry_run: bool = False) -> list[Item]:
    """`clean`, for who holds the pipeline's lock."""
    assert config.runner.keep_runs is not None
    folder = root / config.name
    used = _used_by_runs(folder, config.runner.keep_runs)
    found = [path for path in folders_in(folder) if _is_of_a_stage(path)]
    registered = _registered(config, root, found)
    items = [
        Item(
            path=path,
            num_bytes=sum(files_under(path).values()),
            why="a kept run" if path.name in used else _reason_to_keep(path, registered),
        )
        for path in found
    ]
    items += _left_by_killed(folder)
    if not is_dry_run:
        for item in items:
            if not item.why:
                _delete(item.path)
    return items


def clean_after_run(config: Config, root: Location) -> None:
    """`clean_held` where the pipeline asks for it; what goes wrong is a warning, as the run itself
    went well.
    """
    if config.runner.keep_runs is None:
        return
    try:
        items = clean_held(config, root)
    except Exception as error:  # whatever a store or a network raises
        logger.warning("runner.keep_runs: nothing old is deleted (%s)", error)
        return
    if deleted := [item for item in items if not item.why]:
        freed = sum(item.num_bytes for item in deleted)
        print(f"{len(deleted)} folders of old runs deleted, {freed / 1e6:,.1f} MB", flush=True)


def _used_by_runs(folder: Location, keep_runs: int) -> set[str]:
    """Names of the stage folders of the runs that are kept."""
    used: set[str] = set()
    num_ended = 0
    for run in reversed(folders_in(folder / RUNS)):
        try:
            record = RunRecord.load(run)
        except FileNotFoundError:  # cut off before its first word
            continue
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{run}: its record cannot be read ({error}), so what it used is not known; delete "
                "that folder"
            ) from error
        used |= {stage.folder.rstrip("/").rpartition("/")[2] for stage in record.stages}
        num_ended += record.state in _ENDED
        if num_ended == keep_runs:
            return used
    return used


def _is_of_a_stage(folder: Location) -> bool:
    """Whether a runner made it: a folder that somebody else put there is left alone."""
    return bool(_STAGE_FOLDER.fullmatch(folder.name)) and (
        (folder / RECORD_FOLDER / FACTS_NAME).is_file()
        or (mirror_of(folder) / RECORD_FOLDER / FACTS_NAME).is_file()
    )


@dataclass(frozen=True, kw_only=True)
class _Registered:
    """What versions of registered models hold: digests of checkpoints, and keys of the promote
    stages that registered them.
    """

    digests: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()


def _registered(config: Config, root: Location, folders: Iterable[Location]) -> _Registered:
    if not config.tracking.enabled:
        if promotions := [f.name for f in folders if _metadata(f).get("decision") == "promoted"]:
            raise InputError(
                f"tracking.enabled false: {promotions[0]} registered a model, and MLflow alone "
                "knows which versions are still there; leave tracking on to clean"
            )
        return _Registered()
    versions = list(Registry(config.tracking, root).versions())
    return _Registered(
        digests=frozenset(version.digest for version in versions),
        keys=frozenset(version.stage_key for version in versions if version.stage_key),
    )


def _reason_to_keep(folder: Location, registered: _Registered) -> str:
    for place in (folder, folder / FINAL):
        if is_committed(place) and _digest(place) in registered.digests:
            return "a registered version"
    if folder.name.rpartition("-")[2] in registered.keys:
        return "the promotion of a registered version"
    if is_waiting(mirror_of(folder) / RECORD_FOLDER):
        return "MLflow has yet to get its figures"
    return ""


def _digest(folder: Location) -> str:
    try:
        return checkpoint_identity(folder)
    except (CorruptFileError, OSError):
        return ""


def _metadata(folder: Location) -> dict[str, Any]:
    try:
        return load_manifest(folder).metadata
    except (CorruptFileError, OSError):
        return {}


def _left_by_killed(folder: Location) -> Iterator[Item]:
    """Temporary files that processes left which were killed in mid-write."""
    if isinstance(folder, Path):
        for name, size in files_under(folder).items():
            if is_temporary(name):
                yield Item(path=folder / name, num_bytes=size)


def _delete(path: Location) -> None:
    if isinstance(path, Path) and path.is_file():
        path.unlink(missing_ok=True)
        return
    # Without its manifest it no longer counts, however far the deletion gets.
    (path / FINAL / MANIFEST_NAME).unlink(missing_ok=True)
    remove(path, first=MANIFEST_NAME)
    shutil.rmtree(mirror_of(path), ignore_errors=True)
