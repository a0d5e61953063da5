"""A software bill of materials of requirements.lock: CycloneDX 1.6 as JSON, on stdout.

    make bom        writes build/bom.json

Names and versions are the lock's; licences, and what depends on what, come from the metadata of the
installed packages. Equal input gives equal bytes: there is no time and no serial number in it.
"""

import json
import re
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins}


def purl(name: str, version: str) -> str:
    return f"pkg:pypi/{name}@{version}"


def licenses_of(name: str) -> list[dict[str, object]]:
    """As the package states them; [] where it is not installed, or says nothing."""
    try:
        fields = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return []
    if expression := fields.get("License-Expression"):
        return [{"expression": expression}]
    classifiers = fields.get_all("Classifier") or []
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License ::")]
    if not named and (text := (fields.get("License") or "").strip()):
        named = [text.splitlines()[0][:80]]
    return [{"license": {"name": each}} for each in named]


def needs(name: str, pins: dict[str, str]) -> list[str]:
    """References of the pinned packages that an installed one asks for, extras left out."""
    try:
        texts = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    wanted = [Requirement(text) for text in texts]
    names = {
        canonicalize_name(each.name)
        for each in wanted
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }
    return sorted(purl(each, pins[each]) for each in names if each in pins)


def main() -> None:
    pins = locked()
    text = (ROOT / "tokendiff" / "__init__.py").read_text()
    version = re.search(r'__version__ = "([^"]+)"', text)[1]
    own = purl("tokendiff", version)
    components = [
        {
            "type": "library",
            "bom-ref": purl(name, pin),
            "name": name,
            "version": pin,
            "purl": purl(name, pin),
            **({"licenses": found} if (found := licenses_of(name)) else {}),
        }
        for name, pin in sorted(pins.items())
    ]
    dependencies = [{"ref": own, "dependsOn": needs("tokendiff", pins)}]
    dependencies += [
        {"ref": purl(name, pin), "dependsOn": needs(name, pins)}
        for name, pin in sorted(pins.items())
    ]
    body = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": own,
                "name": "tokendiff",
                "version": version,
                "purl": own,
                "licenses": [{"expression": "Apache-2.0"}],
            }
        },
        "components": components,
        "dependencies": dependencies,
    }
    json.dump(body, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
