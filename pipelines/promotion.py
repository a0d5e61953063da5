"""The gate, and what a checkpoint that passes it becomes."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.lock import alone
from pipelines.paths import model_path
from pipelines.stage import Stage
from tokendiff.artifacts.identity import checkpoint_identity
from tokendiff.artifacts.locations import Location, location
from tokendiff.artifacts.manifest import (
    claim_folder,
    commit,
    fetch,
    load_manifest,
    write_atomically,
)
from tokendiff.artifacts.model_folders import is_draft_folder, local_model
from tokendiff.config.evaluate import is_task_metric
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.pipeline import Config
from tokendiff.config.promote import GateConfig, PromoteConfig
from tokendiff.config.stage_graph import config_of, set_fields, stages_of
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.evaluation.paired import (
    SAMPLED_ROWS,
    paired_standard_error,
    ratio_of,
    read_rows,
)
from tokendiff.tracking.mlflow_outbox import load_state
from tokendiff.tracking.mlflow_store import is_missing, resolve_uri
from tokendiff.tracking.registry import STAGE_KEY, Registry
from tokendiff.tracking.run_log import RunLog

KIND = "promotion"
_RUN_ID_SECONDS = 60.0
_POLL_SECONDS = 0.2
logger = logging.getLogger(__name__)


# From a metric to the paired standard error of its difference; None where it is not known.
StandardErrorOf = Callable[[str], float | None]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one line of a gate says; `champion` is None where there is none."""

    text: str
    passed: bool


def judge(
    gate: Sequence[GateConfig],
    candidate: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
    standard_error_of: StandardErrorOf = lambda metric: None,
) -> list[Verdict]:
    """One verdict for each line of the gate. A figure that is not a finite number never passes, nor
    a difference whose standard error is not known where the line asks for that.

    Args:
        candidate, champion: the figures of both.
        standard_error_of: asked where there is a champion to compare with.

    Raises:
        InputError: the evaluation has no such figure.
    """
    return [_judge_line(line, candidate, champion, standard_error_of) for line in gate]


def _judge_line(
    line: GateConfig,
    candidate: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
    standard_error_of: StandardErrorOf,
) -> Verdict:
    value = _figure(candidate, line.metric)
    sign = 1.0 if line.direction == "lower" else -1.0
    words, passed = [f"{line.metric} {value:.6g}"], math.isfinite(value)
    if line.limit is not None:
        passed &= sign * value <= sign * line.limit
        words.append(f"{'at most' if sign > 0 else 'at least'} {line.limit:g}")
    if champion is not None:
        other = _figure(champion, line.metric)
        better_by = sign * (other - value)
        error = standard_error_of(line.metric)
        if math.isfinite(other):  # anything finite is better than a champion without a figure
            passed &= better_by >= line.margin
            if line.min_standard_errors:
                passed &= error is not None and better_by > line.min_standard_errors * error
        margins = [f"{line.margin:g}"] if line.margin else []
        if line.min_standard_errors:
            margins.append(f"{line.min_standard_errors:g} standard errors")
        margin = f" by {' and '.join(margins)}" if margins else ""
        than = "equal to" if value == other and not margins else f"{line.direction} than"
        words.append(f"{than} the champion's {other:.6g}{margin}")
        if error is not None:
            words.append(f"difference {value - other:.3g} ± {error:.2g}")
    elif line.limit is None:
        words.append("no champion to beat")
    return Verdict(
        text=f"{', '.join(words)}: {'passed' if passed else 'not passed'}", passed=passed
    )


def _figure(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    if not isinstance(value, int | float):
        known = [key for key, figure in metrics.items() if isinstance(figure, int | float)]
        raise InputError(
            f"promote.gate: the evaluation has no figure {name!r}; it has {', '.join(known)}"
        )
    return float(value)


def promote(
    section: PromoteConfig,
    config: Config,
    root: Location,
    stage: Stage,
    log: RunLog,
) -> None:
    """Judge the candidate, and where it passes, register it and move the alias to it.

    Running it again after it was cut off does not register twice. The champion itself passes, and
    becomes a version anew where it is to be served otherwise.

    Raises:
        InputError: the two were not evaluated on the same rows, or the champion that was evaluated
            is no longer the champion, now or when the candidate is registered.
    """
    claim = claim_folder(stage.output, kind=KIND)
    registry = Registry(config.tracking, root)
    candidate = load_manifest(stage.inputs["candidate"].output).metadata
    checkpoint = location(candidate["checkpoint"])
    holder = registry.holder(section.registered_model, section.alias)
    champion = _champion_of(stage, candidate, section.gate)
    digest = checkpoint_identity(checkpoint)
    is_champion = (
        holder is not None and registry.digest_of(section.registered_model, holder) == digest
    )
    if not is_champion:
        _check_champion(section, registry, holder, champion)
    verdicts = judge(
        section.gate,
        candidate["metrics"],
        champion and champion["metrics"],
        _standard_error_of(stage, section.gate),
    )
    passed = is_champion or all(verdict.passed for verdict in verdicts)
    uri = f"models:/{section.registered_model}@{section.alias}"
    for verdict in verdicts:
        log.write("gate", message=verdict.text, passed=verdict.passed)
    result: dict[str, Any] = {
        "decision": "promoted" if passed else "rejected",
        "gate": [verdict.text for verdict in verdicts],
        "checkpoint": str(checkpoint),
        "model": uri,
    }
    if passed:
        sampling, target = _served_with(checkpoint, _at_operating_point(stage, config, digest))
        version = registry.register(
            section.registered_model,
            checkpoint,
            run_id=_run_id(stage),
            sampling=sampling,
            trained_on=_trained_on(stage),
            tags={"pipeline": config.name, STAGE_KEY: stage.key},
            target=target,
        )
        # Registering copies the weights, and the alias may have been moved meanwhile.
        if (now := registry.holder(section.registered_model, section.alias)) != holder:
            remedy = "with --force on the stage that evaluates the champion"
            if champion is None:
                remedy = "with an input 'champion' of promote, an evaluate stage of that version"
            raise InputError(
                f"{uri} was {_as_version(holder)} when the candidate was judged and is "
                f"{_as_version(now)} since; v{version} is registered, and the alias was left where "
                f"it is: run the pipeline again, {remedy}"
            )
        why = "; ".join(verdict.text for verdict in verdicts)
        if is_champion and version != holder:  # its figures are not better than its own
            why = "the same checkpoint, served otherwise"
        before = registry.promote(section.registered_model, section.alias, version, because=why)
        result |= {"version": version, "replaced_version": None if before == version else before}
        was = "" if before in (None, version) else f", was v{before}"
        result["summary"] = f"{uri} is v{version}{was}"
    else:
        result["summary"] = f"{uri} stays v{holder}" if holder else f"{uri} is not there yet"
    write_atomically(stage.output / "decision.json", json.dumps(result, indent=1).encode())
    commit(stage.output, kind=KIND, metadata=result)
    claim.unlink()


def lost_version(section: PromoteConfig, config: Config, root: Location, stage: Stage) -> str:
    """Why what a finished stage registered is there no more: its version was deleted and the alias
    went with it, or the store is another one.

    Empty where it is there, where the alias has moved on to another version since (by a later
    promotion or a rollback), and where the store does not say: a store that is away for now is no
    reason to promote anew, and a run that has nothing to promote goes on without it.
    """
    result = load_manifest(stage.output).metadata
    if result.get("decision") != "promoted":
        return ""
    name, version = section.registered_model, result["version"]
    title = f"models:/{name}/{version}"
    if is_missing(resolve_uri(config.tracking, root)):  # which asking it would create
        return f"{title}, which it registered, went with the MLflow store"
    from mlflow.exceptions import MlflowException  # which takes a second

    try:
        registry = Registry(config.tracking, root)
        if registry.version_of(title) is None:
            if registry.holder(name, section.alias) is not None:
                return ""
            return f"{title}, which it registered, is not in the MLflow registry any more"
        digest = checkpoint_identity(location(result["checkpoint"]))
        if registry.digest_of(name, version) != digest:
            return f"{title} is another model in the MLflow registry than the one it registered"
    except (InputError, ConnectionError, MlflowException) as error:
        logger.warning("%s: not known whether %s is still there: %s", stage.title, title, error)
    except (CorruptFileError, FileNotFoundError):
        pass  # of the checkpoint, whose own stage says so
    return ""


def promote_sections(config: Config) -> dict[str, PromoteConfig]:
    """The promote stages of a pipeline.

    Raises:
        InputError: there are none.
    """
    stages = {name: spec for name, spec in stages_of(config).items() if spec.kind == "promote"}
    if not stages:
        raise InputError(f"pipeline {config.name} has no stage of kind promote")
    return {name: config_of(config, spec).promote for name, spec in stages.items()}


def roll_back(config: Config, root: Location) -> dict[str, Any]:
    """Move the aliases of a pipeline's promote stages back to what they pointed at before.

    Raises:
        InputError: there is no way back for one of them; none is moved then, and of a pipeline that
            never ran nothing is made.
    """
    sections = promote_sections(config)
    if config.tracking.enabled and is_missing(resolve_uri(config.tracking, root)):
        section = next(iter(sections.values()))
        raise InputError(
            f"models:/{section.registered_model}@{section.alias}: there is no such model, and no "
            "MLflow store; nothing to roll back"
        )
    registry = Registry(config.tracking, root)
    # Several stages may promote to one alias, as those of a sweep.
    aliases = list({(s.registered_model, s.alias): None for s in sections.values()})
    for model, alias in aliases:
        if registry.holder(model, alias) is None:
            registry.roll_back(model, alias)  # says why it cannot be
    with alone(root / config.name):
        moved = registry.roll_back_all(aliases)
    return {
        f"models:/{model}@{alias}": f"v{now}, was v{before}"
        for (model, alias), (before, now) in zip(aliases, moved, strict=True)
    }


def sampling_fields(section: GenerateConfig) -> dict[str, Any]:
    """What a registered model samples with: the section without its own models, prompts, places,
    and what goes with them.
    """
    ours = {
        *("checkpoint_path", "model_id", "trust_remote_code", "draft_model_id", "output_dir"),
        *("prompt", "prompts", "num_samples", "max_errors", "output_format", "measure_speedup"),
        *(() if section.use_chat_template else ("add_generation_prompt",)),
    }
    return {name: value for name, value in set_fields(section).items() if name not in ours}


def _served_with(
    checkpoint: Location, section: GenerateConfig
) -> tuple[dict[str, Any], Path | None]:
    """What a checkpoint is registered with: fields to sample with, and the folder of a draft's
    target, unless that is one of the hub, which the fields then name.

    Raises:
        InputError: the section does not sample from such a checkpoint.
    """
    from tokendiff.evaluation.draft_acceptance import plan_of_checkpoint
    from tokendiff.models.requests import make_check

    opened = fetch(checkpoint)
    fields, is_draft = sampling_fields(section), is_draft_folder(opened)
    if is_draft != (section.sampler.name == "dflash"):
        raise InputError(
            f"generate.sampler {section.sampler.name!r}: the model would be served with it, but "
            f"{checkpoint} is {'a' if is_draft else 'not a'} DFlash draft; set sampler 'dflash' "
            "for a draft, and another one for all other models"
        )
    if not is_draft:
        served = GenerateConfig.model_validate(fields)
        # What would go wrong when the model is loaded to be served; no weight is read.
        make_check(opened, served)
        return fields, None
    given = section.target_model_id and model_path(section.target_model_id)
    target = plan_of_checkpoint(opened, given).target_model_id
    fields.pop("target_model_id", None)
    if (folder := Path(local_model(target))).is_dir():
        return fields, folder
    return {**fields, "target_model_id": target}, None


def _at_operating_point(stage: Stage, config: Config, digest: str) -> GenerateConfig:
    """The generate section, with the sampler that a frontier chose where the stage has one.

    Raises:
        InputError: the frontier is of another checkpoint, or the section does not go with it.
    """
    section = config.generate or GenerateConfig()
    source = stage.inputs.get("frontier")
    if source is None:
        return section
    found = load_manifest(source.output).metadata
    if found["checkpoint_files"] != digest:
        raise InputError(
            f"{stage.title}: {source.title} chose an operating point of {found['checkpoint']}, "
            "which is not the candidate; give both stages the same checkpoint"
        )
    fields = {**sampling_fields(section), "sampler": found["chosen"]["sampler"]}
    try:
        return GenerateConfig.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(str(problem["msg"]) for problem in error.errors())
        raise InputError(
            f"{stage.title}: the generate section does not go with the operating point "
            f"{found['chosen']['sampler']}: {problems}"
        ) from error


def _champion_of(
    stage: Stage, candidate: Mapping[str, Any], gate: Sequence[GateConfig]
) -> dict[str, Any] | None:
    """The champion's evaluation; None where the stage that makes it had nothing to do."""
    source = stage.inputs.get("champion")
    if source is None or not source.is_done:
        return None
    champion = load_manifest(source.output).metadata
    if champion["rows"] != candidate["rows"]:
        raise InputError(
            f"{stage.title}: candidate and champion were evaluated on different rows; give both "
            "stages the same data, split, seed, max_eval_rows and num_mask_samples"
        )
    ours, theirs = (judged.get("tasks", {}) for judged in (candidate, champion))
    for task in {line.metric.partition("/")[0] for line in gate if is_task_metric(line.metric)}:
        if ours.get(task) != theirs.get(task):
            raise InputError(
                f"{stage.title}: candidate and champion were not asked about the same documents of "
                f"task {task} in the same words, or answered with different samplers; give both "
                "stages the same tasks, tasks_path, num_fewshot, max_task_documents, "
                "apply_chat_template and sampler, checkpoints with the same chat template, and "
                "evaluate again what an earlier version evaluated (--force)"
            )
    return champion


def _standard_error_of(stage: Stage, gate: Sequence[GateConfig]) -> StandardErrorOf:
    """Of the stage's candidate and champion, by what their evaluations have of each row."""
    needed = {line.metric for line in gate if line.min_standard_errors}

    def standard_error(metric: str) -> float | None:
        judges = [stage.inputs[role] for role in ("candidate", "champion")]
        found = [read_rows(judge.output, metric) for judge in judges]
        if all(rows is not None for rows in found):
            rows, others = (rows for rows in found if rows is not None)
            try:
                if (ratio := ratio_of(metric)) is not None and ratio.file == SAMPLED_ROWS:
                    _check_same_conditions(stage.title, metric, judges)
                return paired_standard_error(metric, rows, others)
            except InputError:
                if metric in needed:
                    raise
                return None  # nobody asked; the figures can be held against each other
        lacking = [j.title for j, rows in zip(judges, found, strict=True) if rows is None]
        if metric in needed and is_task_metric(metric):
            raise InputError(
                f"{' and '.join(lacking)} kept nothing by document of {metric}, which "
                "min_standard_errors needs: the figure is not a mean over documents (a perplexity "
                "is not, nor a group that gives its tasks the same weight); gate on another "
                "figure, for example one of a task of the group, or remove min_standard_errors"
            )
        if metric in needed:
            raise InputError(
                f"{' and '.join(lacking)} kept nothing by row of {metric}, which "
                "min_standard_errors needs: an earlier version of tokendiff evaluated it; evaluate "
                f"again (--force {lacking[0]})"
            )
        return None

    return standard_error


def _check_same_conditions(title: str, metric: str, judges: Sequence[Stage]) -> None:
    """Raise InputError where two evaluations are of samples that were not asked for in one way."""
    conditions = [load_manifest(judge.output).metadata.get("sampled") for judge in judges]
    if None not in conditions and conditions[0] != conditions[1]:  # earlier versions do not say
        raise InputError(
            f"{title}: the samples of candidate and champion were drawn with different settings, "
            f"so their {metric} cannot be compared; give the stages that sample the same prompts, "
            "target, sampler, num_samples, seed, mixed_precision and chat settings"
        )


def _check_champion(
    section: PromoteConfig, registry: Registry, holder: int | None, champion: dict[str, Any] | None
) -> None:
    uri = f"models:/{section.registered_model}@{section.alias}"
    if holder is None:
        return
    if champion is None:
        raise InputError(
            f"{uri} is v{holder}, but was not evaluated; give promote the input 'champion', an "
            f"evaluate stage with checkpoint_path {uri}"
        )
    now = registry.digest_of(section.registered_model, holder)
    if checkpoint_identity(location(champion["checkpoint"])) != now:
        raise InputError(
            f"{uri} was moved to v{holder} after the champion was evaluated; run the pipeline again"
            " with new data, or with --force on the stage that evaluates the champion"
        )


def _as_version(number: int | None) -> str:
    return "not there" if number is None else f"v{number}"


def _trained_on(stage: Stage) -> list[Any]:
    """Identities of the text files that the candidate was trained on, as far as its stages go."""
    source: Stage | None = stage.inputs["candidate"]
    for role in ("checkpoint", "data"):
        source = source.inputs.get(role) if source else None
    if source is None or not source.is_done:
        return []
    files: list[Any] = load_manifest(source.output).metadata.get("trained_on", [])
    return files


def _run_id(stage: Stage) -> str:
    """The id of the stage's run in MLflow, which another thread creates."""
    deadline = time.monotonic() + _RUN_ID_SECONDS
    while time.monotonic() < deadline:
        state = load_state(stage.record)
        if state is not None and state.run_id is not None:
            return state.run_id
        time.sleep(_POLL_SECONDS)
    raise ConnectionError(f"MLflow did not create the run of {stage.title} within a minute")
