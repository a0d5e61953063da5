"""Registered versions that are deleted, or whose files are: what is said, and where the alias
stays.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2

from pipelines.promotion import roll_back
from pipelines.registered import PinnedModels
from tests.pipelines.test_promotion import URI, Shop
from tokendiff.config.pipeline import Config, TrackingConfig
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.tracking.registry import Registry

GATE = {"metric": "perplexity", "direction": "lower"}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Three versions, each of which became the champion."""
    shop = Shop(tmp_path)
    registry = shop.registry
    client: Any = registry._client
    experiment = client.create_experiment("toy", artifact_location=(tmp_path / "files").as_uri())
    for seed in range(3):
        run_id = client.create_run(experiment).info.run_id
        sampling = {"sampler": {"name": "ancestral", "num_inference_steps": 4}}
        checkpoint = shop.checkpoint(seed)
        version = registry.register(
            "toy", checkpoint, run_id=run_id, sampling=sampling, trained_on=[], tags={}
        )
        registry.promote("toy", "champion", version, because="a test")
    return registry


def files_of(registry: Registry, version: int) -> Path:
    source = registry._client.get_model_version("toy", str(version)).source
    return Path(str(source).removeprefix("file://"))


@contextmanager
def gone(folder: Path) -> Iterator[None]:
    aside = folder.with_name("aside")
    shutil.move(folder, aside)
    yield
    shutil.move(aside, folder)


@pytest.mark.slow
def test_what_is_deleted_is_named_and_the_alias_never_leads_to_it(registry: Registry) -> None:
    with gone(files_of(registry, 3)):
        with pytest.raises(CorruptFileError, match=r"^models:/toy/3: its files cannot be had") as e:
            registry.open(URI)
        assert "\n" not in str(e.value)
    weights = next(files_of(registry, 2).rglob("model.safetensors"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match=r"does not match.*champion stays v3"):
        registry.roll_back("toy", "champion")
    weights.write_bytes(data)
    with gone(files_of(registry, 2)), pytest.raises(CorruptFileError, match=r"stays v3"):
        registry.roll_back("toy", "champion")
    assert registry.holder("toy", "champion") == 3
    assert registry.roll_back("toy", "champion") == (3, 2)
    registry.promote("toy", "champion", 3, because="a test")

    pinning = Config.model_validate(
        {
            "name": "judging",
            "stages": {"judge": {"kind": "evaluate", "config": {"checkpoint_path": URI}}},
        }
    )
    root = registry._root
    PinnedModels.read(pinning, root, ["monday"]).keep(root / "judging")
    registry._client.delete_model_version("toy", "2")
    with pytest.raises(InputError, match=r"v2, which v3 replaced, was deleted.*there are v1, v3:"):
        registry.roll_back("toy", "champion")
    registry._client.delete_model_version("toy", "3")  # and its alias with it
    assert registry.open(URI) is None
    with pytest.raises(InputError, match=r"no version has this alias.*there are v1: point the"):
        registry.roll_back("toy", "champion")
    with pytest.raises(InputError, match=r"models:/toy/3, which it stood for.*models\.json"):
        PinnedModels.read(pinning, root, ["monday"])
    assert PinnedModels.read(pinning, root, ["tuesday"]).models == {URI: None}
    registry._client.set_registered_model_alias("toy", "champion", "1")
    model = registry.open(URI)
    assert model is not None
    assert model.version == 1


@pytest.mark.slow
def test_what_is_unknown_is_refused_with_what_there_is(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "there is no {} in the MLflow registry"
    nobody, typo = "models:/toy@nobody", "models:/tony/1"
    versions = "toy has the versions v1, v2, v3 and the aliases @champion (v3)"
    assert registry.missing(nobody) == f"{told.format(nobody)}; {versions}"
    assert registry.missing(typo) == f"{told.format(typo)}; its models: toy"
    stage = {"kind": "train", "config": {"model_name_or_path": typo}}
    config = Config.model_validate({"name": "late", "stages": {"train": stage}})
    with pytest.raises(InputError) as error:
        PinnedModels.read(config, registry._root, ["monday"])
    assert str(error.value) == registry.missing(typo)

    for number in range(11):
        registry._client.create_registered_model(f"another-{number}")
    assert registry.missing(typo).startswith(f"{told.format(typo)}; its models: toy, another-")
    assert registry.missing(typo).endswith(" and 2 more")

    for code in ("INTERNAL_ERROR", "PERMISSION_DENIED"):  # what is known is said all the same

        def fail(*args: Any, code: str = code, **kwargs: Any) -> None:
            raise MlflowException("no", error_code=getattr(databricks_pb2, code))

        monkeypatch.setattr(MlflowClient, "get_registered_model", fail)
        assert registry.missing(nobody) == told.format(nobody)


@pytest.mark.slow
def test_aliases_of_one_pipeline_are_rolled_back_together_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Registry, "_opened", lambda registry, version: None)
    registry = Registry(TrackingConfig(), tmp_path)
    for name, num_versions in (("toy", 4), ("draft", 1)):
        registry._create(name)
        for number in range(1, num_versions + 1):
            registry._client.create_model_version(name, str(tmp_path))
            registry.promote(name, "champion", number, because="a test")

    def pipeline(*models: str) -> Config:
        stages = {
            f"{kind}-{place}": fields
            for place, model in enumerate(models)
            for kind, fields in {
                "judge": {"kind": "evaluate", "config": {"checkpoint_path": "run/final"}},
                "promote": {
                    "kind": "promote",
                    "inputs": {"candidate": f"judge-{place}"},
                    "config": {"registered_model": model, "gate": [GATE]},
                },
            }.items()
        }
        return Config.model_validate({"name": "several", "stages": stages})

    with pytest.raises(InputError, match="draft@champion: v1 replaced no other version"):
        roll_back(pipeline("toy", "draft"), tmp_path)
    assert registry.holder("toy", "champion") == 4
    assert roll_back(pipeline("toy", "toy"), tmp_path) == {URI: "v3, was v4"}
    assert registry.holder("toy", "champion") == 3
