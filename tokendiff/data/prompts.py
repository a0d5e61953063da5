"""Prompts from the command line and from files, as rows with stable ids."""

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokendiff.errors import InputError

if TYPE_CHECKING:
    from tokendiff.config import GenerateConfig


@dataclass(frozen=True, kw_only=True)
class GenerationRow:
    """One sample to draw.

    Attributes:
        id: its place in the whole job; with the seed it decides the row's randomness.
        prompt: text that the sample begins with, or None.
    """

    id: int
    prompt: str | None


def generation_rows(config: "GenerateConfig") -> list[GenerationRow]:
    """`num_samples` rows per prompt, prompts in the order given; without prompts, `num_samples`
    rows in all.
    """
    prompts: list[str | None] = [*config.prompt]
    for pattern in config.prompts:
        prompts += list(_prompts_of(pattern))
    if not prompts:
        if config.prompts:
            raise InputError(f"prompts {', '.join(config.prompts)}: the files hold no prompt")
        prompts = [None]
    repeated = [prompt for prompt in prompts for _ in range(config.num_samples)]
    return [GenerationRow(id=index, prompt=prompt) for index, prompt in enumerate(repeated)]


def _prompts_of(pattern: str) -> Iterator[str]:
    named = Path(pattern).expanduser()
    paths = [str(named)] if named.is_file() else sorted(glob.glob(str(named), recursive=True))
    if not paths:
        raise InputError(f"prompts {pattern}: no such file")
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"prompts {path}: cannot be read ({error})") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield (
                    _prompt_in(line, f"{path}:{number}")
                    if path.endswith((".jsonl", ".json"))
                    else line.rstrip("\r")
                )


def _prompt_in(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not a JSON line ({error})") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str):
        raise InputError(f'{place}: needs a string field "prompt", as in {{"prompt": "Once upon"}}')
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: the prompt is not valid Unicode ({error.reason})") from error
    return prompt
