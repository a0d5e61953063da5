"""S3 that is slow, refuses, dies in the middle of an upload, or lists late."""

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults.disturbances import fill, mounted
from benchmarks.faults.fake_s3 import BUCKET, Failing, FakeS3
from benchmarks.faults.signals import GOES_ON
from benchmarks.faults.subject import CONFIG, Ended, Started, Subject, check_said
from benchmarks.faults.table import Broken, Case
from pipelines import lock

UNHURT = "Exit code 0; rows, weights and losses are as on a local disk."
STOPS = f"Exit code 1 and one message that names the object. {GOES_ON}"
_LIST_SECONDS = 3.0
_SHORT_RENEWAL = 0.5
_DISK = "size=32m"
_SHORT_SECONDS = 3.0  # pyarrow tries again for 6


def _start(
    subject: Subject,
    folder: Path,
    store: FakeS3,
    *,
    machine: str = "cache",
    renewal_s: float = lock.RENEWAL_SECONDS,
) -> Started:
    """The pipeline with its root in the bucket, on a machine of that name: a folder of copies.

    Args:
        renewal_s: of its lease.
    """

    def before() -> None:
        os.environ |= {**store.environment, "TOKENDIFF_CACHE": str(folder / machine)}
        lock.RENEWAL_SECONDS = renewal_s

    return subject.start("pipeline", folder, before, root=f"s3://{BUCKET}/out")


def _run(subject: Subject, folder: Path, store: FakeS3) -> Ended:
    return _start(subject, folder, store).wait()


def _num_requests(subject: Subject) -> int:
    """Of a run without a fault, which comes out as on a local disk."""
    folder = subject.scratch / "behind-s3"
    note = folder / "num-requests"
    if not note.exists():
        with FakeS3.started(folder / "store", Failing()) as store:
            ended = _run(subject, folder, store)
            if ended.code != 0:
                raise RuntimeError(f"the pipeline behind s3:// failed without a fault: {ended.err}")
            subject.check_same("pipeline", store.folder)
            note.write_text(str(store.num_requests))
    return int(note.read_text())


def behind_s3(
    subject: Subject,
    chance: random.Random,
    folder: Path,
    *,
    failing: Callable[..., Failing],
    codes: tuple[int, ...],
    says: str = "",
) -> str:
    """Run the pipeline behind a store that fails from a random request on, mend it, and again."""
    at = chance.randint(1, _num_requests(subject))
    with FakeS3.started(folder / "store", failing(at=at)) as store:
        ended = _run(subject, folder, store)
        check_said(ended, codes=codes, says=says)
        store.mend()
        again = _run(subject, folder, store)
        if again.code != 0:
            raise Broken(f"the same command again ended with {again.code}: {again.message}")
        subject.check_same("pipeline", store.folder)
    return f"exit code {ended.code}; gone on with the same result"


def lease_lost(subject: Subject, chance: random.Random, folder: Path, *, is_disk_full: bool) -> str:
    """A run is stopped at a random request past its lease, one of another machine takes that over
    and ends, and the first is woken; with a full disk, if that is asked for.
    """
    at, stopped = chance.randint(1, _num_requests(subject) * 9 // 10), folder / "stopped"
    disk = mounted(stopped, _DISK) if is_disk_full else nullcontext()
    with FakeS3.started(folder / "store", Failing()) as store, disk:
        start = partial(_start, subject, folder, store, renewal_s=_SHORT_RENEWAL)
        pid: list[int] = []
        store.on_request = lambda number: os.kill(pid[0], signal.SIGSTOP) if number == at else None
        first = start(machine=stopped.name)
        pid.append(first.pid)
        os.waitpid(first.pid, os.WUNTRACED)  # returns once it is stopped
        pipeline = store.folder / "out" / CONFIG["name"]
        is_holder = (pipeline / ".lock.holder").exists()
        is_done = any(pipeline.glob("generate-*/MANIFEST.json"))  # of the last stage
        if is_disk_full:
            fill(stopped / "ballast")
        time.sleep(lock.DEAD_AFTER * _SHORT_RENEWAL)
        check_said(start(machine="other").wait(), codes=(0,))
        os.kill(first.pid, signal.SIGCONT)
        ended = first.wait()
        codes = {4} if is_holder and not is_done else {0, 4}
        check_said(ended, codes=tuple(codes | ({1} if is_disk_full else set())))
        again = start(machine="other").wait()
        if again.code != 0:
            raise Broken(f"the same command again ended with {again.code}: {again.message}")
        # A log is copied to the store at each checkpoint and at the end of a stage: what the first
        # run logged after that is on its machine alone.
        subject.check_same("pipeline", store.folder, may_lack_losses=True)
    return f"stopped at request {at} {'with' if is_holder else 'without'} the lease: {ended.code}"


def _case(name: str, promise: str, done: str, *, codes: tuple[int, ...], **how: Any) -> Case:
    trial = partial(
        behind_s3,
        failing=partial(Failing, **how),
        codes=codes,
        says=f"s3://{BUCKET}/out" if 1 in codes else "",
    )
    return Case(name=name, promise=promise, done=done, trial=trial)


CASES = (
    _case(
        "s3-slow",
        UNHURT,
        "from a random request on, S3 answers three requests after 4 s",
        codes=(0,),
        how="slow",
    ),
    _case(
        "s3-503-for-seconds",
        UNHURT,
        f"from a random request on, S3 answers 503 for {_SHORT_SECONDS:g} s",
        codes=(0,),
        how="503",
        seconds=_SHORT_SECONDS,
    ),
    _case(
        "s3-503",
        STOPS,
        "from a random request on, S3 answers 503 until the run is over",
        codes=(0, 1),
        how="503",
    ),
    _case(
        "s3-dies-in-upload",
        STOPS,
        "from a random upload on, S3 breaks each connection off, the upload's in its middle",
        codes=(0, 1),
        how="dies",
    ),
    _case(
        "s3-lists-late",
        UNHURT,
        f"listings are {_LIST_SECONDS:g} s behind what was written and deleted",
        codes=(0,),
        lists_after=_LIST_SECONDS,
    ),
    *(
        Case(
            name=name,
            promise=f"The other ends with exit code 0, the first with {codes} and one message (or "
            "with 0, where its last stage was done). The same command goes on; rows and weights "
            "are as on a local disk, and so are the losses that had reached the store.",
            done="SIGSTOP at a random request, a run on another machine once the lease is over, "
            f"{then}SIGCONT",
            trial=partial(lease_lost, is_disk_full=is_disk_full),
        )
        for name, codes, then, is_disk_full in (
            ("lease-holder-stopped-and-woken", "4", "", False),
            ("full-disk+lease-lost", "1 or 4", "a full disk at the first, ", True),
        )
    ),
)
