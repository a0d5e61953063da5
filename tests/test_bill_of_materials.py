"""What `make bom` writes, against the lock and the installed packages."""

import json
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from tests import ROOT
from tests.test_project import LOCK
from tokendiff import __version__


@pytest.fixture(scope="module")
def bom() -> dict[str, Any]:
    script = [sys.executable, ".ci/bill_of_materials.py"]
    made = subprocess.run(script, cwd=ROOT, capture_output=True, check=True).stdout
    again = subprocess.run(script, cwd=ROOT, capture_output=True, check=True).stdout
    assert made == again
    found: dict[str, Any] = json.loads(made)
    return found


@pytest.mark.slow
def test_it_names_what_is_locked_and_nothing_else(bom: dict[str, Any]) -> None:
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    assert {each["name"]: each["version"] for each in bom["components"]} == LOCK
    assert bom["metadata"]["component"]["version"] == __version__
    for each in bom["components"]:
        assert each["purl"] == each["bom-ref"] == f"pkg:pypi/{each['name']}@{each['version']}"


def test_dependencies_are_among_the_components(bom: dict[str, Any]) -> None:
    own = bom["metadata"]["component"]["bom-ref"]
    refs = [each["bom-ref"] for each in bom["components"]]
    graph = {each["ref"]: each["dependsOn"] for each in bom["dependencies"]}
    assert sorted(graph) == sorted([own, *refs])
    assert {ref for needed in graph.values() for ref in needed} <= set(refs)
    named = {ref.split("/")[1].split("@")[0] for ref in graph[own]}
    assert {"torch", "transformers", "ray", "mlflow"} <= named
    assert not named & {"hypothesis", "pytest", "peft"}  # of extras


def test_licences_are_the_packages_own(bom: dict[str, Any]) -> None:
    by_name = {each["name"]: each.get("licenses", []) for each in bom["components"]}
    assert by_name["pytest"] == [{"expression": metadata.metadata("pytest")["License-Expression"]}]
    known = sum(bool(licenses) for licenses in by_name.values())
    assert known > 0.9 * sum(_is_installed(name) for name in by_name)


def _is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
