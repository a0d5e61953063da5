"""Prompts of any number: where each row of a job is, and reading any run of rows from its place.

The rows of a job are numbered from 0: `num_samples` for every prompt, those of the command line
first, then the files', each file in its order, files sorted by name. Finding the rows takes one
pass over the files, which keeps of each file its hash, its count and at most `_MAX_MARKS` places in
it: what is in memory does not grow with the number of prompts. Whoever samples a run of rows then
reads them for itself.
"""

import glob
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.locations import glob_files, is_uri, local_path, location, open_binary
from tokendiff.artifacts.manifest import sha256_of
from tokendiff.data.bad_rows import SHOWN_CHARS
from tokendiff.data.columns import not_utf8
from tokendiff.data.files import refuse_array
from tokendiff.data.lines import lines_in
from tokendiff.data.prompts import GenerationRow, Prompt, prompt_of_record
from tokendiff.data.streams import go_to, open_stream, refuse_unreadable, suffix_of
from tokendiff.errors import InputError

if TYPE_CHECKING:
    from tokendiff.config.generate import GenerateConfig

_MAX_MARKS = 2048
_BOM = b"\xef\xbb\xbf"
_PARQUET = ".parquet"
_PARQUET_COLUMNS = ("prompt", "messages")
_PARQUET_BATCH_ROWS = 256
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TABLE_SUFFIXES = (".csv", ".tsv")  # as lines of text, their header would be a prompt


@dataclass(frozen=True, kw_only=True)
class IndexedRow:
    """A row, and where its prompt stands.

    Attributes:
        row: without a prompt where `error` says why there is none.
    """

    row: GenerationRow
    place: str
    error: InputError | None = None


@dataclass(frozen=True, kw_only=True)
class PromptFile:
    """One file of prompts, indexed.

    Attributes:
        path: absolute path or URI.
        stride: prompts from one mark to the next.
        marks: (byte, line number) of every stride-th prompt in a file of lines, as unpacked.
    """

    path: str
    num_prompts: int
    sha256: str
    stride: int = 1
    marks: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        """What records say of where their prompt came from."""
        return self.path.rpartition("/")[2]

    @classmethod
    def index(cls, path: str) -> "PromptFile":
        """Read a file once.

        Raises:
            InputError: it cannot be read, is one JSON array, or is Parquet without a prompt column.
        """
        refuse_unreadable(path)
        suffix = suffix_of(path)
        try:
            if suffix == _PARQUET:
                with _parquet(path) as file:
                    num_rows = file.metadata.num_rows
                return cls(path=path, num_prompts=num_rows, sha256=sha256_of(location(path)))
            if suffix in _JSON_SUFFIXES:
                refuse_array(path)
            return cls._index_lines(path)
        except ConnectionError:  # the store is down, and the file may be well
            raise
        except OSError as error:
            raise InputError(
                f"prompts {path}: cannot be read ({error}); copy the file here again, or leave "
                "it out"
            ) from error

    @classmethod
    def _index_lines(cls, path: str) -> "PromptFile":
        digest, offset, count, stride = hashlib.sha256(), 0, 0, 1
        marks: list[tuple[int, int]] = []
        with open_stream(path) as file:
            for number, line in enumerate(lines_in(file), start=1):
                digest.update(line)
                if _is_prompt(line, offset):
                    if count % stride == 0:
                        marks.append((offset, number))
                    count += 1
                    if len(marks) > _MAX_MARKS:
                        marks, stride = marks[::2], stride * 2
                offset += len(line)
        return cls(
            path=path,
            num_prompts=count,
            sha256=digest.hexdigest(),
            stride=stride,
            marks=tuple(marks),
        )

    def read(self, first: int, stop: int) -> Iterator[tuple[str, "Prompt | InputError"]]:
        """(place, prompt) of prompts first..stop-1; in place of one that is none, why not."""
        return (
            self._read_parquet(first, stop)
            if suffix_of(self.path) == _PARQUET
            else self._read_lines(first, stop)
        )

    def _read_lines(self, first: int, stop: int) -> Iterator[tuple[str, "Prompt | InputError"]]:
        at = first // self.stride
        offset, line_number = self.marks[at]
        prompt_number = at * self.stride
        with open_stream(self.path) as file:
            go_to(file, self.path, offset)
            for line in lines_in(file):
                if prompt_number >= stop:
                    return
                if _is_prompt(line, offset):
                    if prompt_number >= first:
                        yield _line_prompt(line, self.path, line_number)
                    prompt_number += 1
                offset += len(line)
                line_number += 1

    def _read_parquet(self, first: int, stop: int) -> Iterator[tuple[str, "Prompt | InputError"]]:
        with _parquet(self.path) as file:
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            starts = list(itertools.accumulate(sizes, initial=0))
            groups = [
                g for g, size in enumerate(sizes) if starts[g] < stop and starts[g] + size > first
            ]
            row = starts[groups[0]]
            columns = _prompt_columns(file)
            batches = file.iter_batches(_PARQUET_BATCH_ROWS, row_groups=groups, columns=columns)
            for batch in batches:
                if row >= stop:
                    return
                if row + len(batch) > first:
                    for index in range(max(first, row), min(stop, row + len(batch))):
                        place = f"{self.path}: row {index + 1}"
                        yield place, _row_prompt(batch.slice(index - row, 1), place)
                row += len(batch)


@dataclass(frozen=True, kw_only=True)
class PromptIndex:
    """All rows of a generation job.

    Attributes:
        given: prompts of the command line; (None,) where there are no prompts at all.
    """

    given: tuple[Prompt | None, ...]
    num_samples: int
    files: tuple[PromptFile, ...] = field(default=())

    @classmethod
    def of(cls, config: "GenerateConfig") -> "PromptIndex":
        """Index what a config names.

        Raises:
            InputError: a file is missing or of no use, or the files hold no prompt.
        """
        files = tuple(PromptFile.index(path) for path in prompt_paths(config.prompts))
        if config.prompts and not config.prompt and not any(file.num_prompts for file in files):
            raise InputError(f"prompts {', '.join(config.prompts)}: the files hold no prompt")
        given = tuple(config.prompt) if config.prompt or files else (None,)
        return cls(given=given, num_samples=config.num_samples, files=files)

    @property
    def num_rows(self) -> int:
        num_prompts = len(self.given) + sum(file.num_prompts for file in self.files)
        return num_prompts * self.num_samples

    def first_prompts(self) -> Iterator[Prompt | None]:
        """Those of the command line, and the first of the files."""
        yield from self.given
        if self.num_rows > (first := len(self.given) * self.num_samples):
            yield from (item.row.prompt for item in self.rows(first, first + 1))

    def identity(self) -> list[Any]:
        """Plain JSON that changes with any prompt and its number."""
        return [
            self.num_samples,
            self.given,
            [[file.name, file.num_prompts, file.sha256] for file in self.files],
        ]

    def rows(self, first: int, stop: int) -> Iterator[IndexedRow]:
        """Rows first..stop-1, read from where they stand."""
        number = first // self.num_samples
        prompts = self._prompts(number, (stop - 1) // self.num_samples + 1)
        for source, place, prompt in prompts:
            ids = range(number * self.num_samples, (number + 1) * self.num_samples)
            number += 1
            for index in range(max(first, ids.start), min(stop, ids.stop)):
                if isinstance(prompt, InputError):
                    row = GenerationRow(id=index, prompt=None)
                    yield IndexedRow(row=row, place=place, error=prompt)
                else:
                    row = GenerationRow(id=index, prompt=prompt, source=source)
                    yield IndexedRow(row=row, place=place)

    def _prompts(
        self, first: int, stop: int
    ) -> Iterator[tuple[str | None, str, "Prompt | InputError | None"]]:
        """(file name, place, prompt) of prompts first..stop-1."""
        for number, prompt in enumerate(self.given[first:stop], start=first + 1):
            yield None, f"prompt {number}", prompt
        before = len(self.given)
        for file in self.files:
            begin, end = max(first - before, 0), min(stop - before, file.num_prompts)
            if begin < end:
                yield from ((file.name, *found) for found in file.read(begin, end))
            before += file.num_prompts


def error_record(item: IndexedRow, error: InputError, *, num_samples: int) -> dict[str, Any]:
    """What a line of `errors/` says of a prompt, given with its first row."""
    prompt = item.row.prompt
    return {
        "id": item.row.id,
        "num_samples": num_samples,
        "place": item.place,
        "reason": str(error).removeprefix(f"{item.place}: "),
        "prompt": prompt[:SHOWN_CHARS] if isinstance(prompt, str) else prompt,
    }


def prompt_paths(patterns: Iterable[str]) -> list[str]:
    """Absolute paths or URIs of the prompt files that paths and globs name, each once, in the order
    of the patterns, and sorted within each.

    Raises:
        InputError: a pattern matches no file, or a table, whose lines are no prompts.
    """
    found: list[str] = []
    for pattern in patterns:
        if is_uri(pattern):
            try:
                paths = glob_files(pattern)
            except ConnectionError:
                raise
            except OSError as error:
                raise InputError(f"prompts {pattern}: cannot be listed ({error})") from error
        else:
            named = local_path(pattern).absolute()
            matches = [str(named)] if named.is_file() else glob.glob(str(named), recursive=True)
            paths = sorted(match for match in matches if Path(match).is_file())
        if not paths:
            raise InputError(f"prompts {pattern}: no such file")
        found += paths
    for path in found:
        if (suffix := suffix_of(path)) in _TABLE_SUFFIXES:
            raise InputError(
                f"prompts {path}: {suffix} files are not read; write the column of prompts as .txt "
                '(a prompt a line), or as .jsonl or .parquet with a field "prompt"'
            )
    return list(dict.fromkeys(found))


def _is_prompt(line: bytes, offset: int) -> bool:
    """Whether a line is more than white space."""
    return not (line.removeprefix(_BOM) if offset == 0 else line).isspace() and line != _BOM


def _line_prompt(line: bytes, path: str, number: int) -> tuple[str, "Prompt | InputError"]:
    place = f"{path}:{number}"
    try:
        text = (line.removeprefix(_BOM) if number == 1 else line).decode()
    except UnicodeDecodeError as error:
        return place, InputError(f"{place}: not UTF-8 ({error.reason})")
    text = text.removesuffix("\n").removesuffix("\r")
    if suffix_of(path) not in _JSON_SUFFIXES:
        return place, text
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return place, InputError(f"{place}: not a JSON line ({error})")
    return place, _prompt_or_error(record, place)


def _row_prompt(row: Any, place: str) -> "Prompt | InputError":
    """The prompt of a record batch of one row."""
    try:
        (record,) = row.to_pylist()
    except UnicodeDecodeError as error:
        return InputError(f"{place}: {not_utf8(error)}")
    return _prompt_or_error(record, place)


def _prompt_or_error(record: Any, place: str) -> "Prompt | InputError":
    try:
        return prompt_of_record(record, place)
    except InputError as error:
        return error


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_binary(location(path)) as source, pq.ParquetFile(source) as file:
            if not _prompt_columns(file):
                raise InputError(
                    f'prompts {path}: needs a column "prompt" or "messages"; it has '
                    f"{', '.join(file.schema_arrow.names)}"
                )
            yield file
    except ConnectionError:
        raise
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"prompts {path}: cannot be read as Parquet ({error})") from error


def _prompt_columns(file: Any) -> list[str]:
    return [name for name in _PARQUET_COLUMNS if name in file.schema_arrow.names]
