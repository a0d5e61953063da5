"""The code blocks of Markdown pages."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import ROOT

_FENCE = re.compile(r"^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block; `title` names the file that a reader is to write it to."""

    language: str
    text: str
    title: str = ""
    line: int = 0


def pages() -> list[Path]:
    """All pages that are read by people who use the package."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_in(page: str) -> Iterator[Block]:
    for match in _FENCE.finditer(page):
        language, title, text = match.groups()
        line = page.count("\n", 0, match.start()) + 2
        yield Block(language=language, text=text, title=title or "", line=line)


def words_of(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block of shell, without assignments before it; a block of
    Python is one command, `exec`.
    """
    if block.language == "python":
        yield ["exec", block.text]
    if block.language != "bash":
        return
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        if words:
            yield words
