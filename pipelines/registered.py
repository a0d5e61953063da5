"""Registered models in a config: `models:/NAME@ALIAS` in the place of a path.

An alias moves, and a stage's key must not. So a pipeline reads an alias once for each state of the
rest of its inputs, and keeps what it stood for: a run that finds nothing else changed finds every
stage done, though it moved the alias itself.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.paths import input_path, output_path
from tokendiff.artifacts.locations import Location
from tokendiff.artifacts.manifest import fingerprint, write_atomically
from tokendiff.config.loader import matrix_variants
from tokendiff.config.pipeline import Config
from tokendiff.config.stage_graph import SECTION_OF, config_of, stages_of
from tokendiff.errors import InputError
from tokendiff.tracking.registry import RegisteredModel, Registry, is_model_uri

# Fields that may name a registered model, by section.
MODEL_FIELDS = {
    "preprocess": ("new_since",),
    "train": ("warm_start_from", "model_name_or_path"),
    "generate": ("checkpoint_path", "draft_model_id"),
    "evaluate": ("checkpoint_path",),
    "frontier": ("checkpoint_path",),
}
# Those that make do without a model that is not there yet.
_LENIENT = ("new_since", "warm_start_from")
UNKNOWN_MODEL = RegisteredModel(
    name="unknown", version=0, digest="unknown", checkpoint=Path(), trained_on=Path()
)
_PINS_NAME = "models.json"
_KEPT_PINS = 100

Models = Mapping[str, RegisteredModel | None]


def model_paths(field: str, registered: RegisteredModel | None) -> dict[str, Any]:
    """What stands in the place of a field that names a model; `new_since` brings its tokenizer."""
    if registered is None:
        return {field: None}
    if field == "new_since":
        return {
            "new_since": str(registered.trained_on),
            "tokenizer_name_or_path": str(registered.checkpoint),
        }
    return {field: str(registered.checkpoint)}


def with_models(config: Config, sections: Sequence[str] = ("preprocess", "train")) -> Config:
    """The config of a job that reads these sections, with paths in the place of models.

    Raises:
        InputError: there is no such model, and the job cannot do without.
    """
    for section in sections:
        part = getattr(config, section)
        for field in MODEL_FIELDS[section]:
            if not is_model_uri(uri := getattr(part, field)):
                continue
            registry = _registry_of(config)
            registered = registry.open(uri)
            if registered is None and field not in _LENIENT:
                raise InputError(f"{section}.{field}: {registry.missing(uri)}")
            part = part.model_copy(update=model_paths(field, registered))
        config = config.model_copy(update={section: part})
    return config


def checkpoint_folder(path: str, config: Config) -> str:
    """An absolute path of a checkpoint that is given by path, or as a registered model.

    Raises:
        InputError: there is none.
    """
    if not is_model_uri(path):
        return input_path(path, what="checkpoint_path")
    registry = _registry_of(config)
    registered = registry.open(path)
    if registered is None:
        raise InputError(f"checkpoint_path: {registry.missing(path)}")
    return str(registered.checkpoint)


def _registry_of(config: Config) -> Registry:
    return Registry(config.tracking, output_path(config.root))


@dataclass(frozen=True, kw_only=True)
class PinnedModels:
    """What the URIs of a pipeline stand for, given the rest of its inputs.

    Attributes:
        inputs: a fingerprint of that rest.
        moved: the version that an alias stands for now, where that is another one; None where the
            alias is gone.
    """

    models: dict[str, RegisteredModel | None]
    inputs: str
    moved: dict[str, int | None]

    @property
    def late(self) -> list[str]:
        """Aliases that were missing when these inputs were first read, and are there now."""
        return [uri for uri in self.moved if self.models[uri] is None]

    def notes(self) -> list[str]:
        """A line for each alias that stands for something else now."""
        return [
            f"{uri} is {_version_in_words(now)} now; until the text or a setting changes, a run "
            "reads it as it was when these inputs were first run: "
            f"{_version_in_words(_version(model))}"
            for uri, now in self.moved.items()
            for model in [self.models[uri]]
        ]

    @classmethod
    def read(cls, config: Config, root: Location, keys: list[str]) -> "PinnedModels":
        """The models as they were kept for these inputs; those not kept, as the registry has them.

        Args:
            keys: of the pipeline's stages while its models are not known.

        Raises:
            InputError: a model is missing that a stage cannot do without.
        """
        inputs = fingerprint(keys)
        uris = model_uris(config)
        if not uris:
            return cls(models={}, inputs=inputs, moved={})
        registry = Registry(config.tracking, root)
        kept = _read_pins(root / config.name).get(inputs, {})
        models: dict[str, RegisteredModel | None] = {}
        moved: dict[str, int | None] = {}
        for uri, is_needed in uris.items():
            place = kept.get(uri, uri)
            models[uri] = None if place is None else registry.open(place)
            was_there = place not in (None, uri)
            if models[uri] is None and was_there:
                raise InputError(
                    f"{uri}: {place}, which it stood for when these inputs ran before, was deleted "
                    "from the MLflow registry; to read the alias anew, delete "
                    f"{root / config.name / '.run' / _PINS_NAME}"
                )
            if models[uri] is None and is_needed:
                raise InputError(registry.missing(uri))
            if uri in kept and (now := registry.version_of(uri)) != _version(models[uri]):
                moved[uri] = now
        return cls(models=models, inputs=inputs, moved=moved)

    def keep(self, pipeline_folder: Location) -> None:
        if not self.models:
            return
        pins = _read_pins(pipeline_folder)
        pins.pop(self.inputs, None)
        pins[self.inputs] = {
            uri: None if model is None else f"models:/{model.name}/{model.version}"
            for uri, model in self.models.items()
        }
        path = pipeline_folder / ".run" / _PINS_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        newest = dict(list(pins.items())[-_KEPT_PINS:])
        write_atomically(path, json.dumps(newest, indent=1).encode())


def _version(model: RegisteredModel | None) -> int | None:
    return None if model is None else model.version


def _version_in_words(version: int | None) -> str:
    return "missing" if version is None else f"version {version}"


def model_uris(config: Config) -> dict[str, bool]:
    """The registered models that stages name, and whether one of them cannot do without."""
    found: dict[str, bool] = {}
    for _, variant in matrix_variants(config):
        for spec in stages_of(variant).values():
            section = SECTION_OF[spec.kind]
            part = getattr(config_of(variant, spec), section)
            for field in MODEL_FIELDS.get(section, ()):
                if is_model_uri(uri := getattr(part, field)):
                    is_needed = field == "model_name_or_path"
                    found[uri] = found.get(uri, False) or is_needed
    return found


def _read_pins(pipeline_folder: Location) -> dict[str, dict[str, str | None]]:
    try:
        pins = json.loads((pipeline_folder / ".run" / _PINS_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return pins if isinstance(pins, dict) else {}
