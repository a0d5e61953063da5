"""What every section is: strict, frozen, and able to say which fields decide a result."""

import re
from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

# More than anybody counts to, and little enough for arithmetic with a few of them: numbers beyond
# end in a traceback of some library, or never. Fields that need a lower bound have their own.
MAX_COUNT = 2**31 - 1
MAX_BLOCK = 1_000_000  # tokens of a block
MAX_BATCH = 1_000_000  # rows at once, or batches of a step
MAX_WORKERS = 100_000

_VARIABLE = re.compile(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})")
_PATH_FIELD = re.compile(r"(^root|_dir|_path|_files|^prompts|_since|_from)$")


class Section(BaseModel):
    """Strict: unknown fields and wrong types are errors; nothing is coerced or changes later."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @field_validator("*")
    @classmethod
    def _has_no_variable(cls, value: Any, info: ValidationInfo) -> Any:
        """Nothing expands variables of a shell: a folder of that name would be made."""
        if info.field_name and _PATH_FIELD.search(info.field_name):
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str) and (found := _VARIABLE.search(path)):
                    raise ValueError(
                        f"{path!r}: variables such as {found[0]} are not expanded; write the path "
                        "out, or give it on the command line, where the shell expands it"
                    )
        return value

    def result_fields(self) -> dict[str, Any]:
        """The fields that decide the result, as plain JSON: what a stage's key is made of."""
        chosen = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and extra.get("affects_result") is False:
                continue
            value = getattr(self, name)
            if (
                isinstance(extra, dict)
                and extra.get("in_key") == "if set"
                and value == info.default
            ):
                continue
            chosen[name] = value.result_fields() if isinstance(value, Section) else value
        return chosen

    def refuse_ignored(self, names: tuple[str, ...], beside: str) -> None:
        """Nothing may be set in vain. A default may be given: it is how a file's value is undone.

        Raises:
            ValueError: one of these fields differs from its default.
        """
        for name in names:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{name} {value!r} has no effect with {beside}; remove either")


def operational(default: Any, **kwargs: Any) -> Any:
    """A field that changes how a job runs, not what it makes: no part of a stage's key."""
    return Field(default, json_schema_extra={"affects_result": False}, **kwargs)


def added(default: Any, **kwargs: Any) -> Any:
    """A field that came later: part of a stage's key only where it differs from its default, so
    that older keys stay.
    """
    return Field(default, json_schema_extra={"in_key": "if set"}, **kwargs)


def named(default_name: str) -> BeforeValidator:
    """`objective: mdlm` is short for `objective: {name: mdlm}`."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" not in value:
            return {"name": default_name, **value}
        return value

    return BeforeValidator(expand)
