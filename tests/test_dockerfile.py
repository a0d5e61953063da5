"""The Dockerfile, parsed: no daemon builds it here, so what can be read from it is checked."""

import re
import shlex
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.test_project import LOCK, PROJECT, ROOT
from tokendiff import __version__

TARGETS = ("cpu", "cuda")


class Stage(NamedTuple):
    base: str
    steps: list[tuple[str, str]]  # instruction, arguments


def parsed() -> dict[str, Stage]:
    """Stages by name; continued lines are one, without comments and what is before FROM."""
    text = (ROOT / "Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    stages: dict[str, Stage] = {}
    steps: list[tuple[str, str]] = []
    for line in filter(None, lines):
        word, _, rest = line.partition(" ")
        assert word in ("ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "CMD"), line
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            steps = []
            stages[name] = Stage(base, steps)
        else:
            steps.append((word, " ".join(rest.split())))
    return stages


STAGES = parsed()


def chain(name: str) -> list[tuple[str, str]]:
    """The steps of a target, those of the stages that it is built on first."""
    stage = STAGES[name]
    return [*(chain(stage.base) if stage.base in STAGES else []), *stage.steps]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_ends_as_a_user_that_is_not_root(target: str) -> None:
    steps = chain(target)
    assert [rest for word, rest in steps if word == "USER"] == ["1000:1000"]
    after = steps[[word for word, _ in steps].index("USER") + 1 :]
    assert [word for word, _ in after] == ["CMD"]
    (made,) = [rest for word, rest in steps if word == "RUN" and "useradd" in rest]
    assert "--uid 1000 --gid 1000" in made
    # The folder that results go to is the user's.
    assert ("ENV", "PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0 TOKENDIFF_ROOT=/data") in steps
    assert "--owner 1000 --group 1000 /data" in made


@pytest.mark.parametrize("target", TARGETS)
def test_packages_have_the_locked_versions_and_lie_below_the_code(target: str) -> None:
    (install,) = [rest for _, rest in STAGES[f"packages-{target}"].steps if "pip install" in rest]
    assert "-c /build/requirements.lock" in install
    copied = [rest for word, rest in STAGES[target].steps if word == "COPY"]
    assert copied == [f"--from=packages-{target} /install /usr/local", ". ."]
    (code,) = [rest for word, rest in STAGES[target].steps if word == "RUN"]
    assert "--no-deps" in code
    assert "--no-build-isolation" in code


def test_what_is_installed_is_what_the_package_asks_for() -> None:
    """Run the image's own line that reads pyproject.toml."""
    ((_, run),) = [step for step in STAGES["wanted"].steps if step[0] == "RUN"]
    python, flag, code, sign, file = shlex.split(run)
    assert (python, flag, sign, file) == ("python", "-c", ">", "wanted.txt")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    wanted = done.stdout.splitlines()
    lora = PROJECT["optional-dependencies"]["lora"]
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert wanted == [*built, *PROJECT["dependencies"], *lora]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(LOCK[canonicalize_name(requirement.name)])


@pytest.mark.parametrize(("index", "code"), [("", 1), ("x", 0)])
def test_the_cpu_target_says_what_it_needs(index: str, code: int) -> None:
    ((_, run),) = [step for step in STAGES["packages-cpu"].steps if step[0] == "RUN"]
    command = re.sub(r"^--mount=\S+ ", "", run).replace("pip install", "echo")
    done = subprocess.run(
        ["sh", "-c", command], env={"TORCH_CPU_INDEX": index}, capture_output=True, text=True
    )
    assert done.returncode == code
    assert ("--build-arg TORCH_CPU_INDEX" in done.stderr) == (code == 1)


def test_python_is_one_that_the_package_takes() -> None:
    (version,) = re.findall(r"^ARG PYTHON_VERSION=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    roots = {stage.base for stage in STAGES.values()} - STAGES.keys()
    assert roots == {"python:${PYTHON_VERSION}-slim"}


def is_sent(path: str) -> bool:
    """Whether a build gets a file, by .dockerignore: the last line that matches decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        parts = path.split("/")
        places = parts if "**/" in line else parts[:1]
        if line and not line.startswith("#") and any(fnmatch(part, pattern) for part in places):
            sent = line.startswith("!")
    return sent


def test_a_build_gets_what_it_copies_and_nothing_else() -> None:
    named = {
        source
        for stage in STAGES.values()
        for word, rest in stage.steps
        if word == "COPY" and "--from" not in rest
        for source in rest.split()[:-1]
        if source != "."
    }
    assert named == {"pyproject.toml", "requirements.lock"}
    needed = [*named, "README.md", "LICENSE", "jobs/train.py", "pipelines/quickstart.yaml"]
    for path in (*needed, "tokendiff/evaluation/report.html.j2"):
        assert (ROOT / path).is_file()
        assert is_sent(path), path
    unneeded = ["tests/conftest.py", ".git/HEAD", "output/x", "mlflow.db", ".venv/bin/python"]
    for path in (*unneeded, "jobs/__pycache__/train.pyc"):
        assert not is_sent(path), path


def test_manifests_run_this_image() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert f"docker build --target cuda -t tokendiff:{__version__} ." in text
    readme = (ROOT / "jobs" / "kubernetes" / "README.md").read_text()
    assert f"docker build --target cuda -t tokendiff:{__version__} ." in readme
