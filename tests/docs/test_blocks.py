"""Every block of shell, YAML and Python on the pages, parsed and validated, but not run.

A command of a job goes through its own parser and the loader; a YAML through the loader, or, where
it is not a pipeline file, through a parser; Python is compiled and its imports are looked up.
"""

import ast
import importlib
import importlib.util
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import cli
from tests import ROOT
from tests.docs.blocks import Block, blocks_in, pages, words_of
from tokendiff.config.loader import load_config
from tokendiff.config.pipeline import Config

# Commands of others, which stand on the pages as their own documentation has them.
FOREIGN = {
    *("cp", "mkdir", "kubectl", "curl", "mlflow", "docker", "source", ".", "tensorboard"),
    "hf",
}
PLAIN_LANGUAGES = {"text", "console", "json", "dockerfile", "html"}
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}:{block.line}")
    for path in pages()
    for block in blocks_in(path.read_text())
]


class Parsed(BaseException):
    """In place of what a job does once its command line is read."""


def check_job(job: str, flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parse: Callable[..., Any] = cli.parse

    def parse_only(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patched:
        patched.setattr(cli, "parse", parse_only)
        try:
            status = importlib.import_module(job).main(flags)
        except (Parsed, SystemExit):  # SystemExit: --help
            return
    pytest.fail(f"{job}: exit code {status}; it has said why")


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    match words:
        case ["python", "-m", module, *flags] if module.startswith("jobs."):
            check_job(module, flags, monkeypatch)
        case ["python", "-m", module, *_]:
            assert importlib.util.find_spec(module), f"no module {module}"
        case ["tokendiff", job, *flags]:
            check_job(f"jobs.{job}", flags, monkeypatch)
        case ["ray", "job", "submit", *rest]:
            check_command(rest[rest.index("--") + 1 :], monkeypatch)
        case ["make", target, *_]:
            assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"no target {target}"
        case ["pip", "install", *names]:
            extras = project["optional-dependencies"]
            for name in names:
                asked = name.partition("[")[2].rstrip("]")
                assert set(filter(None, asked.split(","))) <= set(extras), f"no extra {asked}"
        case [name, *_] if name in project["scripts"]:
            pass
        case ["ray", "start" | "up", *_]:
            pass
        case [name, *_]:
            assert name in FOREIGN, f"{name}: no command that these tests know"


def check_yaml(text: str, folder: Path) -> None:
    loaded = yaml.safe_load(text)
    if isinstance(loaded, dict) and set(loaded) <= set(Config.model_fields):
        path = folder / "block.yaml"
        path.write_text(text)
        load_config(path)


def names_of(module: str) -> set[str]:
    """What a module defines or imports at its top; read, not imported, which takes seconds."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"no module {module}"
    assert spec.origin is not None
    if not module.startswith("tokendiff"):
        return set(dir(importlib.import_module(module)))
    names = set()
    for node in ast.parse(Path(spec.origin).read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def check_python(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                assert alias.name in names_of(node.module), f"{node.module} has no {alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert importlib.util.find_spec(alias.name.split(".")[0]), f"no {alias.name}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pipelines, and the files that pages have their readers write."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "pipelines").symlink_to(ROOT / "pipelines")
    for run in ("one", "other"):  # results that pages take for granted
        (folder / "output" / run).mkdir(parents=True)
    for path in pages():
        for block in blocks_in(path.read_text()):
            if block.title:
                (folder / block.title).write_text(block.text)
    return folder


@pytest.mark.parametrize("block", BLOCKS)
def test_block_is_valid(
    block: Block, checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(checkout)
    if block.language == "yaml":
        check_yaml(block.text, tmp_path)
    elif block.language == "python":
        check_python(block.text)
    elif block.language == "bash":
        for words in words_of(block):
            check_command(words, monkeypatch)
    else:
        assert block.language in PLAIN_LANGUAGES, "name the language of the block"
