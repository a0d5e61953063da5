"""YAML, overrides and flags to a validated Config; every problem in one error, each with its place.

What comes later wins: the file, then `-o section.field=value` in their order, then flags. Where a
field is one of several models, chosen by `name` (`train.objective`, `generate.sampler`), the name
alone may stand for the model.
"""

import copy
import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tokendiff.config import strict_yaml
from tokendiff.config.base import MAX_COUNT
from tokendiff.config.pipeline import Config, StageConfig
from tokendiff.config.stage_graph import SECTION_OF, config_of, set_fields, stage_problems
from tokendiff.config.strict_yaml import KeyPath
from tokendiff.errors import InputError
from tokendiff.secrets import is_secret_name, without_credentials

Model = TypeVar("Model", bound=BaseModel)

TAG = "name"
MAX_VARIANTS = 64
_MATRIX_SECTIONS = ("preprocess", "train", "generate", "evaluate", "stages")
_WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "greater_than": "> {gt}",
    "greater_than_equal": ">= {ge}",
    "less_than": "< {lt}",
    "less_than_equal": "<= {le}",
    "finite_number": "finite",
    "string_too_short": "at least {min_length} characters long",
    "string_pattern_mismatch": "of the form {pattern}",
}


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    *,
    default_sampler: Callable[[str], str] | None = None,
) -> Config:
    """Read and validate a config.

    Args:
        path: a YAML file; None starts from the defaults.
        overrides: `section.field=value`; `strict_yaml.parse_value` says how the value is read.
        flags: dotted path -> a value, or its text, which is read as the field's type wants: where
            that takes strings, as it is.
        default_sampler: from `generate.model_id` to the sampler that is used where none is named;
            None leaves it to the section's default.

    Raises:
        InputError: listing every problem, one per line, in the order of their places.
    """
    draft, config = _load(Config, path, overrides, flags, default_sampler)
    problems = _stage_problems(draft, config)
    for variant in _matrix_drafts(draft, config) if config.matrix and not problems else []:
        try:
            problems += _stage_problems(variant, Config.model_validate(variant.data))
        except ValidationError as error:
            problems += [variant.explain(e) for e in error.errors(include_url=False)]
    if problems:
        raise _all_of(problems)
    return config


def bounds_of(field: FieldInfo, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The bounds of a field that say something to a reader, by these names of pydantic's: not the
    one that every count has.
    """
    for rule in field.metadata:
        for name in names:
            bound = getattr(rule, name, None)
            if bound is not None and bound != MAX_COUNT:
                yield name, bound


def matrix_variants(config: Config) -> list[tuple[dict[str, Any], Config]]:
    """Each combination of the matrix, and the config with it in place; without a matrix, one."""
    if not config.matrix:
        return [({}, config)]
    drafts = _matrix_drafts(_Draft(Config, strict_yaml.Document(set_fields(config), {})), config)
    return [
        (values, Config.model_validate(draft.data))
        for values, draft in zip(_combinations(config.matrix), drafts, strict=True)
    ]


def _stage_problems(draft: "_Draft", config: Config) -> "list[_Problem]":
    """What is wrong with the stages of a config that is valid as such."""
    problems = [draft.problem(keys, text) for keys, text in stage_problems(config)]
    for name, stage in config.stages.items():
        try:
            config_of(config, stage)
        except ValidationError as error:
            own: KeyPath = ("stages", name, "config")
            section = SECTION_OF[stage.kind]
            problems += [
                draft.explain({**found, "loc": (section, *found["loc"])}, instead=own)
                for found in error.errors(include_url=False)
            ]
    return problems


def _combinations(matrix: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [
        dict(zip(matrix, values, strict=True)) for values in itertools.product(*matrix.values())
    ]


def _matrix_drafts(draft: "_Draft", config: Config) -> "list[_Draft]":
    """A draft for each combination of the matrix, its values at the lines of the matrix.

    Raises:
        InputError: an axis is empty, repeats a value, or changes no result.
    """
    problems = []
    for name, values in config.matrix.items():
        keys = name.split(".")
        if len(keys) < 2 or keys[0] not in _MATRIX_SECTIONS:
            text = f"is no axis: write section.field, of {', '.join(_MATRIX_SECTIONS)}"
        elif keys[0] == "stages" and (len(keys) < 4 or keys[2] != "config"):
            text = "is no axis: of a stage's own fields write stages.NAME.config.FIELD"
        elif not values or any(value in values[:at] for at, value in enumerate(values)):
            text = "must list one value or more, each once"
        else:
            continue
        problems.append(draft.problem(("matrix", name), text))
    if math.prod(map(len, config.matrix.values())) > MAX_VARIANTS:
        problems.append(draft.problem(("matrix",), f"more than {MAX_VARIANTS} combinations"))
    if problems:
        raise _all_of(problems)
    return [draft.with_matrix(values) for values in _combinations(config.matrix)]


def _load(
    model: type[Model],
    path: Path | None,
    overrides: Sequence[str],
    flags: Mapping[str, Any] | None,
    default_sampler: Callable[[str], str] | None = None,
) -> "tuple[_Draft, Model]":
    document = strict_yaml.read(path) if path else strict_yaml.Document({}, {})
    draft = _Draft(model, document, path)
    for number, override in enumerate(overrides):
        draft.override(number, override)
    # Short paths first: the choice of an objective decides how its own fields are read.
    ordered = list(enumerate(sorted(flags or {}, key=lambda name: name.count("."))))
    for number, name in ordered:
        if name.count(".") <= 1:
            draft.set_flag(number, name, (flags or {})[name])
    if default_sampler is not None:
        draft.name_sampler(default_sampler)
    for number, name in ordered:
        if name.count(".") > 1:
            draft.set_flag(number, name, (flags or {})[name])
    try:
        validated = model.model_validate(draft.data)
    except ValidationError as error:
        draft.problems += [draft.explain(e) for e in error.errors(include_url=False)]
    if draft.problems:
        raise _all_of(draft.problems)
    return draft, validated


def _all_of(problems: "list[_Problem]") -> InputError:
    return InputError("\n".join(dict.fromkeys(text for _, text in sorted(problems))))


def to_yaml(config: BaseModel) -> str:
    """A file that loads to an equal config.

    Only fields that were set are written: a default that is written out counts as given, and
    validators refuse some fields that are given without effect.
    """
    return strict_yaml.dump(set_fields(config))


# What the models say about their fields.


def alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows, out of `Annotated` and unions, without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return alternatives(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [found for part in get_args(annotation) for found in alternatives(part)]
    return [] if annotation in (None, NoneType) else [annotation]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    return [t for t in alternatives(annotation) if isinstance(t, type) and issubclass(t, BaseModel)]


def _item_models(annotation: Any) -> list[type[BaseModel]]:
    """The models that the items of a list, or the values of a mapping, may be."""
    containers = [t for t in alternatives(annotation) if get_origin(t) in (list, dict)]
    return [model for t in containers for model in models_in(get_args(t)[-1])]


def tags(model: type[BaseModel]) -> tuple[str, ...]:
    """The names that choose this model where a field allows several; none for other models."""
    field = model.model_fields.get(TAG)
    return get_args(field.annotation) if field else ()


def is_tagged(field: FieldInfo | None) -> bool:
    return field is not None and any(map(tags, models_in(field.annotation)))


def walk_fields(
    model: type[BaseModel], prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], type[BaseModel], FieldInfo]]:
    """Path, owner and field of every field, each followed by those of all the models it allows."""
    for name, field in model.model_fields.items():
        yield (*prefix, name), model, field
        for inner in models_in(field.annotation):
            yield from walk_fields(inner, (*prefix, name))


def _chosen_model(field: FieldInfo | None, value: Any) -> type[BaseModel] | None:
    """The model that reads `value`: the one it names, else the default's, else the only one."""
    models = models_in(field.annotation) if field else []
    name = value.get(TAG) if isinstance(value, dict) else value
    named = [model for model in models if name in tags(model)]
    default = [model for model in models if field and type(field.default) is model]
    only = models if len(models) == 1 else []
    return next(iter(named or default or only), None)


def _read_flag(annotation: Any, raw: Any) -> Any:
    types = alternatives(annotation)
    if isinstance(raw, list):
        item = next((get_args(t)[0] for t in types if get_origin(t) is list), str)
        return [_read_flag(item, text) for text in raw]
    takes_text = models_in(annotation) or any(t is str or get_origin(t) is Literal for t in types)
    return strict_yaml.plain_scalar(raw) if isinstance(raw, str) and not takes_text else raw


class _Place(NamedTuple):
    """Where a value was given. Places compare in the order in which later ones win."""

    rank: int  # 0 the file, 1 overrides, 2 flags
    number: int  # line of the file, or position among the overrides or flags
    text: str
    names: KeyPath = ()  # the field that `text` itself names


_Problem = tuple[_Place, str]


class _Draft:
    """What the user gave, before validation, with the place of each value."""

    def __init__(
        self, model: type[BaseModel], document: strict_yaml.Document, path: Path | None = None
    ) -> None:
        self.model = model
        self.data = document.value
        self.problems: list[_Problem] = []
        self._everything = _Place(0, 0, str(path) if path else "config")
        self._places = {
            keys: _Place(0, line, f"{path}:{line}") for keys, line in document.lines.items()
        }

    def override(self, number: int, override: str) -> None:
        name, equals, raw = override.partition("=")
        keys = tuple(name.strip().split("."))
        place = _Place(1, number, f"-o {'.'.join(keys)}", keys)
        if not equals or not all(keys):
            text = "-o ..." if is_secret_name(override) else f"-o {override}"
            self.problems.append((place, f"{text}: write it as -o section.field=value"))
            return
        if self.model is Config and keys[0] == "stages" and len(keys) > 2:
            stages = self.data.get("stages")
            names = list(stages) if isinstance(stages, dict) else []
            if keys[1] not in names:
                close = difflib.get_close_matches(keys[1], names, n=1)
                remedy = f"; did you mean {close[0]!r}?" if close else ""
                self.problems.append((place, f"{place.text}: no stage {keys[1]!r}{remedy}"))
                return
        try:
            self._assign(keys, strict_yaml.parse_value(raw, source=place.text), place)
        except InputError as error:
            self.problems.append((place, str(error)))

    def set_flag(self, number: int, name: str, raw: Any) -> None:
        keys = tuple(name.split("."))
        place = _Place(2, number, f"--{keys[-1]}", keys)
        field = self._field(keys)
        if field is None and self._is_undecided(keys[:-1]):
            words = f"is a field of one {keys[-2]}, and none is named; add --{keys[-2]} NAME"
            self.problems.append((place, f"{place.text}: {words}"))
            return
        try:
            value = _read_flag(field.annotation, raw) if field else raw
            self._assign(keys, value, place)
        except ValueError as error:
            self.problems.append((place, f"{place.text}: {error}"))

    def name_sampler(self, default_of: Callable[[str], str]) -> None:
        """Name the sampler of `generate` by its model, where a model_id is given and no name."""
        section = self.data.get("generate")
        if not isinstance(section, dict):
            return
        model_id, sampler = section.get("model_id"), section.get("sampler") or {}
        if isinstance(model_id, str) and isinstance(sampler, dict) and TAG not in sampler:
            section["sampler"] = {TAG: default_of(model_id), **sampler}

    def with_matrix(self, values: Mapping[str, Any]) -> "_Draft":
        """A copy with one combination of the matrix in it, and no matrix."""
        copied = copy.deepcopy(self)
        copied.data.pop("matrix")
        for name, value in values.items():
            place = self._place(("matrix", name), "")._replace(names=())
            copied._assign(tuple(name.split(".")), copy.deepcopy(value), place)
        return copied

    def problem(self, keys: KeyPath, text: str) -> _Problem:
        place = self._place(keys, "")
        name = "" if keys == place.names else f"{_dotted(keys)}: "
        return place, f"{place.text}: {name}{text}"

    def _is_undecided(self, keys: KeyPath) -> bool:
        """Whether a field may be one of several models, and nothing says which."""
        field = self._field(keys)
        value: Any = self.data
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return is_tagged(field) and _chosen_model(field, value) is None

    def _field(self, keys: KeyPath) -> FieldInfo | None:
        model: type[BaseModel] | None = self.model
        value: Any = self.data
        if self.model is Config and keys[0] == "stages":
            # Below `stages.NAME.config` come the fields of the section of the stage's kind.
            section = SECTION_OF.get(self._kind_of(keys[1:2]) or "")
            if section is None or len(keys) < 4:
                return None
            inside = self.data["stages"][keys[1]].get("config")
            value = {section: inside if isinstance(inside, dict) else {}}
            keys = (section, *keys[3:])
        field = None
        for key in keys:
            field = model.model_fields.get(str(key)) if model else None
            value = value.get(key) if isinstance(value, dict) else None
            model = _chosen_model(field, value)
        return field

    def _kind_of(self, names: KeyPath) -> str | None:
        value = self.data.get("stages")
        for name in (*names, "kind"):
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, str) else None

    def _assign(self, keys: tuple[str, ...], value: Any, place: _Place) -> None:
        mapping = self.data
        for depth, key in enumerate(keys[:-1], start=1):
            inner = mapping.get(key)
            if isinstance(inner, str) and is_tagged(self._field(keys[:depth])):
                inner = {TAG: inner}
            elif inner is None:
                inner = {}
            elif not isinstance(inner, dict):
                raise InputError(f"{place.text}: {_dotted(keys[:depth])} is not a section")
            mapping[key] = inner
            mapping = inner
        old, field = mapping.get(keys[-1]), self._field(keys)
        is_choice = isinstance(value, str) and isinstance(old, dict) and is_tagged(field)
        if is_choice and _chosen_model(field, value) is _chosen_model(field, old):
            # The model is chosen already; naming it again does not reset its fields.
            return self._assign((*keys, TAG), value, place)
        mapping[keys[-1]] = value
        self._places = {k: v for k, v in self._places.items() if k[: len(keys)] != keys}
        self._places[keys] = place

    def explain(self, error: ErrorDetails, *, instead: KeyPath = ()) -> _Problem:
        """A finding of pydantic, in the words and at the place of what the user wrote.

        Args:
            instead: keys of what was laid over the section that `error` is in: its place, where the
                value came from there.
        """
        keys, owner = self._locate(error["loc"])
        is_of_all = error["type"] == "value_error"
        shown, own = keys, (*instead, *keys[1:])
        if instead and (is_of_all or self._reaches(own, len(instead))):
            shown = own
        source = shown
        if error["type"] == "union_tag_invalid":
            source = (*shown, TAG)
        elif error["type"] == "literal_error" and keys[-1] == TAG and owner and tags(owner):
            keys, shown = keys[:-1], shown[:-1]
        message = _message(error, keys, owner, self.model)
        place = self._place(source, message if is_of_all else "")
        name = "" if shown in ((), place.names) else f"{_dotted(shown)}: "
        return place, f"{place.text}: {name}{message}"

    def _reaches(self, keys: KeyPath, start: int) -> bool:
        """Whether a value was given at these keys, or at what they stand in from `start` on."""
        return any(keys[:length] in self._places for length in range(len(keys), start, -1))

    def _locate(self, loc: KeyPath) -> tuple[KeyPath, type[BaseModel] | None]:
        """The keys as the user wrote them, and the model that should have the last one.

        Where a field allows several models, pydantic's `loc` has the chosen tag behind the field.
        """
        keys: KeyPath = ()
        owner: type[BaseModel] | None = None
        model: type[BaseModel] | None = self.model
        parts = iter(loc)
        for part in parts:
            keys, owner = (*keys, part), model
            field = owner.model_fields.get(str(part)) if owner else None
            models = models_in(field.annotation) if field else []
            if field and (items := _item_models(field.annotation)):
                key = next(parts, None)
                keys, models = (keys if key is None else (*keys, key)), items
            if len(models) > 1:
                tag = next(parts, None)
                models = [m for m in models if tag in tags(m)]
            model = models[0] if models else None
        return keys, owner

    def _place(self, keys: KeyPath, message: str) -> _Place:
        """Where `keys` was given: itself, what it stands in, or something in it.

        A message about a section as a whole is placed at the last given field that it names.
        """
        words = set(re.findall(r"\w+", message))
        inside = {k: p for k, p in self._places.items() if k[: len(keys)] == keys}
        if named := [place for k, place in inside.items() if k[-1] in words]:
            return max(named)
        for length in range(len(keys), 0, -1):
            if keys[:length] in self._places:
                return self._places[keys[:length]]
        return max(inside.values(), default=self._everything)


def _message(
    error: ErrorDetails, keys: KeyPath, owner: type[BaseModel] | None, root: type[BaseModel]
) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_field(keys, owner, root)
    if kind == "missing":
        return "is required"
    if kind == "value_error":
        return str(context["error"])
    value = context.get("tag", error["input"])
    remedy = ""
    if choices := context.get("expected_tags", context.get("expected")):
        wanted = "must be one of " + choices.replace(" or ", ", ")
        close = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", choices), n=1)
        remedy = f"; did you mean {close[0]!r}?" if close else ""
    elif kind in _WANTED:
        wanted = "must be " + _WANTED[kind].format(**context)
    else:
        wanted = error["msg"]
    if kind == "string_type" and isinstance(value, bool | int | float):
        remedy = "; put it in quotes"
    is_secret = any(is_secret_name(str(key)) for key in keys)
    return f"{wanted}, got {'a value not shown here' if is_secret else _shown(value)}{remedy}"


def _unknown_field(keys: KeyPath, owner: type[BaseModel] | None, root: type[BaseModel]) -> str:
    name = str(keys[-1])
    fields = list(owner.model_fields) if owner else []
    if owner is StageConfig and not difflib.get_close_matches(name, fields, cutoff=0.75):
        own = [path for path, _ in _anywhere(name, root) if path[0] in SECTION_OF.values()]
        if own:
            return f"unknown field; a stage's own fields go into config: {{{name}: ...}}"
    same_name = _anywhere(name, root)
    if others := [tag for path, model in same_name if path == keys for tag in tags(model)]:
        mine = ", ".join(tags(owner)) if owner else ""
        return f"not a field of {mine}, only of {', '.join(others)}"
    guesses = (
        difflib.get_close_matches(name, fields, n=1, cutoff=0.75)
        or list(dict.fromkeys(_dotted(path) for path, _ in same_name))
        or difflib.get_close_matches(name, fields, n=1)
    )
    if guesses:
        return f"unknown field; did you mean {' or '.join(map(repr, guesses))}?"
    return f"unknown field; the fields here are {', '.join(fields)}"


def _anywhere(name: str, root: type[BaseModel]) -> list[tuple[tuple[str, ...], type[BaseModel]]]:
    return [(path, model) for path, model, _ in walk_fields(root) if path[-1] == name != TAG]


def _dotted(keys: KeyPath) -> str:
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).removeprefix(".")


def _shown(value: Any) -> str:
    if isinstance(value, str):
        value = without_credentials(value)
        return repr(value if len(value) <= 80 else value[:77] + "...")
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    return "null" if value is None else str(value).lower()
