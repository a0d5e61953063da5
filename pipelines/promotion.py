"""The gate, and what a checkpoint that passes it becomes."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.lock import alone
from pipelines.stage import Stage
from tokendiff.checkpoint import checkpoint_identity
from tokendiff.config import Config, GateConfig, GenerateConfig, PromoteConfig
from tokendiff.errors import InputError
from tokendiff.manifest import claim_folder, commit, load_manifest, write_atomically
from tokendiff.stage_graph import config_of, set_fields, stages_of
from tokendiff.storage import Location, location
from tokendiff.tracking.mlflow_outbox import load_state
from tokendiff.tracking.registry import Registry
from tokendiff.tracking.run_log import RunLog

KIND = "promotion"
_RUN_ID_SECONDS = 60.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one line of a gate says; `champion` is None where there is none."""

    text: str
    passed: bool


def judge(
    gate: Sequence[GateConfig],
    candidate: Mapping[str, Any],
    champion: Mapping[str, Any] | None,
) -> list[Verdict]:
    """One verdict for each line of the gate. A figure that is not a finite number never passes.

    Raises:
        InputError: the evaluation has no such figure.
    """
    return [_judge_line(line, candidate, champion) for line in gate]


def _judge_line(
    line: GateConfig, candidate: Mapping[str, Any], champion: Mapping[str, Any] | None
) -> Verdict:
    value = _figure(candidate, line.metric)
    sign = 1.0 if line.direction == "lower" else -1.0
    words, passed = [f"{line.metric} {value:.6g}"], math.isfinite(value)
    if line.limit is not None:
        passed &= sign * value <= sign * line.limit
        words.append(f"{'at most' if sign > 0 else 'at least'} {line.limit:g}")
    if champion is not None:
        other = _figure(champion, line.metric)
        if math.isfinite(other):  # anything finite is better than a champion without a figure
            passed &= sign * (other - value) >= line.margin
        margin = f" by {line.margin:g}" if line.margin else ""
        words.append(f"{line.direction} than the champion's {other:.6g}{margin}")
    elif line.limit is None:
        words.append("no champion to beat")
    return Verdict(
        text=f"{', '.join(words)}: {'passed' if passed else 'not passed'}", passed=passed
    )


def _figure(metrics: Mapping[str, Any], name: str) -> float:
    value = metrics.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
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

    Running it again after it was cut off does not register twice.

    Raises:
        InputError: the two were not evaluated on the same rows, or the champion that was evaluated
            is no longer the champion.
    """
    claim = claim_folder(stage.output, kind=KIND)
    registry = Registry(config.tracking, root)
    candidate = load_manifest(stage.inputs["candidate"].output).metadata
    checkpoint = location(candidate["checkpoint"])
    holder = registry.holder(section.registered_model, section.alias)
    champion = _champion_of(stage, candidate)
    digest = checkpoint_identity(checkpoint)
    is_champion = (
        holder is not None and registry.digest_of(section.registered_model, holder) == digest
    )
    if not is_champion:
        _check_champion(section, registry, holder, champion)
    verdicts = judge(section.gate, candidate["metrics"], champion and champion["metrics"])
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
        version = registry.register(
            section.registered_model,
            checkpoint,
            run_id=_run_id(stage),
            sampling=sampling_fields(config.generate or GenerateConfig()),
            trained_on=_trained_on(stage),
            tags={"pipeline": config.name, "stage_key": stage.key},
        )
        why = "; ".join(verdict.text for verdict in verdicts)
        before = registry.promote(section.registered_model, section.alias, version, because=why)
        result |= {"version": version, "replaced_version": None if before == version else before}
        was = "" if before in (None, version) else f", was v{before}"
        result["summary"] = f"{uri} is v{version}{was}"
    else:
        result["summary"] = f"{uri} stays v{holder}" if holder else f"{uri} is not there yet"
    write_atomically(stage.output / "decision.json", json.dumps(result, indent=1).encode())
    commit(stage.output, kind=KIND, metadata=result)
    claim.unlink()


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
    """Move the aliases of a pipeline's promote stages back to what they pointed at before."""
    with alone(root / config.name):
        registry = Registry(config.tracking, root)
        moved = {}
        for section in promote_sections(config).values():
            model, alias = section.registered_model, section.alias
            before, now = registry.roll_back(model, alias)
            moved[f"models:/{model}@{alias}"] = f"v{now}, was v{before}"
    return moved


def sampling_fields(section: GenerateConfig) -> dict[str, Any]:
    """What a registered model samples with: the section without its own prompts and places."""
    ours = ("checkpoint_path", "output_dir", "prompt", "prompts", "num_samples", "output_format")
    return {name: value for name, value in set_fields(section).items() if name not in ours}


def _champion_of(stage: Stage, candidate: Mapping[str, Any]) -> dict[str, Any] | None:
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
    return champion


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
