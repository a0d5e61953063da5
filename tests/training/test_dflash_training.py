"""Objectives ar and dflash end to end without Ray: workers, resuming, checkpoints, bad input."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from tests.builders import letter_tokenizer, random_rows, tiny_causal, token_folder
from tests.objectives import test_dflash as drafts
from tests.training.distributed import run_distributed
from tests.training.test_training import run
from tokendiff.artifacts.checkpoint import open_checkpoint
from tokendiff.artifacts.manifest import Manifest, load_manifest, verify
from tokendiff.artifacts.noise_process import NoiseProcess, objective_of
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.data.shard_index import ShardIndex
from tokendiff.data.tokenizers import build_tokenizer
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.errors import InputError
from tokendiff.evaluation.draft_acceptance import (
    DraftEvaluator,
    acceptance_figures,
    accuracy_figures,
    count_blocks,
)
from tokendiff.evaluation.evaluator import evaluation_rows
from tokendiff.evaluation.paired import read_rows
from tokendiff.models.checkpoints import load_autoregressive
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import plan_draft
from tokendiff.objectives.autoregressive import row_nats
from tokendiff.objectives.dflash import DFlash
from tokendiff.training.inputs import check_inputs

LENGTH = 16
DRAFT = {"name": "dflash", "num_anchors": 3, "block_size": 4, "draft_num_layers": 2}
LAYOUTS = pytest.mark.parametrize("layout", ["dflash", "dflash2"])


def runs_of(row: Any) -> list[int]:
    return [7, len(row) - 7] if len(row) > 8 else [len(row)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    rows = random_rows(40, LENGTH)
    rows[-1] = rows[-1][:5]
    rows[3] = rows[3][:2]  # too short for an anchor
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[rows],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(10, LENGTH, seed=1),
        runs_of=runs_of,
    )
    return TokenData.open(folder, split="train")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a target of six layers, and the tokenizer of the data."""
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def config(objective: str | dict[str, Any], **changes: Any) -> TrainConfig:
    fields = {
        "max_train_steps": 4,
        "global_batch_size": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "objective": objective,
    }
    if objective == "ar":
        fields["model_name_or_path"] = "builtin:qwen3-tiny"
    return TrainConfig.model_validate({**fields, **changes})


@pytest.mark.slow
def test_losses_do_not_depend_on_workers(data: TokenData, target: str, tmp_path: Path) -> None:
    def both(**changes: Any) -> list[TrainConfig]:
        few = {"max_train_steps": 3, **changes}
        return [config("ar", **few), config(DRAFT, target_model_id=target, **few)]

    alone = [run(cfg, data, tmp_path / f"{n}")[0] for n, cfg in enumerate(both())]
    assert [sorted(losses) for losses in alone] == [[1, 2, 3]] * 2
    parts = both(per_device_train_batch_size=3)
    in_parts = [run(cfg, data, tmp_path / f"parts{n}")[0] for n, cfg in enumerate(parts)]
    # One row at a time: the row without an anchor is a batch of its own, on one worker alone.
    single = both(per_device_train_batch_size=1)
    shared = [
        run_distributed([(c, tmp_path / f"{size}-{n}") for n, c in enumerate(single)], data, size)
        for size in (2, 4)
    ]
    for losses in (in_parts, *shared):
        for here, there in zip(losses, alone, strict=True):
            assert here == pytest.approx(there, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_losses_of_the_second_layout_do_not_depend_on_workers(
    sharding: str, data: TokenData, target: str, tmp_path: Path
) -> None:
    """The selector stands outside the layers, and its weights are read beside the head."""
    second = {**DRAFT, "draft_layout": "dflash2"}
    few = {"target_model_id": target, "max_train_steps": 3, "per_device_train_batch_size": 2}
    alone = run(config(second, **few), data, tmp_path / "alone")[0]
    shared = config(second, sharding=sharding, **few)
    (losses,) = {
        tuple(sorted(losses.items()))
        for losses in run_distributed([(shared, tmp_path / "shared")], data, 2)
    }
    assert dict(losses) == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
@LAYOUTS
def test_dpace_losses_do_not_depend_on_micro_batches(
    layout: str, data: TokenData, target: str, tmp_path: Path
) -> None:
    """Rows with few anchors and with many count by their blocks, however they are put together."""
    losses = []
    for rows in (8, 3, 1):
        cfg = config(
            {**DRAFT, "draft_layout": layout, "loss_type": "dpace", "dpace_alpha": 0.4},
            target_model_id=target,
            max_train_steps=2,
            per_device_train_batch_size=rows,
        )
        losses.append(run(cfg, data, tmp_path / f"{rows}")[0])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_step_that_has_nothing_to_learn_from_is_a_step(target: str, tmp_path: Path) -> None:
    folder = token_folder(
        tmp_path / "data",
        files=[[[5, 6]] * 8],
        max_length=8,
        tokenizer=letter_tokenizer(),
    )
    short = TokenData.open(folder, split="train")
    losses, events = run(
        config(DRAFT, target_model_id=target, max_train_steps=1), short, tmp_path / "run"
    )
    assert losses == {1: 0.0}
    assert [event["grad_norm"] for event in events if event["event"] == "metrics"] == [0.0]


@pytest.mark.slow
@LAYOUTS
def test_resuming_is_exact_and_a_draft_goes_on(
    layout: str, data: TokenData, target: str, tmp_path: Path
) -> None:
    cfg = config({**DRAFT, "draft_layout": layout}, target_model_id=target)
    losses, events = run(cfg, data, tmp_path / "whole")
    metrics = [event for event in events if event["event"] == "metrics"]
    assert all(1.0 <= event["expected_acceptance_length"] <= 4.0 for event in metrics)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "cut/checkpoint-2")
    resumed, _ = run(cfg, data, tmp_path / "cut")
    assert resumed == {step: loss for step, loss in losses.items() if step > 2}
    weights = [load_file(tmp_path / n / "final/model.safetensors") for n in ("whole", "cut")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    # A draft that was trained is where another run starts.
    onward = config(
        {"name": "dflash", "num_anchors": 3},
        target_model_id=target,
        draft_model_id=str(tmp_path / "whole/final"),
        learning_rate=1e-9,
        ema_decay=0.0,
    )
    run(onward, data, tmp_path / "onward")
    after = load_file(tmp_path / "onward/final/model.safetensors")
    for name, value in weights[0].items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_draft_learns(data: TokenData, target: str, tmp_path: Path) -> None:
    learning = config(
        {**DRAFT, "num_anchors": 8},
        target_model_id=target,
        max_train_steps=60,
        learning_rate=5e-3,
        checkpointing_steps=100,
        logging_steps=10,
    )
    _, events = run(learning, data, tmp_path)
    lengths = [e["expected_acceptance_length"] for e in events if e["event"] == "metrics"]
    assert lengths[0] < 1.6
    assert lengths[-1] > 2.2


@pytest.mark.slow
def test_training_logs_what_is_accepted_on_held_out_rows(
    data: TokenData, target: str, tmp_path: Path
) -> None:
    """At the end it is what the evaluation finds of the checkpoint, averaged weights and all."""
    cfg = config({**DRAFT, "num_anchors": 64}, target_model_id=target, learning_rate=5e-3)
    losses, events = run(cfg, data, tmp_path / "measured")
    lengths = [e["heldout_acceptance_length"] for e in events if e["event"] == "metrics"]
    assert len(lengths) == cfg.max_train_steps
    judge = DraftEvaluator(tmp_path / "measured" / "final", EvaluateConfig(), device="cpu")
    heldout = TokenData.open(data.folder, split="heldout")
    places = evaluation_rows(heldout, seed=0, max_rows=None)
    figures = acceptance_figures(judge.acceptance(heldout.read(*places))["blocks"])
    assert lengths[-1] == pytest.approx(figures["expected_acceptance_length"])
    # It changes nothing in what is trained, and needs no held-out rows.
    nothing = ShardIndex.of(Manifest(kind="tokens", metadata={"splits": {}}), "heldout")
    alone = dataclasses.replace(data, shards={**data.shards, "heldout": nothing})
    again, events = run(cfg, alone, tmp_path / "alone")
    assert again == losses
    assert not any("heldout_acceptance_length" in event for event in events)


@pytest.mark.slow
def test_a_draft_checkpoint_is_the_published_layout(
    data: TokenData, target: str, tmp_path: Path
) -> None:
    run(config(DRAFT, target_model_id=target), data, tmp_path)
    final = open_checkpoint(tmp_path / "final")
    verify(final, kind="checkpoint")
    assert objective_of(final) == "dflash"
    fields = json.loads((final / "config.json").read_text())
    assert (fields["model_type"], fields["architectures"]) == ("qwen3", ["DFlashDraftModel"])
    assert (fields["block_size"], fields["num_target_layers"]) == (4, 6)
    assert fields["dflash_config"] == {"target_layer_ids": [1, 3], "mask_token_id": 1}
    names = set(load_file(final / "model.safetensors"))
    assert not any("conv" in name or "selector" in name for name in names)
    assert {"fc.weight", "hidden_norm.weight", "norm.weight"} <= names
    assert not any("embed" in name or "lm_head" in name for name in names)
    assert not (final / "scheduler_config.json").exists()
    with pytest.raises(InputError, match=r"a DFlash draft.*sampler 'dflash'"):
        NoiseProcess.load(final)

    draft = AutoModel.from_pretrained(final, trust_remote_code=False)
    assert isinstance(draft, DFlashDraftModel)
    model: Any = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(final)
    prompt = tokenizer("abcde", return_tensors="pt")["input_ids"]
    own = model.generate(prompt, do_sample=False, max_new_tokens=12)
    drafted = model.generate(
        prompt,
        do_sample=False,
        max_new_tokens=12,
        assistant_model=draft,
        speculation_type="dflash",
    )
    assert torch.equal(own, drafted)


@pytest.mark.slow
def test_a_draft_of_the_second_layout_learns_and_is_judged_by_its_paths(
    data: TokenData, target: str, tmp_path: Path
) -> None:
    """Loss and the selector's own part fall; the checkpoint is in the published layout, and what
    the evaluation finds of it is what training logged last.
    """
    second = {**DRAFT, "draft_layout": "dflash2", "num_anchors": 64}
    cfg = config(second, target_model_id=target, max_train_steps=16, learning_rate=5e-3)
    cfg = cfg.model_copy(update={"checkpointing_steps": 100})
    losses, events = run(cfg, data, tmp_path)
    metrics = [event for event in events if event["event"] == "metrics"]
    assert losses[16] < 0.9 * losses[1]
    assert metrics[-1]["selector_nll"] < metrics[0]["selector_nll"]
    assert all(0.0 < event["selector_recall"] <= 1.0 for event in metrics)
    final = open_checkpoint(tmp_path / "final")
    fields = json.loads((final / "config.json").read_text())
    assert fields["architectures"] == ["DFlash2DraftModel"]
    assert fields["dflash_config"] == {
        "target_layer_ids": [1, 3],
        "mask_token_id": 1,
        "block_size": 4,
        "conv_kernel_size": 2,
        "conv_group_size": 16,
        "selector_rank": 256,
        "selector_top_k": 16,
    }
    weights = load_file(final / "model.safetensors")
    assert weights["candidate_selector.successor_codebook"].any()
    assert weights["layers.1.mlp_conv.kernel_projection.weight"].any()
    judge = DraftEvaluator(final, EvaluateConfig(), device="cpu")
    heldout = TokenData.open(data.folder, split="heldout")
    places = evaluation_rows(heldout, seed=0, max_rows=None)
    figures = acceptance_figures(judge.acceptance(heldout.read(*places))["blocks"])
    last = [event["heldout_acceptance_length"] for event in metrics][-1]
    assert last == pytest.approx(figures["expected_acceptance_length"])


@pytest.mark.slow
def test_the_ablation_reads_embeddings_and_is_as_large(
    data: TokenData, target: str, tmp_path: Path
) -> None:
    ablated = config({**DRAFT, "use_target_hidden_states": False}, target_model_id=target)
    run(ablated, data, tmp_path / "ablated")
    run(config(DRAFT, target_model_id=target), data, tmp_path / "draft")
    drafts = [AutoModel.from_pretrained(tmp_path / n / "final") for n in ("ablated", "draft")]
    assert drafts[0].config.target_layer_ids == [-1, -1]
    sizes = [{name: value.shape for name, value in draft.state_dict().items()} for draft in drafts]
    assert sizes[0] == sizes[1]
    # In training it is given the embeddings, and transformers' generator gives it the same.
    from tokendiff.models.dflash.trainee import DraftTrainee

    model: Any = AutoModelForCausalLM.from_pretrained(target)
    tokens = torch.arange(6)[None]
    context = DraftTrainee(drafts[0], model).read(tokens, torch.arange(6)[None])
    assert torch.equal(context, torch.cat([model.model.embed_tokens(tokens)] * 2, dim=-1))


@pytest.mark.slow
def test_ar_checkpoints_open_as_causal_models_and_have_no_noise(
    data: TokenData, tmp_path: Path
) -> None:
    run(config("ar", max_train_steps=30, learning_rate=3e-3), data, tmp_path)
    final = open_checkpoint(tmp_path / "final")
    assert objective_of(final) == "ar"
    assert not (final / "scheduler_config.json").exists()
    with pytest.raises(InputError, match=r"objective 'ar' has no noise.*sampler 'ar'"):
        NoiseProcess.load(final)
    # Exact: transformers' own loss on each document alone.
    denoiser, _ = load_autoregressive(final)
    rows = TokenData.open(data.folder, split="heldout").read(np.zeros(10, int), np.arange(10))
    batch = TokenBatch.of_rows(*map(torch.as_tensor, (rows.tokens, rows.lengths, rows.is_start)))
    nats, counts = row_nats(denoiser, batch)
    model: Any = AutoModelForCausalLM.from_pretrained(final)
    for row in range(10):
        expected = 0.0
        for part in batch.tokens[row].split(runs_of(batch.tokens[row])):
            output = model(input_ids=part[None], labels=part[None])
            expected += output.loss.item() * (len(part) - 1)
        assert nats[row].item() == pytest.approx(expected, rel=1e-5)
        assert counts[row].item() == LENGTH - 2
    assert nats.sum() / counts.sum() < 2.3  # ln 12 is 2.48


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "set target_model_id"),
        ({"target_model_id": "nowhere"}, "'nowhere' cannot be opened"),
        ({"target_model_id": "T", "objective": {**DRAFT, "block_size": 32}}, "block of 32 tokens"),
        (
            {"target_model_id": "T", "objective": {**DRAFT, "draft_num_layers": 4}},
            "draft_num_layers 4.*at least 7 layers; it has 6",
        ),
        ({"target_model_id": "T", "objective": {**DRAFT, "mask_token_id": 20}}, "id 20.*frozen"),
        ({"target_model_id": "T", "draft_model_id": "T"}, "no DFlash draft"),
        ({"target_model_id": "short"}, "takes at most 8 tokens; max_length is 16"),
        ({"target_model_id": "other"}, "not made with the tokenizer of target_model_id"),
    ],
)
def test_bad_input_is_named_before_a_weight_is_read(
    changes: dict[str, Any], message: str, data: TokenData, target: str, tmp_path: Path
) -> None:
    short = Qwen3Config.from_pretrained(target, max_position_embeddings=8)
    short.save_pretrained(tmp_path / "short")
    Qwen3Config.from_pretrained(target).save_pretrained(tmp_path / "other")
    letter_tokenizer(18).save_pretrained(tmp_path / "other")
    folders = {"T": target, "short": str(tmp_path / "short"), "other": str(tmp_path / "other")}
    places = {name: folders.get(value, value) for name, value in changes.items() if name[-1] == "d"}
    objective = changes.get("objective", DRAFT)
    if "draft_model_id" in changes:
        objective = "dflash"
    with pytest.raises(InputError, match=message):
        check_inputs(config(objective, **places), data)


# A target without a mask token.


def bare_target(folder: Path, num_embeddings: int) -> tuple[str, Any]:
    """A target of 19 tokens, none of them a mask, and the tokenizer that jobs.preprocess makes."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: index for index, token in enumerate(["[END]", "[UNK]", *"abcdefghijklmno"])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    own = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[END]", unk_token="[UNK]")
    own.add_tokens(["<repo>", "<file>"], special_tokens=True)
    own.save_pretrained(folder)
    model = tiny_causal(vocab_size=num_embeddings, num_hidden_layers=6, eos_token_id=0)
    model.float().save_pretrained(folder)
    tokenizer, notes = build_tokenizer(str(folder), documents=(), vocab_size=400)
    assert notes == ["the tokenizer has no mask token; added [MASK] as id 19"]
    return str(folder), tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_embeddings", "mask", "says"),
    [
        (24, 19, None),  # padded: what jobs.preprocess added has a row
        (19, 17, "no mask token: id 17 (<repo>), a special token that has no part to play"),
        (18, 17, "no mask token: id 17 (<repo>), a special token that has no part to play"),
    ],
)
def test_a_draft_of_a_target_without_a_mask_token_trains(
    num_embeddings: int, mask: int, says: str | None, tmp_path: Path
) -> None:
    name, tokenizer = bare_target(tmp_path / "target", num_embeddings)
    rows = [[2 + token % 12 for token in row] for row in random_rows(16, LENGTH)]
    folder = token_folder(tmp_path / "data", files=[rows], max_length=LENGTH, tokenizer=tokenizer)
    data = TokenData.open(folder, split="train")
    cfg = config(DRAFT, target_model_id=name, max_train_steps=2)
    check_inputs(cfg, data)
    losses, events = run(cfg, data, tmp_path / "run")
    assert all(np.isfinite(loss) for loss in losses.values())
    said = [event["message"] for event in events if event["event"] == "warning"]
    assert len(said) == (says is not None)
    assert all(str(says) in message for message in said)
    final = open_checkpoint(tmp_path / "run/final")
    fields = json.loads((final / "config.json").read_text())
    assert fields["dflash_config"]["mask_token_id"] == mask
    token = tokenizer.convert_ids_to_tokens(mask)
    recorded = load_manifest(final).metadata["mask"]
    assert recorded == {"mask_token_id": mask, "token": token}
    _, events = run(cfg.model_copy(update={"max_train_steps": 3}), data, tmp_path / "run")
    assert not [event for event in events if event["event"] == "warning"], "it is known by now"


def test_an_id_that_was_asked_for_is_the_mask(tmp_path: Path) -> None:
    name, tokenizer = bare_target(tmp_path, 19)
    asked = config({**DRAFT, "mask_token_id": 5}, target_model_id=name)
    plan = plan_draft(asked, tokenizer=tokenizer, max_length=LENGTH)
    assert (plan.draft.mask_token_id, plan.notes) == (5, ())


def test_rows_with_tokens_that_a_frozen_target_has_no_embedding_for_are_refused(
    tmp_path: Path,
) -> None:
    """A text may hold what is written like the mask token that was added."""
    name, tokenizer = bare_target(tmp_path / "target", 19)
    rows = [tokenizer("abcdefgh[MASK]")["input_ids"] for _ in range(4)]
    assert rows[0][-1] == 19
    for split, train_rows, heldout in (("train", rows, []), ("heldout", [[3] * 9] * 4, rows)):
        folder = token_folder(
            tmp_path / split,
            files=[train_rows],
            heldout=heldout,
            max_length=9,
            tokenizer=tokenizer,
        )
        data = TokenData.open(folder, split="train")
        assert data.highest_token() == 19
        with pytest.raises(InputError, match=r"up to id 19 \(\[MASK\]\), but .* has 19 embeddings"):
            check_inputs(config(DRAFT, target_model_id=name), data)


# What jobs.evaluate says of such checkpoints.


@pytest.mark.slow
def test_ar_checkpoints_and_drafts_are_judged_and_reported(
    in_this_process: None, data: TokenData, target: str, tmp_path: Path
) -> None:
    from tokendiff.cluster.evaluate import evaluate

    run(config("ar"), data, tmp_path / "ar")
    run(config(DRAFT, target_model_id=target), data, tmp_path / "draft")

    def judge(checkpoint: str, out: str, **fields: Any) -> tuple[dict[str, Any], str]:
        evaluate(
            EvaluateConfig(batch_size=4, **fields),
            ClusterConfig(cpus_per_worker=0.5),
            title="toy",
            checkpoint_path=str(tmp_path / checkpoint),
            data_path=None,
            samples_path=None,
            training_log=[{"step": 1, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 10.0}],
            config_yaml="name: toy\n",
            output_dir=tmp_path / out,
            on_event=lambda event, **fields: None,
        )
        page = (tmp_path / out / "report/index.html").read_text()
        return json.loads((tmp_path / out / "metrics.json").read_text()), page

    metrics, page = judge("ar/final", "of-ar")
    denoiser, _ = load_autoregressive(tmp_path / "ar/final")
    heldout = TokenData.open(data.folder, split="heldout")
    rows = heldout.read(np.zeros(10, int), np.arange(10))
    batch = TokenBatch.of_rows(*map(torch.as_tensor, (rows.tokens, rows.lengths, rows.is_start)))
    nats, counts = row_nats(denoiser, batch)
    assert metrics["nats_per_token"] == pytest.approx(float(nats.sum() / counts.sum()), rel=1e-6)
    assert (metrics["num_tokens"], metrics["num_bytes"], metrics["is_exact"]) == (140, 140, 1)
    assert "upper bound" not in page
    assert "Likelihood" in page

    metrics, page = judge("draft/final", "of-draft", num_anchors=100)
    # A row of two documents has whole blocks behind 3 and 5 anchors.
    assert (metrics["num_rows"], metrics["num_blocks"]) == (10, 80)
    shares = [metrics[f"expected_acceptance_share_{n}"] for n in range(1, 5)]
    assert sum(shares) == pytest.approx(1.0)
    mean = metrics["expected_acceptance_length"]
    assert mean == pytest.approx(sum(n * share for n, share in enumerate(shares, start=1)))
    at = [metrics[f"expected_acceptance_at_{n}"] for n in range(1, 4)]
    assert mean == pytest.approx(1.0 + sum(at))
    accuracy = [metrics[f"draft_accuracy_{n}"] for n in range(1, 4)]
    assert accuracy[0] == at[0]
    assert all(of_token >= of_prefix for of_token, of_prefix in zip(accuracy, at, strict=True))
    assert "Agreement with the text by place" in page
    by_row = read_rows(tmp_path / "of-draft", "expected_acceptance_length")
    assert by_row is not None
    assert sorted(by_row["row_id"]) == sorted(rows.row_ids)
    assert mean == pytest.approx(by_row["num_accepted"].sum() / by_row["num_blocks"].sum())
    assert "Expected acceptance length" in page
    # The averaged weights are what final/ holds, and what is judged of an earlier checkpoint.
    assert judge("draft/checkpoint-4", "of-4", num_anchors=100)[0] == metrics

    for checkpoint, fields, message in (
        ("draft/final", {"verify": True}, "has none; remove verify"),
        ("ar/final", {"target_model_id": target}, "goes with a DFlash draft"),
        ("draft/final", {"target_model_id": str(tmp_path / "ar/final")}, "is not a draft of"),
    ):
        with pytest.raises(InputError, match=message):
            judge(checkpoint, "refused", **fields)


def test_blocks_are_counted_as_a_plain_loop_counts_them() -> None:
    trainee, batch = drafts.taught_trainee(), drafts.some_batch()
    objective = DFlash(block_size=drafts.BLOCK, mask_token_id=drafts.MASK, num_anchors=99)
    generator = RowGenerator(keys=torch.arange(3))
    blocks, right = np.zeros((3, drafts.BLOCK)), np.zeros((3, drafts.BLOCK - 1))
    for row, _, _, is_right in drafts.plain_blocks(trainee):
        if len(is_right) == drafts.BLOCK - 1:
            blocks[row, [*is_right, False].index(False)] += 1
            right[row] += is_right
    found = count_blocks(objective, trainee, batch, generator)
    assert [counts.tolist() for counts in found] == [blocks.tolist(), right.tolist()]
    figures = accuracy_figures(right, blocks)
    in_all = [right[:, k].sum() / blocks.sum() for k in range(drafts.BLOCK - 1)]
    assert list(figures.values()) == pytest.approx(in_all)
    at = acceptance_figures(blocks.astype(int))
    assert figures["draft_accuracy_2"] > at["expected_acceptance_at_2"]


def test_acceptance_figures_are_those_of_the_blocks_one_by_one() -> None:
    blocks = np.array([[3, 1, 0, 2], [0, 0, 1, 1], [0, 0, 0, 0]])
    figures = acceptance_figures(blocks)
    lengths = [1, 1, 1, 2, 4, 4, 3, 4]
    assert figures["expected_acceptance_length"] == pytest.approx(np.mean(lengths))
    assert figures["expected_acceptance_share_4"] == pytest.approx(3 / 8)
    assert [figures[f"expected_acceptance_at_{n}"] for n in (1, 2, 3)] == [5 / 8, 4 / 8, 3 / 8]
    # Rows of one block each: the standard error is that of a plain mean.
    single = acceptance_figures(np.eye(4, dtype=int)[[0, 1, 3, 3, 2]])
    expected = np.std([1, 2, 4, 4, 3], ddof=1) / np.sqrt(5)
    assert single["expected_acceptance_length_standard_error"] == pytest.approx(expected)
    with pytest.raises(InputError, match="no row has room for a block of 4"):
        acceptance_figures(np.zeros((3, 4), dtype=int))
