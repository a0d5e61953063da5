"""What a run of a pipeline did: `runs/TIME/result.json` in the pipeline's folder.

A person and a monitor read the same file: it says how the run stands or ended, stage by stage.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter

from pipelines.lock import EXIT_LOCKED, is_held
from pipelines.paths import RUNS
from tokendiff.artifacts.locations import Location, folders_in, mirror_of, remove
from tokendiff.artifacts.manifest import write_atomically
from tokendiff.config import strict_yaml
from tokendiff.config.pipeline import Config
from tokendiff.config.stage_graph import set_fields
from tokendiff.secrets import without_secrets

RESULT_NAME, CONFIG_NAME = "result.json", "config.yaml"
# How a run can end, and the exit code of the command that ran it.
EXIT_CODES = {
    "succeeded": 0,
    "failed": 1,
    "bad input": 2,
    "rejected": 3,
    "locked": EXIT_LOCKED,
    "stopped": 130,
}
EXIT_SIGTERM = 143  # stopped, but by SIGTERM
_KEPT_RUNS = 100
_TIME_FORMAT = "%Y%m%dT%H%M%S-%f"  # of a run's folder; its order is that of the names


@dataclass(kw_only=True)
class StageRecord:
    """What became of one stage.

    Attributes:
        state: done (before), ran, skipped, running, failed, stopped, or "not reached".
        why: why it ran, was skipped, or failed.
    """

    stage: str
    kind: str
    key: str
    folder: str
    state: str = "not reached"
    why: str = ""
    seconds: float | None = None
    attempts: int = 0
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class RunRecord:
    """How a run stands, or ended.

    Attributes:
        state: running, or one of `EXIT_CODES`. A run that says "running" but whose process is gone
            was killed.
        axes: what a matrix varies.
        comparison: a row for each variant of a matrix: its values and its figures.
    """

    pipeline: str
    folder: Location
    state: str = "running"
    exit_code: int | None = None
    error: str | None = None
    started: str = ""
    seconds: float | None = None
    stages: list[StageRecord] = field(default_factory=list)
    axes: list[str] = field(default_factory=list)
    comparison: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, config: Config, pipeline_folder: Location, stages: list[StageRecord]
    ) -> "RunRecord":
        """A new run, and its folder with the config that it is of."""
        now = datetime.fromtimestamp(time.time(), UTC)
        folder = pipeline_folder / RUNS / _next_name(pipeline_folder / RUNS, now)
        folder.mkdir(parents=True)
        write_atomically(folder / CONFIG_NAME, public_yaml(config).encode())
        record = cls(
            pipeline=config.name,
            folder=folder,
            started=f"{now:%Y-%m-%d %H:%M:%S} UTC",
            stages=stages,
            facts=run_facts(config),
        )
        record.save()
        _remove_old(pipeline_folder / RUNS)
        return record

    def of(self, title: str) -> StageRecord:
        return next(stage for stage in self.stages if stage.stage == title)

    def save(self) -> None:
        write_atomically(self.folder / RESULT_NAME, json.dumps(self.as_json(), indent=1).encode())

    def as_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return _without_nan({"exit_code": None, **fields, "folder": str(self.folder)})

    @classmethod
    def load(cls, folder: Location) -> "RunRecord":
        """
        Raises:
            ValueError, TypeError, KeyError: what is there is no record of a run.
        """
        raw = json.loads((folder / RESULT_NAME).read_text())
        if not isinstance(raw, dict):
            raise ValueError(f"{folder / RESULT_NAME} holds no record of a run")
        stages = [StageRecord(**_typed(StageRecord, stage)) for stage in raw.pop("stages")]
        return cls(**{**_typed(cls, raw), "folder": folder, "stages": stages})


def _typed(model: type[RunRecord] | type[StageRecord], raw: dict[str, Any]) -> dict[str, Any]:
    """The fields; ValueError where one holds what such a record never does."""
    types = get_type_hints(model)
    for name, value in raw.items():
        if name in types and name != "folder":
            _adapter(types[name]).validate_python(value, strict=True)
    if not isinstance(raw.get("folder"), str):
        raise ValueError(f"folder {raw.get('folder')!r} is no path")
    return raw


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def last_runs(pipeline_folder: Location, count: int) -> list[RunRecord]:
    """The newest runs, the newest first; one whose process is gone is said to be "killed"."""
    records = []
    for folder in reversed(folders_in(pipeline_folder / RUNS)):
        try:
            records.append(RunRecord.load(folder))
        # Cut off before its first word, or none of ours; not one that a store does not give.
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            continue
        if len(records) == count:
            break
    is_alive = bool(records) and records[0].state == "running"
    if is_alive and not is_held(pipeline_folder):
        is_alive = False
        records[0] = RunRecord.load(records[0].folder)  # it may have ended since it was read
    for record in records[1 if is_alive else 0 :]:
        if record.state == "running":
            record.state = "killed"
    return records


def run_facts(config: Config) -> dict[str, Any]:
    """What identifies a run: the code, the config, and the Ray job that it is."""
    facts: dict[str, Any] = {"config_hash": _config_hash(config), "host": socket.gethostname()}
    if commit := _git("rev-parse", "HEAD"):
        facts["git_commit"] = commit + ("-dirty" if _git("status", "--porcelain", "-uno") else "")
    if job := os.environ.get("RAY_JOB_SUBMISSION_ID") or _submission_of_ray():
        facts["ray_job_id"] = job
    return facts


def public_yaml(config: Config) -> str:
    """The config as a file, without secrets."""
    return strict_yaml.dump(without_secrets(set_fields(config)))


def _config_hash(config: Config) -> str:
    return hashlib.sha256(public_yaml(config).encode()).hexdigest()[:12]


def _submission_of_ray() -> str | None:
    """The submission id that Ray gives to a submitted job's driver."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    except ValueError:
        return None
    metadata: Mapping[str, str] = config.get("metadata") or {}
    return metadata.get("job_submission_id")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).resolve().parent), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _next_name(runs: Location, now: datetime) -> str:
    """A name behind those of all runs so far. Names tell which runs are the newest, and the clock
    may have been set back since, or have been that of another machine.
    """
    for folder in reversed(folders_in(runs)):
        with suppress(ValueError, OverflowError):  # somebody else's folder; the end of time
            newest = datetime.strptime(folder.name.rpartition("-")[0], _TIME_FORMAT)
            now = max(now, newest.replace(tzinfo=UTC) + timedelta(microseconds=1))
            break
    return f"{now:{_TIME_FORMAT}}-{os.getpid()}"


def _remove_old(runs: Location) -> None:
    for folder in folders_in(runs)[:-_KEPT_RUNS]:
        remove(folder)
        shutil.rmtree(mirror_of(folder), ignore_errors=True)  # its tables


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
