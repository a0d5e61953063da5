"""A frontier of a small checkpoint: its points are those of runs by themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.builders import tiny_causal
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.cluster.frontier import run_frontier
from tokendiff.cluster.generate import generate
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.frontier import FrontierConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.data.samples import read_samples
from tokendiff.errors import InputError

pytest.importorskip("lm_eval", reason="the extra eval")

SDAR = {"name": "sdar", "max_new_tokens": 8, "temperature": 0.0}
OVER = {"denoising_steps": [1, 4], "confidence_threshold": [0.0, 0.9]}
CLUSTER = ClusterConfig(cpus_per_worker=0.5, threads_per_worker=1)


def frontier_config(folder: str, **fields: Any) -> FrontierConfig:
    common = {
        "samplers": [SDAR],
        "over": OVER,
        "prompt": ["one and", "two"],
        "num_samples": 2,
        "tasks": ["local_choice"],
        "tasks_path": folder,
        "max_task_documents": 4,
        "quality": "local_choice/acc",
        "direction": "higher",
    }
    return FrontierConfig.model_validate({**common, **fields})


def measure(config: FrontierConfig, checkpoint: Path, output_dir: Path) -> dict[str, Any]:
    return run_frontier(
        config,
        CLUSTER,
        title="toy",
        checkpoint_path=str(checkpoint),
        config_yaml="",
        output_dir=output_dir,
        on_event=lambda event, **fields: None,
    ).metadata


@pytest.mark.usefixtures("in_this_process")
def test_points_are_those_of_runs_by_themselves(
    checkpoints: dict[str, Path],
    tasks_path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = checkpoints["block_diffusion"]
    reference = tmp_path / "reference"
    reference.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (reference / file).write_bytes((checkpoint / file).read_bytes())
    size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    tiny_causal(vocab_size=size, seed=5).float().save_pretrained(reference)
    config = frontier_config(
        tasks_path,
        reference_model_name_or_path=str(reference),
        quality="generative_perplexity",
        direction="lower",
        within=0.5,
    )
    found = measure(config, checkpoint, tmp_path / "out")
    assert len(found["points"]) == 4
    for point in found["points"]:
        sampling = GenerateConfig(
            sampler=point["sampler"], prompt=["one and", "two"], num_samples=2
        )
        folder = tmp_path / "alone" / json.dumps(point["sampler"]).replace("/", "")
        generate(
            sampling,
            CLUSTER,
            checkpoint_path=str(checkpoint),
            output_dir=folder,
            on_event=lambda event, **fields: None,
        )
        samples = read_samples(folder)
        new = sum(len(s["tokens"]) - s["num_prompt_tokens"] for s in samples)
        calls = sum(s["num_model_calls"] for s in samples)
        assert point["figures"]["tokens_per_forward"] == pytest.approx(new / calls)
        assert 0.0 <= point["figures"]["local_choice/acc"] <= 1.0
        assert point["figures"]["generative_perplexity"] > 1.0
    speeds = [point["figures"]["tokens_per_forward"] for point in found["points"]]
    assert len(set(speeds)) > 1
    qualities = [point["figures"]["generative_perplexity"] for point in found["points"]]
    allowed = [s for s, q in zip(speeds, qualities, strict=True) if q <= 1.5 * min(qualities)]
    assert found["chosen"]["figures"]["tokens_per_forward"] == max(allowed)
    assert (tmp_path / "out" / "frontier.png").is_file()

    # What was measured before a kill is not measured again.
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("all is measured already")

    monkeypatch.setattr("tokendiff.cluster.frontier.generate", never)
    (tmp_path / "out" / "MANIFEST.json").unlink()
    (tmp_path / "out" / "run" / "frontier.unfinished").touch()
    assert measure(config, checkpoint, tmp_path / "out") == found
    assert load_manifest(tmp_path / "out").kind == "frontier"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"over": {"denoising_step": [1]}}, "did you mean 'denoising_steps'"),
        ({"over": {"denoising_steps": [0]}}, "a combination cannot be"),
        ({"samplers": ["dflash"], "over": {}}, "needs a draft"),
        ({"quality": "accuracy"}, "TASK/METRIC"),
        ({"tasks": [], "quality": "a/acc"}, "TASK/METRIC"),
        ({"samplers": []}, "at least 1"),
    ],
)
def test_a_section_that_cannot_be(fields: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        frontier_config("folder", **fields)


def test_points_are_every_combination_that_a_sampler_has() -> None:
    config = frontier_config("folder", samplers=[SDAR, "ar"], seq_len=None)
    assert [point.name for point in config.points] == ["sdar"] * 4 + ["ar"]
    pairs = {(p.denoising_steps, p.confidence_threshold) for p in config.points[:4]}
    assert pairs == {(1, 0.0), (1, 0.9), (4, 0.0), (4, 0.9)}
    assert all(point.max_new_tokens == 8 for point in config.points[:4])


@pytest.mark.usefixtures("in_this_process")
def test_a_sampler_that_does_not_fit_is_said(
    checkpoints: dict[str, Path],
    tasks_path: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(InputError, match="sampler 'sdar'"):
        measure(frontier_config(tasks_path), checkpoints["mdlm"], tmp_path)
