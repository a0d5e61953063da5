"""Who may import whom. The same table, for people, stands in CONTRIBUTING.md."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

SOURCES = sorted(
    path for top in ("tokendiff", "jobs", "pipelines") for path in (ROOT / top).rglob("*.py")
)

# Every room has its floor; a new one is placed here deliberately. A room may import the floors
# below its own, and of its own floor what stands left of it unless that floor is in PEERS_APART.
FLOORS = {
    0: ["errors", "secrets"],
    1: ["diffusion"],
    2: ["objectives", "samplers"],
    3: ["config", "artifacts", "data", "models", "evaluation", "training", "verification"],
    4: ["cluster", "tracking"],
    5: ["pipelines", "jobs"],
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
PEERS_APART = {0, 2, 4}
COMPUTED_NAME = "<computed name>"  # an import path that the source does not spell out

# Libraries beside the standard one: all that a floor may import, or what a room never may.
ONLY_LIBRARIES: dict[int, set[str]] = {0: set(), 1: {"torch"}, 2: {"torch"}}
NEVER_LIBRARIES = {
    **{room: {"ray", "mlflow"} for room in FLOORS[3]},
    "cluster": {"mlflow"},
    "tracking": {"ray"},
}

JOBS = ("evaluate", "generate", "pipeline", "preprocess", "train")
HEAVY = {"datasets", "matplotlib", "mlflow", "pyarrow", "ray", "torch", "transformers"}


def imports(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that `source`, the file at `path`, imports anywhere in it.

    Args:
        path: relative to the repository, which relative imports are resolved against.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                package = list(path.parent.parts)
                base = package[: len(package) + 1 - level] if level else []
                stem = ".".join([*base, *filter(None, [module])])
                # with the alias, since `from tokendiff import kernels` imports a room
                yield from ((node.lineno, f"{stem}.{alias.name}") for alias in names)
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module")
                | ast.Attribute(attr="import_module"),
                args=args,
            ):
                match args:
                    case [ast.Constant(value=str(name)), *_]:
                        yield node.lineno, name
                    case _:
                        yield node.lineno, COMPUTED_NAME


def room_of(dotted: str) -> str | None:
    """The room that a module of ours is in; None for tokendiff itself and others' modules."""
    top, _, rest = dotted.partition(".")
    if top in FLOORS[5]:
        return top
    if top != "tokendiff" or not rest or rest.startswith("__"):
        return None
    return rest.split(".")[0]


def objection(room: str | None, dotted: str) -> str | None:
    """Why a file of `room` (None: tokendiff itself) may not import `dotted`; None if it may."""
    floor = 0 if room is None else FLOOR_OF[room]
    top = dotted.split(".")[0]
    target = room_of(dotted)
    if target is not None:
        if target not in FLOOR_OF:
            return f"{target} stands on no floor"
        if FLOOR_OF[target] > floor:
            return f"{target} is on floor {FLOOR_OF[target]}"
        if FLOOR_OF[target] == floor and room is not None and target != room:
            peers = FLOORS[floor]
            if floor in PEERS_APART or peers.index(target) > peers.index(room):
                return f"{target} is on floor {floor} too, and not left of {room}"
    elif top not in {*sys.stdlib_module_names, "tokendiff"}:
        if top in NEVER_LIBRARIES.get(room or "", ()):
            return f"never {top}"
        if top not in ONLY_LIBRARIES.get(floor, {top}) or top in {"tests", COMPUTED_NAME}:
            return f"not {top}"
    return None


def violations(path: Path, source: str) -> list[str]:
    """One line for each import that the floor of the file at `path` (relative) forbids."""
    parts = path.with_suffix("").parts
    room = room_of(".".join(parts))
    if room is not None and room not in FLOOR_OF:
        return [f"{path}: {room} stands on no floor; place it in FLOORS"]
    return [
        f"{path}:{line}: {room or 'tokendiff'} may not import {dotted}: {reason}"
        for line, dotted in imports(path, source)
        if (reason := objection(room, dotted))
    ]


@pytest.mark.slow
def test_every_import_keeps_its_floor() -> None:
    assert SOURCES
    found = [
        line
        for path in SOURCES
        for line in violations(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "wanted"),
    [
        (
            "tokendiff/diffusion/a.py",
            "import numpy",
            "diffusion may not import numpy: not numpy",
        ),
        (
            "tokendiff/diffusion/a.py",
            "from tokendiff.models import x",
            "models is on floor 3",
        ),
        ("tokendiff/errors.py", "import torch", "not torch"),
        ("tokendiff/__init__.py", "import torch", "not torch"),
        ("tokendiff/__init__.py", "from tokendiff.cluster import train", "cluster is on floor 4"),
        ("tokendiff/objectives/mdlm.py", "from transformers import AutoModel", "not transformers"),
        (
            "tokendiff/objectives/mdlm.py",
            "from tokendiff import samplers",
            "samplers is on floor 2 too",
        ),
        (
            "tokendiff/samplers/a.py",
            "from ..objectives.mdlm import MDLM",
            "objectives is on floor 2 too",
        ),
        ("tokendiff/samplers/a.py", "from tokendiff import artifacts", "artifacts is on floor 3"),
        ("tokendiff/data/a.py", "from tokendiff.models import b", "and not left of data"),
        ("pipelines/a.py", "from jobs import cli", "and not left of pipelines"),
        ("tokendiff/training/run.py", "def f():\n    import ray.train", "run.py:2: training may"),
        ("tokendiff/data/rows.py", "import os, mlflow", "never mlflow"),
        (
            "tokendiff/models/a.py",
            "import_module('x'); importlib.import_module('ray')",
            "never ray",
        ),
        ("tokendiff/models/a.py", "import_module(name)", "not <computed name>"),
        ("tokendiff/evaluation/a.py", "from tokendiff.tracking import run_log", "floor 4"),
        ("tokendiff/cluster/train.py", "from mlflow import MlflowClient", "never mlflow"),
        ("tokendiff/cluster/train.py", "from tokendiff.tracking import run_log", "floor 4"),
        ("tokendiff/cluster/train.py", "from jobs import train", "jobs is on floor 5"),
        ("tokendiff/tracking/a.py", "if TYPE_CHECKING:\n    import ray", "a.py:2: tracking may"),
        ("tokendiff/attic/a.py", "", "attic stands on no floor; place it"),
        ("tokendiff/attic.py", "", "attic stands on no floor; place it"),
        ("jobs/train.py", "from tokendiff.attic import x", "attic stands on no floor"),
        ("jobs/train.py", "from tests import oracles", "not tests"),
    ],
)
def test_violation_is_caught(path: str, source: str, wanted: str) -> None:
    (line,) = violations(Path(path), source)
    assert wanted in line


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "tokendiff/diffusion/a.py",
            "import math, torch\nfrom tokendiff.diffusion.b import c",
        ),
        (
            "tokendiff/samplers/a.py",
            "from . import categorical\nfrom tokendiff.errors import InputError",
        ),
        (
            "tokendiff/models/a.py",
            "import transformers\nfrom tokendiff import __version__, artifacts",
        ),
        ("tokendiff/cluster/a.py", "import ray, torch\nfrom ..training import run"),
        ("jobs/pipeline.py", "import mlflow, ray\nfrom pipelines import runner\nimport tokendiff"),
    ],
)
def test_permitted_import_passes(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


def test_contributing_shows_the_same_floors() -> None:
    rows = re.findall(r"^\| (\d) \|([^|]*)\|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    shown = {int(floor): re.findall(r"`(\w+)`", rooms) for floor, rooms in rows}
    assert shown == FLOORS


# Rooms that a training box without these libraries must be able to open, and what they lack there.
PORTABLE = (
    *("diffusion", "objectives", "samplers", "artifacts", "models", "training"),
    *("data.order", "data.rows"),
)
ABSENT = ("pydantic", "datasets", "ray", "mlflow")
IMPORT_ALL = """
import importlib, json, sys, traceback
names, absent = map(json.loads, sys.argv[1:])
sys.modules.update(dict.fromkeys(absent))
failures = {}
for name in names:
    try:
        importlib.import_module(name)
    except BaseException:
        failures[name] = traceback.format_exc()
print(json.dumps(failures))
"""


def portable_modules() -> list[str]:
    modules = (".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES)
    prefixes = tuple(f"tokendiff.{room}." for room in PORTABLE)
    return [name.removesuffix(".__init__") for name in modules if f"{name}.".startswith(prefixes)]


@pytest.fixture(scope="module")
def portable_failures() -> dict[str, str]:
    """Module -> traceback; all in one process, since each would import torch again."""
    done = run_python("-c", IMPORT_ALL, json.dumps(portable_modules()), json.dumps(ABSENT))
    failures: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return failures


@pytest.mark.parametrize("module", portable_modules())
def test_imports_without_pydantic_datasets_ray_mlflow(
    module: str, portable_failures: dict[str, str]
) -> None:
    assert module not in portable_failures, portable_failures[module]


def test_every_portable_room_is_there() -> None:
    modules = portable_modules()
    for room in PORTABLE:
        assert any(f"{name}.".startswith(f"tokendiff.{room}.") for name in modules), room


@pytest.mark.parametrize("job", JOBS)
def test_help_is_quick_and_light(job: str) -> None:
    # Of the processor's time, since tests run side by side; the best of three, all the same.
    seconds = float("inf")
    for _ in range(3):
        before = os.times()
        done = run_python("-X", "importtime", "-m", f"jobs.{job}", "--help")
        after = os.times()
        user, system = (
            getattr(after, n) - getattr(before, n) for n in ("children_user", "children_system")
        )
        seconds = min(seconds, user + system)
        if seconds < 1.5:
            break
    assert done.stdout.startswith("usage:")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded, "-X importtime prints what this test thinks it does"
    assert not HEAVY & loaded
    assert seconds < 1.5


@pytest.mark.slow
def test_ray_trains_manager_of_datasets_needs_no_torch() -> None:
    """It is a process that the workers wait for, and imports the class of its rows."""
    code = "import sys, tokendiff.cluster.rank_rows; print('torch' in sys.modules)"
    assert run_python("-c", code).stdout == "False\n"


def test_preprocessing_imports_no_model() -> None:
    """Its tasks are processes too; the tokenizers of transformers import torch, but no models."""
    found = "{'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys, tokendiff.cluster.preprocess; print({found})"
    assert run_python("-c", code).stdout == "set()\n"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


# The docstring of a room is its map: lines that begin with four spaces and a name list
# modules, and those under "Of this room alone:" are not for others.
MAPS = {
    path.parent.relative_to(ROOT): ast.get_docstring(ast.parse(path.read_text()), clean=False) or ""
    for path in SOURCES
    if path.name == "__init__.py" and path.parent != ROOT / "tokendiff"
}


def modules_in(map_text: str) -> list[str]:
    lines = re.findall(r"^ {4}(\S.*?)(?: {2}.*)?$", map_text, re.MULTILINE)
    return [name for line in lines for name in line.split()]


@pytest.mark.parametrize("room", MAPS, ids=str)
def test_a_room_is_mapped(room: Path) -> None:
    files = {path.stem for path in (ROOT / room).glob("*.py")} - {"__init__"}
    rooms = {path.parent.name for path in (ROOT / room).glob("*/__init__.py")}
    assert sorted(modules_in(MAPS[room])) == sorted(files | rooms)
    assert re.findall(r"Read `(\w+)`", MAPS[room])[0] in files


@pytest.mark.slow
def test_rooms_import_what_maps_show() -> None:
    private = {
        ".".join([*room.parts, name]): room
        for room, text in MAPS.items()
        for name in modules_in(text.partition("Of this room alone:")[2])
    }
    assert private
    found = [
        f"{path.relative_to(ROOT)}:{line}: {dotted} is of its room alone"
        for path in SOURCES
        for line, dotted in imports(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
        for module, room in private.items()
        if f"{dotted}.".startswith(f"{module}.") and not path.is_relative_to(ROOT / room)
    ]
    assert not found, "\n".join(found)
