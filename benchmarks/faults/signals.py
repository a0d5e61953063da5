"""Killed and interrupted, at any moment, in every job."""

import os
import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.faults.moments import Moments
from benchmarks.faults.subject import JOBS, Subject, check_said
from benchmarks.faults.table import Broken, Case

GOES_ON = "The same command goes on; rows, weights and losses are as without the fault."


def send(*signals: int) -> Callable[[], None]:
    def act() -> None:
        for number in signals:
            os.kill(os.getpid(), number)

    return act


def drawn(subject: Subject, job: str, chance: random.Random, *, only: str = "") -> int:
    """A moment of the job, as a number from 1."""
    return chance.randint(1, sum(only in moment for moment in subject.moments(job)))


def kill(subject: Subject, chance: random.Random, folder: Path, *, only: str = "") -> str:
    at = drawn(subject, "pipeline", chance, only=only)
    moments = Moments(root=folder / "out", actions={at: send(signal.SIGKILL)}, only=only)
    ended = subject.run("pipeline", folder, moments.install)
    if ended.code != -signal.SIGKILL:
        raise Broken(f"it was not killed, but ended with {ended.code}: {ended.message}")
    subject.check_goes_on("pipeline", folder, is_killed=True)
    return f"killed before its write {at}, went on"


def interrupt(
    subject: Subject,
    chance: random.Random,
    folder: Path,
    *,
    number: int,
    is_twice: bool = False,
    is_sigint_ignored: bool = False,
) -> str:
    """In every job, at a moment of its own."""
    code, says = (143, "stopped by SIGTERM") if number == signal.SIGTERM else (130, "interrupted")
    for job in JOBS:
        here = folder / job
        at = drawn(subject, job, chance)
        again = at + chance.randint(0, 3)
        actions = {at: send(number)}
        if is_twice:
            actions[again] = send(number, number) if again == at else send(number)
        moments = Moments(root=here / "out", actions=actions)

        def before(moments: Moments = moments) -> None:
            if is_sigint_ignored:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            moments.install()

        ended = subject.run(job, here, before)
        # What is sent while a job writes its last lines may come when all is done.
        try:
            check_said(ended, codes=(code, 0), says=says)
        except Broken as error:
            raise Broken(f"jobs.{job}, write {at}: {error}") from None
        subject.check_goes_on(job, here)
    return f"exit code {code} or, where the work was done, 0; one line; each job went on"


def _interrupted(name: str, done: str, **kwargs: bool | int) -> Case:
    number = kwargs["number"]
    what = "SIGTERM" if number == signal.SIGTERM else "SIGINT"
    code = 143 if number == signal.SIGTERM else 130
    return Case(
        name=name,
        promise=f"Exit code {code} and one line. {GOES_ON}",
        done=f"{what} {done}, in each of the five jobs",
        trial=partial(interrupt, **kwargs),  # type: ignore[arg-type]
    )


CASES = (
    Case(
        name="driver-killed",
        promise=GOES_ON,
        done="SIGKILL before a random write of a pipeline",
        trial=kill,
    ),
    Case(
        name="killed-while-training",
        promise=GOES_ON,
        done="SIGKILL before a random write of the train stage",
        trial=partial(kill, only="/train-"),
    ),
    Case(
        name="killed-before-a-manifest",
        promise=GOES_ON,
        done="SIGKILL between the files of a result and its manifest",
        trial=partial(kill, only="/MANIFEST.json"),
    ),
    _interrupted("sigterm", "once", number=signal.SIGTERM),
    _interrupted("sigterm-twice", "twice", number=signal.SIGTERM, is_twice=True),
    _interrupted(
        "sigterm-while-sigint-is-ignored",
        "with SIGINT ignored, as a shell's & does",
        number=signal.SIGTERM,
        is_sigint_ignored=True,
    ),
    _interrupted("sigint", "once", number=signal.SIGINT),
    _interrupted("sigint-twice", "twice", number=signal.SIGINT, is_twice=True),
)
