"""JSON Schema of a pipeline file, for editors: completion, help and errors while one is typed.

    python -m docs.tools.schema

writes pipelines/schema.json. It is more lenient than the loader, which also knows which fields have
no effect beside others.
"""

import json
from pathlib import Path
from typing import Any, get_args

from tokendiff.config.pipeline import Config, StageConfig
from tokendiff.config.stage_graph import SECTION_OF

SCHEMA_PATH = Path(__file__).parents[2] / "pipelines" / "schema.json"


def pipeline_schema() -> dict[str, Any]:
    """The schema as plain JSON (draft 2020-12)."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "tokendiff pipeline"
    definitions = schema["$defs"]
    for model in [schema, *definitions.values()]:
        for name, field in model.get("properties", {}).items():
            model["properties"][name] = _with_short_forms(name, field, definitions)
    _give_stages_their_sections(definitions)
    return schema


def _with_short_forms(name: str, field: Any, definitions: dict[str, Any]) -> Any:
    """What the loader expands: the name of an objective or sampler alone; tasks with commas."""
    if isinstance(field, list):
        return [_with_short_forms(name, item, definitions) for item in field]
    if not isinstance(field, dict):
        return field
    if "discriminator" in field:
        mapping = field["discriminator"]["mapping"]
        kept = {key: field[key] for key in ("description", "default", "title") if key in field}
        models = [{"$ref": reference} for reference in mapping.values()]
        return {**kept, "anyOf": [{"type": "string", "enum": sorted(mapping)}, *models]}
    if name == "tasks":
        return {**field, "type": ["array", "string"]}
    inner = {key: _with_short_forms("", value, definitions) for key, value in field.items()}
    return {key: value for key, value in inner.items() if key not in ("affects_result", "in_key")}


def _give_stages_their_sections(definitions: dict[str, Any]) -> None:
    """The `config` of a stage has the fields of its kind's section, each of which may be absent."""
    stage = definitions[StageConfig.__name__]
    stage["allOf"] = []
    for kind in get_args(StageConfig.model_fields["kind"].annotation):
        annotation = Config.model_fields[SECTION_OF[kind]].annotation
        section = next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type))
        partial = {**definitions[section.__name__]}
        partial.pop("required", None)
        definitions[f"{section.__name__}Fields"] = partial
        reference = {"$ref": f"#/$defs/{section.__name__}Fields"}
        stage["allOf"].append(
            {
                "if": {"properties": {"kind": {"const": kind}}},
                "then": {"properties": {"config": reference}},
            }
        )


def main() -> None:
    SCHEMA_PATH.write_text(json.dumps(pipeline_schema(), indent=1, sort_keys=True) + "\n")
    print(f"wrote {SCHEMA_PATH}")


if __name__ == "__main__":
    main()
