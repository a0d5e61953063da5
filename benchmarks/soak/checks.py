"""Champion, disk, and what is left over: each found without the code that decided it."""

import json
import os
import sqlite3
from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.faults.subject import leftovers
from benchmarks.faults.table import Broken

_ENDED = ("succeeded", "rejected")
_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Candidate minus champion on the same held-out rows, in nats per token.

    Attributes:
        error: its standard error by resampling rows.
    """

    difference: float
    error: float


def last_run(folder: Path) -> dict[str, Any]:
    """The record of a pipeline's newest run that came to an end by itself."""
    ended = [run for run in runs_of(folder) if run["state"] in _ENDED]
    if not ended:
        raise Broken(f"no run of {folder} came to an end")
    return ended[-1]


def runs_of(folder: Path) -> list[dict[str, Any]]:
    """Records of a pipeline's runs, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/result.json"))]


def compared(run: dict[str, Any]) -> Compared | None:
    """The two evaluations of a run held against each other; None where there was no champion."""
    folders = {stage["stage"]: Path(stage["folder"]) for stage in run["stages"]}
    files = [folders[name] / "rows.parquet" for name in ("evaluate", "evaluate-champion")]
    if not all(file.exists() for file in files):
        return None
    ours, theirs = (pq.read_table(file).to_pydict() for file in files)
    if ours["row_id"] != theirs["row_id"]:
        raise Broken("candidate and champion were judged on different rows")
    tokens = np.array(ours["num_tokens"], float)
    excess = np.array(ours["nats"]) - np.array(theirs["nats"])
    drawn = np.random.default_rng(0).integers(len(tokens), size=(_RESAMPLES, len(tokens)))
    means = excess[drawn].sum(1) / tokens[drawn].sum(1)
    return Compared(difference=float(excess.sum() / tokens.sum()), error=float(means.std()))


def check_champion(*, found: Compared | None, moved: bool, margin: float, errors: float) -> None:
    """Raise Broken where the alias moved to a model that is not better by what the gate asks for.

    Resampling knows a standard error to a few percent, so a tenth of it is given away.
    """
    if not moved or found is None:
        return
    if -found.difference < max(margin, 0.9 * errors * found.error):
        raise Broken(
            f"promoted with {found.difference:+.4f} ± {found.error:.4f} nats per token against the "
            f"champion; the gate asks for {margin:g} and {errors:g} standard errors"
        )


@dataclass(frozen=True, kw_only=True)
class Store:
    """What the MLflow store holds, read from its tables."""

    champion: int | None
    num_versions: int
    running: list[str]


def read_store(database: Path, *, model: str, alias: str) -> Store:
    with closing(sqlite3.connect(database)) as store:

        def all_of(query: str, *values: str) -> list[Any]:
            return [row[0] for row in store.execute(query, values)]

        champion = all_of(
            "SELECT version FROM registered_model_aliases WHERE name = ? AND alias = ?",
            model,
            alias,
        )
        return Store(
            champion=int(champion[0]) if champion else None,
            num_versions=len(all_of("SELECT version FROM model_versions WHERE name = ?", model)),
            running=all_of("SELECT name FROM runs WHERE status = 'RUNNING'"),
        )


def bytes_under(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Bytes of the stage folders, and the most that they may be."""

    num_bytes: int
    bound: int


def disk_of(folder: Path, *, keep_runs: int, num_versions: int) -> Disk:
    """The stated function: what the newest runs used down to the `keep_runs`th that came to an
    end, plus for each registered version the train stage and the promotion that made it.
    """
    used: set[str] = set()
    num_ended = 0
    for run in reversed(runs_of(folder)):
        used |= {Path(stage["folder"]).name for stage in run["stages"]}
        num_ended += run["state"] in _ENDED
        if num_ended == keep_runs:
            break
    sizes = {path.name: bytes_under(path) for path in folder.iterdir() if "-" in path.name}
    largest = {
        kind: max((size for name, size in sizes.items() if name.startswith(kind)), default=0)
        for kind in ("train-", "promote-")
    }
    bound = sum(sizes.get(name, 0) for name in used) + num_versions * sum(largest.values())
    return Disk(num_bytes=sum(sizes.values()), bound=bound)


def processes_of(sessions: Collection[int]) -> list[int]:
    """Processes that are still there of sessions, which jobs that have ended led."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) in sessions:
                found.append(int(path.name))
        except ProcessLookupError:
            continue
    return found


def check_nothing_left(
    root: Path, folder: Path, *, store: Store, sessions: Collection[int], temporary: Path | None
) -> None:
    """Raise Broken for processes, locks, runs of MLflow and temporary files of a night.

    Args:
        sessions: of the night's jobs.
        temporary: its folder for temporary files; None where a process was killed, which cannot
            clean up after itself there.
    """
    left = [f"process {pid}" for pid in processes_of(sessions)]
    left += [f"MLflow run {name} is RUNNING" for name in store.running]
    left += leftovers(root)
    if temporary is not None:
        left += [str(path.relative_to(temporary)) for path in temporary.rglob("*")]
    if runs := [run for run in runs_of(folder)[-1:] if run["state"] == "running"]:
        left.append(f"{len(runs)} run that says it is running")
    if left:
        raise Broken(f"left behind: {', '.join(left)}")
