"""Stages: what jobs and pipelines are made of. Each has settings, inputs, a folder, and a key.

The key is a hash of the settings that decide the result, the keys of the inputs and the version of
the code. In a pipeline it names the stage's folder, and a folder that is committed is not made
again. `pipelines.graph` puts a pipeline's stages together.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokendiff
from pipelines.paths import model_path, output_path
from tokendiff.checkpoint import FINAL, find_checkpoint
from tokendiff.config import SAMPLES, Config
from tokendiff.data.prompt_index import prompt_paths
from tokendiff.evaluation.certificate import CERTIFICATE
from tokendiff.manifest import (
    MANIFEST_NAME,
    RECORD_FOLDER,
    file_identity,
    fingerprint,
    is_committed,
    load_manifest,
    remove_committed,
    write_atomically,
)
from tokendiff.storage import Location, files_under, location, mirror_of
from tokendiff.tracking.run_log import LOG_NAME, RunLog, metrics_by_step

_KEY_LENGTH = 12


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the way from text to a report.

    Attributes:
        name: as the pipeline's file has it.
        label: what sets it apart from others of its name that a matrix made.
        kind: of the closed set of `tokendiff.config.StageConfig`.
        settings: fields that decide the result, plain JSON.
        base: where the result goes; in a pipeline the folder that `NAME-KEY` is made in.
        action: does the work; leaves `result_folder` committed, goes on where it was cut off.
        result: what the finished stage reports: figures for tables, the tracking and `--json`.
        inputs: by their role.
        result_subfolder: where in `output` the manifest stands that commits the stage.
        reads: committed folders that the stage reads as data, by what for: recorded in MLflow.
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
    inputs: Mapping[str, "Stage"] = field(default_factory=dict)
    label: str = ""
    reads: Mapping[str, Location] = field(default_factory=dict)
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


# Builders. `keyed`, where it is given, is the config without the paths of inputs, whose keys are in
# the stage's key already.


def preprocess_stage(
    config: Config, folder: str | Location, *, keyed: Config | None = None, **kwargs: Any
) -> Stage:
    keyed = keyed or config
    tokenizer = config.tokenizer_name_or_path

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.preprocess import preprocess

        preprocess(
            config.preprocess,
            tokenizer_name_or_path=tokenizer,
            output_dir=stage.output,
            on_progress=lambda done, total: log.write("progress", done=done, total=total),
        )

    def result(stage: Stage) -> dict[str, Any]:
        metadata = load_manifest(stage.output).metadata
        counts = {
            f"{split}_{name}": figures[name]
            for split, figures in metadata["splits"].items()
            for name in ("documents", "rows", "tokens")
        }
        dropped = {f"dropped_{name}": count for name, count in metadata["dropped"].items()}
        return {**counts, **dropped, "padded_fraction": metadata["padded_fraction"]}

    settings = {
        **keyed.preprocess.result_fields(),
        "tokenizer_name_or_path": keyed.tokenizer_name_or_path,
        "inputs": identity_of(
            *_data_files(keyed), keyed.tokenizer_name_or_path, keyed.preprocess.dataset_name
        ),
    }
    return _stage("preprocess", settings, folder, action, result, **kwargs)


def train_stage(
    config: Config,
    folder: str | Location,
    *,
    data_path: str | Location,
    keyed: Config | None = None,
    **kwargs: Any,
) -> Stage:
    keyed = keyed or config

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.train import train

        train(
            config.train,
            config.cluster,
            data_path=data_path,
            output_dir=stage.output,
            on_event=log.write,
        )

    def result(stage: Stage) -> dict[str, Any]:
        log = _metrics_in(stage.kept_record / LOG_NAME)
        return {
            "step": load_manifest(stage.result_folder).metadata["step"],
            "loss": log[-1]["loss"] if log else None,
            "tokens_per_second": _median([event["tokens_per_second"] for event in log]),
            "checkpoint": str(stage.result_folder),
        }

    settings = {
        **keyed.train.result_fields(),
        "inputs": identity_of(
            keyed.train.model_name_or_path,
            keyed.train.target_model_id,
            keyed.train.draft_model_id,
        ),
    }
    kwargs = {"reads": {"training": location(data_path)}, "result_subfolder": FINAL, **kwargs}
    return _stage("train", settings, folder, action, result, **kwargs)


def generate_stage(
    config: Config,
    folder: str | Location,
    *,
    checkpoint_path: str | None,
    keyed: Config | None = None,
    kind: str = "generate",
    **kwargs: Any,
) -> Stage:
    section, keyed_section = config.generate, (keyed or config).generate
    assert section is not None
    assert keyed_section is not None
    models = ("model_id", "target_model_id", "draft_model_id")
    found = {name: model_path(value) for name in models if (value := getattr(section, name))}
    section = section.model_copy(update=found)

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.generate import generate

        generate(
            section,
            config.cluster,
            checkpoint_path=checkpoint_path,
            output_dir=stage.output,
            on_event=log.write,
        )

    def result(stage: Stage) -> dict[str, Any]:
        metadata = load_manifest(stage.output).metadata
        names = (
            "rows",
            "errors",
            "seq_len",
            "num_model_calls",
            "tokens_per_forward",
            "tokens_per_second",
        )
        figures = {name: metadata.get(name) for name in names}
        speculation = metadata.get("speculation", {})
        return {**figures, **speculation, "output_dir": str(stage.output)}

    paths = prompt_paths(keyed_section.prompts)
    inputs = identity_of(*paths, *(getattr(keyed_section, name) for name in models))
    settings = {**keyed_section.result_fields(), "inputs": inputs}
    return _stage(kind, settings, folder, action, result, **kwargs)


def evaluate_stage(
    config: Config,
    folder: str | Location,
    *,
    checkpoint_path: str,
    data_path: str | Location | None,
    samples_path: str | Location | None,
    keyed: Config | None = None,
    **kwargs: Any,
) -> Stage:
    section, keyed_section = config.evaluate, (keyed or config).evaluate
    assert section is not None
    assert keyed_section is not None

    def action(stage: Stage, log: RunLog) -> None:
        from tokendiff.cluster.evaluate import evaluate
        from tokendiff.config_loader import to_yaml
        from tokendiff.secrets import without_credentials

        evaluate(
            section,
            config.cluster,
            title=config.name,
            checkpoint_path=checkpoint_path,
            data_path=data_path,
            samples_path=samples_path,
            training_log=_training_log(checkpoint_path),
            config_yaml=without_credentials(to_yaml(config)),
            output_dir=stage.output,
            on_event=log.write,
        )

    def result(stage: Stage) -> dict[str, Any]:
        metrics = load_manifest(stage.output).metadata["metrics"]
        files = {"report": stage.output / "report" / "index.html"}
        if (certificate := stage.output / CERTIFICATE).is_file():
            files["certificate"] = certificate
        return {**metrics, **{name: str(path) for name, path in files.items()}}

    settings = {
        **keyed_section.result_fields(),
        "inputs": identity_of(keyed_section.reference_model_name_or_path),
    }
    given = {"evaluation": data_path, "samples": samples_path}
    reads = {context: location(path) for context, path in given.items() if path is not None}
    return _stage("evaluate", settings, folder, action, result, **{"reads": reads, **kwargs})


def promote_stage(
    config: Config, folder: str | Location, *, keyed: Config | None = None, **kwargs: Any
) -> Stage:
    def action(stage: Stage, log: RunLog) -> None:
        from pipelines.promotion import promote

        promote(config.promote, config, stage.base.parent, stage, log)

    def result(stage: Stage) -> dict[str, Any]:
        return load_manifest(stage.output).metadata

    sampling = (keyed or config).generate
    settings = {
        **(keyed or config).promote.result_fields(),
        "gate": [line.result_fields() for line in config.promote.gate],
        "sampling": None if sampling is None else sampling.result_fields(),
    }
    return _stage("promote", settings, folder, action, result, **{"needs_ray": False, **kwargs})


def _stage(
    kind: str,
    settings: dict[str, Any],
    folder: str | Location,
    action: Callable[[Stage, RunLog], None],
    result: Callable[[Stage], dict[str, Any]],
    **kwargs: Any,
) -> Stage:
    base = output_path(str(folder))
    kwargs = {"name": kind, **kwargs}
    return Stage(kind=kind, settings=settings, base=base, action=action, result=result, **kwargs)


def _training_log(checkpoint_path: str) -> list[dict[str, Any]]:
    """The metrics of the run that made a checkpoint; none where there is no log beside it."""
    return _metrics_in(find_checkpoint(checkpoint_path).parent / RECORD_FOLDER / LOG_NAME)


def _metrics_in(path: Location) -> list[dict[str, Any]]:
    if isinstance(path, Path):
        return metrics_by_step(path)
    with tempfile.NamedTemporaryFile() as copy:
        Path(copy.name).write_bytes(path.read_bytes() if path.is_file() else b"")
        return metrics_by_step(Path(copy.name))


def _data_files(config: Config) -> list[str]:
    section = config.preprocess
    if not section.data_files:
        return []
    if section.dataset_name == SAMPLES:
        from tokendiff.data.samples import find_sample_folders

        # Its manifest holds the hash of every part, and the folder a log that goes on.
        return [str(folder / MANIFEST_NAME) for folder in find_sample_folders(section.data_files)]
    from tokendiff.data.files import find_files

    return find_files(section.data_files)


def identity_of(*names: str | None) -> list[Any]:
    """The content of whatever among `names` is on this machine: changed text is another input."""
    found: list[Any] = []
    for name in names:
        path = location(name) if name else None
        if path is not None and is_committed(path):
            found.append(fingerprint(load_manifest(path).files))
        elif path is not None and path.exists():
            files = [path] if path.is_file() else [path / name for name in files_under(path)]
            found.append([file_identity(file) for file in files])
    return found


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None
