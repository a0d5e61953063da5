"""The nights: new text, a fault, the pipeline until it comes to an end, what must be true then."""

import os
import random
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults.damage import flip
from benchmarks.faults.disturbances import fill
from benchmarks.faults.moments import Moments
from benchmarks.faults.signals import send
from benchmarks.faults.subject import CONFIG, Ended, Started, Subject, at_the_end, check_said
from benchmarks.faults.table import Broken
from benchmarks.soak import checks
from benchmarks.soak.corpus import poison, text_of

MODEL, ALIAS = "soak", "champion"
CHAMPION = f"models:/{MODEL}@{ALIAS}"
MARGIN, ERRORS, KEEP_RUNS = 0.005, 2.0, 3
DONE = (0, 3)  # a model that the gate turns away is the end of a night as well
_FIRST_LINES, _LINES, _POISON_LINES = 240, 60, 90
_DAY_SECONDS = 86400.0
_MOST_RUNS = 3
SECTIONS: dict[str, Any] = {
    **CONFIG,
    "name": "month",
    "preprocess": {
        "dataset_name": "text",
        "new_since": CHAMPION,
        "tokenizer_name_or_path": "bytes",
        "max_length": 64,
        "heldout_fraction": 0.2,
    },
    "train": {
        **CONFIG["train"],
        "warm_start_from": CHAMPION,
        "max_train_steps": 60,
        "logging_steps": 20,
        "checkpointing_steps": 20,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "per_device_train_batch_size": 16,
    },
    "generate": {"sampler": {"num_inference_steps": 4}},
    "evaluate": {"num_mask_samples": 2, "time_passes": False},
    "promote": {
        "registered_model": MODEL,
        "gate": [
            {
                "metric": "nats_per_token",
                "direction": "lower",
                "margin": MARGIN,
                "min_standard_errors": ERRORS,
            }
        ],
    },
    "stages": {
        "data": {"kind": "preprocess"},
        "train": {"kind": "train", "inputs": {"data": "data"}},
        "evaluate": {"kind": "evaluate", "inputs": {"checkpoint": "train", "data": "data"}},
        "evaluate-champion": {
            "kind": "evaluate",
            "inputs": {"data": "data"},
            "config": {"checkpoint_path": CHAMPION},
        },
        "promote": {
            "kind": "promote",
            "inputs": {"candidate": "evaluate", "champion": "evaluate-champion"},
        },
    },
    "runner": {"max_retries": 0, "retry_wait_s": 0.0, "keep_runs": KEEP_RUNS},
    "tracking": {"enabled": True},
}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is done to a night's first run.

    Attributes:
        codes: exit codes that it may have, beside those of a night that is done.
        action: called in the process of the job at a moment that is drawn, with the month's root.
        mend: called before the next run.
    """

    codes: tuple[int, ...] = ()
    action: Callable[[Path], None] | None = None
    mend: Callable[[Path, random.Random], None] = lambda root, chance: None


def _set_back(root: Path) -> None:
    right = time.time
    time.time = lambda: right() - _DAY_SECONDS


_held: list[sqlite3.Connection] = []


def _lock_database(root: Path) -> None:
    """As a second program that writes to the store and does not come to an end."""
    database = sqlite3.connect(root / "mlflow.db", timeout=30.0)
    database.execute("BEGIN EXCLUSIVE")
    _held.append(database)  # closed, and so let go, with the process


def _flip_newest_checkpoint(root: Path, chance: random.Random) -> None:
    """Of a training that is not done."""
    found = [
        path
        for path in root.glob("month/train-*/checkpoint-*/model.safetensors")
        if not (path.parents[1] / "final" / "MANIFEST.json").exists()
    ]
    if found:
        flip(max(found, key=lambda path: path.stat().st_mtime_ns), chance)


FAULTS: dict[str, Fault] = {
    "none": Fault(),
    "killed": Fault(codes=(-signal.SIGKILL,), action=lambda root: send(signal.SIGKILL)()),
    "killed, checkpoint flipped": Fault(
        codes=(-signal.SIGKILL,),
        action=lambda root: send(signal.SIGKILL)(),
        mend=_flip_newest_checkpoint,
    ),
    "sigterm": Fault(codes=(143,), action=lambda root: send(signal.SIGTERM)()),
    "sigint": Fault(codes=(130,), action=lambda root: send(signal.SIGINT)()),
    "clock set back": Fault(action=_set_back),
    "database locked": Fault(codes=(1, 2), action=_lock_database),
    "two at once": Fault(codes=(4,)),
}
FULL_DISK = Fault(
    codes=(1, 2),
    action=lambda root: fill(root / "ballast"),
    mend=lambda root, chance: (root / "ballast").unlink(missing_ok=True),
)


@dataclass(kw_only=True)
class Night:
    """What a night came to.

    Attributes:
        codes: exit codes of its runs, in order.
        is_hit: the fault's moment came; a night that does less than the one before may be over.
        champion: the version that is the champion afterwards.
        broken: the promise that was not kept; empty where all were.
    """

    number: int
    fault: str
    is_poisoned: bool = False
    codes: list[int] = field(default_factory=list)
    is_hit: bool = True
    compared: checks.Compared | None = None
    champion: int | None = None
    moved: bool = False
    disk: checks.Disk | None = None
    store_bytes: int = 0
    seconds: float = 0.0
    broken: str = ""


@dataclass(kw_only=True)
class Month:
    """A corpus, and the folder that all its nights write under.

    Attributes:
        root: of the pipeline.
        poisoned: the night whose text is poison; a person takes it away the next morning.
    """

    subject: Subject
    root: Path
    nights: int
    seed: int
    faults: dict[str, Fault]
    _champion: int | None = None
    _num_moments: int = 0  # of the last night that was done in one run
    _sessions: list[int] = field(default_factory=list)

    @property
    def poisoned(self) -> int:
        return self.nights // 2 + 1

    @property
    def _corpus(self) -> Path:
        return self.root.parent / "corpus"

    @property
    def _config(self) -> Path:
        return self.root.parent / "config.yaml"

    def run(self) -> Iterator[Night]:
        """Each night when it is over."""
        files = {"data_files": [f"{self._corpus}/*.txt"]}
        preprocess = {**SECTIONS["preprocess"], **files}
        config = {**SECTIONS, "root": str(self.root), "preprocess": preprocess}
        self._config.write_text(yaml.safe_dump(config))
        for number in range(1, self.nights + 1):
            chance = random.Random(f"{self.seed}/{number}/fault")
            # The first night has no store yet, whose lock another could hold.
            name = "none" if number == 1 else chance.choice(list(self.faults))
            night = Night(number=number, fault=name, is_poisoned=number == self.poisoned)
            started = time.monotonic()
            try:
                self._run(night, chance)
            except Broken as error:
                night.broken = str(error)
            night.seconds = time.monotonic() - started
            yield night

    def _run(self, night: Night, chance: random.Random) -> None:
        self._bring_text(night)
        temporary = self.root.parent / f"tmp-{night.number}"
        temporary.mkdir()
        fault = self.faults[night.fault]
        self._sessions.clear()
        for ended in self._first(night, fault, chance, temporary):
            night.codes.append(ended.code)
            check_said(ended, codes=(*DONE, *fault.codes))
        if night.codes[-1] in DONE and len(night.codes) == 1:
            self._num_moments = int((self.root.parent / "num-moments").read_text())
        fault.mend(self.root, chance)
        while night.codes[-1] not in DONE:
            if len(night.codes) == _MOST_RUNS:
                raise Broken(f"not done after runs that ended with {night.codes}")
            ended = self._start(temporary).wait()
            night.codes.append(ended.code)
            check_said(ended, codes=DONE)
        self._check(night, temporary if -signal.SIGKILL not in night.codes else None)

    def _bring_text(self, night: Night) -> None:
        self._corpus.mkdir(exist_ok=True)
        (self._corpus / "poison.txt").unlink(missing_ok=True)
        lines = _FIRST_LINES if night.number == 1 else _LINES
        text = text_of(night.number, nights=self.nights, seed=self.seed, num_lines=lines)
        if night.is_poisoned:
            text = poison(seed=self.seed, num_lines=_POISON_LINES)
        name = "poison" if night.is_poisoned else f"night-{night.number:02}"
        (self._corpus / f"{name}.txt").write_text(text)

    def _first(
        self, night: Night, fault: Fault, chance: random.Random, temporary: Path
    ) -> list[Ended]:
        """The night's first run, or the first two."""
        moments = Moments(root=self.root)
        if fault.action is not None:
            at = chance.randint(1, self._num_moments)
            moments = replace(moments, actions={at: partial(self._hit, fault.action)})
            self._mark.unlink(missing_ok=True)
        started = [self._start(temporary, moments)]
        if night.fault == "two at once":
            started.append(self._start(temporary))
        # The refused one first: the last code is that of the run that did the work.
        ended = sorted((each.wait() for each in started), key=lambda each: -each.code)
        night.is_hit = fault.action is None or self._mark.exists()
        return ended

    @property
    def _mark(self) -> Path:
        return self.root.parent / "hit"

    def _hit(self, action: Callable[[Path], None]) -> None:
        self._mark.touch()
        action(self.root)

    def _start(self, temporary: Path, moments: Moments | None = None) -> Started:
        counts = self.root.parent / "num-moments"
        moments = moments or Moments(root=self.root)

        def before() -> None:
            os.setsid()  # so that processes that it leaves behind can be found
            tempfile.tempdir = str(temporary)
            at_the_end(lambda: counts.write_text(str(len(moments.seen))))
            moments.install()

        started = self.subject.start(
            "pipeline", self.root.parent, before, arguments=["run", str(self._config)]
        )
        self._sessions.append(started.pid)
        return started

    def _check(self, night: Night, temporary: Path | None) -> None:
        folder = self.root / "month"
        store = checks.read_store(self.root / "mlflow.db", model=MODEL, alias=ALIAS)
        before, self._champion = self._champion, store.champion
        night.champion, night.moved = store.champion, store.champion != before
        night.compared = checks.compared(checks.last_run(folder))
        night.disk = checks.disk_of(folder, keep_runs=KEEP_RUNS, num_versions=store.num_versions)
        night.store_bytes = checks.bytes_under(self.root) - checks.bytes_under(folder)
        checks.check_nothing_left(
            self.root, folder, store=store, sessions=self._sessions, temporary=temporary
        )
        if store.champion is None:
            raise Broken("there is no champion")
        checks.check_champion(found=night.compared, moved=night.moved, margin=MARGIN, errors=ERRORS)
        if night.is_poisoned and night.moved:
            raise Broken("a model that was trained on poison became the champion")
        if night.disk.num_bytes > night.disk.bound:
            raise Broken(f"{night.disk.num_bytes} bytes on disk, at most {night.disk.bound}")
