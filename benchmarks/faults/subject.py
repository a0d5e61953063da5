"""A tiny pipeline in a process of its own, and whether it came out as without a fault.

Processes are forked from this one, which has imported everything and run the pipeline once: a run
takes a second or two and not half a minute, so that each fault can be tried at many moments. What
Ray would start other processes for is done in the job's (`tests.in_this_process`).
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.faults.moments import Moments
from benchmarks.faults.table import Broken
from tests.in_this_process import jobs_here
from tokendiff.artifacts.manifest import MANIFEST_NAME, load_manifest, verify
from tokendiff.tracking.run_log import LOG_NAME, metrics_by_step

JOBS = ("preprocess", "train", "generate", "evaluate", "pipeline")
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "preprocess": {
        "use_dummy_data": True,
        "num_dummy_samples": 64,
        "max_length": 16,
        "tokenizer_name_or_path": "bytes",
        "heldout_fraction": 0.1,
    },
    "train": {
        "model_name_or_path": "builtin:bert-tiny",
        "max_train_steps": 6,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 4,
        "mixed_precision": "no",
    },
    "generate": {"num_samples": 4, "batch_size": 2, "sampler": {"num_inference_steps": 4}},
    "evaluate": {"max_eval_rows": 4, "num_mask_samples": 1},
    "runner": {"max_retries": 0, "retry_wait_s": 0.0},
    "cluster": {"cpus_per_worker": 0.5, "threads_per_worker": 1},
    "tracking": {"enabled": False},
}
_LONGEST_SECONDS = 150.0
_POLL_SECONDS = 0.02
Outcome = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended. A `code` below 0 is the signal that killed it."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The last that it said on stderr, on one line."""
        return " ".join(self.err.split())[-300:]


@dataclass(frozen=True, kw_only=True)
class Started:
    """A process under way."""

    pid: int
    streams: Path

    def wait(self, seconds: float = _LONGEST_SECONDS) -> Ended:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                out, err = (
                    self.streams.with_suffix(suffix).read_text(errors="replace")
                    for suffix in (".out", ".err")
                )
                return Ended(code=os.waitstatus_to_exitcode(status), out=out, err=err)
            time.sleep(_POLL_SECONDS)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise Broken(f"nothing came of it within {seconds:.0f} s")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The pipeline, and each job by itself on what an undisturbed pipeline made."""

    scratch: Path

    @property
    def _made(self) -> Path:
        """The folder of an undisturbed pipeline, as `jobs.pipeline` names it."""
        return self.undisturbed("pipeline") / CONFIG["name"]

    def _one(self, pattern: str) -> str:
        (found,) = self._made.glob(pattern)
        return str(found)

    def arguments(self, job: str, folder: Path, **sections: Any) -> list[str]:
        """The command line of a job that writes under `folder`.

        Args:
            sections: of the config, where they are to be others.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {**CONFIG, "root": str(folder / "out"), **sections}
        if job == "pipeline":  # the report's figures take longer than all else
            config["evaluate"] = sections.get("evaluate")
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        if job == "pipeline":
            return ["run", str(path)]
        given = {
            "preprocess": [],
            "train": ["--data_path", "preprocess-*"],
            "generate": ["--checkpoint_path", "train-*/final"],
            "evaluate": ["--checkpoint_path", "train-*/final", "--data_path", "preprocess-*"],
        }[job]
        words = [word if word.startswith("--") else self._one(word) for word in given]
        return ["--config", str(path), *words, "--output_dir", str(folder / "out" / job)]

    def start(
        self,
        job: str,
        folder: Path,
        before: Callable[[], None] = lambda: None,
        *,
        arguments: list[str] | None = None,
        **sections: Any,
    ) -> Started:
        """Start a job that writes under `folder`.

        Args:
            before: called in the new process before the job: it arranges for the fault.
            arguments: the command line, where it is another.
        """
        arguments = arguments or self.arguments(job, folder, **sections)
        streams = folder / f"streams-{time.monotonic_ns()}"
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return Started(pid=pid, streams=streams)
        code = 70
        try:
            for number, suffix in ((1, ".out"), (2, ".err")):
                file = os.open(streams.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(file, number)
            sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
            sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with jobs_here():
                before()
                code = importlib.import_module(f"jobs.{job}").main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def run(
        self,
        job: str,
        folder: Path,
        before: Callable[[], None] = lambda: None,
        **kwargs: Any,
    ) -> Ended:
        return self.start(job, folder, before, **kwargs).wait()

    def expected(self, job: str) -> Outcome:
        """What the job makes without a fault."""
        return outcome_of(self.undisturbed(job))

    def moments(self, job: str) -> list[str]:
        """The job's moments without a fault."""
        text = (self.undisturbed(job).parent / "moments.json").read_text()
        moments: list[str] = json.loads(text)
        return moments

    def undisturbed(self, job: str) -> Path:
        """What the job wrote without a fault; it is run when this is first asked for."""
        folder = self.scratch / "undisturbed" / job
        if not (folder / "moments.json").exists():
            moments = Moments(root=folder / "out")

            def before() -> None:
                moments.install()
                at_the_end(lambda: (folder / "moments.json").write_text(json.dumps(moments.seen)))

            ended = self.run(job, folder, before)
            if ended.code != 0:
                raise RuntimeError(f"{job} failed without a fault: {ended.err}")
        return folder / "out"

    def check_same(
        self, job: str, folder: Path, *, is_killed: bool = False, may_lack_losses: bool = False
    ) -> None:
        """Raise Broken where the job did not come out as without a fault, or left something.

        Args:
            may_lack_losses: the log may lack some, but has no others.
        """
        expected, found = self.expected(job), outcome_of(folder / "out")
        for name, losses in expected.items() if may_lack_losses else ():
            if name.startswith("losses of ") and found.get(name, {}).items() <= losses.items():
                found[name] = losses
        for name in expected.keys() | found.keys():
            if expected.get(name) != found.get(name):
                raise Broken(f"{name}: not as without a fault")
        if left := leftovers(folder / "out", is_killed=is_killed):
            raise Broken(f"left behind: {', '.join(left)}")

    def check_goes_on(
        self, job: str, folder: Path, *, is_killed: bool = False, **kwargs: Any
    ) -> Ended:
        """Run the same command again: it must end well, with all as without a fault."""
        ended = self.run(job, folder, **kwargs)
        if ended.code != 0:
            raise Broken(f"the same command again ended with {ended.code}: {ended.message}")
        self.check_same(job, folder, is_killed=is_killed)
        return ended


def at_the_end(call: Callable[[], object]) -> None:
    """Before this forked process ends: `os._exit` calls nothing that is registered."""
    leave = os._exit

    def last(code: int) -> None:
        call()
        leave(code)

    os._exit = last  # type: ignore[assignment]


@contextlib.contextmanager
def prepared(scratch: Path, *, has_report: bool = True) -> Iterator[Subject]:
    """A subject whose processes start at once: all is imported, and has run once.

    Args:
        has_report: False leaves out what only `jobs.evaluate` imports.
    """
    subject = Subject(scratch=scratch)
    evaluate = CONFIG["evaluate"] if has_report else None
    arguments = subject.arguments("pipeline", scratch / "warm", evaluate=evaluate)
    with jobs_here(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = importlib.import_module("jobs.pipeline").main(arguments)
    if code != 0:
        raise RuntimeError("the pipeline failed without a fault")
    yield subject


def outcome_of(folder: Path) -> Outcome:
    """What was made: the digest of each file that a manifest vouches for, and each step's loss.

    Raises:
        CorruptFileError: a file is not as its manifest says.
    """
    found: Outcome = {}
    for path in sorted(folder.rglob(MANIFEST_NAME)):
        if path.parent.name.startswith("checkpoint-"):
            continue
        verify(path.parent)
        manifest = load_manifest(path.parent)
        # Reports and figures hold times.
        is_judged = manifest.kind == "evaluation"
        found[str(path.parent.relative_to(folder))] = {
            name: entry["sha256"]
            for name, entry in manifest.files.items()
            if not is_judged or name.endswith(".parquet")
        }
    for path in sorted(folder.rglob(LOG_NAME)):
        if losses := {e["step"]: e["loss"] for e in metrics_by_step(path) if "loss" in e}:
            found[f"losses of {path.parent.parent.relative_to(folder)}"] = losses
    return found


def leftovers(folder: Path, *, is_killed: bool = False) -> list[str]:
    """Temporary files, locks' holders, and marks of results under way that are not there: one
    beside a manifest is of a process that ended in the instant between the two, and means nothing.

    Args:
        is_killed: a process was, which may leave marks and temporary files beside records of runs
            and of stages, which are no part of a result.
    """
    found = [
        path.relative_to(folder)
        for each in ("*.tmp", "*.unfinished", ".lock.holder")
        for path in folder.rglob(each)
    ]
    found = [
        path
        for path in found
        if path.suffix != ".unfinished" or not any((folder / path.parents[1]).rglob(MANIFEST_NAME))
    ]
    if is_killed:
        ours = {"run", "runs", ".run"}
        found = [p for p in found if p.name == ".lock.holder" or not ours & set(p.parts)]
    return sorted(map(str, found))


def check_said(ended: Ended, *, codes: tuple[int, ...], says: str = "") -> None:
    """Raise Broken for another exit code, a traceback, or anything but one message."""
    if ended.code not in codes:
        raise Broken(f"exit code {ended.code}, expected {codes}: {ended.message}")
    if "Traceback" in ended.err:
        raise Broken(f"a traceback in place of a message: {ended.message}")
    if ended.code > 0 and says not in ended.err:
        raise Broken(f"stderr does not say {says!r}: {ended.message}")
    if (count := sum(line.startswith("error: ") for line in ended.err.splitlines())) > 1:
        raise Broken(f"{count} messages in place of one: {ended.message}")
