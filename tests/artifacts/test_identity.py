"""Identities are stored: in stage keys, in the manifests of samples, in the registry. For the same
content they must stay what they are, or old results are not found any more.
"""

from pathlib import Path
from typing import Any

import pytest

from tokendiff.artifacts.identity import (
    checkpoint_identity,
    content_identity,
    file_identity,
    identity_of,
    model_identity,
)
from tokendiff.artifacts.locations import RemotePath
from tokendiff.artifacts.manifest import commit, publish

# Computed by the code before `tokendiff.artifacts.identity`, when each room had its own function.
CONFIG = ["config.json", 23, "86d49337f51b848491007eba678aaafb2f0960510a11980abdb063bb3b0d8530"]
WEIGHTS = [
    "model.safetensors",
    7,
    "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
]
WORDS = ["vocab.txt", 3, "c8687a08aa5d6ed2044328fa6a697ab8e96dc34291e8c2034ae8c38e6fcc6d65"]
NOISE = [
    "scheduler_config.json",
    42,
    "42b62ba34a324da14c4fec485d4ceaf7021e7bce1175f3172d1f76cc3264dd89",
]
MANIFEST_OF_COMMITTED = "b67a672f839d54f9a377db1cdee578ff14601d863ce3165c295c4b01ef76a185"
FILES_OF_PLAIN = "6498b9f0f06b8c1d9d35c6be1cd122e7db82845786a488b99113dcd312ffa1c8"
FILES_OF_COMMITTED = "5042cb2937a22c4562bfa753975c1608fccdd42274d9e4c71402aa524c9852f6"
FILES_OF_FOREIGN = "3be0e6308acc7e2952feb7276899cd533590b60cd272cb347d19343b68e7f5ac"
FOREIGN_CHECKPOINT = "2c449043877d7660814b521fbc9b3470e4f374cc01aee494ada00a3db609ddda"


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A model, the same as a checkpoint of ours, and as one of the published scripts."""
    made = {}
    for name in ("plain", "committed", "foreign"):
        folder = made[name] = tmp_path / name
        (folder / "nested").mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "qwen3"}')
        (folder / "model.safetensors").write_text("weights")
        (folder / "nested" / "vocab.txt").write_text("a b")
    commit(made["committed"], kind="checkpoint", metadata={"step": 3})
    scheduler = '{"_class_name": "TokenDiffusionScheduler"}'
    (made["foreign"] / "scheduler_config.json").write_text(scheduler)
    return made


def test_inputs_of_stages(folders: dict[str, Path]) -> None:
    config = folders["plain"] / "config.json"
    assert file_identity(config) == CONFIG
    assert content_identity(config) == CONFIG[1:]
    names = [str(folders["plain"]), None, str(folders["committed"]), "hub/name", str(config)]
    found = identity_of(*names, str(folders["foreign"]))
    plain = [CONFIG, WEIGHTS, WORDS]
    assert found == [plain, MANIFEST_OF_COMMITTED, [CONFIG], [*plain, NOISE]]


def test_when_a_folder_was_downloaded_is_no_part_of_it(folders: dict[str, Path]) -> None:
    folder = folders["plain"]
    records = folder / ".cache" / "huggingface" / "download"  # as `hf download` keeps them
    records.mkdir(parents=True)
    (records / "config.json.metadata").write_text("6c71fef\n6f38b1\n1796029711.5\n")
    assert identity_of(str(folder)) == [[CONFIG, WEIGHTS, WORDS]]


def test_checkpoints(folders: dict[str, Path]) -> None:
    assert checkpoint_identity(folders["committed"]) == MANIFEST_OF_COMMITTED
    assert checkpoint_identity(folders["foreign"]) == FOREIGN_CHECKPOINT
    with pytest.raises(FileNotFoundError):
        checkpoint_identity(folders["plain"])


@pytest.mark.parametrize(
    ("name", "identity", "by_files"),
    [
        ("plain", FILES_OF_PLAIN, FILES_OF_PLAIN),
        ("committed", MANIFEST_OF_COMMITTED, FILES_OF_COMMITTED),
        ("foreign", FILES_OF_FOREIGN, FILES_OF_FOREIGN),
    ],
)
def test_models_by_name(name: str, identity: str, by_files: str, folders: dict[str, Path]) -> None:
    """What samples were drawn from, what a draft was registered with; and a target's own."""
    for given in (folders[name], str(folders[name])):
        assert model_identity(given) == identity
        assert model_identity(given, by_manifest=False) == by_files


def test_a_name_of_the_hub_stands_for_itself_and_a_uri_for_what_is_there(
    folders: dict[str, Path],
) -> None:
    assert model_identity("hub/name") == "hub/name"
    publish(folders["committed"], there := RemotePath("memory://identity/model"))
    assert model_identity(there.uri) == checkpoint_identity(there) == MANIFEST_OF_COMMITTED
    # Its copy on this machine has the same files, and the manifest that was copied last.
    assert model_identity(there.uri, by_manifest=False) == FILES_OF_COMMITTED


def test_another_content_is_another_identity(folders: dict[str, Path]) -> None:
    ways: list[tuple[Any, str]] = [
        (model_identity, "plain"),
        (checkpoint_identity, "foreign"),
        (lambda folder: identity_of(str(folder)), "plain"),
    ]
    before = [way(folders[name]) for way, name in ways]
    for name in ("plain", "foreign"):
        (folders[name] / "model.safetensors").write_text("other w")
    after = [way(folders[name]) for way, name in ways]
    assert all(here != there for here, there in zip(before, after, strict=True))
