"""What a pipeline file's stages are: their inputs, their own config, and the order they run in.

    stages:
      corpus: {kind: preprocess}
      model:
        kind: train
        inputs: {data: corpus}
        config: {max_train_steps: 200}

A stage's config is the section of its kind with `config` laid over it. Without `stages`, a file
means preprocess, train, generate and evaluate in a row.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_origin

from pydantic import BaseModel

from tokendiff.config.base import Section
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.frontier import PERPLEXITY, FrontierConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.pipeline import Config, StageConfig
from tokendiff.config.strict_yaml import KeyPath

# The section that a kind's config is made from.
SECTION_OF = {
    "preprocess": "preprocess",
    "cache_target_states": "train",
    "train": "train",
    "regenerate": "generate",
    "generate": "generate",
    "evaluate": "evaluate",
    "frontier": "frontier",
    "promote": "promote",
}
# Of sections that may be left out, what a stage's own fields then make.
_WITHOUT_SECTION: dict[str, type[Section]] = {
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "frontier": FrontierConfig,
}
# What a preprocess stage would read the text from, if it were not the samples of another stage.
SOURCE_FIELDS = (
    *("dataset_name", "dataset_config_name", "dataset_split", "data_files", "text_column"),
    *("sample_by", "use_dummy_data", "num_dummy_samples"),
)
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_TAG = "name"


@dataclass(frozen=True, kw_only=True)
class Role:
    """An input that a kind of stage takes.

    Attributes:
        kinds: what may fill it.
        field: of the stage's config, which then gets the input's folder; None where the stage
            reads it in another way.
        is_needed: it must be filled, or else the field be given.
        instead: fields or roles that stand in for one that is needed.
        is_optional: the stage runs without it where what fills it has nothing to do.
    """

    kinds: tuple[str, ...]
    field: str | None = None
    is_needed: bool = False
    instead: tuple[str, ...] = ()
    is_optional: bool = False


# Samples come from a checkpoint of ours, from another model, or from a draft and its target.
_MODELS: dict[str, Role] = {
    "checkpoint": Role(
        kinds=("train",),
        field="checkpoint_path",
        is_needed=True,
        instead=("model_id", "target", "target_model_id", "draft", "draft_model_id"),
    ),
    "target": Role(kinds=("train",), field="target_model_id"),
    "draft": Role(kinds=("train",), field="draft_model_id"),
}
# The closed table of what goes into what.
ROLES: dict[str, dict[str, Role]] = {
    "preprocess": {
        "text": Role(kinds=("generate", "regenerate")),
        "tokenizer": Role(kinds=("preprocess", "train"), field="tokenizer_name_or_path"),
    },
    "cache_target_states": {
        "data": Role(kinds=("preprocess",), field="data_path", is_needed=True),
        "target": Role(kinds=("train",), field="target_model_id"),
        "draft": Role(kinds=("train",), field="draft_model_id"),
    },
    "train": {
        "data": Role(kinds=("preprocess",), field="data_path", is_needed=True),
        "init": Role(kinds=("train",), field="model_name_or_path"),
        "target": Role(kinds=("train",), field="target_model_id"),
        "draft": Role(kinds=("train",), field="draft_model_id"),
        "states": Role(kinds=("cache_target_states",), field="target_states_path"),
    },
    "regenerate": _MODELS,
    "generate": _MODELS,
    "evaluate": {
        "checkpoint": Role(kinds=("train",), field="checkpoint_path", is_needed=True),
        "data": Role(kinds=("preprocess",), field="data_path"),
        "samples": Role(kinds=("generate",), field="samples_path"),
    },
    "frontier": {
        "checkpoint": Role(kinds=("train",), field="checkpoint_path", is_needed=True),
        "reference": Role(kinds=("train",), field="reference_model_name_or_path"),
    },
    "promote": {
        "candidate": Role(kinds=("evaluate",), is_needed=True),
        "champion": Role(kinds=("evaluate",), is_optional=True),
        "frontier": Role(kinds=("frontier",)),
    },
}


def stages_of(config: Config) -> dict[str, StageConfig]:
    """The file's stages, each behind those it needs; without `stages` the four in a row."""
    if config.stages:
        return {name: config.stages[name] for name in _order(config.stages)[0]}
    stages = {
        "preprocess": StageConfig(kind="preprocess"),
        "train": StageConfig(kind="train", inputs={"data": "preprocess"}),
    }
    if config.generate is not None:
        stages["generate"] = StageConfig(kind="generate", inputs={"checkpoint": "train"})
    if config.evaluate is not None:
        inputs = {"checkpoint": "train", "data": "preprocess"}
        samples = {"samples": "generate"} if config.generate is not None else {}
        stages["evaluate"] = StageConfig(kind="evaluate", inputs={**inputs, **samples})
    return stages


def config_of(config: Config, stage: StageConfig) -> Config:
    """The config with the stage's own fields in its section; it has no stages and no matrix.

    Raises:
        pydantic.ValidationError: the stage's fields do not make a section.
    """
    section = SECTION_OF[stage.kind]
    model, fields = section_fields(config, stage)
    own = model.model_validate(fields)
    return config.model_copy(update={section: own, "stages": {}, "matrix": {}})


def section_fields(config: Config, stage: StageConfig) -> tuple[type[Section], dict[str, Any]]:
    """The model of the stage's config, and the fields that are given, of section and stage."""
    name = SECTION_OF[stage.kind]
    section = getattr(config, name)
    if section is None:  # no such stage in a file without `stages`; here, nothing in common
        return _WITHOUT_SECTION[name], dict(stage.config)
    return type(section), _laid_over(set_fields(section), stage.config)


def set_fields(model: BaseModel) -> dict[str, Any]:
    """The fields that were given, as plain values.

    A default that is written out counts as given, and validators refuse some fields that are given
    without effect.
    """
    return {
        name: _plain(getattr(model, name))
        for name, field in type(model).model_fields.items()
        if name in model.model_fields_set or (name == _TAG and _is_tag(field.annotation))
    }


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return set_fields(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _is_tag(annotation: Any) -> bool:
    """Whether a `name` chooses its model among several; a pipeline's name does not."""
    return get_origin(annotation) is Literal


def _laid_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged, but for one that names another objective or sampler: it stands alone."""
    merged = dict(below)
    for key, value in above.items():
        there = merged.get(key)
        if isinstance(value, str) and isinstance(there, dict) and there.get(_TAG) == value:
            continue  # `objective: mdlm` over an mdlm changes nothing
        is_same = isinstance(value, Mapping) and value.get(_TAG, _name_in(there)) == _name_in(there)
        if isinstance(value, Mapping) and isinstance(there, dict) and is_same:
            merged[key] = _laid_over(there, value)
        else:
            merged[key] = value
    return merged


def _name_in(value: Any) -> Any:
    return value.get(_TAG) if isinstance(value, dict) else None


def stage_problems(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """What is wrong with the stages' names and inputs: the keys of the place, and the words."""
    stages = config.stages
    for name, stage in stages.items():
        place: KeyPath = ("stages", name)
        if not name or not _NAME_CHARACTERS.issuperset(name):
            yield place, "a stage's name is made of letters, digits, '-' and '_'"
        roles = ROLES[stage.kind]
        for role, source in stage.inputs.items():
            if problem := _input_problem(stage.kind, role, source, stages):
                yield (*place, "inputs", role), problem
        given = {role: roles[role].field for role in stage.inputs if role in roles}
        _, fields = section_fields(config, stage)
        for role, field in given.items():
            if field is not None and field in stage.config:
                yield (
                    (*place, "config", field),
                    f"is what the input {role!r} is for; give one of the two",
                )
        for field in SOURCE_FIELDS if "text" in given else ():
            if field in stage.config:
                yield (*place, "config", field), "the text is the input 'text'; remove this"
        if "output_dir" in stage.config:
            yield (
                (*place, "config", "output_dir"),
                "is decided by the pipeline (everything goes under root); remove it",
            )
        for role, wanted in roles.items():
            filled = {*given, *(field for field, value in fields.items() if value)}
            if wanted.is_needed and filled.isdisjoint({role, wanted.field, *wanted.instead}):
                kinds = " or ".join(wanted.kinds)
                yield place, f"needs inputs: {{{role}: ...}}, a stage of kind {kinds}"
    if cycle := _cycle(stages):
        yield (
            ("stages", cycle[0], "inputs"),
            f"a stage cannot be its own input: {' <- '.join([*cycle, cycle[0]])}",
        )


def _input_problem(
    kind: str, role: str, source: str, stages: Mapping[str, StageConfig]
) -> str | None:
    roles = ROLES[kind]
    if role not in roles:
        takes = _guess(role, roles) or f"; it takes {', '.join(roles)}"
        return f"{kind} has no such input{takes}"
    if source not in stages:
        return f"no stage {source!r}{_guess(source, stages)}"
    if stages[source].kind not in roles[role].kinds:
        wanted = " or ".join(roles[role].kinds)
        return f"stage {source!r} is of kind {stages[source].kind}; this must be one of {wanted}"
    return None


def _guess(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _order(stages: Mapping[str, StageConfig]) -> tuple[list[str], list[str]]:
    """Names with inputs first, else in the order written; and those that no order is found for."""
    ordered: list[str] = []
    waiting = list(stages)
    while waiting:
        for name in waiting:
            needed = [source for source in stages[name].inputs.values() if source in stages]
            if all(source in ordered for source in needed):
                ordered.append(name)
                waiting.remove(name)
                break
        else:
            return ordered, waiting
    return ordered, []


def _cycle(stages: Mapping[str, StageConfig]) -> list[str]:
    """Stages of which each needs the next, and the last the first; none, if there are none."""
    waiting = _order(stages)[1]
    path = waiting[:1]
    while path:
        needed = next(name for name in stages[path[-1]].inputs.values() if name in waiting)
        if needed in path:
            return path[path.index(needed) :]
        path.append(needed)
    return []


def agreement_problems(config: Config) -> list[str]:
    """Where stages do not go with their inputs, each with its stage."""
    stages = stages_of(config)
    problems = []
    for name, stage in stages.items():
        chain = config
        for ancestor in [*_ancestors(name, stages), name]:
            own = config_of(config, stages[ancestor])
            section = SECTION_OF[stages[ancestor].kind]
            chain = chain.model_copy(update={section: getattr(own, section)})
        kinds = {stages[ancestor].kind for ancestor in _ancestors(name, stages)}
        found: list[str] = []
        if stage.kind == "train":
            found = [*chain.train_problems(), *_states_problems(config, stage)]
        elif stage.kind == "cache_target_states":
            found = _reader_problems(chain)
        elif stage.kind == "generate" and "preprocess" in kinds:
            found = chain.generate_problems()
        if stage.kind in ("generate", "regenerate"):
            found = [*found, *_model_problems(chain, stage)]
        elif stage.kind == "evaluate" and "preprocess" in kinds:
            found = chain.evaluate_problems()
        elif stage.kind == "frontier":
            found = _frontier_problems(chain, stage)
        elif stage.kind == "promote":
            found = _serving_problems(config, stage)
        problems += [f"stages.{name}: {text}" if config.stages else text for text in found]
    return problems


def _reader_problems(config: Config) -> list[str]:
    """Where a stage that reads a target has none to read."""
    name = config.train.objective.name
    if name == "dflash":
        return []
    return [
        f"objective {name!r} reads no target; a stage of kind cache_target_states takes the fields "
        "of the training that it is for, with objective dflash"
    ]


def _states_problems(config: Config, stage: StageConfig) -> list[str]:
    """Where hidden states are not those that the training they are given to would compute."""
    if (name := stage.inputs.get("states")) is None:
        return []
    source = config.stages[name]
    mine, theirs = (config_of(config, each).train for each in (stage, source))
    if mine.objective.name != "dflash":
        return [f"input 'states' has no effect with objective {mine.objective.name!r}; remove it"]
    sides = [
        {
            **{role: each.inputs.get(role) for role in ("data", "target", "draft")},
            **{field: getattr(train, field) for field in ("target_model_id", "draft_model_id")},
            **{
                field: getattr(train.objective, field, None)
                for field in ("draft_num_layers", "use_target_hidden_states")
            },
            "mixed_precision": train.mixed_precision,
        }
        for each, train in ((stage, mine), (source, theirs))
    ]
    return [
        f"{field} is {here!r}, and {sides[1][field]!r} in {name!r}, whose hidden states it reads; "
        "give both the same"
        for field, here in sides[0].items()
        if sides[1][field] != here
    ]


def _model_problems(config: Config, stage: StageConfig) -> list[str]:
    """Where a stage that samples does not have the models that its sampler takes."""
    section = config.generate
    assert section is not None, "config_of fills it in"
    sampler, drafted = f"sampler {section.sampler.name!r}", ("target", "draft")
    if section.sampler.name != "dflash":
        return [
            f"input {role!r} has no effect with {sampler}; remove it"
            for role in drafted
            if role in stage.inputs
        ]
    missing = [
        role
        for role in drafted
        if role not in stage.inputs and getattr(section, f"{role}_model_id") is None
    ]
    unused = ["checkpoint"] if "checkpoint" in stage.inputs else []
    return [
        *(f"{sampler} needs the input {role!r}, or {role}_model_id" for role in missing),
        *(f"input {role!r} has no effect with {sampler}; remove it" for role in unused),
    ]


def _frontier_problems(config: Config, stage: StageConfig) -> list[str]:
    """Where nothing measures the quality that points are compared by."""
    section = config.frontier
    assert section is not None, "config_of fills it in"
    given = {"reference"} & set(stage.inputs) or section.reference_model_name_or_path
    if section.quality != PERPLEXITY or given:
        return []
    return [
        f"quality {PERPLEXITY!r} needs the input 'reference', a stage that trains a causal model, "
        "or reference_model_name_or_path; or take the figure of a task"
    ]


def _serving_problems(config: Config, stage: StageConfig) -> list[str]:
    """Where what is promoted does not go with the `generate` section, which it is served with."""
    judge = config.stages[stage.inputs["candidate"]]
    if (trained := judge.inputs.get("checkpoint")) is None:
        return []
    objective = config_of(config, config.stages[trained]).train.objective.name
    sampler = (config.generate or GenerateConfig()).sampler.name
    if (objective == "dflash") == (sampler == "dflash"):
        return []
    return [
        f"what {trained!r} trains with objective {objective!r} is to be served with the generate "
        f"section's sampler {sampler!r}; a DFlash draft, and nothing else, takes sampler 'dflash'"
    ]


def _ancestors(name: str, stages: Mapping[str, StageConfig]) -> list[str]:
    """What the stage is made from, directly or not, the nearest last."""
    found: list[str] = []
    for source in stages[name].inputs.values():
        for ancestor in [*_ancestors(source, stages), source]:
            if ancestor not in found:
                found.append(ancestor)
    return found
