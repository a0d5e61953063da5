"""What a frontier chose is what the promoted model is served with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.builders import promote_stage
from pipelines.graph import Variant, pipeline_stages
from pipelines.runner import run_variants
from pipelines.schedule import Selection
from pipelines.stage import Stage
from tests import ROOT
from tests.pipelines.test_promotion import Shop
from tokendiff.artifacts.identity import checkpoint_identity
from tokendiff.artifacts.manifest import commit
from tokendiff.config.loader import load_config
from tokendiff.errors import InputError
from tokendiff.tracking.mlflow_store import resolve_uri


def frontier_of(shop: Shop, checkpoint: Path, sampler: dict[str, Any]) -> Stage:
    point = {"sampler": sampler, "figures": {}}
    files = checkpoint_identity(checkpoint)

    def act(stage: Stage, log: Any) -> None:
        stage.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"checkpoint": str(checkpoint), "checkpoint_files": files, "chosen": point}
        commit(stage.folder, kind="frontier", metadata=metadata)

    like = shop.evaluation("frontier", checkpoint, 0.0)
    settings = {"files": files, "sampler": sampler}
    return replace(like, kind="frontier", action=act, settings=settings, result=lambda stage: {})


def promoted(shop: Shop, checkpoint: Path, frontier: Stage) -> Any:
    candidate = shop.evaluation("judge", checkpoint, 1.0)
    inputs = {"candidate": candidate, "frontier": frontier}
    promote = promote_stage(shop.config, shop.root / "shop", inputs=inputs, is_keyed=True)
    variants = [Variant(values={}, stages=[candidate, frontier, promote])]
    return run_variants(shop.config, shop.root, variants, Selection()).of("promote").result


@pytest.mark.slow
def test_the_promoted_model_is_served_at_the_operating_point(
    tmp_path: Path, load_served: Callable[[str, str], Any]
) -> None:
    shop = Shop(tmp_path)
    checkpoint, other = shop.checkpoint(0), shop.checkpoint(1)
    sampler = {"name": "ancestral", "num_inference_steps": 3, "temperature": 0.5}
    with pytest.raises(InputError, match=r"chose an operating point of .*, which is not the"):
        promoted(shop, checkpoint, frontier_of(shop, other, sampler))
    with pytest.raises(InputError, match=r"does not go with the operating point .*num_steps"):
        promoted(shop, checkpoint, frontier_of(shop, checkpoint, {**sampler, "num_steps": 1}))
    result = promoted(shop, checkpoint, frontier_of(shop, checkpoint, sampler))
    assert result["decision"] == "promoted"
    model = load_served(resolve_uri(shop.config.tracking, shop.root), "models:/toy/1")
    assert model.model_config["sampler"] == sampler  # the section of the file has 4 steps
    answer = model.predict([{"prompt": "abc"}])[0]
    assert answer["num_model_calls"] == 3


def test_the_pipeline_that_comes_with_it(tmp_path: Path) -> None:
    path = ROOT / "pipelines" / "frontier.yaml"
    config = load_config(path, [], {})
    stages = {stage.name: stage for stage in pipeline_stages(config, tmp_path)}
    frontier = stages["frontier"]
    assert {role: source.name for role, source in frontier.inputs.items()} == {
        "checkpoint": "train",
        "reference": "judge",
    }
    assert len(frontier.settings["samplers"]) == 6
    other = load_config(path, ["frontier.over.denoising_steps=[1, 2]"], {})
    fewer = {stage.name: stage for stage in pipeline_stages(other, tmp_path)}
    assert len(fewer["frontier"].settings["samplers"]) == 4
    assert fewer["frontier"].key != frontier.key
    assert fewer["train"].key == stages["train"].key
    alone = load_config(path, ["stages.frontier.inputs={checkpoint: train}"], {})
    with pytest.raises(InputError, match=r"'generative_perplexity' needs the input 'reference'"):
        pipeline_stages(alone, tmp_path)
