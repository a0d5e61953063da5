"""What the jobs share on the command line: a config, overrides, a flag for every field, exit codes.

Exit codes: 0 done; 1 failed; 2 the input cannot be used as it stands (a flag, a config, a file), so
that the same command would fail again; 4 another run has the place that this one would write to;
130 interrupted; 143 stopped by SIGTERM (`ray job stop`), with the last training step saved.
(3, a gate that was not passed, is of `jobs.pipeline` alone.)
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import gc
import json
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.record import EXIT_CODES
from tokendiff.artifacts.locations import is_of_store
from tokendiff.cluster.session import thread_policy
from tokendiff.cluster.stopping import is_stop_requested, sigterm_stops, words_of
from tokendiff.config.loader import (
    TAG,
    alternatives,
    bounds_of,
    is_tagged,
    load_config,
    models_in,
    tags,
    walk_fields,
)
from tokendiff.config.pipeline import Config
from tokendiff.errors import CorruptFileError, InputError

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_LOCKED = EXIT_CODES["locked"]
EXIT_INTERRUPTED = 130
EXIT_STOPPED = 143  # 128 + SIGTERM, which is what a shell makes of a process that it killed

FieldPath = tuple[str, ...]
Variants = list[tuple[type[BaseModel], FieldInfo]]  # a field, with the model that has it

_FORESEEN = (
    *(InputError, CorruptFileError, FloatingPointError, MemoryError),
    *(ConnectionError, PermissionError),  # of stores, and of disks
    *(BlockingIOError, TimeoutError, ChildProcessError),  # of our locks, clocks and processes
)
# Of disks, which any call that writes may find full.
_DISK_REMEDIES = {
    **dict.fromkeys(
        (errno.ENOSPC, errno.EDQUOT), "make room and run the same command again: it goes on"
    ),
    errno.EROFS: "give an output folder that can be written",
}
# Of paths that can never be used: the same command would fail again.
_PATH_REMEDIES = {
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST), "a file is where a folder should be; give another path"
    ),
    errno.EISDIR: "a folder is where a file should be; give another path",
    errno.ELOOP: "a link there leads back to itself; mend it, or give another path",
    errno.ENAMETOOLONG: "give a shorter path",
}
_JOB_SECTIONS = ("preprocess", "train", "generate", "evaluate")  # each the main one of jobs.NAME
# Imports make half a million objects that stay. With Python's 700, a tenth of a job's start goes
# into looking for garbage among them.
_OBJECTS_BETWEEN_COLLECTIONS = 50_000
_COMMON = ("config", "override", "json", "verbose", "help")
# Other names of flags that help need not list.
_SHORT_FLAGS = {"output_dir": "--output"}
_METAVARS = {int: "INT", float: "FLOAT", bool: "true|false"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
_called_as: ContextVar[str | None] = ContextVar("_called_as", default=None)
_asked: ContextVar[list[argparse.ArgumentParser] | None] = ContextVar("_asked", default=None)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A command line that was read; `config` has its overrides and flags in it.

    `options` are those that a command has beside the common ones.
    """

    config: Config
    json: bool
    command: str | None
    options: argparse.Namespace = dataclasses.field(
        default_factory=argparse.Namespace, compare=False
    )


@contextlib.contextmanager
def called_as(command: str) -> Iterator[None]:
    """Inside, help and errors say `command JOB` where they would say `python -m jobs.JOB`."""
    token = _called_as.set(command)
    try:
        yield
    finally:
        _called_as.reset(token)


def _spoken(prog: str) -> str:
    """What a person types to run the module `prog`."""
    command = _called_as.get()
    if command is None:
        return f"python -m {prog}"
    return " ".join([command, prog.removeprefix("jobs.")])


def parser_of(main: Callable[..., int]) -> argparse.ArgumentParser:
    """The parser that a job makes before it does anything else; nothing runs."""
    found: list[argparse.ArgumentParser] = []
    token = _asked.set(found)
    try:
        main([])
    except SystemExit:
        (parser,) = found
        return parser
    finally:
        _asked.reset(token)
    raise AssertionError(f"{main} does not begin with `parse`")


def entry_point(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Make a job's `main(argv)` answer with an exit code, and put errors on stderr.

    Only an exception that nobody foresaw shows its traceback.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        # Work that needs no Ray is done here, with the policy that Ray's workers get. OpenMP reads
        # it when torch is loaded, which no job has done yet.
        os.environ.update(thread_policy())
        gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
        try:
            with sigterm_stops():
                return main(argv) or EXIT_OK
        except KeyboardInterrupt as interrupt:
            print(words_of(interrupt) or "interrupted", file=sys.stderr)
            return EXIT_STOPPED if is_stop_requested() else EXIT_INTERRUPTED
        except Exception as error:
            return _report(error)

    return run


def _report(error: Exception) -> int:
    cause = getattr(error, "cause", None)
    if _is_ray_s(error) and isinstance(cause, _FORESEEN):
        error = cause  # as it was raised on a worker, without the traceback that Ray puts around it
    if isinstance(error, OSError) and error.errno in _DISK_REMEDIES:
        return fail(f"{error}; {_DISK_REMEDIES[error.errno]}")
    if isinstance(error, OSError) and (remedy := _path_remedy(error)):
        error = InputError(f"{error}; {remedy}")
    if isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError):
        return fail(f"{error}; run the same command again when it answers: it goes on")
    is_given_up = type(error) is RuntimeError and _is_ray_s(error.__cause__)
    if isinstance(error, _FORESEEN) or is_given_up or is_of_store(error):
        _print_error(error)
    else:
        traceback.print_exception(error)
    if isinstance(error, BlockingIOError):
        return EXIT_LOCKED
    return EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED


def _path_remedy(error: OSError) -> str | None:
    """What to do about a path that can never be used; None of other errors."""
    is_folder = error.errno == errno.EEXIST and os.path.isdir(error.filename or "")
    if not error.filename or is_folder:  # one that another process has just made
        return None
    return _PATH_REMEDIES.get(error.errno or 0)


def _is_ray_s(error: BaseException | None) -> bool:
    """Found by name: importing ray takes seconds."""
    return type(error).__module__.split(".")[0] == "ray"


def _print_error(error: Exception | str) -> None:
    prefix = "error: "
    text = textwrap.indent(str(error) or type(error).__name__, " " * len(prefix)).strip()
    print(prefix + text, file=sys.stderr)


def fail(message: str) -> int:
    """The exit code of a job that has done and written its work, which then proved bad."""
    _print_error(message)
    return EXIT_FAILED


def print_result(result: Mapping[str, Any], *, as_json: bool) -> None:
    """The last thing on stdout: one line of JSON, or else a line per entry that has a value.

    JSON has every digit. It has no NaN and no infinity: they become null.
    """
    if as_json:
        finite = json.loads(json.dumps(result, default=str), parse_constant=lambda _: None)
        print(json.dumps(finite), flush=True)
        return
    shown = {name: value for name, value in result.items() if value is not None}
    width = max(map(len, shown), default=0)
    lines = [f"{name:<{width}}  {_to_read(value)}" for name, value in shown.items()]
    print("\n".join(lines), flush=True)


def _to_read(value: Any) -> str:
    """Of a float six digits, or the whole part of a larger one."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1e6 <= abs(value) < 1e15 else f"{value:.6g}"


def parse(
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str | None,
    sections: Sequence[str] = (),
    hidden: Sequence[str] = (),
    commands: Mapping[str, str] | None = None,
    add_options: Callable[[str, argparse.ArgumentParser], None] = lambda command, parser: None,
    folders: Sequence[str] = (),
    default_sampler: Callable[[str], str] | None = None,
) -> Arguments:
    """Read a job's command line and its config; `--verbose` takes effect here.

    Args:
        argv: None reads `sys.argv`.
        prog: the module, as in `python -m prog`.
        sections: those whose fields become flags, the job's main one first: where fields share a
            name, the flag is the earlier section's, and the others are reached by `-o`.
        hidden: dotted fields of those that the job does not read: no flags, but `-o` takes them,
            since one file serves all jobs.
        commands: subcommands and their help; each takes its config as a positional FILE.yaml.
        add_options: adds what a command takes besides to its parser.
        folders: commands that take a folder in place of FILE.yaml, and then no config.
        default_sampler: see `load_config`.

    Raises:
        InputError: listing what is wrong with the command line, or else with the config.
        SystemExit: after `--help`, or where `parser_of` asks.
    """
    parser = _Parser(prog=prog, description=description, usage=_usage(prog, sections, commands))
    if commands:
        # Without `prog`, argparse would make the name of a subcommand out of `usage`.
        subparsers = parser.add_subparsers(dest="command", required=True, prog=prog)
        for name, text in commands.items():
            subparser = subparsers.add_parser(name, help=text, description=text)
            subparser.add_argument("config", type=Path, metavar="FILE.yaml")
            _add_common_flags(subparser)
            add_options(name, subparser)
    else:
        parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="config to start from")
        _add_common_flags(parser)
    paths = _flag_paths(sections, hidden)
    for section in sections:
        _add_section_flags(parser, section, paths, hidden)
    if (asked := _asked.get()) is not None:
        asked.append(parser)
        raise SystemExit(EXIT_OK)

    options, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_explain_unknown(unknown, paths, prog=prog, has_commands=bool(commands)))
    if options.verbose:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    flags = {name: value for name, value in vars(options).items() if "." in name}
    is_folder = getattr(options, "command", None) in folders and options.config.is_dir()
    file = None if is_folder else shipped(options.config)
    config = load_config(file, options.override, flags, default_sampler=default_sampler)
    for section in sections:
        if getattr(config, section) is None:
            raise InputError(
                f"{options.config or 'config'}: {section}: null, but {prog} needs this section; "
                f"remove the line or add -o {section}={{}}"
            )
    return Arguments(
        config=config,
        json=options.json,
        command=getattr(options, "command", None),
        options=options,
    )


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"argument (?:-o/)?(--\w+): expected (one|at least one) arg", message):
            message += f"; write a value that begins with - as {match[1]}=VALUE"
        raise InputError(f"{message}\nsee {_spoken(self.prog)} --help")


def _usage(prog: str, sections: Sequence[str], commands: Mapping[str, str] | None) -> str:
    config = f"{{{','.join(commands)}}} FILE.yaml" if commands else "[--config FILE.yaml]"
    flags = " [--field value ...]" if sections else ""
    return f"{_spoken(prog)} {config} [-o section.field=value ...]{flags} [--json] [--verbose]"


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--override",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="set any field, the value as in YAML; may be given several times",
    )
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--verbose", action="store_true", help="log at level INFO")


def shipped(path: Path | None) -> Path | None:
    """The file, or, where there is none and the name is that of a pipeline which comes with the
    package, that one: `quickstart`, `quickstart.yaml` and `pipelines/quickstart.yaml` name it.
    """
    if path is None or path.exists() or path.parent not in (Path(), Path("pipelines")):
        return path
    import pipelines

    within = Path(pipelines.__path__[0]) / f"{path.name.removesuffix('.yaml')}.yaml"
    return within if within.is_file() else path


def allowed_values() -> dict[str, tuple[str, ...]]:
    """Dotted path of a field that takes one of a few words -> those words."""
    allowed: dict[str, tuple[str, ...]] = {}
    for section in Config.model_fields:
        for path, variants in _section_fields(section).items():
            field = variants[0][1]
            if is_tagged(field):
                words = [tag for model in models_in(field.annotation) for tag in tags(model)]
            else:
                words = [word for _, variant in variants for word in _choices(variant)]
                words += ["true", "false"] if bool in alternatives(field.annotation) else []
            if words:
                allowed[".".join(path)] = tuple(dict.fromkeys(words))
    return allowed


def _section_fields(section: str) -> dict[FieldPath, Variants]:
    """All fields of a section; the members of a union may each have one at the same path."""
    fields: dict[FieldPath, Variants] = {}
    for model in models_in(Config.model_fields[section].annotation):
        for path, owner, field in walk_fields(model, (section,)):
            if not (path[-1] == TAG and tags(owner)):
                fields.setdefault(path, []).append((owner, field))
    return fields


def _flag_paths(sections: Sequence[str], hidden: Sequence[str]) -> dict[str, FieldPath]:
    """Flag -> path of its field. In a section, its own fields go before those inside them."""
    paths: dict[str, FieldPath] = {}
    for section in sections:
        for path in sorted(_section_fields(section), key=len):
            if path[-1] not in _COMMON and ".".join(path) not in hidden:
                paths.setdefault(path[-1], path)
    return paths


def _add_section_flags(
    parser: argparse.ArgumentParser,
    section: str,
    paths: Mapping[str, FieldPath],
    hidden: Sequence[str],
) -> None:
    fields = _section_fields(section)
    names = {path: ".".join(path) for path in fields if paths.get(path[-1]) != path}
    by_override = ", ".join(name for name in names.values() if name not in hidden)
    group = parser.add_argument_group(section, by_override and f"By -o only: {by_override}.")
    for path, variants in fields.items():
        if path in names:
            continue
        field = variants[0][1]
        details = _details(variants)
        texts = _descriptions(variants)
        parent = fields.get(path[:-1])
        if len(texts) > 1:
            described = "; ".join(f"{path[-2]} {names}: {text}" for text, names in texts.items())
        else:
            (described,) = texts
            if parent and len(models_in(parent[0][1].annotation)) > len(variants):
                details.insert(0, f"{path[-2]} {', '.join(texts.values())}")
        text = f"{described} ({'; '.join(details)})".replace(" ()", "")
        kwargs: dict[str, Any] = _shape(field.annotation)
        group.add_argument(
            f"--{path[-1]}",
            dest=".".join(path),
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **kwargs,
        )
        if short := _SHORT_FLAGS.get(path[-1]):
            kwargs |= {"dest": ".".join(path), "default": argparse.SUPPRESS}
            group.add_argument(short, help=argparse.SUPPRESS, **kwargs)


def _choices(field: Any) -> tuple[str, ...]:
    literals = (t for t in alternatives(field.annotation) if get_origin(t) is Literal)
    return tuple(str(choice) for literal in literals for choice in get_args(literal))


def _descriptions(variants: Variants) -> dict[str, str]:
    """What a field is -> the models in which it is that, by name."""
    return _by_model([(owner, field.description or "") for owner, field in variants])


def _by_model(values: Sequence[tuple[type[BaseModel], str]]) -> dict[str, str]:
    """Value -> names of the models that have it, in their order."""
    owners: dict[str, list[str]] = {}
    for owner, value in values:
        owners.setdefault(value, []).extend(tags(owner)[:1])
    return {value: ", ".join(names) for value, names in owners.items()}


def _shape(annotation: Any) -> dict[str, Any]:
    """How many words a flag takes. What they mean is left to the loader: its errors are better."""
    types = alternatives(annotation)
    for item in (get_args(t)[0] for t in types if get_origin(t) is list):
        return {**_shape(item), "nargs": "+", "action": "extend"}
    metavar = next((_METAVARS[t] for t in types if t in _METAVARS), "TEXT")
    if bool in types:
        return {"nargs": "?", "const": "true", "metavar": metavar}
    return {"metavar": metavar}


def _details(variants: Variants) -> list[str]:
    """Allowed values of a field, and its default, by model where the models differ."""
    field = variants[0][1]
    owners = _by_model([(owner, ", ".join(_choices(variant))) for owner, variant in variants])
    if is_tagged(field):
        choices = ", ".join(tag for model in models_in(field.annotation) for tag in tags(model))
    elif len(owners) == 1:
        (choices,) = owners
    else:
        choices = " or ".join(f"{names} for {of}" for names, of in owners.items())
    details = [f"one of {choices}"] if choices else []
    details += [f"{_BOUNDS[name]} {bound}" for name, bound in bounds_of(field, _BOUNDS)]
    defaults = _by_model([(owner, _default(variant)) for owner, variant in variants])
    shown = [
        value if len(defaults) == 1 else f"{value} for {of}"
        for value, of in defaults.items()
        if value
    ]
    return [*details, f"default: {' or '.join(shown)}"] if shown else details


def _default(field: FieldInfo) -> str:
    default = getattr(field.default, TAG, field.default)
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default in (None, []) else str(default)


def _explain_unknown(
    words: Sequence[str], paths: Mapping[str, FieldPath], *, prog: str, has_commands: bool
) -> str:
    unknown = [word.partition("=")[0] for word in words if word.startswith("--")]
    if not unknown:
        return f"unexpected argument {words[0]!r}"
    common = [name for name in _COMMON if not (has_commands and name == "config")]
    lines = []
    for flag in unknown:
        name = flag.removeprefix("--").replace("-", "_")
        fields = [path for path, _, _ in walk_fields(Config) if path[1:] and path[-1] == name]
        jobs = list(dict.fromkeys(f"jobs.{p[0]}" for p in fields if p[0] in _JOB_SECTIONS))
        if has_commands and name == "config":
            lines.append(f"unknown flag {flag}; the file is given as FILE.yaml after the command")
        elif name in paths or not fields:
            close = difflib.get_close_matches(name, [*paths, *common], n=1)
            lines.append(
                f"unknown flag {flag}" + (f"; did you mean --{close[0]}?" if close else "")
            )
        elif has_commands:
            places = " or ".join(f"-o {'.'.join(path)}=..." for path in fields)
            lines.append(f"unknown flag {flag}; did you mean {places}?")
        elif jobs:
            lines.append(f"{flag} is a flag of {', '.join(jobs)}, not of {prog}")
        else:
            lines.append(f"unknown flag {flag}; {prog} does not read {'.'.join(fields[0])}")
    return "\n".join(lines)
