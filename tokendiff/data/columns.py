"""The column that holds the text: found by its name or its path, and read as texts.

`text_column` names a column, or the field of a struct by its path: `doc.text` is `text` in the
objects under `doc`, unless a column has that very name. A cell is a text, or a list of texts, each
a document of its own. Null cells are none. All else is a bad row, or, where the type of a whole
column says it, an error at once.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tokendiff.data.bad_rows import SHOWN_CHARS, BadRow, Document
from tokendiff.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

Row = tuple[int, "dict[str, Any] | BadRow"]
_ABSENT = object()
_MAX_NAMES = 20
_CONVERT = "convert the file, for example with iconv -f latin1 -t utf-8"


def row_place(path: str, row: int) -> str:
    """Where a row stands in a file that has no lines, or in a dataset."""
    return f"{path}: row {row}"


def missing_column(place: str, column: str, columns: Iterable[Any]) -> InputError:
    from tokendiff.data.chats import formats_in_words  # which needs this module

    return InputError(
        f"{place}: no column {column!r}; set text_column to one of those there: {_names(columns)}; "
        "or, to train on conversations, give them the columns of a chat format: "
        f"{formats_in_words()}"
    )


def documents_in(
    rows: Iterable[Row],
    column: str,
    *,
    path: str,
    place: Callable[[int], str],
    all_rows: Callable[[], Iterable[Row]],
) -> Iterator[Document]:
    """The texts under `column` in rows that are objects.

    Args:
        rows: each with its number.
        path: of the file.
        place: of the row with a number.
        all_rows: those of the whole file, of which `rows` may be a part.

    Raises:
        InputError: no row of the file has the column.
    """
    is_known = False
    for number, row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        cell = _cell(row, column)
        if cell is not _ABSENT:
            is_known = True
            yield from texts_of(cell, column, number, place=place)
            continue
        if not is_known:
            _require_column(all_rows(), column, path)
            is_known = True
        reason = f"no column {column!r}, only {_names(_paths(row))}"
        yield BadRow(place=place(number), reason=reason, row=shown(row))


def texts_of(
    cell: Any, column: str, number: int, *, place: Callable[[int], str]
) -> Sequence[Document]:
    """The texts of one cell; a cell with anything wrong in it is a bad row as a whole.

    Args:
        number: of its row, for `place`.
    """
    is_list = isinstance(cell, list)
    texts: list[Document] = []
    try:
        for item in cell if is_list else (cell,):
            texts.append(_text(item))
    except ValueError as error:
        name = f"{column}[{len(texts)}]" if is_list else column
        return [BadRow(place=place(number), reason=f"{name!r} {error}", row=shown(cell))]
    return texts


def _text(item: Any) -> str | None:
    """A text, or None.

    Raises:
        ValueError: it is none; says why.
    """
    try:
        if isinstance(item, str):
            item.encode()
            return item
        if item is None:
            return None
        if isinstance(item, bytes):
            return item.decode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is {_not_unicode(error)}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is {not_utf8(error)}") from error
    kind = type(item).__name__
    raise ValueError(f"must be a text or a list of texts, got {kind} {shown(item)}")


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.object[error.start]:#04x}: {error.reason}); {_CONVERT}"


def _not_unicode(error: UnicodeEncodeError) -> str:
    """Of a text with lone surrogates: JSON can spell them ("\\ud800"), and they stand for the bytes
    that are not UTF-8 where rows must be told apart before they are decoded.
    """
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:
        return f"not UTF-8 (byte {code - 0xDC00:#04x}); {_CONVERT}"
    return f"not valid Unicode (a lone surrogate, {code:#06x})"


def shown(value: Any) -> str:
    """How a value begins, as a text that can be printed and written."""
    if isinstance(value, bytes):
        return value[: 4 * SHOWN_CHARS].decode("utf-8", "replace")[:SHOWN_CHARS]
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False, default=str)
        except RecursionError:
            value = f"{type(value).__name__} too deep to show"
    text: str = value[:SHOWN_CHARS]
    return text.encode("utf-8", "replace").decode()


def _cell(row: dict[str, Any], column: str) -> Any:
    if column in row:
        return row[column]
    if "." not in column:
        return _ABSENT
    value: Any = row
    for name in column.split("."):
        if value is None:
            return None
        if not isinstance(value, dict) or name not in value:
            return _ABSENT
        value = value[name]
    return value


def _require_column(rows: Iterable[Row], column: str, path: str) -> None:
    first: dict[str, Any] | None = None
    for _, row in rows:
        if isinstance(row, BadRow):
            continue
        if _cell(row, column) is not _ABSENT:
            return
        first = row if first is None else first
    assert first is not None, "a row that lacks the column is among them"
    raise missing_column(path, column, _paths(first))


def _paths(row: dict[str, Any], depth: int = 3) -> Iterator[str]:
    for name, value in row.items():
        inner = _paths(value, depth - 1) if isinstance(value, dict) and depth > 1 else ()
        yield from [f"{name}.{path}" for path in inner] or [name]


def _names(names: Iterable[Any]) -> str:
    return ", ".join(repr(str(name)) for name in list(names)[:_MAX_NAMES]) or "none"


# Arrow: Parquet and datasets


def arrow_path(schema: "pa.Schema", column: str, place: str) -> list[str]:
    """The names that lead to a column.

    Raises:
        InputError: there is none, or it holds no text.
    """
    names = [column] if column in schema.names else column.split(".")
    fields, kind = list(schema), None
    for name in names:
        kind = {field.name: field.type for field in fields}.get(name)
        if kind is None:
            raise missing_column(place, column, _arrow_paths(schema))
        fields = _fields(kind)
    if not _holds_text(kind):
        raise InputError(
            f"{place}: column {column!r} holds {kind}, not text; set text_column to "
            f"one of {_names(_arrow_paths(schema))}, or make a column of text of it, for example "
            "with datasets.Dataset.from_parquet('a.parquet').map(lambda row: {'text': ...})"
            ".to_parquet('b.parquet')"
        )
    return names


def arrow_cells(column: Any, names: list[str]) -> list[Any]:
    """The cells of an Arrow column, of the field in it that `names` lead to.

    One whose bytes are not UTF-8 stands as bytes there, and so do its neighbours.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if len(names) > 1:
        column = pc.struct_field(column, names[1:])
    try:
        cells: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        if pa.types.is_dictionary(column.type):
            column = pc.dictionary_decode(column)
        cells = column.cast(_with_bytes(column.type)).to_pylist()
    return cells


def _fields(kind: Any) -> list[Any]:
    """The fields of a struct; other types have none."""
    import pyarrow as pa

    return list(kind) if pa.types.is_struct(kind) else []


def _arrow_paths(fields: Iterable[Any]) -> Iterator[str]:
    for field in fields:
        yield from [f"{field.name}.{path}" for path in _arrow_paths(_fields(field.type))] or (
            [field.name]
        )


def _holds_text(kind: Any) -> bool:
    """Whether a type is text, bytes that may be, null, or a list of those."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if _is_list(kind):
        return not _is_list(kind.value_type) and _holds_text(kind.value_type)
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        or types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
        or types.is_null(kind)
    )  # fmt: skip


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _with_bytes(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_fixed_size_list(kind):
        return pa.list_(pa.large_binary(), kind.list_size)
    if pa.types.is_large_list(kind):
        return pa.large_list(pa.large_binary())
    return pa.list_(pa.large_binary()) if pa.types.is_list(kind) else pa.large_binary()
