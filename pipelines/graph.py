"""The stages of a pipeline, put together: each one's config, with its inputs' folders in place."""

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from pipelines.builders import (
    evaluate_stage,
    frontier_stage,
    generate_stage,
    preprocess_stage,
    promote_stage,
    target_states_stage,
    train_stage,
)
from pipelines.registered import MODEL_FIELDS, UNKNOWN_MODEL, Models, model_paths
from pipelines.stage import Stage
from tokendiff.artifacts.identity import identity_of
from tokendiff.artifacts.locations import Location, location, size_of
from tokendiff.config.loader import matrix_variants
from tokendiff.config.pipeline import Config, StageConfig
from tokendiff.config.preprocess import SAMPLES, PreprocessConfig
from tokendiff.config.stage_graph import (
    ROLES,
    SECTION_OF,
    SOURCE_FIELDS,
    agreement_problems,
    config_of,
    stages_of,
)
from tokendiff.data.files import find_files
from tokendiff.data.sources import known_files
from tokendiff.errors import InputError
from tokendiff.tracking.registry import is_model_uri


def pipeline_stages(
    config: Config,
    folder: Location,
    models: Models = MappingProxyType({}),
    late: Collection[str] = (),
) -> list[Stage]:
    """The stages of a pipeline in the order in which they run, each in `folder/NAME-KEY`.

    With a matrix there are those of every variant; stages with the same key are one.

    Args:
        models: what each `models:/` URI of the config stands for; None where there is none yet. One
            that is not given stands for a model that is not known.
        late: those that stand for None because there was none when these inputs were first read,
            though there is one now.

    Raises:
        InputError: they do not go together, or a path is set that the pipeline decides.
    """
    variants = pipeline_variants(config, folder, models, late)
    stages = [stage for variant in variants for stage in variant.stages]
    return list({stage.output: stage for stage in stages}.values())


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One combination of a matrix, by short names of its axes, and its stages in their order."""

    values: dict[str, Any]
    stages: list[Stage]


def pipeline_variants(
    config: Config,
    folder: Location,
    models: Models = MappingProxyType({}),
    late: Collection[str] = (),
) -> list[Variant]:
    """The variants of a pipeline; one, where its file has no matrix. They share equal stages."""
    variants = []
    for values, variant in matrix_variants(config):
        if not variant.stages:
            _refuse_decided_paths(variant)
        if problems := agreement_problems(variant):
            raise InputError("\n".join(problems))
        built: dict[str, Stage] = {}
        for name, spec in stages_of(variant).items():
            inputs = {role: built[source] for role, source in sorted(spec.inputs.items())}
            built[name] = _build(variant, name, spec, inputs, folder, models, late)
        short = dict(zip(_short_names(list(values)), values.values(), strict=True))
        variants.append(Variant(values=short, stages=list(built.values())))
    return _labelled(variants)


def _short_names(paths: list[str]) -> list[str]:
    """The last words of dotted paths, as many as tell them apart."""
    num_words = 1
    while True:
        names = [".".join(path.split(".")[-num_words:]) for path in paths]
        if len(set(names)) == len(paths):
            return names
        num_words += 1


def _labelled(variants: list[Variant]) -> list[Variant]:
    """Give each stage the axes that decide it: those on which all variants that share it agree."""
    sharing: dict[Location, list[dict[str, Any]]] = {}
    for variant in variants:
        for stage in variant.stages:
            sharing.setdefault(stage.output, []).append(variant.values)
    labelled: dict[Location, Stage] = {}
    for variant in variants:
        for stage in variant.stages:
            there = sharing[stage.output]
            axes = [
                name for name in variant.values if all(v[name] == there[0][name] for v in there)
            ]
            is_shared_by_all = len(there) == len(variants)
            label = ",".join(f"{name}={_shown(there[0][name])}" for name in axes)
            inputs = {role: labelled[source.output] for role, source in stage.inputs.items()}
            label = "" if is_shared_by_all else label
            labelled.setdefault(stage.output, replace(stage, label=label, inputs=inputs))
    return [
        replace(variant, stages=[labelled[stage.output] for stage in variant.stages])
        for variant in variants
    ]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _build(
    config: Config,
    name: str,
    spec: StageConfig,
    inputs: dict[str, Stage],
    folder: Location,
    models: Models,
    late: Collection[str],
) -> Stage:
    own = config_of(config, spec)
    linked, keyed = _link(own, spec, inputs, models)
    fields: dict[str, Any] = {
        "name": name,
        "inputs": inputs,
        "is_keyed": True,
        "keyed": keyed,
        "optional": frozenset(n for n, role in ROLES[spec.kind].items() if role.is_optional),
        "max_retries": spec.max_retries,
        "timeout_s": spec.timeout_s,
        "skip": _reason_to_skip(own, linked, spec, late),
    }
    section = getattr(linked, SECTION_OF[spec.kind])
    stage = _BUILDERS[spec.kind](linked, section, folder, fields)
    return replace(stage, settings={**stage.settings, **_outside(own, keyed, spec)})


def _link(
    own: Config, spec: StageConfig, inputs: dict[str, Stage], models: Models
) -> tuple[Config, Config]:
    """The stage's config with folders in the place of inputs and models, and one for its key.

    In that one, inputs have their fields' defaults, and models are named by their content.
    """
    section = SECTION_OF[spec.kind]
    model = getattr(own, section)
    paths: dict[str, Any] = {}
    for role, source in inputs.items():
        if field := ROLES[spec.kind][role].field:
            is_tokenizer = role == "tokenizer" and source.kind == "preprocess"
            paths[field] = str(source.result_folder / ("tokenizer" if is_tokenizer else ""))
    if "text" in inputs:
        paths |= _text_of(inputs["text"])
    in_key = {name: type(model).model_fields[name].default for name in paths}
    for field in MODEL_FIELDS.get(section, ()):
        if is_model_uri(uri := getattr(model, field)):
            registered = models.get(uri, UNKNOWN_MODEL)
            paths |= model_paths(field, registered)
            names = dict.fromkeys(model_paths(field, registered), None)
            in_key |= dict.fromkeys(names, registered and f"model {registered.digest[:12]}")
    return (
        own.model_copy(update={section: model.model_copy(update=paths)}),
        own.model_copy(update={section: model.model_copy(update=in_key)}),
    )


def _reason_to_skip(own: Config, linked: Config, spec: StageConfig, late: Collection[str]) -> str:
    """Why there is nothing to do: a model that is not there yet, or no new text."""
    section = SECTION_OF[spec.kind]
    given, found = getattr(own, section), getattr(linked, section)
    for field in ("checkpoint_path", "draft_model_id"):
        uri = getattr(given, field, None)
        if is_model_uri(uri) and getattr(found, field) is None:
            if uri in late:
                return f"there was no {uri} when these inputs were first run"
            return f"there is no {uri} yet"
    since = found.new_since if spec.kind == "preprocess" else None
    if since is None or not location(since).is_file():
        return ""
    new = set(find_files(found.data_files)) - known_files(found)
    has_text = any(size_of(location(path)) > 0 for path in new)
    return "" if has_text else f"no text is new since {given.new_since}"


def _text_of(samples: Stage) -> dict[str, Any]:
    """Fields of a preprocess section that read samples."""
    fields = {name: PreprocessConfig.model_fields[name].default for name in SOURCE_FIELDS}
    return {**fields, "dataset_name": SAMPLES, "data_files": [str(samples.output)]}


def _outside(own: Config, keyed: Config, spec: StageConfig) -> dict[str, Any]:
    """What the stage reads that no stage makes: the identity of folders that are given by path."""
    section, in_place = (getattr(config, SECTION_OF[spec.kind]) for config in (own, keyed))
    in_key = section.result_fields()
    given = {
        role.field: getattr(section, role.field)
        for name, role in ROLES[spec.kind].items()
        if role.field and role.field not in in_key and name not in spec.inputs
    }
    return {
        field: getattr(in_place, field) if is_model_uri(path) else identity_of(path)
        for field, path in given.items()
        if path is not None
    }


def _preprocess(config: Config, section: Any, folder: Location, fields: dict[str, Any]) -> Stage:
    return preprocess_stage(config, folder, **fields)


def _train(config: Config, section: Any, folder: Location, fields: dict[str, Any]) -> Stage:
    rows = fields["inputs"].get("data")
    planned_length = None if rows is None else rows.settings["max_length"]
    return train_stage(
        config, folder, data_path=section.data_path, planned_length=planned_length, **fields
    )


def _target_states(config: Config, section: Any, folder: Location, fields: dict[str, Any]) -> Stage:
    rows = fields["inputs"].get("data")
    planned_length = None if rows is None else rows.settings["max_length"]
    return target_states_stage(
        config, folder, data_path=section.data_path, planned_length=planned_length, **fields
    )


def _generate(config: Config, section: Any, folder: Location, fields: dict[str, Any]) -> Stage:
    return generate_stage(config, folder, checkpoint_path=section.checkpoint_path, **fields)


def _regenerate(config: Config, section: Any, folder: Location, fields: dict[str, Any]) -> Stage:
    return _generate(config, section, folder, {**fields, "kind": "regenerate"})


def _promote(config: Config, section: Any, folder: Location, fields: dict[str, Any]) -> Stage:
    if not config.tracking.enabled:
        raise InputError(
            "tracking.enabled false: a promote stage registers models with MLflow; leave it on"
        )
    return promote_stage(config, folder, **fields)


def _evaluate(config: Config, section: Any, folder: Location, fields: dict[str, Any]) -> Stage:
    trained = fields["inputs"].get("checkpoint")
    return evaluate_stage(
        config,
        folder,
        checkpoint_path=section.checkpoint_path,
        data_path=section.data_path,
        samples_path=section.samples_path,
        trained_on=trained and trained.reads["training"],
        **fields,
    )


def _frontier(config: Config, section: Any, folder: Location, fields: dict[str, Any]) -> Stage:
    return frontier_stage(config, folder, checkpoint_path=section.checkpoint_path, **fields)


# The closed table behind `kind: NAME`.
_BUILDERS: dict[str, Callable[[Config, Any, Location, dict[str, Any]], Stage]] = {
    "preprocess": _preprocess,
    "cache_target_states": _target_states,
    "train": _train,
    "regenerate": _regenerate,
    "generate": _generate,
    "evaluate": _evaluate,
    "frontier": _frontier,
    "promote": _promote,
}


def _refuse_decided_paths(config: Config) -> None:
    for section in ("preprocess", "train", "generate", "evaluate"):
        part = getattr(config, section)
        for name in ("output_dir", "data_path", "checkpoint_path", "samples_path"):
            if getattr(part, name, None) is not None:
                raise InputError(
                    f"{section}.{name} is decided by the pipeline (everything goes under root); "
                    f"remove it, or run python -m jobs.{section} by itself"
                )
