"""Reference pages, written from the code when the site is built: they cannot be outdated."""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.tools.schema import pipeline_schema
from tokendiff.config import objectives, samplers
from tokendiff.config.loader import bounds_of, is_tagged, models_in, tags
from tokendiff.config.pipeline import Config
from tokendiff.config.stage_graph import ROLES

ROOT = Path(__file__).parents[2]
JOBS = ("preprocess", "train", "generate", "evaluate", "pipeline")
ROOMS = (
    *("diffusion", "objectives", "samplers", "artifacts", "data", "models", "training"),
    *("evaluation", "verification", "cluster", "tracking"),
)
_BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}"}
_BOUNDS |= {"min_length": "length at least {}"}


def pages() -> dict[str, str]:
    """Path of each page below docs/ -> its Markdown."""
    made = {f"reference/config/{section}.md": text for section, text in _sections()}
    made["reference/config/objectives.md"] = _union_page(
        "Objectives", "train.objective", objectives.ObjectiveConfig
    )
    made["reference/config/samplers.md"] = _union_page(
        "Samplers", "generate.sampler", samplers.SamplerConfig
    )
    made["reference/stages.md"] = _stages_page()
    made["reference/cli.md"] = "\n".join(_cli())
    for room in ROOMS:
        made[f"reference/api/{room}.md"] = "\n".join(_api(room))
    return made


def files() -> dict[str, str]:
    """Path of each file of the site that is no page -> its text."""
    return {"schema.json": json.dumps(pipeline_schema(), indent=1, sort_keys=True)}


def _sections() -> Iterator[tuple[str, str]]:
    own = []
    for name, field in Config.model_fields.items():
        found = models_in(field.annotation)
        if not found:
            own.append((name, field))
            continue
        lines = [f"# Section `{name}`", "", _summary(found[0]), ""]
        yield name, "\n".join([*lines, *_models(name, found[0])])
    head = "# A pipeline file\n\nFields of the file itself, beside its sections.\n"
    yield "pipeline", "\n".join([head, *_table(own)])


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().replace("\n    ", "\n")


def _models(name: str, model: type[BaseModel]) -> list[str]:
    """The table of a section, then those of the entries that its lists and mappings hold."""
    lines = _table(model.model_fields.items())
    for field_name, field in model.model_fields.items():
        for item in get_args(field.annotation):
            if isinstance(item, type) and issubclass(item, BaseModel) and not is_tagged(field):
                lines += ["", f"## An entry of `{name}.{field_name}`", "", _summary(item), ""]
                lines += _table(item.model_fields.items())
    return lines


def _union_page(title: str, place: str, annotation: Any) -> str:
    lines = [f"# {title}", "", f"The field `{place}`: a name alone, or a mapping with `name` and"]
    lines += ["the fields below. A field that a class does not have is an error.", ""]
    for model in models_in(annotation):
        lines += [f"## `{tags(model)[0]}`", "", _summary(model), ""]
        lines += [*_table(item for item in model.model_fields.items() if item[0] != "name"), ""]
    return "\n".join(lines)


def _table(fields: Any) -> list[str]:
    rows = list(fields)
    if not rows:
        return ["No fields."]
    lines = ["| field, type, default | meaning |", "|---|---|"]
    for name, field in rows:
        meaning = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        bounds = _bounds(field)
        meaning += f" *({bounds})*" if bounds else ""
        shape = f"<br><small>{_type(field)}, {_default(field)}</small>"
        lines.append(f"| {field_name(name)}{shape} | {meaning} |")
    return lines


def field_name(name: str) -> str:
    """The name as tables show it; where a line is short it is broken behind an underscore."""
    return f"**<code>{name.replace('_', '_<wbr>')}</code>**"


def _bounds(field: FieldInfo) -> str:
    texts = [
        _BOUNDS[name].format(bound if name == "min_length" else _number(bound))
        for name, bound in bounds_of(field, _BOUNDS)
    ]
    return ", ".join(text for text in texts if text != "length at least 1")


def _number(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) and bound < 2**50 else f"{bound:g}"


def _type(field: FieldInfo) -> str:
    if is_tagged(field):
        where = "objectives" if "objective" in str(field.annotation).lower() else "samplers"
        return f"one of the [{where}]({where}.md)"
    text = re.sub(r"tokendiff\.[a-z_.]+\.", "", str(getattr(field.annotation, "__name__", None)))
    if get_args(field.annotation):
        text = re.sub(r"(typing|tokendiff)\.(\w+\.)*", "", str(field.annotation))
    choices = re.search(r"Literal\[(.*?)\]", text)
    if choices:
        text = text.replace(choices[0], choices[1].replace("'", "").replace(", ", " / "))
    text = text.replace(" | None", " or null").replace("NoneType", "null")
    return f"`{text}`".replace("|", "\\|")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*needed*"
    value = field.default
    if isinstance(value, BaseModel):
        return f"`{getattr(value, 'name', '')}`"
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return ", ".join(f"`{item.model_dump(exclude_unset=True)}`" for item in value)
    return "`null`" if value is None else f"`{json.dumps(value)}`"


def _stages_page() -> str:
    lines = ["# Kinds of stages", "", "Inputs by role. A role in **bold** must be filled.", ""]
    lines += ["| kind | role | filled by a stage of kind | sets the field |", "|---|---|---|---|"]
    for kind, roles in ROLES.items():
        for name, role in roles.items():
            shown = f"**{name}**" if role.is_needed else name
            instead = f" (or {', '.join(role.instead)})" if role.instead else ""
            field = f"`{role.field}`" if role.field else ""
            lines.append(f"| `{kind}` | {shown}{instead} | {', '.join(role.kinds)} | {field} |")
    return "\n".join(lines)


def _cli() -> Iterator[str]:
    yield "# Command line\n"
    yield "What `--help` prints. A file, then `-o`, then flags: what comes later wins.\n"
    for job in JOBS:
        yield f"## `python -m jobs.{job}`\n"
        yield f"```text\n{help_text(job)}\n```\n"


def help_text(job: str) -> str:
    """What a job prints for --help."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        import_module(f"jobs.{job}").main(["--help"])
    return printed.getvalue().rstrip()


def _api(room: str) -> Iterator[str]:
    yield f"# `tokendiff.{room}`\n"
    package = import_module(f"tokendiff.{room}")
    map_text = (package.__doc__ or "").strip()
    yield f"{map_text.splitlines()[0]}\n"
    for module in public_modules(room):
        yield f"::: tokendiff.{room}.{module}\n"


def public_modules(room: str) -> list[str]:
    """The modules that the room's map offers to other rooms."""
    package = import_module(f"tokendiff.{room}")
    shown = (package.__doc__ or "").partition("For other rooms:")[2]
    shown = shown.partition("Of this room alone:")[0]
    folder = ROOT / "tokendiff" / room
    words = [word for line in shown.splitlines() for word in _first_words(line, folder)]
    return list(dict.fromkeys(words))


def _first_words(line: str, folder: Path) -> list[str]:
    """Names of modules at the beginning of a line of a map."""
    found = []
    for word in line.split():
        if not (folder / f"{word}.py").is_file():
            break
        found.append(word)
    return found
