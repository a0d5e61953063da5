"""Faults that happen in the middle of a run, one or several at once, and what ends them."""

import errno
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults.fake_mlflow import FakeMlflow
from benchmarks.faults.moments import Moments, is_written
from benchmarks.faults.signals import drawn, send
from benchmarks.faults.subject import CONFIG, Subject, check_said
from benchmarks.faults.table import Broken, CannotTry
from tokendiff.tracking.run_log import LOG_NAME, metrics_by_step

_BLOCK = 1 << 12
_DISK = "size=24m"
_STORE_DISK = "size=8m"
_DAY_SECONDS = 86400.0


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """A fault that waits for its moment.

    Attributes:
        action: what happens at the moment, in the process of the job.
        mend: called between the run and the next.
        check: called when the next run has ended; raises Broken.
        sections: of the config that both runs take.
    """

    action: Callable[[], None]
    mend: Callable[[], None] = lambda: None
    check: Callable[[], None] = lambda: None
    sections: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """A fault by name, the exit codes that a run may have under it, what it says where that is not
    0, and what it says in any case.
    """

    name: str
    codes: tuple[int, ...]
    arrange: Callable[[Path], AbstractContextManager[Arranged]]
    says: str = ""
    warns: str = ""


def disturbed(
    subject: Subject,
    chance: random.Random,
    folder: Path,
    *,
    faults: Sequence[Disturbance],
    only: str = "",
) -> str:
    """Run the pipeline with each fault at a moment of its own, mend them, and run it again."""
    (folder / "out").mkdir(parents=True)
    with ExitStack() as stack:
        arranged = [stack.enter_context(fault.arrange(folder)) for fault in faults]
        sections = {name: value for each in arranged for name, value in each.sections.items()}
        moments = [drawn(subject, "pipeline", chance, only=only) for _ in faults]
        actions: dict[int, Callable[[], None]] = {}
        for at, each in zip(moments, arranged, strict=True):
            while at in actions:
                at += 1
            actions[at] = each.action
        counter = Moments(root=folder / "out", actions=actions, only=only)
        ended = subject.run("pipeline", folder, counter.install, **sections)
        codes = {code for fault in faults for code in fault.codes}
        says = faults[0].says if len(faults) == 1 else ""
        check_said(ended, codes=tuple(sorted(codes)), says=says)
        for fault in faults:
            if fault.warns not in ended.err:
                raise Broken(f"stderr does not say {fault.warns!r}: {ended.message}")
        for each in arranged:
            each.mend()
        subject.check_goes_on(
            "pipeline", folder, is_killed=-signal.SIGKILL in codes or len(faults) > 1, **sections
        )
        for each in arranged:
            each.check()
    return f"exit code {ended.code}; gone on with the same result"


@contextmanager
def _signal(folder: Path, *, number: int) -> Iterator[Arranged]:
    yield Arranged(action=send(number))


@contextmanager
def full_disk(folder: Path) -> Iterator[Arranged]:
    """A small disk for the output, which is full from the moment on."""
    disk, ballast = folder / "out", folder / "out" / "ballast"
    with mounted(disk, _DISK):
        yield Arranged(action=partial(fill, ballast), mend=lambda: ballast.unlink(missing_ok=True))


def fill(ballast: Path) -> None:
    """Write a file until its disk is full."""
    file = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        while os.write(file, bytes(_BLOCK)):
            pass
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    finally:
        os.close(file)


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory in the place of a folder.

    Raises:
        CannotTry: this user may not mount one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotTry(f"a small disk takes the right to mount one: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def _refused(folder: Path, *, number: int) -> Iterator[Arranged]:
    """From the moment on Python can write nothing to the output, as where a quota is used up."""
    yield Arranged(action=partial(_refuse, number, f"{folder / 'out'}/"))


@contextmanager
def _logs_refused(folder: Path, *, number: int) -> Iterator[Arranged]:
    """From the moment on only what tells of a run cannot be written: logs, records of stages and
    of runs, and what an MLflow server, which is well, is still to get.
    """
    places = f"{folder / 'out'}/(.*/)?(run|runs|\\.mlflow)/"
    with _mlflow(folder, fails_with="never") as mlflow:
        yield replace(mlflow, action=partial(_refuse, number, places), mend=lambda: None)


def _refuse(number: int, places: str) -> None:
    """From now on this process can open no file to write whose path begins like this pattern, nor
    write to one by its descriptor: the system's answer is an OSError of that number.
    """

    def check(path: str) -> None:
        if re.match(places, path):
            raise OSError(number, os.strerror(number), path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.mkdir" or (event == "open" and is_written(arguments)):
            check(str(arguments[0]))

    def write(file: int, data: Any, right: Callable[[int, Any], int] = os.write) -> int:
        check(os.readlink(f"/proc/self/fd/{file}"))
        return right(file, data)

    sys.addaudithook(hook)
    os.write = write


@contextmanager
def _clock_set_back(folder: Path) -> Iterator[Arranged]:
    def set_back() -> None:
        right = time.time
        time.time = lambda: right() - _DAY_SECONDS

    yield Arranged(action=set_back)


_held: list[sqlite3.Connection] = []


@contextmanager
def _locked_store(folder: Path) -> Iterator[Arranged]:
    """A sqlite store that another program writes to from the moment on, until the job ends."""
    database = folder / "mlflow.db"

    def lock() -> None:
        connection = sqlite3.connect(database, timeout=30.0)
        connection.execute("BEGIN EXCLUSIVE")
        _held.append(connection)  # closed, and so let go, with the process

    yield _with_store(folder, database, action=lock)


@contextmanager
def _full_store(folder: Path) -> Iterator[Arranged]:
    """A sqlite store on a disk of its own, which is full from the moment on."""
    disk = folder / "store"
    ballast = disk / "ballast"
    with mounted(disk, _STORE_DISK):
        yield _with_store(
            folder,
            disk / "mlflow.db",
            action=partial(fill, ballast),
            mend=lambda: ballast.unlink(missing_ok=True),
        )


@contextmanager
def _deleted_experiment(folder: Path) -> Iterator[Arranged]:
    """A sqlite store whose experiment is deleted, with its runs, as MLflow does it; restored, it
    gets no metric that it refused meanwhile.
    """
    database = folder / "mlflow.db"

    def mark(stage: str) -> None:
        with closing(sqlite3.connect(database, timeout=30.0)) as store, store:
            for table in ("experiments", "runs"):
                store.execute(f"UPDATE {table} SET lifecycle_stage = ?", (stage,))

    yield Arranged(
        action=partial(mark, "deleted"),
        mend=partial(mark, "active"),
        sections={"tracking": {"uri": f"sqlite:///{database}"}},
    )


def _with_store(folder: Path, database: Path, **kwargs: Any) -> Arranged:
    def check() -> None:
        with closing(sqlite3.connect(database)) as store:
            query = "SELECT step, value FROM metrics WHERE key = 'loss'"
            _check_losses(folder, dict(store.execute(query)))

    return Arranged(check=check, sections={"tracking": {"uri": f"sqlite:///{database}"}}, **kwargs)


def _check_losses(folder: Path, arrived: dict[int, float]) -> None:
    (log,) = folder.glob(f"out/{CONFIG['name']}/train-*/run/{LOG_NAME}")
    logged = {e["step"]: e["loss"] for e in metrics_by_step(log)}
    if arrived != logged:
        raise Broken(f"MLflow has losses {arrived}, the log {logged}")


@contextmanager
def _mlflow(folder: Path, *, fails_with: str) -> Iterator[Arranged]:
    """An MLflow server that fails from the moment on; mended, it gets all that it missed."""
    with FakeMlflow.started(folder / "mlflow", fails_with) as server:
        yield Arranged(
            action=server.fail,
            mend=server.mend,
            check=lambda: _check_losses(folder, server.points("loss")),
            sections={"tracking": {"uri": server.uri}},
        )


KILLED = Disturbance(
    name="killed",
    codes=(-signal.SIGKILL,),
    arrange=partial(_signal, number=signal.SIGKILL),
)
SIGTERM = Disturbance(
    name="sigterm",
    codes=(143, 0),
    arrange=partial(_signal, number=signal.SIGTERM),
    says="stopped by SIGTERM",
)
SIGINT = Disturbance(name="sigint", codes=(130, 0), arrange=partial(_signal, number=signal.SIGINT))
FULL_DISK = Disturbance(
    name="full-disk", codes=(0, 1), arrange=full_disk, says="No space left on device"
)
QUOTA = Disturbance(
    name="quota",
    codes=(0, 1),
    arrange=partial(_refused, number=errno.EDQUOT),
    says=os.strerror(errno.EDQUOT),
)
LOGS_REFUSED = {
    name: Disturbance(
        name=name,
        codes=(0, 1),
        arrange=partial(_logs_refused, number=number),
        says=os.strerror(number),
    )
    for name, number in (("disk-full", errno.ENOSPC), ("quota", errno.EDQUOT))
}
DELETED_EXPERIMENT = Disturbance(
    name="mlflow-experiment-deleted-in-mid-run",
    codes=(0,),
    arrange=_deleted_experiment,
    warns="goes without a ",
)
CLOCK = Disturbance(name="clock-set-back", codes=(0,), arrange=_clock_set_back)
# The name of each way to fail is also the fake server's.
MLFLOW = {
    how: Disturbance(
        name=f"mlflow-{how}",
        codes=(0, 2),
        says="cannot be used",
        arrange=partial(_mlflow, fails_with=how),
    )
    for how in ("dies", "hangs", "401", "403", "500")
}
STORE = {
    how: Disturbance(name=f"mlflow-{how}", codes=(0, 2), says="cannot be used", arrange=arrange)
    for how, arrange in (("locked", _locked_store), ("full-disk", _full_store))
}
