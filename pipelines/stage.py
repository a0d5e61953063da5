"""What a stage is: settings, inputs, a folder, and a key.

The key is a hash of the settings that decide the result, the keys of the inputs and the version of
the code. In a pipeline it names the stage's folder, and a folder that is committed is not made
again. `pipelines.builders` makes the stages of each kind, `pipelines.graph` puts those of a
pipeline together.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokendiff
from tokendiff.artifacts.locations import Location, mirror_of
from tokendiff.artifacts.manifest import (
    RECORD_FOLDER,
    fingerprint,
    is_committed,
    remove_committed,
    write_atomically,
)
from tokendiff.tracking.run_log import LOG_NAME, RunLog

_KEY_LENGTH = 12


def _nothing_to_check(stage: "Stage") -> None:
    pass


def _nothing_lost(stage: "Stage") -> str:
    return ""


def _nothing_to_show(stage: "Stage") -> Mapping[str, str]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the way from text to a report.

    Attributes:
        name: as the pipeline's file has it.
        label: what sets it apart from others of its name that a matrix made.
        kind: of the closed set of `tokendiff.config.pipeline.StageConfig`.
        settings: fields that decide the result, plain JSON.
        base: where the result goes; in a pipeline the folder that `NAME-KEY` is made in.
        action: does the work; leaves `result_folder` committed, goes on where it was cut off.
        result: what the finished stage reports: figures for tables, the tracking and `--json`.
        check: raises InputError for what is known to be wrong before anything starts; of a stage
            whose inputs are still to be made, for what can be told without them.
        lost: of a stage that is done, why its result does not hold any more though its files are
            there; empty where it holds, and where that cannot be told.
        preview: what a plan shows of the data that the stage is to read.
        inputs: by their role.
        result_subfolder: where in `output` the manifest stands that commits the stage.
        reads: committed folders that the stage reads as data, by what for: recorded in MLflow.
        judges: token shards and their split that the stage evaluates on. The runner looks at them
            as soon as they are there, so that too few rows end a run before it has trained.
        optional: roles of inputs that the stage does without where they are skipped.
        skip: why there is nothing to do; the stage, and what is made from it, is left out then.
        needs_ray: whether it works on a Ray cluster.
        max_retries, timeout_s: its own, in place of the runner's.
        version: raised when the same settings come to give another result.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    base: Location
    action: Callable[["Stage", RunLog], None]
    result: Callable[["Stage"], dict[str, Any]]
    check: Callable[["Stage"], None] = _nothing_to_check
    lost: Callable[["Stage"], str] = _nothing_lost
    preview: Callable[["Stage"], Mapping[str, str]] = _nothing_to_show
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    label: str = ""
    reads: Mapping[str, Location] = field(default_factory=dict)
    judges: tuple[Location, str] | None = None
    optional: frozenset[str] = frozenset()
    skip: str = ""
    needs_ray: bool = True
    max_retries: int | None = None
    timeout_s: float | None = None
    is_keyed: bool = False
    result_subfolder: str = ""
    version: int = 1

    @cached_property
    def key(self) -> str:
        parts = {
            "kind": self.kind,
            "settings": self.settings,
            "inputs": {role: stage.key for role, stage in self.inputs.items()},
            "code": [tokendiff.__version__, self.version],
        }
        return fingerprint(parts)[:_KEY_LENGTH]

    @property
    def title(self) -> str:
        """The stage's name, with its label: no other stage of the pipeline has the same."""
        return f"{self.name}[{self.label}]" if self.label else self.name

    @cached_property
    def output(self) -> Location:
        """Where the result goes."""
        return self.base / f"{self.name}-{self.key}" if self.is_keyed else self.base

    @property
    def folder(self) -> Path:
        """`output`, or where this machine keeps what belongs to a remote one."""
        return mirror_of(self.output)

    @property
    def record(self) -> Path:
        """The folder of the stage's own log and tracking state, beside its result; of a remote one
        on this machine, with a copy of the log there.
        """
        return self.folder / RECORD_FOLDER

    @property
    def kept_record(self) -> Location:
        """What another machine sees of `record`: the log, as it was when the stage last ended or
        saved a checkpoint, and of what the stage was made.
        """
        return self.output / RECORD_FOLDER

    @property
    def log_path(self) -> Path:
        return self.record / LOG_NAME

    @property
    def result_folder(self) -> Location:
        """The folder whose manifest commits the stage."""
        return self.output / self.result_subfolder

    @property
    def is_done(self) -> bool:
        return is_committed(self.result_folder)

    @property
    def has_inputs(self) -> bool:
        """Whether all that it is made from is there."""
        return all(source.is_done for source in self.inputs.values())


def discard(stage: Stage) -> None:
    """Delete what is there of a stage."""
    remove_committed(stage.output, stage.result_folder)
    shutil.rmtree(stage.folder, ignore_errors=True)


def take_log(stage: Stage) -> None:
    """Go on with the log beside a remote result, unless this machine's goes on from that."""
    there = stage.kept_record / LOG_NAME
    if isinstance(there, Path) or not there.is_file():
        return
    kept = there.read_bytes()
    stage.record.mkdir(parents=True, exist_ok=True)
    if not (stage.log_path.is_file() and stage.log_path.read_bytes().startswith(kept)):
        write_atomically(stage.log_path, kept)


def put_log(stage: Stage) -> None:
    """Copy the log beside a remote result."""
    there = stage.kept_record / LOG_NAME
    if not isinstance(there, Path):
        there.write_bytes(stage.log_path.read_bytes())
