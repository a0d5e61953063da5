"""The site: it builds without a warning or a network, and what is generated is complete."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from docs.tools import reference, schema
from tests import ROOT
from tokendiff.config import objectives, samplers
from tokendiff.config.loader import load_config, models_in, tags, walk_fields
from tokendiff.config.pipeline import Config
from tokendiff.config.stage_graph import ROLES
from tokendiff.errors import InputError

PIPELINES = sorted((ROOT / "pipelines").glob("*.yaml"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with --strict: a page that is missing from nav, or a broken link or anchor, fails."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    made = subprocess.run([*build, str(folder)], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert {"index.html", "tutorial.html", "404.html"} <= {page.name for page in pages}
    element = r'<(?:script|img|link|iframe)[^>]*?(?:src|href)="(https?:[^"]+)"'
    for page in pages:
        loaded = re.findall(element, page.read_text())
        assert loaded == [], page


def test_links_of_the_readme_lead_somewhere() -> None:
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#([^)]+))?\)", readme)
    assert len(links) > 10
    for path, anchor in links:
        assert (ROOT / path).is_file(), path
        if anchor:
            titles = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{path}#{anchor}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_field_of_the_config_stands_in_the_reference() -> None:
    pages = reference.pages()
    for path, _, _ in walk_fields(Config):
        is_section = len(path) == 1 and models_in(Config.model_fields[path[0]].annotation)
        if is_section or (path[-1] == "name" and len(path) > 1):
            continue
        page = path[0] if models_in(Config.model_fields[path[0]].annotation) else "pipeline"
        if "objective" in path[:-1] or "sampler" in path[:-1]:
            page = "objectives" if "objective" in path[:-1] else "samplers"
        assert f"| {reference.field_name(path[-1])}<br>" in pages[f"reference/config/{page}.md"], (
            path
        )


def test_bounds_choices_and_defaults_stand_in_the_reference() -> None:
    train = reference.pages()["reference/config/train.md"].splitlines()
    names = ("logging_steps", "sharding", "adam_beta1")
    rows = {
        name: line for name in names for line in train if f"| {reference.field_name(name)}<" in line
    }
    assert "`10`" in rows["logging_steps"]
    assert "at least 1" in rows["logging_steps"]
    assert "none / gradients / full / hybrid" in rows["sharding"]
    assert "at least 0, below 1" in rows["adam_beta1"]


@pytest.mark.parametrize("union", [objectives.ObjectiveConfig, samplers.SamplerConfig])
def test_every_objective_and_sampler_has_its_section(union: Any) -> None:
    text = "\n".join(reference.pages().values())
    for model in models_in(union):
        assert f"## `{tags(model)[0]}`" in text


@pytest.mark.parametrize("room", reference.ROOMS)
def test_the_python_reference_has_the_modules_of_each_map(room: str) -> None:
    assert reference.public_modules(room)


def test_help_of_every_job_stands_on_the_page_of_the_command_line() -> None:
    for job in reference.JOBS:
        assert f"usage: python -m jobs.{job}" in reference.help_text(job)


# The schema.


@pytest.fixture(scope="module")
def validator() -> Any:
    made = schema.pipeline_schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


def test_the_schema_that_editors_load_is_that_of_the_code() -> None:
    stands = json.loads(schema.SCHEMA_PATH.read_text())
    assert stands == schema.pipeline_schema(), "run: python -m docs.tools.schema"


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_the_schema_takes_the_pipelines(path: Path, validator: Any) -> None:
    first = path.read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=schema.json"
    errors = [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))]
    assert errors == []


WRONG = [
    "trian: {max_train_steps: 3}",
    "train: {max_train_stepz: 3}",
    "train: {max_train_steps: many}",
    "train: {max_train_steps: 0}",
    "train: {objective: mdml}",
    "train: {objective: {name: mdlm, block_length: 4}}",
    "generate: {sampler: {name: sdar, denoising_steps: 0}}",
    "train: {sharding: half}",
    "stages: {judge: {kind: judge}}",
    "stages: {judge: {kind: evaluate, config: {max_train_steps: 3}}}",
    "promote: {gate: [{metric: nats_per_token}]}",
]
RIGHT = [
    "train: {objective: mdlm}",
    "train: {objective: {block_length: 4, name: block_diffusion}, lora_rank: null}",
    "generate: null",
    "evaluate: {tasks: 'arc_easy,gsm8k', sampler: ar}",
    "evaluate: {tasks: [builtin]}",
    "cluster: {num_workers: '4:16'}",
    "stages: {c: {kind: frontier, inputs: {}, config: {within: 0.1}}}",
]


@pytest.mark.parametrize("text", WRONG)
def test_the_schema_refuses_what_the_loader_refuses(
    text: str, validator: Any, tmp_path: Path
) -> None:
    assert not validator.is_valid(yaml.safe_load(text))
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError):
        load_config(path)


@pytest.mark.parametrize("text", RIGHT)
def test_the_schema_takes_short_forms(text: str, validator: Any) -> None:
    assert validator.is_valid(yaml.safe_load(text))


def test_kinds_of_stages_have_their_inputs_in_the_reference() -> None:
    page = reference.pages()["reference/stages.md"]
    for kind, roles in ROLES.items():
        for role in roles:
            row = rf"^\| `{kind}` \| \*{{0,2}}{role}\b"
            assert re.search(row, page, re.MULTILINE), (kind, role)
