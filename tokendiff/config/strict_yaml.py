"""YAML without its surprises: plain values, the line of each, and an error for anything doubtful.

Plain scalars follow the core schema of YAML 1.2, not PyYAML's 1.1: `1e-3` is a number; `yes`, `no`,
`on`, `off` and dates are strings; `true`, `True` and `TRUE` are true; `1_000` is a string.
Of PyYAML only the parser and the composer run: tags are refused and no object is ever constructed.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tokendiff.errors import InputError

KeyPath = tuple[str | int, ...]
Scalar = bool | int | float | str | None
Place = Callable[[int], str]  # what stands in front of an error on that line

MAX_DEPTH = 32
MAX_ALIASED_NODES = 10_000
MAX_NUMBER_LENGTH = 64  # int() takes quadratic time, and beyond 4,300 digits fails in its own words

_NULLS = {"", "~", "null", "Null", "NULL"}
_TRUES = {"true", "True", "TRUE"}
_FALSES = {"false", "False", "FALSE"}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_ODD_BREAK = re.compile("[\x85\u2028\u2029]")
_INF_OR_NAN = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class Document:
    """What a file holds, and the line (from 1) of each key or list item.

    Below an alias, the lines are those of the text that its anchor marks.
    """

    value: dict[str, Any]
    lines: dict[KeyPath, int]


def read(path: Path) -> Document:
    """Read a file that holds one mapping.

    Raises:
        InputError: with `file:line: ` in front, or `file: ` if it cannot be read at all.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{raw[error.start]:02x}"
        raise InputError(f"{path}:{line}: not UTF-8 ({byte}); save the file as UTF-8") from error
    return parse(text, source=str(path))


def parse(text: str, *, source: str) -> Document:
    """Parse a text that holds one mapping; errors begin with `source:line: `."""

    def place(line: int) -> str:
        return f"{source}:{line}"

    node = _compose(text, place)
    if node is None:
        raise InputError(f"{place(1)}: the file is empty; it should hold sections (train: ...)")
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{place(_line(node))}: the file should hold sections (train: ...)")
    converter = _Converter(place)
    return Document(converter.convert(node, ()), converter.lines)


def parse_value(text: str, *, source: str) -> Any:
    """Parse one value of the command line: a scalar, or a flow list or mapping; empty is null.

    Errors begin with `source: `.

    Only a text that opens with a bracket, a quote or a tag is read as YAML. Any other is one plain
    scalar as a whole, so that `*.txt`, `a: b` and `a #1` mean themselves.
    """
    text = text.strip()
    if not text.startswith(("[", "{", '"', "'", "!")):
        try:
            return plain_scalar(text)
        except ValueError as error:
            raise InputError(f"{source}: {error}") from error

    def place(line: int) -> str:
        return source

    node = _compose(text, place)
    assert node is not None, "the text is not empty"
    if isinstance(node, yaml.CollectionNode) and not node.flow_style:
        raise InputError(f"{source}: not a single value; put quotes around the whole of it")
    return _Converter(place).convert(node, ())


def plain_scalar(text: str) -> Scalar:
    """What an unquoted text means in the core schema of YAML 1.2.

    Raises:
        ValueError: a number of more than MAX_NUMBER_LENGTH characters.
    """
    if text in _NULLS:
        return None
    if text in _TRUES or text in _FALSES:
        return text in _TRUES
    if _INF_OR_NAN.fullmatch(text):
        return float(text.replace(".", ""))
    is_int = _INT.fullmatch(text)
    if not is_int and not _FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_NUMBER_LENGTH:
        raise ValueError(f"a number of {len(text)} characters; at most {MAX_NUMBER_LENGTH}")
    if not is_int:
        return float(text)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


def dump(value: Any) -> str:
    """Plain values to the block-style text that `parse` reads back to equal ones."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes no anchors, and quotes what would otherwise read back as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        style = None
        if _INT.fullmatch(text) or _FLOAT.fullmatch(text):  # PyYAML looks out for its own numbers
            style = "'"
        elif _ODD_BREAK.search(text):  # which PyYAML escapes in no other style
            style = '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _compose(text: str, place: Place) -> yaml.Node | None:
    loader = None
    try:
        # The composer recurses, so the flat stream of events is checked first.
        loader = yaml.SafeLoader(text)
        _check_events(loader, place)
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except InputError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        reason = ", ".join(part for part in (error.context, error.problem) if part)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"character U+{ord(text[error.position]):04X} is not allowed"
    except (ValueError, OverflowError):  # from PyYAML's own chr() and int()
        line = loader.line + 1 if loader else 1
        reason = "an escape or a version is out of range"
    raise InputError(f"{place(line)}: not valid YAML: {reason}")


def _check_events(loader: yaml.SafeLoader, place: Place) -> None:
    """Refuse tags, deep nesting and further documents, at the first event that shows them."""
    depth = num_documents = 0
    while loader.check_event():
        event = loader.get_event()
        problem = None
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            if num_documents > 1:
                problem = "a second document ('---'); a config is one document"
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                problem = f"nested deeper than {MAX_DEPTH} levels"
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        tag = getattr(event, "tag", None)
        if tag is not None:
            tag = tag.replace("tag:yaml.org,2002:", "!!")
            problem = f"tag {tag} is not allowed; remove it, or put the value in quotes"
        if problem:
            raise InputError(f"{place(_line(event))}: {problem}")


class _Converter:
    """Composed nodes to plain values. An alias is the very node of its anchor, met again."""

    def __init__(self, place: Place) -> None:
        self.lines: dict[KeyPath, int] = {}
        self._place = place
        self._met: set[int] = set()
        self._num_aliased = 0

    def convert(self, node: yaml.Node, path: KeyPath) -> Any:
        self._count(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if len(path) >= MAX_DEPTH:
            raise self._error(
                node, f"nested deeper than {MAX_DEPTH} levels, or an alias that contains itself"
            )
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        return self._list(node, path)

    def _count(self, node: yaml.Node) -> None:
        if id(node) in self._met:
            self._num_aliased += 1
            if self._num_aliased > MAX_ALIASED_NODES:
                raise self._error(node, f"aliases repeat more than {MAX_ALIASED_NODES:,} values")
        self._met.add(id(node))

    def _mapping(self, node: yaml.Node, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            key_path = (*path, key)
            if key in mapping:
                name, first = ".".join(map(str, key_path)), self.lines[key_path]
                raise self._error(key_node, f"{name}: given twice, first on line {first}")
            self.lines[key_path] = _line(key_node)
            mapping[key] = self.convert(value_node, key_path)
        return mapping

    def _list(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        values = []
        for index, item in enumerate(node.value):
            self.lines[*path, index] = _line(item)
            values.append(self.convert(item, (*path, index)))
        return values

    def _key(self, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._error(node, "a key must be a string, not a list or mapping")
        if node.value == "<<" and node.style is None:
            raise self._error(node, "merge keys (<<) are not allowed; write the fields out")
        self._count(node)
        key = self._scalar(node)
        if not isinstance(key, str):
            got = node.value or "nothing"
            raise self._error(node, f"a key must be a string, got {got}; put it in quotes")
        return key

    def _scalar(self, node: yaml.ScalarNode) -> Scalar:
        if node.style is not None:  # quoted, or a block of text
            return str(node.value)
        try:
            return plain_scalar(node.value)
        except ValueError as error:
            raise self._error(node, str(error)) from error

    def _error(self, node: yaml.Node, message: str) -> InputError:
        return InputError(f"{self._place(_line(node))}: {message}")


def _line(marked: yaml.Node | yaml.Event) -> int:
    return int(marked.start_mark.line) + 1 if marked.start_mark else 1
