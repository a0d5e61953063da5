"""Decoding with a draft as jobs.generate does it: models from folders, records, measurements."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tests.builders import generation_rows, letter_tokenizer, tiny_causal
from tokendiff.artifacts.locations import RemotePath
from tokendiff.artifacts.manifest import commit, publish
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.data.samples import read_samples
from tokendiff.errors import InputError
from tokendiff.evaluation.acceptance import speedup_metrics
from tokendiff.models.completion import CompletionModel, CompletionSetup
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import new_draft_config

V, BLOCK = 30, 4


def save_target(folder: Path, **changes: Any) -> Path:
    fields = {"num_hidden_layers": 6, "eos_token_id": 2, **changes}
    model = tiny_causal(vocab_size=V, **fields)
    model.float().save_pretrained(folder)
    letter_tokenizer(V).save_pretrained(folder)
    return folder


def save_draft(folder: Path, target: Path) -> Path:
    from transformers import AutoConfig

    config = new_draft_config(
        AutoConfig.from_pretrained(target),
        target_model_id=str(target),
        num_layers=2,
        block_size=BLOCK,
        mask_token_id=1,
    )
    torch.manual_seed(3)
    DFlashDraftModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("drafted")
    target = save_target(folder / "target")
    draft = save_draft(folder / "draft", target)
    return {"target_model_id": str(target), "draft_model_id": str(draft)}


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    (tmp_path / "one.txt").write_text("abc\nb\n")
    (tmp_path / "two.jsonl").write_text(json.dumps({"prompt": "hello"}) + "\n")
    return [str(tmp_path / "one.txt"), str(tmp_path / "two.jsonl")]


def config_of(models: dict[str, str], **fields: Any) -> GenerateConfig:
    sampler = {"name": "dflash", "max_new_tokens": 9, **fields.pop("sampler", {})}
    return GenerateConfig(**{**models, "sampler": sampler, "num_samples": 2, **fields})


def test_models_behind_uris_write_the_same(models: dict[str, str], prompts: list[str]) -> None:
    remote = {}
    for field, path in models.items():
        commit(Path(path), kind="checkpoint")
        publish(Path(path), target := RemotePath(f"memory://drafted/{field}"))
        remote[field] = target.uri
    rows = generation_rows(config_of(models, prompts=prompts))
    expected = CompletionModel(config_of(models, prompts=prompts)).sample(rows)
    records = CompletionModel(config_of(remote, prompts=prompts)).sample(rows)
    for here, there in zip(expected, records, strict=True):
        assert here["tokens"] == there["tokens"]
        assert here["blocks_by_gain"] == there["blocks_by_gain"]
    with pytest.raises(InputError, match=r"holds no checkpoint or tokenizer that tokendiff wrote"):
        CompletionModel(config_of({**remote, "draft_model_id": "memory://drafted/nothing"}))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_records_are_those_of_the_target_alone_and_say_what_blocks_came_to(
    models: dict[str, str], prompts: list[str], temperature: float
) -> None:
    sampler = {"temperature": temperature, **({"draft_temperature": 0.0} if temperature else {})}
    config = config_of(models, prompts=prompts, sampler=sampler)
    rows = generation_rows(config)
    alone = GenerateConfig(
        model_id=models["target_model_id"],
        sampler={"name": "ar", "max_new_tokens": 9, "temperature": temperature},  # type: ignore[arg-type]
    )
    expected = CompletionModel(alone).sample(rows)
    records = CompletionModel(config).sample(rows)
    assert [record["source"] for record in records] == ["one.txt"] * 4 + ["two.jsonl"] * 2
    for record, of_target in zip(records, expected, strict=True):
        for name in ("id", "prompt", "tokens", "text", "completion", "finish_reason"):
            assert record[name] == of_target[name]
        blocks = record["blocks_by_gain"]
        assert len(blocks) == BLOCK
        by_prefill = int(record["num_prompt_tokens"] > 1)
        gained = sum(length * count for length, count in enumerate(blocks, start=1))
        assert gained + by_prefill == len(record["tokens"]) - record["num_prompt_tokens"]
        assert sum(blocks) + by_prefill == record["num_model_calls"]


@pytest.mark.slow
@pytest.mark.parametrize("is_target_first", [True, False])
def test_both_sides_are_timed_on_the_same_rows(
    models: dict[str, str], prompts: list[str], is_target_first: bool
) -> None:
    sampler = {"draft_temperature": 0.0}
    config = config_of(models, prompts=prompts, measure_speedup=True, sampler=sampler)
    rows = generation_rows(config)
    model = CompletionModel(config)
    told: list[tuple[float, float]] = []
    records, measured = model.measured(
        rows,
        is_target_first=is_target_first,
        on_progress=lambda figures: told.append(figures()),
    )
    assert told == sorted(told)
    assert told[-1] == (len(rows), measured["new_tokens"] + measured["new_tokens_alone"])
    assert any(0 < done < len(rows) / 2 for done, _ in told)
    by_id = {record["id"]: record for record in records}
    timeless = [{**by_id[row.id], "seconds": 0} for row in rows]
    assert timeless == [{**record, "seconds": 0} for record in CompletionModel(config).sample(rows)]
    assert measured["rows"] == measured["same_rows"] == len(rows)
    assert measured["new_tokens"] == measured["new_tokens_alone"] > 0
    assert measured["seconds"] > 0.0
    assert measured["seconds_alone"] > 0.0


@pytest.mark.parametrize("is_target_first", [True, False])
def test_each_side_has_its_own_seconds(
    models: dict[str, str],
    prompts: list[str],
    is_target_first: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([1.0, 2.0])

    def timed(model: CompletionModel, work: Any) -> float:
        work()
        return next(seconds)

    monkeypatch.setattr(CompletionModel, "_timed", timed)
    config = config_of(models, prompts=prompts, sampler={"max_new_tokens": 2})
    rows = generation_rows(config)
    _, measured = CompletionModel(config).measured(rows, is_target_first=is_target_first)
    expected = {True: (1.0, 2.0), False: (2.0, 1.0)}[is_target_first]
    assert (measured["seconds_alone"], measured["seconds"]) == expected


def test_rows_that_differ_in_a_later_token_are_not_the_same(
    models: dict[str, str], prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = CompletionModel.samples

    def samples(model: CompletionModel, *args: Any, **options: Any) -> list[dict[str, Any]]:
        records = list(written(model, *args, **options))
        records[0]["tokens"][-1] += 1
        return records

    monkeypatch.setattr(CompletionModel, "samples", samples)
    sampler = {"draft_temperature": 0.0, "max_new_tokens": 4}
    config = config_of(models, prompts=prompts, sampler=sampler)
    rows = generation_rows(config)
    records, measured = CompletionModel(config).measured(rows, is_target_first=True)
    assert len(records[0]["tokens"]) - records[0]["num_prompt_tokens"] > 1
    assert measured["same_rows"] == len(rows) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_and_draft_are_held_in_the_precision_that_is_asked_for(
    models: dict[str, str], dtype: torch.dtype
) -> None:
    precision = "bf16" if dtype == torch.bfloat16 else "no"
    drafting: Any = CompletionModel(config_of(models, mixed_precision=precision))._model
    for model in (drafting._draft, drafting.target.model):
        assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_averaged_weights_of_a_draft_are_those_that_draft(
    models: dict[str, str], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(models["draft_model_id"], tmp_path / "draft"))
    averages = {name: w + 1 for name, w in load_file(folder / "model.safetensors").items()}
    save_file(averages, folder / "ema.safetensors")
    drafting: Any = CompletionModel(config_of({**models, "draft_model_id": str(folder)}))._model
    weights = dict(drafting._draft.named_parameters())
    assert averages.keys() <= weights.keys()
    assert all(torch.equal(weights[name], average) for name, average in averages.items())


def test_texts_of_drawn_proposals_are_not_compared(
    models: dict[str, str], prompts: list[str]
) -> None:
    """They have the target's distribution, but are other texts."""
    config = config_of(models, prompts=prompts)
    _, measured = CompletionModel(config).measured(generation_rows(config), is_target_first=True)
    assert "same_rows" not in measured
    assert "same_text_fraction" not in speedup_metrics(measured)


@pytest.mark.ray
def test_the_job_measures_and_goes_on_where_it_stopped(
    models: dict[str, str], prompts: list[str], tmp_path: Path, ray_session: None
) -> None:
    from tokendiff.cluster.generate import generate

    sampler = {"draft_temperature": 0.0}
    config = config_of(models, prompts=prompts, measure_speedup=True, batch_size=2, sampler=sampler)
    cluster = ClusterConfig(cpus_per_worker=0.5, threads_per_worker=1)
    folder = tmp_path / "samples"
    manifest = generate(
        config, cluster, checkpoint_path=None, output_dir=folder, on_event=lambda *_, **__: None
    )
    speculation = manifest.metadata["speculation"]
    assert speculation["acceptance_length_mean"] >= 1.0
    assert {"acceptance_length_mean/one.txt", "acceptance_length_mean/two.jsonl"} < set(speculation)
    assert sum(speculation[f"acceptance_share_{k}"] for k in range(1, BLOCK + 1)) == pytest.approx(
        1
    )
    assert speculation["speedup"] == pytest.approx(
        speculation["tokens_per_second_with_draft"] / speculation["tokens_per_second_alone"]
    )
    assert speculation["same_text_fraction"] == 1.0
    records = read_samples(folder)
    assert [record["id"] for record in records] == list(range(6))
    assert records[0]["source"] == "one.txt"


def test_sides_take_turns_and_another_target_under_the_same_name_makes_other_samples(
    models: dict[str, str],
    prompts: list[str],
    tmp_path: Path,
    in_this_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tokendiff.cluster.generate import generate

    target = shutil.copytree(models["target_model_id"], tmp_path / "target")
    config = config_of(
        {**models, "target_model_id": str(target)},
        prompts=prompts,
        measure_speedup=True,
        batch_size=2,
        sampler={"max_new_tokens": 2},
    )
    turns: list[bool] = []
    measured = CompletionModel.measured

    def noting(model: CompletionModel, rows: Any, *, is_target_first: bool, **options: Any) -> Any:
        turns.append(is_target_first)
        return measured(model, rows, is_target_first=is_target_first, **options)

    def run() -> dict[str, Any]:
        manifest = generate(
            config,
            ClusterConfig(),
            checkpoint_path=None,
            output_dir=tmp_path / "samples",
            on_event=lambda event, **fields: None,
        )
        return manifest.metadata

    monkeypatch.setattr(CompletionModel, "measured", noting)
    assert run()["speculation"]["speedup"] > 0.0
    assert turns == [True, False, True]
    (target / "config.json").write_text((target / "config.json").read_text() + " ")
    with pytest.raises(InputError, match="holds samples of another checkpoint, config or prompts"):
        run()


def test_what_makes_samples_comparable(models: dict[str, str], prompts: list[str]) -> None:
    from tokendiff.cluster.generate import _conditions

    def conditions(**fields: Any) -> str:
        return _conditions(config_of(models, **fields), ["rows"], "target")

    same = conditions()
    assert conditions(draft_model_id="another", batch_size=3, measure_speedup=True) == same
    for fields in ({"seed": 1}, {"num_samples": 3}, {"use_chat_template": True}):
        assert conditions(**fields) != same
    assert conditions(sampler={"temperature": 0.5}) != same
    for rows, target in ((["others"], "target"), (["rows"], "another")):
        assert _conditions(config_of(models), rows, target) != same


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_model_id": None}, "needs target_model_id.*and draft_model_id"),
        ({"draft_model_id": None}, "needs target_model_id.*and draft_model_id"),
        ({"draft_model_id": "TARGET"}, "is no DFlash draft"),
        ({"target_model_id": "DRAFT"}, "is a DFlash draft; give the model it drafts for"),
        ({"target_model_id": "WIDE"}, "hidden_size 32, the target 64"),
        ({"target_model_id": "FLAT"}, "num_target_layers 6, the target has 3"),
        ({"draft_model_id": "SHORT"}, "a block is the anchor and at least one token more"),
        ({"draft_model_id": "/nowhere"}, "draft_model_id '/nowhere' cannot be opened"),
    ],
)
def test_models_that_do_not_go_together_are_refused_before_a_weight_is_read(
    models: dict[str, str], tmp_path: Path, fields: dict[str, Any], says: str
) -> None:
    wide = {"hidden_size": 64}
    save_target(tmp_path / "WIDE", **wide)
    save_target(tmp_path / "FLAT", num_hidden_layers=3)
    short = tmp_path / "SHORT"
    short.mkdir()
    draft = json.loads((Path(models["draft_model_id"]) / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**draft, "block_size": 1}))
    named = {
        "TARGET": models["target_model_id"],
        "DRAFT": models["draft_model_id"],
        **{name: str(tmp_path / name) for name in ("WIDE", "FLAT", "SHORT")},
    }
    given = {name: named.get(value, value) for name, value in fields.items()}
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(InputError, match=says):
        CompletionSetup.of(config_of({**models, **given}), None)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sampler": {"name": "ar"}, "draft_model_id": "x"}, "draft_model_id 'x' has no effect"),
        (
            {"sampler": {"name": "ar"}, "measure_speedup": True},
            "measure_speedup True has no effect",
        ),
        ({"sampler": {"name": "dflash"}, "model_id": "x"}, "model_id 'x' has no effect"),
        (
            {"sampler": {"name": "dflash", "temperature": 0.0, "draft_temperature": 0.5}},
            "draft_temperature 0.5 has no effect with temperature 0",
        ),
    ],
)
def test_settings_without_effect_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        GenerateConfig(**fields)
