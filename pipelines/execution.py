"""Running one stage: with its log, its progress on the console, and its run in MLflow; here, or in
a process of its own beside others.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from pipelines.attempts import deadline, with_retries
from pipelines.graph import pipeline_stages
from pipelines.schedule import write_facts
from pipelines.stage import Stage, put_log, take_log
from tokendiff.artifacts.locations import Location
from tokendiff.artifacts.manifest import fetch, fingerprint, load_manifest
from tokendiff.cluster.session import ray_session
from tokendiff.cluster.stopping import sigterm_stops, words_of
from tokendiff.config.pipeline import Config, RunnerConfig
from tokendiff.errors import that_travels
from tokendiff.tracking.mlflow_mirror import MirroredRun, MlflowMirror
from tokendiff.tracking.progress import LogTailer, ProgressPrinter
from tokendiff.tracking.run_log import RunLog
from tokendiff.verification.certificate import CERTIFICATE, figures, read_certificate

_STOP_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage came to, in how many attempts and seconds."""

    result: dict[str, Any]
    attempts: int
    seconds: float


def run_stage(
    stage: Stage,
    mirror: MlflowMirror,
    *,
    tags: Mapping[str, Any] | None = None,
    has_bar: bool = True,
) -> dict[str, Any]:
    """Run one stage, or go on with it where it was cut off; returns its result.

    What it does is written to its log, and shown and mirrored from there.

    Args:
        tags: of its run in MLflow, beside its own.
        has_bar: whether a progress bar may be drawn; stages side by side write lines.
    """
    own_tags = {"stage": stage.name, "key": stage.key, **(tags or {})}
    params = {stage.kind: stage.settings}

    def keep_log(events: list[dict[str, Any]]) -> None:
        if any(event["event"] == "checkpoint" for event in events):
            put_log(stage)

    take_log(stage)
    with (
        RunLog(stage.log_path) as log,
        ProgressPrinter(stage.title, log_path=stage.log_path, has_bar=has_bar) as printer,
        mirror.stage(stage.title, folder=stage.record, params=params, tags=own_tags) as run,
        run.system_metrics(),
    ):
        _log_data(stage, run)
        try:
            consumers = [printer.consume, run.consume, keep_log]
            with LogTailer(stage.log_path, consumers, on_look=printer.look):
                _act(stage, log)
        except BaseException:
            with contextlib.suppress(OSError):  # of two errors the first one counts
                put_log(stage)
            raise
        put_log(stage)
        result = stage.result(stage)
        run.log_metrics(figures_of(stage.title, result))
        made = fetch(stage.output) if stage.kind == "evaluate" else stage.folder
        if (report := made / "report").is_dir():
            run.log_artifacts(report, "report")
        if checks := read_certificate(made):
            run.log_metrics(figures(checks))
            run.log_artifacts(made / CERTIFICATE)
    return result


def _act(stage: Stage, log: RunLog) -> None:
    try:
        stage.action(stage, log)
    except BaseException as error:
        with contextlib.suppress(OSError):  # where the disk is full, the first error counts
            is_interrupt = isinstance(error, KeyboardInterrupt)
            name = "interrupted" if is_interrupt else type(error).__name__
            log.write("error", message=words_of(error).split("\n")[0] or name)
        raise
    log.write("end")


def run_patiently(
    stage: Stage,
    mirror: MlflowMirror,
    runner: RunnerConfig,
    *,
    tags: Mapping[str, Any] | None = None,
    has_bar: bool = True,
) -> Outcome:
    """`run_stage`, again after failures that may pass, each attempt within its time."""
    retries = runner.max_retries if stage.max_retries is None else stage.max_retries
    timeout_s = runner.timeout_s if stage.timeout_s is None else stage.timeout_s
    started = time.monotonic()

    def once() -> dict[str, Any]:
        attempt = write_facts(stage)["attempt"]
        with deadline(timeout_s, what=stage.title):
            return run_stage(
                stage, mirror, tags={**(tags or {}), "attempt": attempt}, has_bar=has_bar
            )

    result, attempts = with_retries(
        once, max_retries=retries, wait_s=runner.retry_wait_s, on_retry=partial(_tell_retry, stage)
    )
    return Outcome(result=result, attempts=attempts, seconds=time.monotonic() - started)


def check_patiently(stage: Stage, runner: RunnerConfig) -> None:
    """`stage.check`, again after failures that may pass."""
    with_retries(
        partial(stage.check, stage),
        max_retries=runner.max_retries if stage.max_retries is None else stage.max_retries,
        wait_s=runner.retry_wait_s,
        on_retry=partial(_tell_retry, stage),
    )


def _tell_retry(stage: Stage, reason: str, wait: float) -> None:
    print(f"{stage.title}  failed ({reason}); trying again in {wait:g} s", flush=True)


def figures_of(title: str, result: Mapping[str, Any]) -> dict[str, float]:
    """A stage's numbers under names of their own, so that no curve of the run gets a point more."""
    return {
        f"{title}/{name}": value
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _log_data(stage: Stage, run: MirroredRun) -> None:
    for context, folder in stage.reads.items():
        try:
            digest = fingerprint(load_manifest(folder).files)
        except OSError:  # the stage itself will say what is wrong with it
            continue
        name = f"{folder.parent.name}/{folder.name}"
        run.log_input(name=name, digest=digest, source=folder, context=context)


class ChildStage:
    """A stage that runs in a process of its own, on the cluster that this process is connected to.

    What Ray Data, signals and clocks keep for a whole process is then the stage's alone.
    """

    def __init__(
        self,
        stage: Stage,
        config: Config,
        root: Location,
        *,
        models: Mapping[str, Any],
        parent_run_id: str | None,
        tags: Mapping[str, Any],
    ) -> None:
        import ray

        self.stage = stage
        cluster = {"address": ray.get_runtime_context().gcs_address}
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update=cluster)})
        context = multiprocessing.get_context("spawn")
        self.receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, config, root, stage.output, dict(models), parent_run_id, dict(tags))
        self._process = context.Process(target=_run_child, args=arguments, name=stage.title)
        self._process.start()
        sender.close()

    def outcome(self) -> Outcome:
        """What it came to, once `receiver` has it; raises what the stage raised."""
        try:
            answer = self.receiver.recv()
        except EOFError:
            self._process.join()
            raise ChildProcessError(
                f"{self.stage.title}: its process ended with code {self._process.exitcode}; "
                "run the same command again: it goes on where it was cut off"
            ) from None
        self._process.join()
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, Outcome)
        return answer

    def ask_to_stop(self) -> None:
        """It may save what it has first; `wait` says for how long."""
        self._process.terminate()

    def kill(self) -> None:
        """It writes nothing more, and Ray ends what it runs elsewhere."""
        self._process.kill()

    def wait(self) -> None:
        """Return once it has ended, if need be by force."""
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _run_child(
    sender: Connection,
    config: Config,
    root: Location,
    output: Location,
    models: Mapping[str, Any],
    parent_run_id: str | None,
    tags: Mapping[str, Any],
) -> None:
    threading.Thread(target=_end_with_parent, name="end with parent", daemon=True).start()
    answer: Outcome | BaseException
    try:
        with sigterm_stops():
            stages = pipeline_stages(config, root / config.name, models)
            stage = next(stage for stage in stages if stage.output == output)
            with (
                MlflowMirror.open(config.tracking, root, parent_run_id=parent_run_id) as mirror,
                ray_session(config.cluster),
            ):
                answer = run_patiently(stage, mirror, config.runner, tags=tags, has_bar=False)
    except KeyboardInterrupt:
        return
    except BaseException as error:
        answer = that_travels(error)
    sender.send(answer)


def _end_with_parent() -> None:
    """As by `ChildStage.kill`: the lock of a parent that was killed is free for another run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
