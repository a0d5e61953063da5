"""A checkpoint sampled and measured with one setting after the other, on the cluster.

Each point has a folder of its own, in which samples and answers to tasks go on after a restart, and
its figures once they are known. Another stage of the same pipeline, which chooses by another rule,
takes these figures and samples nothing again.
"""

import importlib.metadata
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tokendiff
from tokendiff.artifacts.checkpoint import find_checkpoint
from tokendiff.artifacts.identity import checkpoint_identity, identity_of
from tokendiff.artifacts.locations import Location, folders_in, remove
from tokendiff.artifacts.manifest import (
    MANIFEST_NAME,
    Manifest,
    claim_folder,
    commit,
    fingerprint,
    load_manifest,
    write_atomically,
)
from tokendiff.cluster.evaluate import sample_metrics, score_with_reference
from tokendiff.cluster.generate import generate
from tokendiff.cluster.progress import JobProgress
from tokendiff.cluster.tasks import run_tasks
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.data.prompt_index import prompt_paths
from tokendiff.data.samples import read_samples
from tokendiff.evaluation.frontier import Point, Rule, draw, frontier_report
from tokendiff.evaluation.report import render_page
from tokendiff.evaluation.tasks.quality import Quality, quality_of
from tokendiff.evaluation.tasks.setup import drawn_as_asked

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig
    from tokendiff.config.frontier import FrontierConfig
    from tokendiff.training.trainer import OnEvent

KIND = "frontier"
TOKENS_PER_SECOND = "tokens_per_second"
_POINTS, _FIGURES = "points", "figures.json"
_POINT = "point.sha256"  # what the files in a point's folder are of
_MAX_SCORED_TOKENS = 2048  # of a sample, by the reference


def run_frontier(
    config: "FrontierConfig",
    cluster: "ClusterConfig",
    *,
    title: str,
    checkpoint_path: str,
    config_yaml: str,
    output_dir: Location,
    on_event: "OnEvent",
) -> Manifest:
    """Measure every point, write `frontier.json`, `frontier.png` and `report/index.html` under
    `output_dir`, and commit it.

    Raises:
        InputError: a sampler does not go with the checkpoint, no task has the quality, or no point
            satisfies the rule.
    """
    source = find_checkpoint(checkpoint_path)
    quality = quality_of(config)
    mark = claim_folder(output_dir, kind=KIND)
    (output_dir / MANIFEST_NAME).unlink(missing_ok=True)
    points = []
    samplers = samplers_of(config, quality)
    beside = _measured_beside(config, output_dir)
    for number, sampler in enumerate(samplers):
        on_event("doing", what=f"point {number + 1} of {len(samplers)}")
        folder = output_dir / _POINTS / f"{number:03d}"
        fields = sampler.model_dump(include=sampler.model_fields_set | {"name"})
        figures = _figures(
            config,
            cluster,
            sampler,
            checkpoint=source,
            folder=folder,
            beside=beside,
            on_event=on_event,
        )
        points.append(Point(sampler=fields, figures=figures))
    rule = rule_of(config, quality)
    chosen = rule.choose(points)
    found = [{"sampler": dict(p.sampler), "figures": dict(p.figures)} for p in points]
    metadata = {
        "checkpoint": str(source),
        "checkpoint_files": checkpoint_identity(source),
        "points": found,
        "front": rule.front(points),
        "chosen": found[chosen],
    }
    report = frontier_report(title, points, rule, chosen, config_yaml=config_yaml)
    (output_dir / "report").mkdir(parents=True, exist_ok=True)
    write_atomically(output_dir / "frontier.json", json.dumps(metadata, indent=1).encode())
    write_atomically(output_dir / "frontier.png", draw(points, rule, chosen))
    write_atomically(output_dir / "report" / "index.html", render_page(report))
    manifest = commit(output_dir, kind=KIND, metadata=metadata)
    mark.unlink()
    return manifest


def samplers_of(config: "FrontierConfig", quality: Quality) -> list[Any]:
    """The settings to try. One that leaves the temperature open, where a task's text is the
    quality, takes the task's: texts are sampled, timed, judged and later served alike.
    """
    if quality.settings is None:
        return config.points
    found: list[Any] = []
    for point in config.points:
        drawn = drawn_as_asked(point, quality.settings)
        if drawn not in found:
            found.append(drawn)
    return found


def rule_of(config: "FrontierConfig", quality: Quality) -> Rule:
    return Rule(
        quality=quality.name,
        speed=config.speed,
        is_lower_better=quality.is_lower_better,
        within=config.within,
        limit=config.limit,
        min_entropy_nats=config.min_entropy_nats,
    )


def judging(config: "FrontierConfig", sampler: Any) -> EvaluateConfig:
    """What is measured of the samples at a point."""
    fields = {
        name: getattr(config, name)
        for name in ("reference_model_name_or_path", "batch_size", "mixed_precision", "seed")
    }
    if config.tasks:
        names = ("tasks", "tasks_path", "max_task_documents")
        fields |= {name: getattr(config, name) for name in names}
        fields["sampler"] = sampler.model_dump(include=sampler.model_fields_set | {"name"})
    return EvaluateConfig.model_validate(fields)


def _figures(
    config: "FrontierConfig",
    cluster: "ClusterConfig",
    sampler: Any,
    *,
    checkpoint: Location,
    folder: Location,
    beside: Mapping[str, Location],
    on_event: "OnEvent",
) -> dict[str, float]:
    """The figures of one point. They are read where the same was measured before, in this folder or
    by another frontier beside it; what is left of other settings, another checkpoint or other tasks
    in its folder is deleted.
    """
    identity = folder / _POINT
    found = _identity(config, sampler, checkpoint)
    if not identity.is_file() or identity.read_text() != found:
        remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(identity, found.encode())
    known = folder / _FIGURES
    if known.is_file():
        return _read(known)
    if (elsewhere := beside.get(found)) is not None:
        stage = elsewhere.parent.parent.parent.name
        on_event("doing", what=f"taking the figures from {stage}, which measured the same")
        write_atomically(known, elsewhere.read_bytes())
        return _read(known)
    samples, figures = _sampled(
        config, cluster, sampler, checkpoint=checkpoint, folder=folder, on_event=on_event
    )
    judge = judging(config, sampler)
    with JobProgress(on_event) as progress:
        if config.reference_model_name_or_path is not None:
            figures |= score_with_reference(
                judge,
                cluster,
                samples=samples,
                max_length=_MAX_SCORED_TOKENS,
                progress=progress,
            )
        if config.tasks:
            result = run_tasks(
                judge, cluster, checkpoint=checkpoint, output_dir=folder, progress=progress
            )
            figures |= {**result.metrics, "unserved_requests": len(result.unserved)}
    write_atomically(known, json.dumps(figures, indent=1).encode())
    return figures


def _measured_beside(config: "FrontierConfig", output_dir: Location) -> dict[str, Location]:
    """What other frontiers in the same pipeline's folder measured: files of figures, by what they
    are of. Where time decides there are none: all points are then timed in one run.
    """
    if config.speed == TOKENS_PER_SECOND:
        return {}
    points = [
        point
        for frontier in folders_in(output_dir.parent)
        if frontier.name != output_dir.name
        for point in folders_in(frontier / _POINTS)
    ]
    return {
        (point / _POINT).read_text(): point / _FIGURES
        for point in points
        if (point / _POINT).is_file() and (point / _FIGURES).is_file()
    }


def _read(figures: Location) -> dict[str, float]:
    found: dict[str, float] = json.loads(figures.read_text())
    return found


def _sampled(
    config: "FrontierConfig",
    cluster: "ClusterConfig",
    sampler: Any,
    *,
    checkpoint: Location,
    folder: Location,
    on_event: "OnEvent",
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The samples of a point, and their figures. Samples that were all there before have no speed:
    where that decides, they are drawn again.
    """
    samples_path = folder / "samples"
    for _ in range(2):
        generate(
            config.sampling(sampler),
            cluster,
            checkpoint_path=str(checkpoint),
            output_dir=samples_path,
            on_event=on_event,
        )
        made = load_manifest(samples_path).metadata
        if config.speed != TOKENS_PER_SECOND or made["tokens_per_second"] is not None:
            break
        on_event("doing", what="drawing samples again: the time that they took is not known")
        remove(samples_path)
    samples = read_samples(samples_path)
    figures = sample_metrics(samples, made)
    if (speed := figures.pop("sampled_tokens_per_second", None)) is not None:
        figures[TOKENS_PER_SECOND] = speed
    return samples, figures


def _identity(config: "FrontierConfig", sampler: Any, checkpoint: Location) -> str:
    """A fingerprint of everything that decides a point's figures."""
    versions = [tokendiff.__version__]
    if config.tasks:
        versions.append(importlib.metadata.version("lm_eval"))
    inputs = identity_of(
        *prompt_paths(config.prompts), config.reference_model_name_or_path, config.tasks_path
    )
    settings = [
        config.sampling(sampler).result_fields(),
        judging(config, sampler).result_fields(),
    ]
    return fingerprint([settings, checkpoint_identity(checkpoint), inputs, versions])
