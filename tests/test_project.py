"""The files around the code: what is installed, what is uploaded, what a cluster is made of."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tokendiff
from tests.test_floors import COMPUTED_NAME, FLOORS, ROOT, SOURCES, imports

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = PROJECT["optional-dependencies"]
FOR_PEOPLE_HERE = ("dev", "docs")  # extras that no module of the library imports
DEVELOPMENT = [Requirement(text) for name in FOR_PEOPLE_HERE for text in EXTRAS[name]]
OPTIONAL = [
    Requirement(text) for name in EXTRAS if name not in FOR_PEOPLE_HERE for text in EXTRAS[name]
]
LOCK_LINES = [
    line
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
LOCK: dict[str, str] = {
    canonicalize_name(name): pin for name, _, pin in (s.partition("==") for s in LOCK_LINES)
}


def repository_files() -> list[Path]:
    """Files that are committed, or would be by `git add .`."""
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, cwd=ROOT, capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    return [path for path in paths if path.is_file()]


def libraries_imported_by(paths: Iterable[Path]) -> set[str]:
    ours = {"tokendiff", "tests", "benchmarks", "docs", *FLOORS[5], *sys.stdlib_module_names}
    found = {
        name.split(".")[0]
        for path in paths
        for _, name in imports(path.relative_to(ROOT), path.read_text(encoding="utf-8"))
    }
    return found - ours - {COMPUTED_NAME, "pydantic_core"}  # the latter comes with pydantic


def modules_of(requirements: Iterable[Requirement]) -> dict[str, set[str]]:
    modules: dict[str, set[str]] = {canonicalize_name(r.name): set() for r in requirements}
    for module, distributions in metadata.packages_distributions().items():
        for name in modules.keys() & {canonicalize_name(d) for d in distributions}:
            modules[name].add(module)
    return modules


@pytest.mark.slow
def test_declared_dependencies_are_those_imported() -> None:
    imported = libraries_imported_by(SOURCES)
    declared = modules_of([*DECLARED, *OPTIONAL])
    assert imported <= set().union(*declared.values()), "imported, not in pyproject.toml"
    assert [name for name, modules in declared.items() if not modules & imported] == []


@pytest.mark.slow
def test_tests_and_benchmarks_import_declared_dependencies() -> None:
    files = [path for top in ("tests", "benchmarks", "docs") for path in (ROOT / top).rglob("*.py")]
    imported = libraries_imported_by(files)
    optional = {"diffusers"}  # what is held against it is left out where it is not installed
    declared = modules_of([*DECLARED, *OPTIONAL, *DEVELOPMENT])
    assert imported - optional <= set().union(*declared.values())


def test_lock_is_pins_only() -> None:
    """No address, option or local build (torch's +cpu): any index on any platform serves it."""
    odd = [line for line in LOCK_LINES if not re.fullmatch(r"[\w.-]+==\d[\w.]*", line)]
    assert odd == []
    assert len(LOCK) == len(LOCK_LINES)
    assert LOCK["torch"] == "2.13.0"


@pytest.mark.slow
def test_lock_covers_what_pyproject_asks_for() -> None:
    waiting = [*DECLARED, *OPTIONAL, *DEVELOPMENT, Requirement("setuptools>=77.0.3")]
    seen: set[str] = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        name = canonicalize_name(requirement.name)
        if name.startswith(("cuda-", "nvidia-", "triton")):
            continue  # what torch's Linux builds bring, each its own exact set
        seen.add(str(requirement))
        assert name in LOCK, f"{requirement} is not locked"
        assert requirement.specifier.contains(LOCK[name]), f"{requirement}: locked {LOCK[name]}"
        for text in metadata.requires(name) or ():
            needed = Requirement(text)
            extras = {"", *requirement.extras}
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(needed)
    assert {canonicalize_name(Requirement(text).name) for text in seen} == set(LOCK), (
        "unneeded pins"
    )


@pytest.mark.slow
def test_wheel_holds_the_library_its_jobs_and_pipelines_and_no_more(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("tokendiff", "jobs", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip_wheel = [sys.executable, "-m", "pip", "wheel", ".", "--wheel-dir", "wheel"]
    offline = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([*pip_wheel, *offline], cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = [*(ROOT / "tokendiff").rglob("*.py"), *(ROOT / "tokendiff").rglob("*.j2")]
    library += [*(ROOT / "jobs").glob("*.py"), *(ROOT / "pipelines").glob("*.py")]
    library += [*(ROOT / "pipelines").glob("*.yaml"), *(ROOT / "pipelines").glob("*.jinja")]
    assert packed == {path.relative_to(ROOT).as_posix() for path in library}

    # It runs where there is no checkout, with the pipelines that it brings.
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys; from pathlib import Path; from jobs import cli, console; "
        "print(cli.shipped(Path('quickstart'))); sys.exit(console.main(['train', '--help']))"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    file, usage, *_ = done.stdout.splitlines()
    assert file == str(tmp_path / "site" / "pipelines" / "quickstart.yaml")
    assert usage.startswith("usage: tokendiff train ")


def test_old_python_is_refused_in_a_sentence(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).touch()
    old = tmp_path / "old python"
    pretend = "import sys; sys.argv.pop(0); sys.version_info = (3, 10, 13); exec(sys.argv[0])"
    old.write_text(f'#!/bin/sh\nshift\nexec "{sys.executable}" -c "{pretend}" "$@"\n')
    old.chmod(0o755)
    made = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert made.returncode != 0
    assert "needs Python 3.11 or newer" in made.stderr
    assert "is 3.10" in made.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize(
    "target", ["quickstart", "test", "lint", "bench", "docs", "clean", "setup"]
)
def test_make_help_lists(target: str) -> None:
    text = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^{target} +\S", text, re.MULTILINE)


def test_job_upload_holds_what_jobs_import_and_no_more(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    kept = ["tokendiff/data/rows.py", "jobs/train.py", "pipelines/mdlm.yaml", "pyproject.toml"]
    left = [
        ".venv/bin/python",
        ".git/HEAD",
        "output/train/model.safetensors",
        "run-output/log.jsonl",
        "mlflow.db",
        "tests/data/test_data.py",
        "jobs/__pycache__/train.pyc",
        ".mypy_cache/3.11/cache.db",
    ]
    upload = tmp_path / "upload"
    for name in kept + left:
        (upload / name).parent.mkdir(parents=True, exist_ok=True)
        (upload / name).touch()
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, upload)
    package = tmp_path / "package.zip"
    create_package(str(upload), package, include_gitignore=True, include_parent_dir=False)
    packed = set(zipfile.ZipFile(package).namelist())
    assert packed == {*kept, ".rayignore", ".gitignore"}


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """cluster.yaml as `ray up` reads it, its defaults filled in and its schema checked."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    return config


def test_cluster_starts_with_a_head_that_runs_no_tasks(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    head = types[cluster["head_node_type"]]
    workers = [node_type for node_type in types.values() if node_type is not head]
    assert head["resources"] == {"CPU": 0}
    assert head["max_workers"] == 0
    assert {"GPU" in worker["resources"] for worker in workers} == {True, False}
    for worker in workers:
        assert worker["resources"]["CPU"] > 1  # Ray Data needs a CPU beside the training worker's
        assert worker["min_workers"] == 0
        assert 0 < worker["max_workers"] <= cluster["max_workers"]
        assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_cluster_opens_nothing_to_the_world(cluster: dict[str, Any]) -> None:
    """Without a group of its own the launcher makes one that lets SSH in from everywhere."""
    for node_type in cluster["available_node_types"].values():
        assert node_type["node_config"]["SecurityGroupIds"]
    assert "security_group" not in cluster["provider"]
    assert "0.0.0.0" not in str(cluster)
    assert "::/0" not in str(cluster)


def test_cluster_nodes_have_the_locked_versions(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/requirements.lock"] == "requirements.lock"
    for setup in (cluster["head_setup_commands"], cluster["worker_setup_commands"]):
        installs = [command for command in setup if "pip install" in command]
        assert installs[0].endswith(" -r ~/requirements.lock")
        for command in installs[1:]:  # what comes on top leaves the locked packages alone
            asked = re.findall(r"'([^']+)'", command)
            assert asked
            assert not {canonicalize_name(Requirement(text).name) for text in asked} & set(LOCK)


@pytest.mark.parametrize("node", ["head", "worker"])
def test_cluster_starts_ray_with_authentication(
    cluster: dict[str, Any], node: str, tmp_path: Path
) -> None:
    """Run the node's own commands in an empty home, with a `ray` that notes how it was started."""
    search_path = "/usr/bin:/bin"
    assert shutil.which("ray", path=search_path) is None, (
        "a real `ray stop` would stop real clusters"
    )
    ray = tmp_path / "tokendiff-venv/bin/ray"
    ray.parent.mkdir(parents=True)
    ray.write_text('#!/bin/sh\n{ echo "$@"; env; } > "$HOME/$1.txt"\n')
    ray.chmod(0o755)
    home = {"HOME": str(tmp_path), "PATH": search_path, "RAY_HEAD_IP": "10.0.0.1"}
    (write_environment,) = (c for c in cluster["setup_commands"] if "> ~/ray.env" in c)
    starts = cluster[f"{node}_start_ray_commands"]

    image_with_ray = {**home, "PATH": f"{ray.parent}:{search_path}"}
    for command in starts:  # set-up failed: Ray must not start, open to everyone
        failed = subprocess.run(["bash", "-c", command], env=image_with_ray, capture_output=True)
        assert failed.returncode != 0
    assert not (tmp_path / "start.txt").exists()

    for command in (write_environment, *starts):
        subprocess.run(["bash", "-c", command], env=home, check=True)
    arguments, *environment = (tmp_path / "start.txt").read_text().splitlines()
    assert {
        "RAY_AUTH_MODE=token",
        f"RAY_AUTH_TOKEN_PATH={tmp_path}/.ray/auth_token",
        "RAY_USAGE_STATS_ENABLED=0",
    } <= set(environment)
    assert f"{tmp_path}/.ray/auth_token".replace(str(tmp_path), "~") in cluster["file_mounts"]
    if node == "head":
        assert "--dashboard-host=127.0.0.1" in arguments.split()
    else:
        assert "--address=10.0.0.1:6379" in arguments.split()


# Hosts that the repository may name, dotless ones as examples; no package registry is among them.
HOSTS = re.compile(
    r"(127\.0\.0\.1|[\w-]+|\[::1\]|([\w-]+\.)*(example|invalid|test)(\.com|\.org)?"
    r"|arxiv\.org|json-schema\.org|www\.apache\.org|www\.w3\.org|docs\.ray\.io|github\.com|huggingface\.co)"
)
URL = re.compile(r"\b(?:https?|ftp|git|ssh)://(?:[^@/\s]*@)?([\w-]+(?:\.[\w-]+)*|\[[^]]*\])", re.I)
REGISTRY = re.compile(r"p[y]pi\.org|p[y]thonhosted|n[p]mjs|index-url|trusted-host", re.I)
MACHINE_PATH = re.compile(r"(?<![\w.~*-])/(?:home|root|Users|work|opt|mnt|srv)/\w")


@pytest.mark.slow
def test_repository_names_no_registry_and_no_machine() -> None:
    found = []
    for path in repository_files():
        if path == Path(__file__).resolve():  # what the patterns are tried on stands here
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            hosts = [host for host in URL.findall(line) if not HOSTS.fullmatch(host)]
            if hosts or REGISTRY.search(line) or MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (URL, "see http://10.1.2.3:5000/x"),
        (MACHINE_PATH, "cd /home/someone/tokendiff"),
        (MACHINE_PATH, '"' + "/srv" + '/data"'),
        (REGISTRY, "pip install --index-url=..."),
        (REGISTRY, "see p" + "ypi.org"),
    ],
)
def test_machine_and_registry_patterns_match(pattern: re.Pattern[str], text: str) -> None:
    assert pattern.search(text)


def test_license_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "The tokendiff authors" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= cited.keys()  # what the format asks for
    assert cited["version"] == tokendiff.__version__
    assert cited["license"] == PROJECT["license"]
    assert [author["name"] for author in cited["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_what_their_format_asks_for(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown")
        assert field["attributes"]["label"]
        assert (field["type"] == "dropdown") == ("options" in field["attributes"])
