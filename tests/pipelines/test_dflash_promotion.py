"""Drafts that become champions: decoded beside their target, judged on the same prompts, served."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.builders import promote_stage
from pipelines.graph import Variant, pipeline_stages
from pipelines.promotion import _served_with, sampling_fields
from pipelines.runner import plan, run_pipeline, run_variants
from pipelines.schedule import Selection
from pipelines.stage import Stage
from tests import ROOT
from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.cluster.test_dflash_job import V, save_target
from tests.models.test_completion import block_checkpoint
from tokendiff.artifacts.manifest import commit
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.loader import load_config
from tokendiff.config.pipeline import Config, TrackingConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.errors import InputError
from tokendiff.evaluation.paired import paired_standard_error, read_rows
from tokendiff.models.completion import CompletionModel
from tokendiff.tracking.registry import Registry
from tokendiff.training.run import train_in_process

PIPELINES = ROOT / "pipelines"
CHAMPION = "models:/toy-draft@champion"
LENGTH = 16
# The text of the target alone, token for token.
SAMPLER = {"name": "dflash", "max_new_tokens": 12, "temperature": 0.8, "draft_temperature": 0.0}


class Bench:
    """A target, rows, drafts of it, and the end of pipelines/dflash.yaml from `decode` on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, str(save_target(folder / "target" / "final"))
        self.data = token_folder(
            folder / "data",
            files=[random_rows(40, LENGTH)],
            heldout=random_rows(6, LENGTH, seed=1),
            max_length=LENGTH,
            tokenizer=letter_tokenizer(V),
        )

    def draft(self, seed: int, steps: int) -> Path:
        config = TrainConfig.model_validate(
            {
                "objective": {
                    "name": "dflash",
                    "num_anchors": 4,
                    "block_size": 4,
                    "draft_num_layers": 2,
                },
                "target_model_id": self.target,
                "max_train_steps": steps,
                "learning_rate": 5e-3,
                "logging_steps": 50,
                "seed": seed,
            }
        )
        data = TokenData.open(self.data, split="train")
        return train_in_process(config, data, self.folder / f"draft-{seed}")

    def pipeline(self, draft: Path, **sections: Any) -> Config:
        """With checkpoints by path where the file has stages."""
        text = yaml.safe_load((PIPELINES / "dflash.yaml").read_text())
        stages, data = text["stages"], {"data_path": str(self.data)}
        for name in ("corpus", "answers", "texts", "draft"):
            stages.pop(name, None)
        of_target = {"target_model_id": self.target}
        stages["decode"] = {
            "kind": "generate",
            "config": {**of_target, "draft_model_id": str(draft), "measure_speedup": True},
        }
        stages["judge"] = {
            "kind": "evaluate",
            "inputs": {"samples": "decode"},
            "config": {**data, "checkpoint_path": str(draft)},
        }
        stages["decode-champion"]["config"] = {**of_target, "draft_model_id": CHAMPION}
        stages["judge-champion"]["inputs"].pop("data")
        stages["judge-champion"]["config"] = {**data, "checkpoint_path": CHAMPION}
        fields = {
            "name": "toy",
            "root": str(self.folder / "root"),
            "generate": {"prompt": ["abc", "fed", "ba", "cad"], "sampler": SAMPLER},
            "promote": {**text["promote"], "registered_model": "toy-draft"},
            "stages": stages,
            "cluster": {"cpus_per_worker": 0.5, "threads_per_worker": 1},
            "runner": {"max_parallel": 1},
        }
        return Config.model_validate({**fields, **sections})

    def run(self, config: Config) -> Any:
        return run_pipeline(config, Path(config.root))

    def crown(self, draft: Path) -> Any:
        """Promote a draft as the first champion, by an evaluation that says nothing else."""
        config = self.pipeline(draft)
        base = Path(config.root) / "toy"

        def act(stage: Stage, log: Any) -> None:
            stage.folder.mkdir(parents=True, exist_ok=True)
            figures = {"metrics": {"acceptance_length_mean": 1.0}, "rows": "none"}
            commit(stage.folder, kind="evaluation", metadata={**figures, "checkpoint": str(draft)})

        judge = Stage(
            name="crown",
            kind="evaluate",
            settings={"draft": str(draft)},
            base=base,
            action=act,
            result=lambda stage: {},
            is_keyed=True,
            needs_ray=False,
        )
        promote = promote_stage(config, base, inputs={"candidate": judge}, is_keyed=True)
        variant = Variant(values={}, stages=[judge, promote])
        root = Path(config.root)
        return run_variants(config, root, [variant], Selection()).of("promote").result


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
def test_a_draft_is_judged_beside_the_champion_and_served_with_its_target(
    bench: Bench,
    in_this_process: None,
    load_served: Callable[[str, str], Any],
) -> None:
    first, second = bench.draft(seed=0, steps=1), bench.draft(seed=1, steps=1)
    assert bench.crown(first)["version"] == 1
    config = bench.pipeline(second)
    record = bench.run(config)
    (verdict,) = record.of("promote").result["gate"]
    assert record.state == ("succeeded" if verdict.endswith(": passed") else "rejected")
    registry = Registry(config.tracking, Path(config.root))
    model = registry.open("models:/toy-draft/1")
    assert model is not None
    folder = Path(config.root) / "toy"
    stages = {stage.name: stage for stage in pipeline_stages(config, folder, {CHAMPION: model})}
    rows, others = (
        read_rows(stages[name].folder, "acceptance_length_mean")
        for name in ("judge", "judge-champion")
    )
    assert rows is not None
    assert others is not None
    assert len(rows["row_id"]) == 16
    error = paired_standard_error("acceptance_length_mean", rows, others)
    means = [side["num_accepted"].sum() / side["num_blocks"].sum() for side in (rows, others)]
    assert f"acceptance_length_mean {means[0]:.6g}, higher than the champion's" in verdict
    assert f"difference {means[0] - means[1]:.3g} ± {error:.2g}: " in verdict
    is_better = means[0] - means[1] > 2 * error
    assert registry.holder("toy-draft", "champion") == 1 + is_better

    # What is served is the target's own text, from files of its own.
    from tokendiff.tracking.mlflow_store import resolve_uri

    rows_to_write = [GenerationRow(id=place, prompt=p) for place, p in enumerate(("abc", "d"))]
    own = GenerateConfig.model_validate(
        {
            "model_id": bench.target,
            "sampler": {"name": "ar", "max_new_tokens": 12, "temperature": 0.8},
        }
    )
    expected = CompletionModel(own).sample(rows_to_write)
    shutil.move(bench.target, f"{bench.target}-away")
    try:
        store = resolve_uri(config.tracking, Path(config.root))
        served = load_served(store, "models:/toy-draft/1")
        answers = served.predict([{"prompt": "abc"}, {"prompt": "d"}])
    finally:
        shutil.move(f"{bench.target}-away", bench.target)
    assert [answer["text"] for answer in answers] == [record["text"] for record in expected]
    calls = [record["num_model_calls"] for record in expected]
    assert sum(answer["num_model_calls"] for answer in answers) <= sum(calls)


def test_the_first_plan_leaves_the_champion_out(tmp_path: Path) -> None:
    for name, model in (("dflash", "Qwen3-4B-DFlash"), ("dflash_offline", "tokendiff-draft")):
        config = load_config(PIPELINES / f"{name}.yaml")
        steps = {step.stage.title: step for step in plan(config, tmp_path).steps}
        assert steps["decode-champion"].why == f"there is no models:/{model}@champion yet"
        assert steps["judge-champion"].state == "skip"
        assert steps["promote"].state == "run"
        # Held-out prompts that replace the examples are not what the draft learns from.
        given = [f"generate.prompts=[{tmp_path}/heldout.txt]"]
        (tmp_path / "heldout.txt").write_text("a prompt\n")
        before = {s.stage.title: s.stage.key for s in plan(config, tmp_path).steps}
        after = {
            s.stage.title: s.stage.key
            for s in plan(load_config(PIPELINES / f"{name}.yaml", given), tmp_path).steps
        }
        changed = {title for title in before if before[title] != after[title]}
        assert changed == {"decode", "judge", "decode-champion", "judge-champion", "promote"}


SERVED = """\
generate: {sampler: {name: ar}}
stages:
  corpus: {kind: preprocess}
  model: {kind: train, inputs: {data: corpus}, config: {objective: ar}}
  draft: {kind: train, inputs: {data: corpus, target: model}, config: {objective: dflash}}
  judge: {kind: evaluate, inputs: {checkpoint: model, data: corpus}}
  promote: {kind: promote, inputs: {candidate: judge}}
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("", "", None),
        ("checkpoint: model", "checkpoint: draft", "'draft' trains with objective 'dflash' is to"),
        ("name: ar", "name: dflash", "'model' trains with objective 'ar' is to be served with the"),
    ],
)
def test_what_is_promoted_goes_with_what_it_is_served_with(
    tmp_path: Path, old: str, new: str, says: str | None
) -> None:
    path = tmp_path / "toy.yaml"
    path.write_text(SERVED.replace(old, new))
    config = load_config(path)
    if says is None:
        assert plan(config, tmp_path).steps
        return
    with pytest.raises(InputError, match=f"^stages.promote: what {says}"):
        plan(config, tmp_path)


def test_a_draft_that_would_not_be_served_is_not_registered(bench: Bench) -> None:
    draft = bench.draft(seed=2, steps=1)
    config = bench.pipeline(draft)
    assert config.generate is not None
    fields, target = _served_with(draft, config.generate)
    assert target == Path(bench.target)
    assert fields == {"sampler": SAMPLER}
    with pytest.raises(InputError, match=r"generate.sampler 'ancestral': .* is a DFlash draft"):
        _served_with(draft, GenerateConfig())
    with pytest.raises(InputError, match=r"generate.sampler 'dflash': .* is not a DFlash draft"):
        _served_with(Path(bench.target), config.generate)


@pytest.mark.parametrize(
    ("objective", "sampler", "says"),
    [
        ("block_refinement", "block_refinement", None),
        ("block_refinement", "ar", "predicts the token at its own position"),
        ("block_refinement", "ancestral", "decodes block by block; use sampler 'block_refinement'"),
        ("mdlm", "ancestral", None),
        ("mdlm", "sdar", "is a denoiser of whole rows"),
    ],
)
def test_a_model_that_its_sampler_does_not_go_with_is_not_registered(
    tmp_path: Path, objective: str, sampler: str, says: str | None
) -> None:
    of_blocks = ("block_length", "attention_mask_mode", "clean_context")
    process: dict[str, Any] = {} if objective == "block_refinement" else dict.fromkeys(of_blocks)
    checkpoint = block_checkpoint(tmp_path / "c", objective=objective, **process)
    section = GenerateConfig.model_validate({"sampler": {"name": sampler}})
    if says is None:
        assert _served_with(checkpoint, section) == ({"sampler": {"name": sampler}}, None)
        return
    with pytest.raises(InputError, match=says):
        _served_with(checkpoint, section)


def test_a_draft_is_a_version_anew_with_another_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, target = block_checkpoint(tmp_path / "draft"), save_target(tmp_path / "target")
    registry = Registry(TrackingConfig(), tmp_path)
    artifacts = str(tmp_path / "artifacts")
    experiment = registry._client.create_experiment("toy", artifact_location=artifacts)
    run_id = registry._client.create_run(experiment).info.run_id

    def save(folder: Path, *args: Any, **kwargs: Any) -> None:
        folder.mkdir()

    monkeypatch.setattr("tokendiff.tracking.registry.save_model", save)

    def version(target: Path | None) -> int:
        fields: dict[str, Any] = {"sampling": {"sampler": SAMPLER}, "trained_on": [], "tags": {}}
        return registry.register("draft", draft, run_id=run_id, target=target, **fields)

    assert [version(target), version(target), version(None), version(target)] == [1, 1, 2, 1]
    (target / "config.json").write_text((target / "config.json").read_text() + " ")
    assert version(target) == 3


def test_what_a_registered_model_keeps_of_the_section_is_a_section() -> None:
    """Served by itself: without prompts, fields that go with them alone have no effect."""
    given = {
        "model_id": "someone/else",
        "trust_remote_code": True,
        "prompts": ["prompts.jsonl"],
        "max_errors": 3,
        "num_samples": 2,
        "output_dir": "samples",
        "output_format": "parquet",
        "add_generation_prompt": True,
        "sampler": {"name": "ar", "max_new_tokens": 5},
    }
    kept = sampling_fields(GenerateConfig.model_validate(given))
    assert kept == {"sampler": {"name": "ar", "max_new_tokens": 5}}
    assert GenerateConfig.model_validate(kept)
    chat = sampling_fields(GenerateConfig.model_validate({**given, "use_chat_template": True}))
    assert chat["add_generation_prompt"]
