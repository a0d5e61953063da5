"""A frontier of a small checkpoint: its points are those of runs by themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.builders import tiny_causal
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.cluster.frontier import rule_of, run_frontier, samplers_of
from tokendiff.cluster.generate import generate
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.frontier import PERPLEXITY, FrontierConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.samplers import SDARSamplerConfig
from tokendiff.data.samples import read_samples
from tokendiff.errors import InputError
from tokendiff.evaluation.tasks.quality import quality_of
from tokendiff.training.trainer import OnEvent

pytest.importorskip("lm_eval", reason="the extra eval")

SDAR = {"name": "sdar", "max_new_tokens": 8, "temperature": 0.0}
SDAR_DRAWN = SDARSamplerConfig(name="sdar", max_new_tokens=4, temperature=0.7)
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
    }
    return FrontierConfig.model_validate({**common, **fields})


def measure(
    config: FrontierConfig,
    checkpoint: Path,
    output_dir: Path,
    on_event: OnEvent = lambda event, **fields: None,
) -> dict[str, Any]:
    return run_frontier(
        config,
        CLUSTER,
        title="toy",
        checkpoint_path=str(checkpoint),
        config_yaml="",
        output_dir=output_dir,
        on_event=on_event,
    ).metadata


@pytest.mark.slow
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
    # Nor by another rule of the same pipeline, which has its own folder.
    stricter = config.model_copy(update={"within": 0.0})
    assert measure(stricter, checkpoint, tmp_path / "other")["points"] == found["points"]
    timed = config.model_copy(update={"speed": "tokens_per_second"})
    with pytest.raises(AssertionError, match="all is measured already"):
        measure(timed, checkpoint, tmp_path / "timed")
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
        (
            {"quality": "generative_perplexity", "direction": "higher"},
            "is better when lower; remove it",
        ),
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


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_what_answers_a_task_is_also_sampled_and_promoted(
    checkpoints: dict[str, Path], tasks_path: str, tmp_path: Path
) -> None:
    """A section that leaves the temperature open: the task's text is not drawn, so nothing is."""
    config = frontier_config(
        tasks_path,
        samplers=[{"name": "sdar", "max_new_tokens": 4}],
        over={"denoising_steps": [1, 4]},
        tasks=["local_writing"],
        quality="local_writing/exact_match",
        prompt=["one and"],
        num_samples=3,
    )
    said: list[str] = []

    def on_event(event: str, **fields: Any) -> None:
        if event == "warning":
            said.append(fields["message"])

    found = measure(config, checkpoints["block_diffusion"], tmp_path / "out", on_event)
    assert [point["sampler"]["temperature"] for point in found["points"]] == [0.0, 0.0]
    assert found["chosen"]["sampler"]["temperature"] == 0.0
    for number in range(2):
        texts = {
            s["text"]
            for s in read_samples(tmp_path / "out" / "points" / f"{number:03d}" / "samples")
        }
        assert len(texts) == 1  # three samples of one prompt, and no chance in them
    assert (
        sum("asks for up to 6 tokens, and sampler 'sdar' has max_new_tokens 4" in m for m in said)
        == 2
    )
    given = config.model_copy(update={"samplers": [SDAR_DRAWN]})
    quality = quality_of(given)
    assert {point.temperature for point in samplers_of(given, quality)} == {0.7}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"quality": "local_choice/exact_match"},
            r"no such figure; they have local_choice/acc; did you mean 'local_choice/acc'",
        ),
        ({"quality": "local_choice/acc/strict"}, r"no such figure"),
        ({"direction": "lower"}, r"the task says that .*local_choice/acc is better when higher"),
        (
            {"tasks": ["local_text"], "quality": "local_text/bits_per_byte", "direction": "higher"},
            r"is better when lower",
        ),
    ],
)
@pytest.mark.usefixtures("in_this_process")
def test_a_quality_that_no_task_has_is_said_before_anything_runs(
    fields: Any, message: str, checkpoints: dict[str, Path], tasks_path: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        measure(frontier_config(tasks_path, **fields), checkpoints["block_diffusion"], tmp_path)
    assert not (tmp_path / "points").exists()


def test_the_direction_is_the_tasks(tasks_path: str) -> None:
    def is_lower_better(**fields: Any) -> bool:
        config = frontier_config(tasks_path, **fields)
        return rule_of(config, quality_of(config)).is_lower_better

    assert not is_lower_better()
    assert not is_lower_better(direction="higher")
    assert is_lower_better(tasks=["local_text"], quality="local_text/bits_per_byte")
    assert is_lower_better(tasks=[], tasks_path=None, max_task_documents=None, quality=PERPLEXITY)
    # Stages that compare by perplexity keep their keys.
    without = frontier_config(tasks_path, quality=PERPLEXITY)
    assert without.result_fields()["direction"] == "lower"


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_figures_of_other_settings_are_not_taken(
    checkpoints: dict[str, Path], tasks_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point is told by what it is of, not by its number; equal ones are read."""
    sampled: list[Any] = []

    def watched(config: GenerateConfig, *args: Any, **kwargs: Any) -> Any:
        sampled.append(config.sampler)
        return generate(config, *args, **kwargs)

    monkeypatch.setattr("tokendiff.cluster.frontier.generate", watched)

    def run(objective: str, **fields: Any) -> int:
        sampled.clear()
        output_dir = fields.pop("output_dir", "one")
        config = frontier_config(tasks_path, **fields)
        measure(config, checkpoints[objective], tmp_path / output_dir)
        return len(sampled)

    first = {"over": {"denoising_steps": [1, 2]}}
    assert run("block_diffusion", **first) == 2
    assert run("block_diffusion", **first) == 0
    assert run("block_diffusion", over={"denoising_steps": [1, 4]}) == 1
    assert [sampler.denoising_steps for sampler in sampled] == [4]
    assert run("block_diffusion", over={"denoising_steps": [1, 4]}, max_task_documents=3) == 2
    assert run("joint", over={"denoising_steps": [1, 4]}, max_task_documents=3) == 2
    assert run("joint", over={"denoising_steps": [2, 4]}, output_dir="another") == 2
    assert run("joint", over={"denoising_steps": [2, 4]}, seed=1, output_dir="third") == 2
    beside = {"over": {"denoising_steps": [2, 4]}, "output_dir": "another"}
    assert run("joint", max_task_documents=3, **beside) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_samples_without_a_time_are_drawn_again_where_speed_decides(
    checkpoints: dict[str, Path], tasks_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after all parts were there: the time that they took is lost."""
    config = frontier_config(tasks_path, over={}, speed="tokens_per_second")

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tokendiff.cluster.generate.commit", cut_off)
        with pytest.raises(KeyboardInterrupt):
            measure(config, checkpoints["block_diffusion"], tmp_path)
    assert (tmp_path / "points" / "000" / "samples" / "part-00000.jsonl").is_file()
    found = measure(config, checkpoints["block_diffusion"], tmp_path)
    assert found["points"][0]["figures"]["tokens_per_second"] > 0.0
    assert found["front"] == [0]
