"""What `make soak` finds out after a night: it notices a promise that was not kept."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.table import Broken
from benchmarks.soak import checks
from benchmarks.soak.checks import Compared, Store


def record(folder: Path, number: int, state: str, *stages: str) -> None:
    run = folder / "runs" / f"2026-{number:02}"
    run.mkdir(parents=True)
    entries = [{"stage": name[:5], "folder": str(folder / name)} for name in stages]
    (run / "result.json").write_text(json.dumps({"state": state, "stages": entries}))


def put(folder: Path, num_bytes: int) -> None:
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(bytes(num_bytes))


@pytest.mark.parametrize(
    ("difference", "moved", "is_broken"),
    [(-0.03, True, False), (-0.01, True, True), (0.5, False, False), (-0.001, True, True)],
)
def test_a_champion_that_is_not_better_by_enough(
    difference: float, moved: bool, is_broken: bool
) -> None:
    def check(found: Compared | None) -> None:
        checks.check_champion(found=found, moved=moved, margin=0.005, errors=2.0)

    check(None)
    found = Compared(difference=difference, error=0.01)
    if is_broken:
        with pytest.raises(Broken, match=r"promoted with -0\.0"):
            check(found)
    else:
        check(found)


def test_disk_is_bounded_by_what_kept_runs_used_and_versions(tmp_path: Path) -> None:
    """A failed run between two that ended is kept; a folder that only an older run used is not."""
    for number, (state, name, num_bytes) in enumerate(
        [
            ("succeeded", "train-a", 1000),
            ("rejected", "train-b", 100),
            ("failed", "train-c", 20),
            ("succeeded", "train-d", 3),
        ]
    ):
        record(tmp_path, number, state, name)
        put(tmp_path / name, num_bytes)
    found = checks.disk_of(tmp_path, keep_runs=2, num_versions=0)
    assert (found.num_bytes, found.bound) == (1123, 123)
    assert checks.disk_of(tmp_path, keep_runs=2, num_versions=1).bound == 1123


def empty_store(**fields: Any) -> Store:
    return Store(**{"champion": 1, "num_versions": 1, "running": [], **fields})


def test_what_is_left_over_is_found(tmp_path: Path) -> None:
    root, folder, temporary = tmp_path / "out", tmp_path / "out" / "month", tmp_path / "tmp"
    temporary.mkdir()
    record(folder, 1, "succeeded")

    def left(store: Store, sessions: tuple[int, ...] = ()) -> None:
        checks.check_nothing_left(root, folder, store=store, sessions=sessions, temporary=temporary)

    left(empty_store())
    with pytest.raises(Broken, match="MLflow run train is RUNNING"):
        left(empty_store(running=["train"]))
    child = subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        with pytest.raises(Broken, match=f"process {child.pid}"):
            left(empty_store(), sessions=(os.getsid(child.pid),))
    finally:
        child.communicate(b"\n")
    for path in (temporary / "scratch", folder / ".lock.holder", folder / "train-a" / "x.tmp"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
        with pytest.raises(Broken, match=path.name):
            left(empty_store())
        path.unlink()
    record(folder, 2, "running")
    with pytest.raises(Broken, match="says it is running"):
        left(empty_store())


def test_the_store_is_read_by_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path)) as store:
        store.executescript(
            "CREATE TABLE registered_model_aliases (name, alias, version);"
            "CREATE TABLE model_versions (name, version);"
            "CREATE TABLE runs (name, status);"
            "INSERT INTO registered_model_aliases VALUES ('soak', 'champion', 2);"
            "INSERT INTO registered_model_aliases VALUES ('b', 'champion', 9);"
            "INSERT INTO model_versions VALUES ('soak', 1), ('soak', 2), ('b', 9);"
            "INSERT INTO runs VALUES ('train', 'RUNNING'), ('data', 'FINISHED');"
        )
    found = checks.read_store(path, model="soak", alias="champion")
    assert found == Store(champion=2, num_versions=2, running=["train"])
    assert checks.read_store(path, model="none", alias="champion").champion is None
