"""Disk, clock, MLflow and locks: a fault of what is around a run; and two faults at once."""

import os
import random
import signal
from functools import partial
from pathlib import Path

from benchmarks.faults import disturbances as faults
from benchmarks.faults.disturbances import disturbed, mounted
from benchmarks.faults.moments import Moments
from benchmarks.faults.signals import GOES_ON, drawn, send
from benchmarks.faults.subject import JOBS, Subject, check_said
from benchmarks.faults.table import Broken, Case

FULL = f"Exit code 1 and one message, or 0 where what is left to write fits. {GOES_ON}"
LOGS = f"{FULL} It brings MLflow all losses that it missed."
UNHURT = "Exit code 0; rows, weights and losses are as without the fault."
MISSED = (
    f"{UNHURT} Exit code 2 and one message where it fails before the start. Once it is back, the "
    "next start brings it all losses that it missed."
)
BOTH = f"A documented exit code and one message. {GOES_ON}"
_DISKS = {"packing": "/preprocess-", "checkpointing": "/train-", "generating": "/generate-"}
_STORES = {
    "locked": "another program holds the lock of MLflow's sqlite file",
    "full-disk": "the disk of MLflow's sqlite file is full",
}
_PAIRS = (
    (faults.KILLED, faults.MLFLOW["hangs"]),
    (faults.KILLED, faults.MLFLOW["500"]),
    (faults.KILLED, faults.FULL_DISK),
    (faults.KILLED, faults.CLOCK),
    (faults.SIGTERM, faults.FULL_DISK),
    (faults.SIGTERM, faults.MLFLOW["dies"]),
    (faults.SIGTERM, faults.CLOCK),
    (faults.SIGINT, faults.FULL_DISK),
    (faults.FULL_DISK, faults.MLFLOW["401"]),
    (faults.FULL_DISK, faults.CLOCK),
)


def read_only(subject: Subject, chance: random.Random, folder: Path) -> str:
    """From the start, for each job."""
    for job in JOBS:
        here = folder / job
        with mounted(here / "out", "size=1m,ro"):
            ended = subject.run(job, here)
            check_said(ended, codes=(1, 2), says="Read-only file system")
    return "exit code 1, one message, in each of the five jobs"


def two_at_once(subject: Subject, chance: random.Random, folder: Path) -> str:
    started = [subject.start("pipeline", folder) for _ in range(2)]
    ended = [each.wait() for each in started]
    for each in ended:
        check_said(each, codes=(0, 4))
    codes = sorted(each.code for each in ended)
    if codes[0] != 0:
        raise Broken(f"both were refused: {ended[0].message}")
    subject.check_same("pipeline", folder)
    return f"exit codes {codes[0]} and {codes[1]}"


def stopped_holder(
    subject: Subject, chance: random.Random, folder: Path, *, is_killed: bool
) -> str:
    """A run is stopped at a random moment, a second one started, and the first woken or killed."""
    at = drawn(subject, "pipeline", chance)
    moments = Moments(root=folder / "out", actions={at: send(signal.SIGSTOP)})
    first = subject.start("pipeline", folder, moments.install)
    os.waitpid(first.pid, os.WUNTRACED)  # returns once it is stopped
    # The first moments are before the lock is taken.
    is_holder = (folder / "out" / "tiny" / ".lock.holder").exists()
    second = subject.run("pipeline", folder)
    check_said(second, codes=(4,) if is_holder else (0, 4))
    os.kill(first.pid, signal.SIGKILL if is_killed else signal.SIGCONT)
    ended = first.wait()
    if ended.code != (-signal.SIGKILL if is_killed else 0):
        raise Broken(f"the first run ended with {ended.code}: {ended.message}")
    subject.check_goes_on("pipeline", folder, is_killed=is_killed)
    return "refused with exit code 4 meanwhile"


CASES = (
    *(
        Case(
            name=f"disk-full-while-{what}",
            promise=FULL,
            done=f"the disk is filled before a random write under STAGE{only}KEY",
            trial=partial(disturbed, faults=[faults.FULL_DISK], only=only),
        )
        for what, only in _DISKS.items()
    ),
    *(
        Case(
            name=f"quota-while-{what}",
            promise=FULL,
            done=f"from a random write under STAGE{only}KEY on, each write to the output is "
            f"answered with {faults.QUOTA.says!r}",
            trial=partial(disturbed, faults=[faults.QUOTA], only=only),
        )
        for what, only in _DISKS.items()
    ),
    *(
        Case(
            name=f"{name}-while-logging",
            promise=LOGS,
            done="from a random write there on, each write to a folder run/, runs/ or .mlflow/ is "
            f"answered with {fault.says!r}",
            trial=partial(disturbed, faults=[fault], only="/run"),
        )
        for name, fault in faults.LOGS_REFUSED.items()
    ),
    Case(
        name="disk-full",
        promise=FULL,
        done="the disk is filled before a random write of a pipeline",
        trial=partial(disturbed, faults=[faults.FULL_DISK]),
    ),
    Case(
        name="read-only-output",
        promise="Exit code 1 or 2, and one message that says so.",
        done="the output folder is on a read-only disk, in each of the five jobs",
        trial=read_only,
        moments=1,
    ),
    Case(
        name="clock-set-back",
        promise=UNHURT,
        done="the clock goes back a day before a random write",
        trial=partial(disturbed, faults=[faults.CLOCK]),
    ),
    *(
        Case(
            name=fault.name,
            promise=MISSED,
            done=f"from a random write on, the MLflow server {how}"
            if not how.isdigit()
            else f"from a random write on, the MLflow server answers {how}",
            trial=partial(disturbed, faults=[fault]),
        )
        for how, fault in faults.MLFLOW.items()
    ),
    *(
        Case(
            name=fault.name,
            promise=MISSED,
            done=f"from a random write on, {_STORES[how]}",
            trial=partial(disturbed, faults=[fault]),
        )
        for how, fault in faults.STORE.items()
    ),
    Case(
        name=faults.DELETED_EXPERIMENT.name,
        promise=f"{UNHURT} A warning says that MLflow refuses metrics, which stay in the log. Once "
        "the experiment is restored, the same command ends with exit code 0.",
        done="before a random write of a stage's log folder the experiment is deleted from MLflow",
        trial=partial(disturbed, faults=[faults.DELETED_EXPERIMENT], only="/run/"),
    ),
    Case(
        name="two-at-once",
        promise="One runs; the other is refused with exit code 4, or finds all done.",
        done="two pipelines of one name start in the same instant",
        trial=two_at_once,
    ),
    Case(
        name="lock-holder-stopped-and-woken",
        promise=f"Others are refused with exit code 4 meanwhile. {UNHURT}",
        done="SIGSTOP before a random write, a second run, SIGCONT",
        trial=partial(stopped_holder, is_killed=False),
    ),
    Case(
        name="lock-holder-killed",
        promise=f"Others are refused while it lives, and at once take over. {GOES_ON}",
        done="SIGSTOP before a random write, a second run, SIGKILL, a third run",
        trial=partial(stopped_holder, is_killed=True),
    ),
    *(
        Case(
            name=f"{one.name}+{other.name}",
            promise=BOTH,
            done="both faults, each before a random write of its own",
            trial=partial(disturbed, faults=[one, other]),
        )
        for one, other in _PAIRS
    ),
)
