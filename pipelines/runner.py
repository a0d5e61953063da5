"""Running stages: each with its log, its progress on the console, and its run in MLflow."""

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipelines.graph import pipeline_stages
from pipelines.paths import output_path
from pipelines.stage import Stage
from tokendiff.cluster.session import ray_session
from tokendiff.config import Config
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.evaluation.certificate import CERTIFICATE, figures, read_certificate
from tokendiff.manifest import fetch, verify
from tokendiff.tracking.mlflow_mirror import MlflowMirror
from tokendiff.tracking.mlflow_store import open_command, resolve_uri
from tokendiff.tracking.progress import LogTailer, ProgressPrinter
from tokendiff.tracking.run_log import RunLog

Results = dict[str, dict[str, Any]]


def run_stage(stage: Stage, mirror: MlflowMirror) -> dict[str, Any]:
    """Run one stage, or go on with it where it was cut off; returns its result.

    What it does is written to its log, and shown and mirrored from there.
    """
    params = {stage.kind: stage.settings}
    tags = {"stage": stage.name, "key": stage.key}
    with (
        RunLog(stage.log_path) as log,
        ProgressPrinter(stage.title) as printer,
        mirror.stage(stage.title, folder=stage.record, params=params, tags=tags) as run,
        LogTailer(stage.log_path, [printer.consume, run.consume]),
    ):
        try:
            stage.action(stage, log)
        except BaseException as error:
            log.write("error", message=str(error).split("\n")[0] or type(error).__name__)
            raise
        log.write("end")
        result = stage.result(stage)
        run.log_metrics(_figures(stage.title, result))
        made = fetch(stage.output) if stage.kind == "evaluate" else stage.folder
        if (report := made / "report").is_dir():
            run.log_artifacts(report, "report")
        if checks := read_certificate(made):
            run.log_metrics(figures(checks))
            run.log_artifacts(made / CERTIFICATE)
    return result


def run_job(stages: Sequence[Stage], config: Config) -> dict[str, Any]:
    """Run the stages of a single job, without a pipeline; returns the last one's result.

    Its tracking store, where none is configured, is that of the pipelines: under `config.root`.
    """
    output = stages[-1].output
    root = output_path(config.root)
    with (
        _alone(stages[-1].record),
        MlflowMirror.open(config.tracking, root) as mirror,
        ray_session(config.cluster),
    ):
        for stage in stages:
            result = run_stage(stage, mirror)
    tracked = {"MLflow": store_command(config, root)} if config.tracking.enabled else {}
    return {"output_dir": str(output), **result, **tracked}


def run_pipeline(config: Config, root: Path) -> Results:
    """Run every stage that is not done, in order; returns the result of each.

    Args:
        root: absolute folder that the pipeline's own folder is made in.

    Raises:
        InputError: a stage's input cannot be used, or another run of this pipeline is under way.
    """
    stages = checked_stages(config, root)
    with _alone(root / config.name), _parent_run(config, root) as mirror:
        results: Results = {}
        pending = [stage for stage in stages if not _is_sound(stage)]
        for stage in stages:
            if stage not in pending:
                print(f"{stage.title}  done before, in {stage.folder.name}", flush=True)
                results[stage.title] = stage.result(stage)
        if pending:
            with ray_session(config.cluster):
                for stage in pending:
                    started = time.monotonic()
                    results[stage.title] = run_stage(stage, mirror)
                    print(f"{stage.title}  done in {time.monotonic() - started:.0f} s", flush=True)
        for name, result in results.items():
            mirror.log_metrics(_figures(name, result))
    return {stage.title: results[stage.title] for stage in stages}


def store_command(config: Config, root: Path) -> str:
    """The command that opens the tracking store, as it can be typed in this environment."""
    command = open_command(resolve_uri(config.tracking, root))
    beside = Path(sys.executable).with_name("mlflow")
    if command.startswith("mlflow ") and shutil.which("mlflow") is None and beside.exists():
        return f"{beside}{command.removeprefix('mlflow')}"
    return command


def plan(config: Config, root: Path) -> list[dict[str, str]]:
    """What `run_pipeline` would do with each stage: `state` is done, resume or run."""
    rows = []
    for stage in checked_stages(config, root):
        state = "done" if stage.is_done else "resume" if stage.folder.is_dir() else "run"
        rows.append(
            {"stage": stage.title, "state": state, "key": stage.key, "folder": str(stage.folder)}
        )
    return rows


def status(config: Config, root: Path) -> Results:
    """The result of every stage that is done."""
    return {
        stage.title: stage.result(stage) for stage in checked_stages(config, root) if stage.is_done
    }


def checked_stages(config: Config, root: Path) -> list[Stage]:
    """The stages, after refusing what cannot work and paths that the pipeline itself decides."""
    return pipeline_stages(config, root / config.name)


def _is_sound(stage: Stage) -> bool:
    """Whether the stage is done; its files must then still be there, by presence and size."""
    if not stage.is_done:
        return False
    try:
        verify(stage.result_folder, hashes=False)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}; delete {stage.folder} to make it again") from error
    return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system frees it when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise InputError(
            f"{folder}: another run that writes there is under way; wait for it, or choose another "
            "folder or name"
        ) from error


@contextmanager
def _parent_run(config: Config, root: Path) -> Iterator[MlflowMirror]:
    with MlflowMirror.open(
        config.tracking,
        root,
        run_name=config.name,
        tags={"pipeline": config.name},
        folder=root / config.name / ".run",
    ) as mirror:
        yield mirror


def _figures(stage: str, result: dict[str, Any]) -> dict[str, float]:
    """A stage's numbers under names of their own, so that no curve of the run gets a point more."""
    return {
        f"{stage}/{name}": value
        for name, value in result.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
