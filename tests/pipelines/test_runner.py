"""The runner with stages that are plain functions: what runs, why, how often, and what is told."""

import contextlib
import errno
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from jobs import pipeline as pipeline_job
from pipelines import attempts, lock, runner, tables
from pipelines import record as records
from pipelines.attempts import StageTimeout, deadline, may_pass, with_retries
from pipelines.comparison import comparison_table
from pipelines.graph import Variant
from pipelines.interrupt import Interrupt
from pipelines.lock import alone, is_held
from pipelines.record import RunRecord, StageRecord, last_runs, run_facts
from pipelines.registered import PinnedModels
from pipelines.runner import Plan, run_variants
from pipelines.schedule import Selection, plan_steps, read_facts, write_facts
from pipelines.stage import Stage
from tests import ROOT
from tests.starts import STARTERS, started_by
from tokendiff.artifacts.locations import Location, RemotePath, folders_in, mirror_of
from tokendiff.artifacts.manifest import commit
from tokendiff.config.pipeline import Config, RunnerConfig, TrackingConfig
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.secrets import without_secrets

Action = Callable[[Stage], object]


class Toy:
    """A pipeline of stages that each write one file; `calls` lists those that ran.

    `at_start` is called before each run and each plan.
    """

    def __init__(self, root: Location, at_start: Callable[[], None] = lambda: None) -> None:
        self.root = root
        self.at_start = at_start
        self.calls: list[str] = []
        self.actions: dict[str, Action] = {}
        self.stages: dict[str, Stage] = {}
        self.manifests: dict[str, dict[str, Any]] = {}
        self.config = Config(
            name="toy",
            tracking=TrackingConfig(enabled=False),
            runner=RunnerConfig(retry_wait_s=0.0),
        )

    def add(self, name: str, *inputs: str, **fields: Any) -> Stage:
        kind = fields.pop("kind", "train")
        settings = fields.pop("settings", {})
        stage = Stage(
            name=name,
            kind=kind,
            settings=settings,
            base=self.root / "toy",
            action=self._act,
            result=lambda stage: json.loads((stage.output / "result.json").read_text()),
            inputs={source: self.stages[source] for source in inputs},
            is_keyed=True,
            **{"needs_ray": False, **fields},
        )
        self.stages[name] = stage
        return stage

    def _act(self, stage: Stage, log: Any) -> None:
        self.calls.append(stage.title)
        stage.output.mkdir(parents=True, exist_ok=True)
        (stage.output / "result.json").write_bytes(json.dumps({"value": 1}).encode())
        self.actions.get(stage.name, lambda stage: None)(stage)
        commit(stage.result_folder, **self.manifests.get(stage.name, {"kind": "toy"}))

    def run(self, **selection: tuple[str, ...]) -> RunRecord:
        self.calls.clear()
        self.at_start()
        variants = [Variant(values={}, stages=list(self.stages.values()))]
        return run_variants(self.config, self.root, variants, Selection(**selection))

    def plan(self, **selection: tuple[str, ...]) -> dict[str, tuple[str, str]]:
        self.at_start()
        steps = plan_steps(list(self.stages.values()), Selection(**selection))
        return {step.stage.title: (step.state, step.why) for step in steps}

    def result_json(self) -> Any:
        folder = folders_in(self.root / "toy" / "runs")[-1]
        return json.loads((folder / "result.json").read_text())


@pytest.fixture(params=["in a folder", "behind a URI", "each time from another machine"])
def toy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """data -> model -> {samples, judge}; samples -> judge."""
    machines = (str(tmp_path / f"machine-{number}") for number in itertools.count())

    def move() -> None:
        monkeypatch.setenv("TOKENDIFF_CACHE", next(machines))

    move()
    monkeypatch.setattr(lock, "PAUSE_SECONDS", 0.0)
    is_local, is_moving = (request.param.startswith(word) for word in ("in", "each"))
    root = tmp_path if is_local else RemotePath(f"memory://{tmp_path.name}")
    toy = Toy(root, move) if is_moving else Toy(root)
    toy.add("data", kind="preprocess")
    toy.add("model", "data")
    toy.add("samples", "model")
    toy.add("judge", "model", "samples")
    return toy


ALL = ["data", "model", "samples", "judge"]


def test_each_stage_runs_once(toy: Toy) -> None:
    assert toy.run().state == "succeeded"
    assert toy.calls == ALL
    assert toy.run().state == "succeeded"
    assert toy.calls == []
    assert {state for state, _ in toy.plan().values()} == {"done"}


@pytest.mark.parametrize(
    ("selection", "ran"),
    [
        ({"end": ("model",)}, ["data", "model"]),
        ({"only": ("data",)}, ["data"]),
        ({"start": ("data",), "end": ("samples",)}, ["data", "model", "samples"]),
    ],
)
def test_what_is_selected_of_a_new_pipeline(
    toy: Toy, selection: dict[str, tuple[str, ...]], ran: list[str]
) -> None:
    toy.run(**selection)
    assert toy.calls == ran


@pytest.mark.parametrize(
    ("selection", "ran"),
    [
        ({"start": ("samples",)}, ["samples", "judge"]),
        ({"start": ("model",), "end": ("samples",)}, ["model", "samples"]),
    ],
)
def test_from_a_stage_on(toy: Toy, selection: dict[str, tuple[str, ...]], ran: list[str]) -> None:
    toy.run(end=("data",))
    if "samples" in selection["start"]:
        with pytest.raises(InputError, match=r"samples needs model, which is neither done nor sel"):
            toy.run(**selection)
        toy.run(end=("model",))
    toy.run(**selection)
    assert toy.calls == ran


def test_what_an_alias_stands_for_is_kept_before_the_first_stage_runs(toy: Toy) -> None:
    """A run that is killed once it has moved the alias is gone on with, and reads it as before."""
    models: dict[str, Any] = {"models:/toy@champion": None}
    kept = toy.root / "toy" / ".run" / "models.json"
    read: list[Any] = []
    toy.actions["data"] = lambda stage: read.append(json.loads(kept.read_text()))
    pinned = PinnedModels(models=models, inputs="monday", moved={})
    variants = [Variant(values={}, stages=list(toy.stages.values()))]
    run_variants(toy.config, toy.root, variants, Selection(only=("data",)), pinned)
    assert read == [{"monday": models}]


def test_a_wrong_name_is_told_with_the_nearest(toy: Toy) -> None:
    with pytest.raises(InputError, match=r"--only jugde: no such stage; did you mean 'judge'\?"):
        toy.plan(only=("jugde",))


def test_a_forced_stage_takes_others_along_only_if_it_comes_out_different(toy: Toy) -> None:
    toy.run()
    assert toy.plan(force=("model",)) == {
        "data": ("done", "made by an earlier run"),
        "model": ("run", "asked for with --force"),
        "samples": ("check", "only if model comes out different"),
        "judge": ("check", "only if model and samples come out different"),
    }
    (toy.stages["model"].output / "left").write_bytes(b"of before, which is begun anew")
    record = toy.run(force=("model",))
    assert toy.calls == ["model"]
    assert record.of("judge").why == "model came out the same"
    toy.actions["model"] = lambda stage: (stage.output / "weights").write_bytes(b"other")
    record = toy.run(force=("model",))
    assert toy.calls == ["model", "samples", "judge"]
    assert record.of("samples").why == "model came out different"
    # Forced although not selected otherwise; what is made from it is left, and caught up later.
    toy.actions["model"] = lambda stage: (stage.output / "weights").write_bytes(b"third")
    toy.run(only=("data",), force=("model",))
    assert toy.calls == ["model"]
    assert toy.plan()["judge"] == ("check", "only if samples comes out different")
    assert toy.plan()["samples"] == ("run", "model was made again")
    toy.run()
    assert toy.calls == ["samples", "judge"]


def test_a_run_that_was_cut_off_goes_on(toy: Toy) -> None:
    def stop(stage: Stage) -> None:
        raise KeyboardInterrupt

    toy.actions["samples"] = stop
    with pytest.raises(KeyboardInterrupt):
        toy.run()
    result = toy.result_json()
    assert (result["state"], result["exit_code"]) == ("stopped", 130)
    assert [stage["state"] for stage in result["stages"]] == [
        "ran",
        "ran",
        "stopped",
        "not reached",
    ]
    assert toy.plan()["samples"] == ("resume", "it was interrupted")
    del toy.actions["samples"]
    kept = toy.stages["samples"].output / "kept"
    kept.write_bytes(b"")
    toy.run()
    assert toy.calls == ["samples", "judge"]
    assert kept.exists()  # what was there was gone on with
    assert read_facts(toy.stages["samples"])["attempt"] == 2


def test_why_a_stage_runs_names_what_changed(toy: Toy) -> None:
    toy.run()
    toy.add("model", "data", settings={"rate": 2.0, "objective": {"name": "a"}})
    toy.run(end=("model",))
    toy.add("model", "data", settings={"rate": 3.0, "objective": {"name": "b"}})
    toy.add("samples", "model")
    plan = toy.plan()
    said = 'rate changed from 2.0 to 3.0, objective.name changed from "a" to "b"'
    assert plan["model"] == ("run", said)
    assert plan["samples"] == ("run", "the input 'model' changed")
    assert plan["data"][0] == "done"


def test_what_is_new_is_told_from_the_last_one_that_an_earlier_version_made(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.add("data", kind="preprocess")
    for last in range(4):  # each once, since folders are in no order of time
        for number in range(4):
            stage = toy.add("model", "data", settings={"rate": number})
            toy.run()
            path = stage.folder / "run" / "stage.json"
            facts = json.loads(path.read_text())
            facts.pop("time", None)
            path.write_text(json.dumps(facts))
            seconds = 2e9 if number == last else 1e9
            os.utime(path, (seconds, seconds))
        toy.add("model", "data", settings={"rate": 9})
        assert toy.plan()["model"] == ("run", f"rate changed from {last} to 9")


def test_a_file_that_is_gone_is_said_and_not_passed_over(toy: Toy) -> None:
    toy.run()
    (toy.stages["model"].output / "result.json").unlink()
    with pytest.raises(CorruptFileError, match=r"result\.json is missing.*delete .*model-"):
        toy.run()


def test_a_failure_takes_down_what_depends_on_it_alone(toy: Toy) -> None:
    toy.add("other", "data")

    def fail(stage: Stage) -> None:
        raise FloatingPointError("loss is nan at step 3")

    toy.actions["model"] = fail
    with pytest.raises(FloatingPointError):
        toy.run()
    assert toy.calls == ["data", "model", "other"]  # and no second attempt at the model
    result = toy.result_json()
    assert (result["state"], result["exit_code"]) == ("failed", 1)
    assert result["error"] == "loss is nan at step 3"
    states = {stage["stage"]: (stage["state"], stage["why"]) for stage in result["stages"]}
    assert states["model"] == ("failed", "loss is nan at step 3")
    assert states["judge"] == ("not reached", "model, samples failed")
    assert states["other"][0] == "ran"

    def fail_too(stage: Stage) -> None:
        raise OSError("a disk is full")

    toy.actions["other"] = fail_too
    with pytest.raises(FloatingPointError):  # the first; the rest is in the record
        toy.run(force=("other",))
    states = {s["stage"]: (s["state"], s["why"]) for s in toy.result_json()["stages"]}
    assert states["other"] == ("failed", "a disk is full")


@pytest.mark.parametrize(("num_cpus", "expected"), [(24, 2), (27, 3), (3, 1)])
def test_as_many_stages_run_side_by_side_as_the_cpus_do_for(
    monkeypatch: pytest.MonkeyPatch, num_cpus: int, expected: int
) -> None:
    """A stage needs those of its workers or actors, whichever are more, and one to read data."""
    monkeypatch.setattr(runner, "num_cpus", lambda cluster: num_cpus)
    for fields in ({"num_workers": 4, "num_actors": 2}, {"num_workers": 2, "num_actors": 4}):
        cluster = {"cpus_per_worker": 2, **fields}
        assert runner._room(Config.model_validate({"name": "toy", "cluster": cluster})) == expected


def test_what_a_failed_stage_held_is_free_for_the_stages_behind_it(tmp_path: Path) -> None:
    """A model on a GPU, say; the error itself, with the lines it came from, is kept."""

    class Model:
        pass

    toy = Toy(tmp_path)
    toy.add("model")
    toy.add("other")
    held: list[weakref.ref[Model]] = []
    seen: list[Model | None] = []

    def fail(stage: Stage) -> None:
        model = Model()
        held.append(weakref.ref(model))
        try:
            raise ValueError("out of bounds")
        except ValueError as error:
            raise FloatingPointError("loss is nan") from error

    toy.actions["model"] = fail
    toy.actions["other"] = lambda stage: seen.append(held[0]())
    with pytest.raises(FloatingPointError) as raised:
        toy.run()
    assert seen == [None]
    assert "out of bounds" in "".join(traceback.format_exception(raised.value))


def test_a_stage_with_nothing_to_do_and_what_is_made_from_it_are_left_out(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    toy.add("data", skip="no new data")
    toy.add("model", "data")
    toy.add("champion")
    toy.add("promote", "champion", "data", optional=frozenset({"data"}))
    assert toy.plan()["model"] == ("skip", "data is skipped")
    assert toy.run().state == "succeeded"
    assert toy.calls == ["champion", "promote"]


def shards_of(heldout_rows: int, **fields: Any) -> dict[str, Any]:
    """What a manifest of token shards says of them."""
    splits = {"train": {"rows": 9, "documents": 4}, "heldout": {"rows": heldout_rows}}
    return {"kind": "tokens", "metadata": {"splits": splits, "config": fields}}


def test_rows_that_an_evaluation_will_lack_end_the_run_at_the_data(toy: Toy) -> None:
    toy.manifests["data"] = shards_of(1, heldout_fraction=0.05)
    data, judge = toy.stages["data"], toy.stages["judge"]
    toy.stages["judge"] = replace(judge, judges=(data.result_folder, "heldout"))
    said = (
        r"judge: data_path .*/data-\w+: split 'heldout' has 1 row, and an evaluation takes at "
        r"least 2; raise preprocess.heldout_fraction \(it is 0.05\), or give more documents"
    )
    for calls in (["data"], []):  # it is made once, and the next run looks at what is there
        with pytest.raises(InputError, match=said):
            toy.run()
        assert toy.calls == calls
        record = toy.result_json()
        states = {stage["stage"]: stage["state"] for stage in record["stages"]}
        assert states == {"data": "failed", **dict.fromkeys(ALL[1:], "not reached")}
        assert record["state"] == "bad input"
    toy.run(only=("model",))  # without the evaluation it may train
    assert toy.calls == ["model"]
    toy.stages["judge"] = replace(judge, judges=(data.result_folder, "train"))
    toy.run()
    assert toy.calls == ["samples", "judge"]


def test_data_from_elsewhere_is_looked_at_before_anything_runs(toy: Toy, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    commit(elsewhere, **shards_of(0))
    toy.stages["judge"] = replace(toy.stages["judge"], judges=(elsewhere, "heldout"))
    with pytest.raises(InputError, match="split 'heldout' has no rows"):
        toy.run()
    assert toy.calls == []
    assert toy.result_json()["state"] == "bad input"


def test_bad_input_in_a_stage_has_its_own_state(toy: Toy) -> None:
    def refuse(stage: Stage) -> None:
        raise InputError("no such column")

    toy.actions["data"] = refuse
    with pytest.raises(InputError):
        toy.run()
    assert toy.calls == ["data"]
    assert (toy.result_json()["state"], toy.result_json()["exit_code"]) == ("bad input", 2)

    def blunder(stage: Stage) -> None:
        raise ValueError("a fault of ours")

    toy.actions["data"] = blunder
    with pytest.raises(ValueError, match="a fault of ours"):
        toy.run()
    assert (toy.result_json()["state"], toy.result_json()["exit_code"]) == ("failed", 1)


# Retries.


def ray_error(name: str, *args: Any) -> BaseException:
    from ray import exceptions

    error: BaseException = getattr(exceptions, name)(*args)
    return error


def task_error(cause: Exception) -> BaseException:
    return ray_error("RayTaskError", "f", "traceback", cause)


def wrapped(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def http_error(status: int) -> Exception:
    class Response:
        status_code = status

    error = OSError("the hub answers")
    error.response = Response()  # type: ignore[attr-defined]
    return error


def store_error(what: str) -> Exception:
    """As it comes from pyarrow by way of `tokendiff.artifacts.locations`."""
    return OSError(
        f"s3://b/x: When reading information for key 'x' in bucket 'b': AWS Error {what}"
    )


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (lambda: store_error("NETWORK_CONNECTION during PutObject operation: curlCode: 7"), True),
        (lambda: store_error("UNKNOWN (HTTP status 503) during HeadObject operation"), True),
        (lambda: store_error("SLOW_DOWN during PutObject operation"), True),
        (lambda: store_error("UNKNOWN (HTTP status 412) during PutObject operation"), False),
        (lambda: store_error("ACCESS_DENIED during HeadObject operation"), False),
        (lambda: ConnectionResetError("by peer"), True),
        (lambda: TimeoutError("no answer"), True),
        (lambda: wrapped(error := TimeoutError("raised from itself"), error), True),
        (lambda: OSError(errno.ESTALE, "stale file handle"), True),
        (lambda: ray_error("NodeDiedError", "node"), True),
        (lambda: ray_error("WorkerCrashedError"), True),
        (lambda: wrapped(RuntimeError("failed 4 times"), ray_error("RayActorError")), True),
        (lambda: http_error(503), True),
        (lambda: http_error(429), True),
        (lambda: http_error(404), False),
        (lambda: InputError("bad"), False),
        (lambda: FloatingPointError("nan"), False),
        (lambda: CorruptFileError("sha256"), False),
        (lambda: OSError(errno.ENOSPC, "no space left on device"), False),
        (lambda: ray_error("OutOfDiskError"), False),
        (lambda: wrapped(ConnectionError("lost"), OSError(errno.ENOSPC, "no space")), False),
        (lambda: wrapped(ConnectionError("lost"), OSError(errno.EDQUOT, "quota")), False),
        (lambda: wrapped(ConnectionError("lost"), PermissionError("refused")), False),
        (lambda: wrapped(ConnectionError("lost"), ray_error("RuntimeEnvSetupError")), False),
        (lambda: ray_error("ActorDiedError", task_error(ValueError("in __init__"))), False),
        (lambda: ray_error("ActorDiedError"), True),
        (lambda: task_error(InputError("bad")), False),
        (lambda: task_error(ConnectionError("lost")), True),
        (lambda: ValueError("a bug"), False),
        (lambda: FileNotFoundError("gone"), False),
        (lambda: MemoryError(), False),
        (lambda: StageTimeout("too long"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(make: Callable[[], BaseException], passes: bool) -> None:
    assert may_pass(make()) is passes


def test_waits_double_and_attempts_end() -> None:
    waits: list[float] = []
    told: list[tuple[str, float]] = []
    outcomes: list[Any] = [ConnectionError("a"), ConnectionError("b"), 7]

    def work() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return int(outcome)

    def run(max_retries: int, wait_s: float = 3.0) -> tuple[int, int]:
        return with_retries(
            work,
            max_retries=max_retries,
            wait_s=wait_s,
            on_retry=lambda reason, wait: told.append((reason, wait)),
            sleep=waits.append,
        )

    assert run(2) == (7, 3)
    assert waits == [3.0, 6.0]
    assert told == [("a", 3.0), ("b", 6.0)]
    outcomes[:] = [ConnectionError("a"), ConnectionError("b"), 7]
    with pytest.raises(ConnectionError, match="b"):
        run(1)
    waits.clear()
    outcomes[:] = [ConnectionError("away")] * 4 + [7]
    assert run(9, wait_s=100.0) == (7, 5)
    assert waits == [100.0, 200.0, 400.0, 600.0]  # ten minutes at most


def test_a_stage_is_tried_again_and_its_own_number_goes_first(toy: Toy) -> None:
    failures = ["once", "twice"]

    def fail(stage: Stage) -> None:
        if failures:
            raise ConnectionError(failures.pop())

    toy.actions["model"] = fail
    record = toy.run()
    assert (record.of("model").attempts, record.state) == (3, "succeeded")
    assert read_facts(toy.stages["model"])["attempt"] == 3
    failures[:] = ["once"]
    toy.add("model", "data", settings={"other": True}, max_retries=0)
    with pytest.raises(ConnectionError):
        toy.run()
    assert toy.calls == ["model"]


def test_a_server_that_is_away_while_a_stage_is_checked_is_asked_again(toy: Toy) -> None:
    failures = ["once", "twice"]

    def check(stage: Stage) -> None:
        if failures:
            raise ConnectionError(failures.pop())

    toy.add("model", "data", check=check)
    assert toy.run().state == "succeeded"
    failures[:] = ["once", "twice", "and again"]
    toy.add("model", "data", settings={"other": True}, check=check)
    with pytest.raises(ConnectionError):
        toy.run()
    assert toy.calls == []
    record = toy.result_json()
    assert (record["state"], record["exit_code"]) == ("failed", 1)
    assert {"stage": "model", "state": "failed"}.items() <= record["stages"][1].items()


# Timeouts.


def test_a_stage_that_takes_too_long_is_stopped_wherever_it_waits(toy: Toy) -> None:
    def wait(stage: Stage) -> None:
        try:
            time.sleep(30)
        except Exception:  # as a library may, of whatever comes
            time.sleep(30)

    toy.actions["model"] = wait
    toy.add("model", "data", timeout_s=0.2)
    toy.stages["samples"] = toy.add("samples", "model")
    started = time.monotonic()
    with pytest.raises(StageTimeout, match=r"model took longer than timeout_s = 0\.2; raise it"):
        toy.run(end=("model",))
    assert time.monotonic() - started < 10
    assert toy.calls == ["data", "model"]
    assert toy.result_json()["state"] == "failed"


@pytest.mark.parametrize("starter", STARTERS)
def test_time_is_up_whoever_started_the_process(starter: str) -> None:
    started = time.monotonic()
    with (
        started_by(starter),
        pytest.raises(StageTimeout, match=r"x took longer than timeout_s = 0\.05"),
        deadline(30.0, what="y"),
        deadline(0.05, what="x"),
    ):
        time.sleep(10)
    assert time.monotonic() - started < 5


def test_time_that_is_up_is_told_again_where_a_library_kept_it_to_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keep_one_to_itself() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(10)
        time.sleep(10)

    monkeypatch.setattr(attempts, "_RESEND_SECONDS", 0.05)
    started = time.monotonic()
    with pytest.raises(StageTimeout), deadline(0.05, what="x"):
        keep_one_to_itself()
    assert time.monotonic() - started < 5


def test_ctrl_c_is_no_timeout() -> None:
    with pytest.raises(KeyboardInterrupt), deadline(30.0, what="x"):
        raise KeyboardInterrupt


def test_only_a_main_thread_can_be_timed_out() -> None:
    def enter() -> str:
        with pytest.raises(InputError, match="timeout_s: only a run in a process's main thread"):
            deadline(30.0, what="x").__enter__()
        return "refused"

    with ThreadPoolExecutor() as pool:
        assert pool.submit(enter).result() == "refused"


@pytest.mark.parametrize("seconds", [30.0, 1e30])  # no clock can wait for so long
def test_a_deadline_that_is_kept_leaves_nothing_behind(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    before = signal.getsignal(signal.SIGURG)
    num_threads = threading.active_count()
    with deadline(seconds, what="x"):
        pass
    assert failed == []
    assert signal.getsignal(signal.SIGURG) is before
    assert threading.active_count() == num_threads


def test_an_interrupt_that_comes_too_late_does_nothing_and_one_to_an_outer_block_counts() -> None:
    def send(interrupt: Interrupt) -> None:
        interrupt.send()
        time.sleep(10)

    with Interrupt() as outer:
        with Interrupt() as inner:
            pass
        inner.send()
        with pytest.raises(KeyboardInterrupt), Interrupt():
            send(outer)
        inner.send()  # which does not raise again what was sent before
    outer.send()
    time.sleep(0.01)


# The lock.

HOLD = """
import sys, time
from pathlib import Path
from pipelines.lock import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    toy, folder = Toy(tmp_path), tmp_path / "toy"
    toy.add("data", kind="preprocess")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=rf"is under way \(process {process.pid} on"):
            toy.run()
        assert not (folder / "runs").exists()
        process.kill()
        process.wait()
    assert toy.run().state == "succeeded"


CHILD = """
import multiprocessing, sys, time
from pathlib import Path
from pipelines import execution
from tokendiff.config.pipeline import Config

def stay(*_):
    try:
        print("begun", flush=True)
        time.sleep(15)
        print("outlived", flush=True)
    except KeyboardInterrupt:
        print("saved", flush=True)
    return []

def child(sender):
    execution.pipeline_stages = stay
    execution._run_child(sender, Config(name="toy"), Path("."), Path("."), {}, None, {})

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    context.Process(target=child, args=(sender,)).start()
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_stage_in_a_process_of_its_own_ends_with_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run.py"
    path.write_text(CHILD)
    with subprocess.Popen(
        [sys.executable, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        process.kill()
        assert process.stdout.read() == ""  # both have closed it


def test_a_lock_within_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(BlockingIOError), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


def test_who_looks_whether_a_run_is_under_way_refuses_none(tmp_path: Path) -> None:
    glance = FileLock(tmp_path / ".lock", thread_local=False)
    glance.acquire()
    threading.Timer(0.1, glance.release).start()
    with alone(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_who_may_only_read_sees_whether_a_run_is_under_way(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, **options: Any) -> None:
        raise OSError(number, "no", str(path))

    with monkeypatch.context() as patch, alone(tmp_path):
        patch.setattr(lock, "FileLock", refuse)
        assert is_held(tmp_path)
    monkeypatch.setattr(lock, "FileLock", refuse)
    assert not is_held(tmp_path)


def test_a_lock_that_a_library_waited_for_in_vain_is_not_taken_for_this_one(tmp_path: Path) -> None:
    with pytest.raises(Timeout, match=r"compiled\.lock"), alone(tmp_path):
        raise Timeout("compiled.lock")
    with alone(tmp_path):
        pass


# What is told.


def test_the_record_is_there_from_the_start(toy: Toy) -> None:
    def look(stage: Stage) -> None:
        (run,) = last_runs(toy.root / "toy", 5)
        seen.append((run.state, run.of("model").state, run.of("judge").state))
        steps = plan_steps(list(toy.stages.values()), Selection())
        status = tables.status_as_json([run], Plan(steps=steps, notes=[]))
        seen.append({stage["stage"]: stage["why"] for stage in status["stages"]}["model"])

    seen: list[Any] = []
    toy.actions["model"] = look
    toy.run()
    assert seen == [("running", "running", "not reached"), "it is running"]
    (run,) = last_runs(toy.root / "toy", 5)
    assert (run.state, run.exit_code, run.of("model").state) == ("succeeded", 0, "ran")
    assert run.seconds is not None
    # A run that nobody holds the lock for is not running.
    path = run.folder / "result.json"
    text = path.read_text().replace('"state": "succeeded"', '"state": "running"')
    path.write_bytes(text.encode())
    assert last_runs(toy.root / "toy", 5)[0].state == "killed"
    for damaged in ("", "{", "null", "[]", "5", "{}"):
        path.write_bytes(damaged.encode())
        assert last_runs(toy.root / "toy", 5) == []


def test_a_run_that_ends_while_it_is_looked_at_was_not_killed(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = RunRecord.begin(toy.config, toy.root / "toy", [])

    def end(folder: Location) -> bool:
        record.state = "succeeded"
        record.save()
        return False

    monkeypatch.setattr(records, "is_held", end)
    assert [run.state for run in last_runs(toy.root / "toy", 5)] == ["succeeded"]


def test_of_runs_that_say_that_they_run_the_newest_alone_may_be_alive(tmp_path: Path) -> None:
    toy = Toy(tmp_path)
    for _ in range(2):
        RunRecord.begin(toy.config, tmp_path / "toy", [])
    with alone(tmp_path / "toy"):
        assert [run.state for run in last_runs(tmp_path / "toy", 5)] == ["running", "killed"]
    assert [run.state for run in last_runs(tmp_path / "toy", 1)] == ["killed"]


def test_a_run_begins_beside_what_others_keep_among_its_records(tmp_path: Path) -> None:
    (tmp_path / "toy" / "runs" / "notes-of-mine").mkdir(parents=True)
    record = RunRecord.begin(Config(name="toy"), tmp_path / "toy", [])
    assert [run.folder for run in last_runs(tmp_path / "toy", 5)] == [record.folder]


def test_a_run_says_which_code_and_which_job_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    for name in ("RAY_JOB_SUBMISSION_ID", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    if shutil.which("git") and (commit := git("rev-parse", "HEAD")):
        is_dirty = bool(git("status", "--porcelain", "-uno"))
        assert run_facts(Config(name="toy"))["git_commit"] == commit + "-dirty" * is_dirty
    monkeypatch.setattr(records, "_git", lambda *words: "")  # as where it is not installed
    facts = run_facts(Config(name="toy"))
    assert facts.keys() == {"config_hash", "host"}
    assert run_facts(Config(name="other"))["config_hash"] != facts["config_hash"]
    for told, job in (("{", None), ("{}", None), ('{"metadata": {"job_submission_id": "a"}}', "a")):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", told)
        assert run_facts(Config(name="toy")).get("ray_job_id") == job
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "b")
    assert run_facts(Config(name="toy"))["ray_job_id"] == "b"


def test_the_last_run_is_not_another_one_while_the_store_is_down(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.run()
    newest, load = toy.run().folder, RunRecord.load

    def fail(folder: Location) -> RunRecord:
        if folder == newest:
            raise ConnectionError(f"{folder}: AWS Error SLOW_DOWN")
        return load(folder)

    monkeypatch.setattr(RunRecord, "load", fail)
    with pytest.raises(ConnectionError, match="SLOW_DOWN"):
        last_runs(toy.root / "toy", 5)


@pytest.mark.parametrize("fails", [False, True])
def test_a_record_that_cannot_be_written_ends_no_run_and_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def lose_the_store(stage: Stage) -> None:
        monkeypatch.setattr(RunRecord, "save", refuse)
        if fails:
            raise FloatingPointError("loss is nan")

    def refuse(record: RunRecord) -> None:
        raise OSError("s3://b/result.json: AWS Error NETWORK_CONNECTION")

    toy = Toy(tmp_path)
    toy.add("data", kind="preprocess")
    toy.add("model", "data")
    toy.actions["data"] = lose_the_store
    if fails:
        with pytest.raises(FloatingPointError, match="loss is nan"):
            toy.run()
    else:
        assert toy.run().state == "succeeded"
        assert toy.calls == ["data", "model"]


@pytest.fixture
def remote_toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """No stages yet; whether it has its lease is looked at often."""
    monkeypatch.setenv("TOKENDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(lock, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(lock, "RENEWAL_SECONDS", 0.1)
    return Toy(RemotePath(f"memory://{tmp_path.name}"))


def take_lease(toy: Toy) -> None:
    other = {"host": "far", "pid": "7", "since": "2026", "token": "other"}
    (toy.root / "toy" / ".lock.holder").write_bytes(json.dumps(other).encode())


@pytest.mark.parametrize("starter", STARTERS)
def test_a_run_whose_lease_was_taken_says_so(remote_toy: Toy, starter: str) -> None:
    toy = remote_toy

    def lose(stage: Stage) -> None:
        take_lease(toy)
        time.sleep(10)

    toy.add("data", kind="preprocess")
    toy.actions["data"] = lose
    with started_by(starter), pytest.raises(BlockingIOError, match="process 7 on far"):
        toy.run()
    result = toy.result_json()
    assert (result["state"], result["exit_code"]) == ("locked", 4)
    assert "process 7 on far" in result["error"]
    assert result["stages"][0]["state"] == "stopped"
    assert not (toy.stages["data"].output / "run" / "log.jsonl").exists()  # which is the other's


def test_a_stage_that_is_deaf_to_the_loss_of_the_lease_is_the_last(
    remote_toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = remote_toy

    def lose(stage: Stage) -> None:
        take_lease(toy)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(10)

    toy.add("data", kind="preprocess")
    toy.actions["data"] = lose
    for name in ("a", "b"):  # cut off before, they would go on in processes of their own
        write_facts(toy.add(name, kind="preprocess", needs_ray=True))
    monkeypatch.setattr(runner._Run, "_room_here", lambda run: 2)
    monkeypatch.setattr(runner._Run, "_connect", lambda run: None)
    monkeypatch.setattr(runner, "ChildStage", lambda stage, *_, **__: toy.calls.append(stage.title))
    with pytest.raises(BlockingIOError, match="process 7 on far"):
        toy.run()
    assert toy.calls == ["data"]
    assert not toy.stages["data"].is_done
    assert toy.result_json()["state"] == "locked"


@pytest.mark.parametrize(("is_lost", "told"), [(True, "kill"), (False, "ask_to_stop")])
def test_stages_side_by_side_are_not_asked_to_save_once_the_lease_is_lost(
    remote_toy: Toy, monkeypatch: pytest.MonkeyPatch, is_lost: bool, told: str
) -> None:
    toy, calls = remote_toy, []

    class Child:
        def __init__(self, stage: Stage, *_: object, **__: object) -> None:
            self.title = stage.title
            self.receiver, self._sender = multiprocessing.Pipe(duplex=False)
            if stage.name == "b" and is_lost:
                take_lease(toy)
            elif stage.name == "b":
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

        def __getattr__(self, name: str) -> Callable[[], None]:
            return lambda: calls.append((self.title, name))

    monkeypatch.setattr(runner, "ChildStage", Child)
    monkeypatch.setattr(runner._Run, "_room_here", lambda run: 2)
    monkeypatch.setattr(runner._Run, "_connect", lambda run: None)
    for name in ("a", "b"):
        toy.add(name, kind="preprocess", needs_ray=True)
    with pytest.raises(BlockingIOError if is_lost else KeyboardInterrupt):
        toy.run()
    assert calls == [("a", told), ("b", told), ("a", "wait"), ("b", "wait")]
    assert toy.result_json()["exit_code"] == (4 if is_lost else 143)


def test_a_rejection_is_a_state_of_its_own_each_time(toy: Toy) -> None:
    toy.add("promote", "judge", kind="promote")
    rejected = json.dumps({"decision": "rejected", "gate": [], "summary": "it stays"}).encode()
    toy.actions["promote"] = lambda stage: (stage.output / "result.json").write_bytes(rejected)
    for _ in range(2):
        assert toy.run().state == "rejected"
        assert toy.result_json()["exit_code"] == 3
    assert toy.calls == []


def test_a_plan_looks_at_the_root_from_all_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `run` does, which a submitted job shows on two of them."""

    def refuse(cluster: object, root: Location) -> None:
        raise InputError(f"root {root} is not visible")

    monkeypatch.setattr("tokendiff.cluster.session.check_seen_by_all", refuse)
    path = tmp_path / "local.yaml"
    path.write_text(f"name: local\nroot: {tmp_path}\npreprocess: {{use_dummy_data: true}}\n")
    assert pipeline_job.main(["plan", str(path)]) == 2
    assert f"root {tmp_path} is not visible" in capsys.readouterr().err


def test_lines_tell_what_ran_and_what_did_not(toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    toy.run(end=("model",))
    record = toy.run(only=("samples",))
    printed = capsys.readouterr().out
    name = toy.stages["model"].output.name
    assert "data  will run (no earlier result)" in printed
    assert f"model  done (made by an earlier run, in {name})" in printed
    assert "samples  will run (no earlier result)" in printed
    assert "judge  skipped (not selected)" in printed
    lines = tables.stage_lines(record.stages)
    assert [line.split()[:2] for line in lines] == [
        ["stage", "state"],
        ["data", "done"],
        ["model", "done"],
        ["samples", "ran"],
        ["judge", "skipped"],
    ]
    assert lines[4].endswith("not selected")
    assert record.of("judge").result == {}
    graph = tables.mermaid(plan_steps(list(toy.stages.values()), Selection()))
    assert graph[0] == "graph LR"
    assert "  s1 -->|model| s2" in graph
    assert any("judge" in line and line.endswith(":::run") for line in graph)
    assert '"' not in graph[2].split('["')[1].split('"]')[0]
    toy.run()
    left_out = toy.run(force=("data",), end=("data",)).of("model")  # but it has a result to show
    assert (left_out.state, left_out.result) == ("skipped", {"value": 1})


def test_variants_side_by_side(toy: Toy) -> None:
    toy = Toy(toy.root)
    shared = toy.add("data", kind="preprocess")
    variants = []
    for rate in (1, 2):
        model = toy.add("model", "data", settings={"rate": rate}, label=f"rate={rate}")
        judge = toy.add("judge", "model", kind="evaluate", label=f"rate={rate}")
        variants.append(Variant(values={"rate": rate}, stages=[shared, model, judge]))

    def measure(stage: Stage) -> None:
        figures = {"nats_per_token": 1.5 / stage.settings["rate"], "same": 3, "text": "x"}
        (stage.output / "result.json").write_bytes(json.dumps(figures).encode())

    def fail(stage: Stage) -> None:
        if stage.settings["rate"] == 2:
            raise FloatingPointError("nan")

    toy.actions["model"] = measure
    record = run_variants(toy.config, toy.root, variants, Selection())
    assert toy.calls == ["data", "model[rate=1]", "model[rate=2]", "judge[rate=1]", "judge[rate=2]"]
    assert [row["nats_per_token"] for row in record.comparison] == [1.5, 0.75]
    assert comparison_table(record.comparison, record.axes) == [
        "| rate | nats_per_token |",
        "| ---- | -------------- |",
        "| 1    | 1.5            |",
        "| 2    | 0.75           |",
    ]
    assert (
        (record.folder / "comparison.csv").read_text().splitlines()[0].startswith("rate,nats_per")
    )
    assert (record.folder / "comparison.md").read_text().startswith("| rate |")
    page = (record.folder / "comparison.html").read_text()
    assert "2 variants side by side" in page
    assert "<td" in page
    assert "rate 2" in page
    # One variant that diverges leaves the other its figures.
    toy.actions["model"] = fail
    selection = Selection(force=("model",))
    with pytest.raises(FloatingPointError):
        run_variants(toy.config, toy.root, variants, selection)
    rows = toy.result_json()["comparison"]
    assert rows[0].get("state") is None
    assert rows[1]["state"] == "failed"


def test_old_runs_are_removed(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_KEPT_RUNS", 2)
    for second in range(4):
        monkeypatch.setattr(time, "time", lambda second=second: 1e9 + second)
        kept = mirror_of(toy.run().folder)
        kept.mkdir(parents=True, exist_ok=True)
        (kept / "comparison.csv").write_text("")
    here = [path.parent.parent for path in tmp_path.glob("machine-*/runs/**/comparison.csv")]
    assert all(len(list(runs.iterdir())) <= 2 for runs in here)
    names = [folder.name for folder in folders_in(toy.root / "toy" / "runs")]
    assert [name.split("-")[0] for name in names] == ["20010909T014642", "20010909T014643"]


def test_exit_codes_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(f"name: small\nroot: {tmp_path / 'out'}\n")
    with alone(tmp_path / "out" / "small"):
        assert pipeline_job.main(["run", str(path)]) == 4
    assert "is under way" in capsys.readouterr().err
    assert pipeline_job.main(["run", str(path), "--only", "tran"]) == 2
    assert "--only tran: no such stage; did you mean 'train'?" in capsys.readouterr().err
    assert pipeline_job.main(["plan", str(path), "--mermaid"]) == 0
    assert capsys.readouterr().out.startswith("graph LR\n")
    assert pipeline_job.main(["status", str(path)]) == 0
    assert "no run yet" in capsys.readouterr().out
    record = RunRecord(pipeline="small", folder=tmp_path, state="rejected")
    monkeypatch.setattr("pipelines.runner.run_pipeline", lambda *args: record)
    assert pipeline_job.main(["run", str(path), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["state"] == "rejected"


def test_status_tells_of_the_runs_though_the_corpus_is_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.yaml"
    corpus = tmp_path / "corpus" / "*.txt"
    path.write_text(
        f"name: small\nroot: {tmp_path / 'out'}\n"
        f"preprocess: {{dataset_name: text, data_files: ['{corpus}']}}\n"
    )
    (run := tmp_path / "out" / "small" / "runs" / "1").mkdir(parents=True)
    RunRecord(pipeline="small", folder=run, state="failed").save()
    assert pipeline_job.main(["status", str(path)]) == 2
    shown = capsys.readouterr()
    assert "failed  1" in shown.out
    assert "matches no file" in shown.err
    assert pipeline_job.main(["status", str(path), "--json"]) == 2
    status = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in status["runs"]] == ["failed"]
    assert "matches no file" in status["error"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"seconds": "long"},
        {"seconds": "2"},
        {"state": 3},
        {"started": None},
        {"stages": [{**vars(StageRecord(stage="a", kind="b", key="c", folder="d")), "why": 1}]},
        {"stages": [{**vars(StageRecord(stage="a", kind="b", key="c", folder="d")), "folder": 1}]},
    ],
)
def test_a_record_of_other_types_is_passed_over(
    wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(f"name: small\nroot: {tmp_path / 'out'}\n")
    (run := tmp_path / "out" / "small" / "runs" / "1").mkdir(parents=True)
    record = RunRecord(pipeline="small", folder=run, state="failed", seconds=2).as_json()
    (run / "result.json").write_text(json.dumps(record))
    assert pipeline_job.main(["status", str(path)]) == 0
    assert "failed, 2 s  1" in capsys.readouterr().out
    (run / "result.json").write_text(json.dumps({**record, **wrong}))
    assert pipeline_job.main(["status", str(path)]) == 0
    assert "no run yet" in capsys.readouterr().out
    assert pipeline_job.main(["clean", str(path), "-o", "runner.keep_runs=1"]) == 2
    assert "its record cannot be read" in capsys.readouterr().err


def test_what_never_ran_is_not_rolled_back_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "out"
    flags = ["-o", "name=never", "-o", f"root={root}"]
    assert pipeline_job.main(["rollback", "retrain", *flags]) == 2
    assert "models:/tokendiff@champion: there is no such model" in capsys.readouterr().err
    assert not root.exists()


def test_secrets_are_in_no_record(tmp_path: Path) -> None:
    config = Config(
        name="toy",
        tracking=TrackingConfig(enabled=False, uri="https://me:hunter2@host/store"),
    )
    record = RunRecord.begin(config, tmp_path, [])
    written = "".join(path.read_text() for path in record.folder.iterdir())
    assert "https://host/store" in written
    assert "hunter2" not in written
    hidden = {"api_key": "hunter2", "list": [{"password": "hunter2"}], "tokenizer": "bytes"}
    assert without_secrets(hidden) == {"list": [{}], "tokenizer": "bytes"}
