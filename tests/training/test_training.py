"""The training loop without Ray: order of rows, workers, resuming, checkpoints, divergence."""

import copy
import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM

from tests.builders import letter_tokenizer, random_rows, save_ref, tiny_causal, token_folder
from tests.training.distributed import Losses, run_distributed
from tokendiff.artifacts.checkpoint import (
    ADAPTERS,
    committed_checkpoints,
    newest_sound_checkpoint,
    open_checkpoint,
)
from tokendiff.artifacts.identity import checkpoint_identity
from tokendiff.artifacts.manifest import load_manifest, verify
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.order import RowOrder, permutation
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import StepPlan, TokenData, TokenRows, step_batches
from tokendiff.diffusion.kernels import HybridKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import Cosine
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.models.adapters import adapter_tensors
from tokendiff.models.checkpoints import load_for_inference
from tokendiff.models.sampling import SamplingModel
from tokendiff.models.vocabulary import check_vocabulary
from tokendiff.objectives.token_noise import TokenNoiseDiffusion
from tokendiff.training.optimizer import Optimizer
from tokendiff.training.run import TrainingRun, step_plan, train_in_process
from tokendiff.training.trainer import Trainer
from tokendiff.training.world import World

Rows = list[tuple[int, int]]
LENGTH, ROWS_PER_STEP = 12, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    rows = random_rows(70, LENGTH)
    rows[-1] = rows[-1][:5]  # a short last row, padded in its batch
    files = [rows[:40], rows[40:]]
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=files,
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(10, LENGTH, seed=1),
    )
    return TokenData.open(folder, split="train")


def config(**changes: Any) -> TrainConfig:
    fields = {
        "model_name_or_path": "builtin:bert-tiny",
        "max_train_steps": 6,
        "global_batch_size": ROWS_PER_STEP,
        "per_device_train_batch_size": ROWS_PER_STEP,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "objective": {"name": "mdlm", "lambda_conf": 0.5, "conf_temperature": 0.5},
    }
    return TrainConfig.model_validate({**fields, **changes})


def run(cfg: TrainConfig, data: TokenData, folder: Path) -> tuple[Losses, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    train_in_process(
        cfg,
        data,
        folder,
        on_event=lambda event, **fields: events.append({"event": event, **fields}),
    )
    losses = {e["step"]: e["loss"] for e in events if e["event"] == "metrics"}
    return losses, events


# The order of rows


def test_each_epoch_visits_each_row_once_in_an_order_of_its_own() -> None:
    order = RowOrder(row_group_sizes=(5, 16, 16, 3, 16), seed=3, window_rows=32)
    epochs, groups, rows = order.rows(0, 3 * 56)
    assert epochs.tolist() == [0] * 56 + [1] * 56 + [2] * 56
    everything = {(g, r) for g, size in enumerate(order.row_group_sizes) for r in range(size)}
    visits = [list(zip(groups[epochs == e], rows[epochs == e], strict=True)) for e in range(3)]
    assert all(len(visit) == 56 and set(visit) == everything for visit in visits)
    assert visits[0] != visits[1] != visits[2]


def test_any_stretch_of_the_order_can_be_asked_for() -> None:
    order = RowOrder(row_group_sizes=(5, 16, 16, 3, 16), seed=3, window_rows=20)
    whole = np.stack(order.rows(0, 200))
    for start, stop in ((0, 1), (55, 57), (17, 130), (111, 113), (199, 200)):
        assert np.array_equal(np.stack(order.rows(start, stop)), whole[:, start:stop])


def order_by_hand(sizes: list[int], seed: int, window_rows: int, epoch: int) -> Rows:
    """One epoch, as it has been from the first version on."""
    groups = permutation(key_from(seed, "row groups", epoch), len(sizes)).tolist()
    per_window = max(1, window_rows // max(sizes))
    rows: Rows = []
    for window, first in enumerate(range(0, len(sizes), per_window)):
        inside = [(g, r) for g in groups[first : first + per_window] for r in range(sizes[g])]
        shuffled = permutation(key_from(seed, "rows", epoch, window), len(inside)).tolist()
        rows += [inside[place] for place in shuffled]
    return rows


@pytest.mark.parametrize("window_rows", [1, 20, 40, 1000])
def test_the_order_is_that_of_the_first_version(window_rows: int) -> None:
    sizes = [5, 16, 16, 3, 16, 16, 1, 9]
    as_array = np.array(sizes, dtype=np.int32)
    order = RowOrder(row_group_sizes=as_array, seed=7, window_rows=window_rows)
    epochs, groups, rows = order.rows(0, 2 * sum(sizes))
    for epoch in range(2):
        found = zip(groups[epochs == epoch].tolist(), rows[epochs == epoch].tolist(), strict=True)
        assert list(found) == order_by_hand(sizes, 7, window_rows, epoch)


def test_an_order_is_handed_on_without_what_it_has_made() -> None:
    order = RowOrder(row_group_sizes=np.full(10_000, 16, dtype=np.int32), seed=0)
    before = order.rows(100, 200)
    pickled = pickle.dumps(order)
    assert len(pickled) < 4 * 10_000 + 1000
    assert np.array_equal(np.stack(pickle.loads(pickled).rows(100, 200)), np.stack(before))


def test_each_window_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(200, LENGTH)
    folder = token_folder(
        tmp_path / "data",
        files=[rows[:100], rows[100:]],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        row_group_rows=10,
    )
    data = TokenData.open(folder, split="train")
    read: list[int] = []
    read_group = TokenData.read_group

    def counted(self: TokenData, group: int) -> TokenRows:
        read.append(group)
        return read_group(self, group)

    monkeypatch.setattr(TokenData, "read_group", counted)
    # Windows of 40 rows, and steps of 9, of which none ends where a window does.
    order = RowOrder(row_group_sizes=data.row_group_sizes, seed=0, window_rows=40)
    plan = StepPlan(order=order, rows_per_step=9)
    batches = list(step_batches(data, plan, 0, 22))  # of the 200 rows 198
    assert sorted(read) == list(range(20))
    expected = order_by_hand(data.row_group_sizes.tolist(), 0, 40, 0)
    found = np.concatenate([batch["row_id"] for batch in batches]).tolist()
    assert found == [(g // 10 << 32) + g % 10 * 10 + r for g, r in expected[:198]]
    # What one task of Ray Data reads begins in the middle of a window, and ends in one.
    read.clear()
    (chunk,) = plan.chunks(2, 22)
    parts = list(plan.read(data, *chunk))
    assert len(parts) == 5
    assert sorted(read) == list(range(20))


def test_windows_bound_what_is_read_at_once() -> None:
    order = RowOrder(row_group_sizes=(16,) * 100, seed=0, window_rows=64)
    _, groups, _ = order.rows(0, 1600)
    for start in range(0, 1600, 64):
        assert len(set(groups[start : start + 64])) == 4
    assert len(set(groups[:64]) & set(range(4))) < 4  # the row groups themselves are shuffled


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_workers_share_each_step_without_overlap(data: TokenData, world_size: int) -> None:
    order = RowOrder(row_group_sizes=data.row_group_sizes, seed=0)
    plans = [
        StepPlan(order=order, rows_per_step=8, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    alone = StepPlan(order=order, rows_per_step=8)
    for start in (0, 5):
        expected = list(step_batches(data, alone, start, 20))
        shares = [list(step_batches(data, plan, start, 20)) for plan in plans]
        for step, whole in enumerate(expected):
            for plan, share in zip(plans, shares, strict=True):
                assert np.array_equal(share[step]["row_id"], whole["row_id"][plan.positions])
                assert np.array_equal(share[step]["tokens"], whole["tokens"][plan.positions])


def test_rows_arrive_as_written(data: TokenData) -> None:
    rows = random_rows(70, LENGTH)
    read = data.read(np.array([4, 0, 4]), np.array([13, 3, 0]))
    assert data.row_group_sizes.tolist() == [16, 16, 8, 16, 14]
    assert read.tokens[1].tolist() == rows[3]
    assert read.tokens[2].tolist() == rows[56]
    assert read.lengths.tolist() == [5, LENGTH, LENGTH]
    assert read.tokens[0].tolist() == rows[69][:5] + [0] * 7
    assert read.row_ids.tolist() == [(1 << 32) + 29, 3, (1 << 32) + 16]


# The loop


@pytest.mark.slow
def test_losses_do_not_depend_on_workers_or_micro_batches(data: TokenData, tmp_path: Path) -> None:
    alone, _ = run(config(), data, tmp_path / "1")
    assert sorted(alone) == [1, 2, 3, 4, 5, 6]
    small_passes, _ = run(config(per_device_train_batch_size=3), data, tmp_path / "micro")
    assert small_passes == pytest.approx(alone, rel=1e-5)
    for size in (2, 4):
        cfg = config(per_device_train_batch_size=1 if size == 2 else 2)
        (shared,) = run_distributed([(cfg, tmp_path / str(size))], data, size)
        assert shared == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_uneven_shares_are_still_one_mean(data: TokenData, tmp_path: Path) -> None:
    """7 rows on 2 workers: 4 and 3; averaging the workers' means would be off."""
    cfg = config(global_batch_size=7, max_train_steps=3)
    alone, _ = run(cfg, data, tmp_path / "1")
    (shared,) = run_distributed([(cfg, tmp_path / "2")], data, 2)
    assert shared == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_twice_is_identical_and_the_seed_matters(data: TokenData, tmp_path: Path) -> None:
    first, _ = run(config(), data, tmp_path / "a")
    assert run(config(), data, tmp_path / "b")[0] == first
    assert run(config(seed=1), data, tmp_path / "c")[0] != first


def test_the_commit_of_a_hub_model_is_recorded(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    model = BertForMaskedLM(
        BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1,
                   num_attention_heads=1, intermediate_size=8)
    )  # fmt: skip
    model.save_pretrained(snapshot)
    save_ref(tmp_path / "models--some--model", "v1", "a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    named = config(model_name_or_path="some/model@v1")
    _, events = run(named, data, tmp_path / "out")
    (start,) = [event for event in events if event["event"] == "start"]
    assert start["commits"] == {"model_name_or_path": "a" * 40}
    assert load_manifest(tmp_path / "out/final").metadata["commits"] == start["commits"]


def test_gradients_are_scaled_and_clipped_as_torch_does_it() -> None:
    torch.manual_seed(0)
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    model, expected = (
        torch.nn.ParameterList([torch.zeros(5, 7, dtype=kind) for kind in kinds]) for _ in range(2)
    )
    optimizer = Optimizer(model, config())
    assert optimizer.clip_grad(1.0) == 0.0  # there is none yet
    for max_norm in (1.0, 1e-30, 1e6, float("inf")):
        for ours, theirs in zip(model, expected, strict=True):
            ours.grad = torch.randn(5, 7, dtype=ours.dtype)
            theirs.grad = ours.grad * 3
        optimizer.scale_grad(torch.tensor(3.0))
        norm = optimizer.clip_grad(max_norm)
        assert norm == torch.nn.utils.clip_grad_norm_(expected.parameters(), max_norm)
        for ours, theirs in zip(model, expected, strict=True):
            assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.slow
def test_adapters_go_on_with_the_commit_that_they_began_with(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    repository = tmp_path / "models--some--model"
    for seed, commit in enumerate(("a" * 40, "b" * 40)):
        model = tiny_causal(vocab_size=16, seed=seed, num_hidden_layers=1)
        model.float().save_pretrained(repository / "snapshots" / commit)
    save_ref(repository, "main", "a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cfg = config(model_name_or_path="some/model", lora_rank=2, objective={"name": "ar"})
    cfg = cfg.model_copy(update={"max_train_steps": 2, "checkpointing_steps": 1})
    losses, _ = run(cfg, data, tmp_path / "whole")
    save_ref(repository, "main", "b" * 40)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-1", tmp_path / "cut/checkpoint-1")
    resumed, events = run(cfg, data, tmp_path / "cut")
    assert resumed == {2: losses[2]}
    (start,) = [event for event in events if event["event"] == "start"]
    assert start["commits"] == {"model_name_or_path": "a" * 40}
    final = "final/model.safetensors"
    assert (tmp_path / "cut" / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
    anew, _ = run(cfg, data, tmp_path / "anew")
    assert anew[1] != losses[1]


@pytest.mark.slow
def test_dropout_too_is_repeatable(data: TokenData, tmp_path: Path) -> None:
    first, _ = run(config(dropout=0.2), data, tmp_path / "a")
    torch.manual_seed(99)
    assert run(config(dropout=0.2), data, tmp_path / "b")[0] == first
    assert first != run(config(), data, tmp_path / "c")[0]


def test_noise_differs_between_epochs_and_dropout_between_passes(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps that each read all rows, in two passes."""
    keys: list[int] = []
    seeds: list[int] = []
    loss = Trainer._loss

    def noting(trainer: Trainer, batch: Any, generator: RowGenerator, model: Any) -> Any:
        keys.extend(generator.keys.tolist())
        seeds.append(torch.initial_seed())
        return loss(trainer, batch, generator, model)

    monkeypatch.setattr(Trainer, "_loss", noting)
    cfg = config(
        dropout=0.1, max_train_steps=2, global_batch_size=70, per_device_train_batch_size=35
    )
    run(cfg, data, tmp_path)
    assert (len(keys), len(set(keys))) == (140, 140)
    assert (len(seeds), len(set(seeds))) == (4, 4)


def test_the_gradient_norm_is_that_of_the_mean_over_a_steps_tokens(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before clipping; found once more with copies of the model."""
    norms: list[float] = []
    loss = Trainer._loss

    def noting(trainer: Trainer, batch: Any, generator: RowGenerator, model: Any) -> Any:
        twin = copy.deepcopy(model)
        output = trainer.objective.loss(twin, batch, generator)
        (output.loss_sum / output.num_tokens).backward()
        squares = [p.grad.square().sum() for p in twin.parameters() if p.grad is not None]
        norms.append(float(torch.stack(squares).sum().sqrt()))
        return loss(trainer, batch, generator, model)

    monkeypatch.setattr(Trainer, "_loss", noting)
    _, events = run(config(max_train_steps=2, max_grad_norm=0.01), data, tmp_path)
    found = [event["grad_norm"] for event in events if event["event"] == "metrics"]
    assert found == pytest.approx(norms, rel=1e-4)
    assert min(norms) > 0.01, "or nothing is clipped"


class _Killed(Exception):
    pass


def die_at_checkpoint(step: int) -> Any:
    def die(event: str, **fields: Any) -> None:
        if event == "checkpoint" and fields["step"] == step:
            raise _Killed

    return die


def shifted_tokenizer() -> Any:
    """The letters of `letter_tokenizer`, each one id further."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index + 1 for token, index in letter_tokenizer().get_vocab().items()}
    inner = Tokenizer(models.WordLevel({"new": 0, **vocabulary}, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]")


@pytest.mark.slow
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(
    data: TokenData, tmp_path: Path, logging_steps: int
) -> None:
    cfg = config(max_train_steps=9, checkpointing_steps=4, logging_steps=logging_steps, dropout=0.1)
    expected, _ = run(cfg, data, tmp_path / "whole")
    cut = tmp_path / "cut"
    seen: Losses = {}

    def die_after_checkpoint(event: str, **fields: Any) -> None:
        if event == "metrics":
            seen[fields["step"]] = fields["loss"]
        if event == "checkpoint" and fields["step"] == 8:
            # Step 8 was committed; then the newest checkpoint is damaged, so that 4 must be found.
            raise _Killed

    with pytest.raises(_Killed):
        train_in_process(cfg, data, cut, on_event=die_after_checkpoint)
    weights = cut / "checkpoint-8" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-100] ^= 1
    weights.write_bytes(bytes(damaged))

    resumed, events = run(cfg, data, cut)
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert len(warnings) == 1
    assert "checkpoint-8: model.safetensors does not match its MANIFEST (sha256" in warnings[0]
    assert next(e for e in events if e["event"] == "resume")["step"] == 4
    assert {**seen, **resumed} == expected
    whole, again = (
        load_for_inference(folder / "final")[0].state_dict() for folder in (tmp_path / "whole", cut)
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_finished_run_does_no_step_and_a_longer_one_goes_on(
    data: TokenData, tmp_path: Path
) -> None:
    run(config(), data, tmp_path)
    assert run(config(), data, tmp_path) == ({}, [])
    longer, events = run(config(max_train_steps=8), data, tmp_path)
    assert next(e for e in events if e["event"] == "resume")["step"] == 6
    assert sorted(longer) == [7, 8]
    # The rate follows the new end at once: cosine, 2 steps of warm-up, 6 of decay.
    rates = [e["lr"] for e in events if e["event"] == "metrics"]
    assert rates[0] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 4 / 6)))
    with pytest.raises(InputError, match=r"8 steps already; max_train_steps 6 is fewer"):
        run(config(), data, tmp_path)


def test_another_configuration_is_refused_and_nothing_is_lost(
    data: TokenData, tmp_path: Path
) -> None:
    run(config(), data, tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=r"learning_rate: 0\.001 there, 0\.002 here"):
        run(config(learning_rate=2e-3), data, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_progress_is_told_within_steps_and_changes_no_loss(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of many micro-batches may take minutes; resumed, it goes on where it was."""
    cfg = config(per_device_train_batch_size=3, max_train_steps=2, logging_steps=2)
    monkeypatch.setattr("tokendiff.training.trainer._TELL_SECONDS", math.inf)
    quiet, events = run(cfg, data, tmp_path / "quiet")
    assert sum(event["event"] == "progress" for event in events) == 1
    monkeypatch.setattr("tokendiff.training.trainer._TELL_SECONDS", 0.0)
    told, events = run(cfg, data, tmp_path / "told")
    assert told == quiet
    progress = [event for event in events if event["event"] == "progress"]
    parts = [0, 1 / 3, 2 / 3]
    assert [event["done"] for event in progress] == pytest.approx(
        [*parts, *(1 + part for part in parts), 2]
    )
    assert {(event["total"], event["unit"]) for event in progress} == {(2, "steps")}
    tokens = [event["tokens"] for event in progress]
    plan = step_plan(cfg, data, rank=0, world_size=1)
    lengths = next(step_batches(data, plan, 0, 2))["length"]
    assert tokens[:4] == [0, *np.cumsum(lengths)[[2, 5, 7]]]
    _, events = run(cfg.model_copy(update={"max_train_steps": 3}), data, tmp_path / "told")
    assert next(e for e in events if e["event"] == "progress")["done"] == 2


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_optimiser_step(
    data: TokenData, tmp_path: Path, poison: float
) -> None:
    cfg = config(checkpointing_steps=2)
    training: dict[str, TrainingRun] = {}
    events: list[str] = []

    def poison_after_step_3(event: str, **fields: Any) -> None:
        events.append(event)
        if event == "metrics" and fields["step"] == 3:
            model = training["run"].trainer.denoiser.model
            next(model.parameters()).data[:] = poison

    from tokendiff.training.world import World

    built = TrainingRun.build(
        cfg, data, tmp_path, world=World.current(), on_event=poison_after_step_3
    )
    training["run"] = built
    plan = step_plan(cfg, data, rank=0, world_size=1)
    with pytest.raises(FloatingPointError, match=r"step 4: loss is .*checkpoint-2"):
        built.fit(step_batches(data, plan, 0, 6))
    assert built.trainer.step == 3
    assert [p.name for p in committed_checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.slow
def test_options_that_save_memory_change_nothing(data: TokenData, tmp_path: Path) -> None:
    plain, _ = run(config(), data, tmp_path / "plain")
    saving, _ = run(config(gradient_checkpointing=True), data, tmp_path / "saving")
    assert saving == pytest.approx(plain, rel=1e-6)
    bf16, _ = run(config(mixed_precision="bf16"), data, tmp_path / "bf16")
    assert bf16 == pytest.approx(plain, rel=0.02)
    assert bf16 != plain
    weights = load_for_inference(tmp_path / "bf16" / "final")[0].model
    assert {p.dtype for p in weights.parameters()} == {torch.float32}


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    folder = token_folder(
        tmp_path / "data",
        files=[random_rows(500, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
    )
    cfg = config(
        max_train_steps=120,
        global_batch_size=64,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        logging_steps=30,
        ema_decay=0.0,
        objective="mdlm",
    )
    losses, _ = run(cfg, TokenData.open(folder, split="train"), tmp_path / "out")
    assert losses[30] > 2.2  # about ln 12: only how frequent each letter is
    assert losses[120] < 1.9


# Checkpoints


def test_a_checkpoint_opens_with_transformers_and_keeps_the_averaged_weights(
    data: TokenData, tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    run(config(), data, tmp_path)
    assert [p.name for p in committed_checkpoints(tmp_path)] == [
        f"checkpoint-{n}" for n in (2, 4, 6)
    ]
    final = tmp_path / "final"
    verify(final, kind="checkpoint")
    model = AutoModelForMaskedLM.from_pretrained(final)
    assert AutoTokenizer.from_pretrained(final).mask_token == "[MASK]"
    average = load_file(tmp_path / "checkpoint-6" / "ema.safetensors")
    raw = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    differing = 0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, average[name], rtol=0, atol=0)
        differing += int(name in raw and not torch.equal(parameter.data, raw[name]))
    assert differing > 10
    # Sampling from checkpoint-6 takes the average too.
    denoiser, _, process = load_for_inference(tmp_path / "checkpoint-6")
    for name, parameter in denoiser.model.named_parameters():
        assert torch.equal(parameter.data, average[name])
    assert process.mask_token_id == 1
    scheduler = json.loads((final / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "TokenDiffusionScheduler"
    assert (scheduler["forward_process"], scheduler["prediction"]) == ("absorbing", "loo")


def test_averages_follow_the_weights_more_slowly_as_training_goes_on(
    data: TokenData, tmp_path: Path
) -> None:
    cfg = config(max_train_steps=4, checkpointing_steps=1, checkpoints_total_limit=9, ema_decay=0.3)
    run(cfg, data, tmp_path)
    steps = [tmp_path / f"checkpoint-{step}" for step in range(1, 5)]
    weights = [load_file(step / "model.safetensors") for step in steps]
    averages = [load_file(step / "ema.safetensors") for step in steps]
    for step, decay in ((2, 3 / 12), (3, 0.3), (4, 0.3)):  # 4 / 13 is above ema_decay
        for name, average in averages[step - 1].items():
            expected = decay * averages[step - 2][name] + (1 - decay) * weights[step - 1][name]
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-7)


def test_only_the_newest_checkpoints_are_kept(data: TokenData, tmp_path: Path) -> None:
    run(config(checkpointing_steps=1, checkpoints_total_limit=2), data, tmp_path)
    assert [p.name for p in committed_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_a_run_that_starts_over_keeps_its_own_checkpoints(data: TokenData, tmp_path: Path) -> None:
    """Damaged later checkpoints are passed over: what was saved since is the newest."""
    run(config(), data, tmp_path)
    for folder in [*committed_checkpoints(tmp_path), tmp_path / "final"]:
        damaged = bytearray((folder / "config.json").read_bytes())
        damaged[5] ^= 1
        (folder / "config.json").write_bytes(bytes(damaged))
    cfg = config(checkpoints_total_limit=2)
    with pytest.raises(_Killed):
        train_in_process(cfg, data, tmp_path, on_event=die_at_checkpoint(4))
    newest = newest_sound_checkpoint(tmp_path, warn=pytest.fail)
    assert newest is not None
    assert newest.name == "checkpoint-4"
    run(cfg, data, tmp_path)
    assert load_for_inference(tmp_path / "final")


@pytest.mark.slow
def test_no_flipped_byte_of_a_manifest_goes_unseen(data: TokenData, tmp_path: Path) -> None:
    run(config(max_train_steps=4, lr_warmup_steps=0), data, tmp_path)
    path = tmp_path / "checkpoint-4" / "MANIFEST.json"
    sound = path.read_bytes()
    for at in range(len(sound)):
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        try:
            verify(path.parent, kind="checkpoint", hashes=False)
        except CorruptFileError:
            continue
        # A space or newline between values may become another; the content is then the same.
        assert json.loads(path.read_bytes()) == json.loads(sound)
    path.write_bytes(sound[:50] + bytes([sound[50] ^ 4]) + sound[51:])
    newest = newest_sound_checkpoint(tmp_path, warn=lambda message: None)
    assert newest is not None
    assert newest.name == "checkpoint-2"


def test_a_flipped_byte_of_a_shard_is_seen_when_it_is_read(tmp_path: Path) -> None:
    folder = token_folder(
        tmp_path / "data",
        files=[random_rows(64, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
    )
    shard = folder / "train" / "part-00000.parquet"
    sound = shard.read_bytes()
    unseen = 0
    for at in range(40, len(sound) - 2500, 97):
        shard.write_bytes(sound[:at] + bytes([sound[at] ^ 16]) + sound[at + 1 :])
        data = TokenData.open(folder, split="train")
        try:
            rows = [data.read_group(group).tokens for group in range(len(data.row_group_sizes))]
        except CorruptFileError:
            continue
        unseen += not np.array_equal(np.concatenate(rows), np.array(random_rows(64, LENGTH)))
    assert unseen == 0


def test_data_of_another_tokenizer_than_the_pretrained_model(
    data: TokenData, tmp_path: Path
) -> None:
    run(config(max_train_steps=2), data, tmp_path / "model")
    fine_tune = config(model_name_or_path=str(tmp_path / "model" / "final"), max_train_steps=2)
    losses, _ = run(fine_tune, data, tmp_path / "again")
    assert sorted(losses) == [1, 2]
    other = letter_tokenizer()
    other.add_tokens(["zz"])  # a token more is no contradiction
    check_vocabulary(str(tmp_path / "model" / "final"), other)
    with pytest.raises(InputError, match=r"not made with the tokenizer of model_name_or_path"):
        check_vocabulary(str(tmp_path / "model" / "final"), shifted_tokenizer())
    (tmp_path / "model" / "final" / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"model_name_or_path .*: no tokenizer can be opened"):
        check_vocabulary(str(tmp_path / "model" / "final"), other)


def test_a_folder_without_its_manifest_does_not_count(data: TokenData, tmp_path: Path) -> None:
    run(config(), data, tmp_path)
    (tmp_path / "checkpoint-6" / "MANIFEST.json").unlink()
    newest = newest_sound_checkpoint(tmp_path, warn=pytest.fail)
    assert newest == tmp_path / "checkpoint-4"
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert newest_sound_checkpoint(tmp_path, warn=pytest.fail) is None


def test_opening_what_is_not_a_checkpoint(data: TokenData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no committed checkpoint there \(no MANIFEST.json\)"):
        open_checkpoint(tmp_path)
    run(config(max_train_steps=2), data, tmp_path)
    assert open_checkpoint(tmp_path).name == "final"
    (tmp_path / "final" / "config.json").unlink()
    with pytest.raises(CorruptFileError, match=r"config\.json is missing"):
        open_checkpoint(tmp_path / "final")
    with pytest.raises(InputError, match="must be a checkpoint-N or final folder"):
        NoiseProcess.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_name_or_path": "builtin:bert-giant"},
            "no such built-in model; there are builtin:",
        ),
        ({"model_name_or_path": "/nowhere/model"}, "cannot be opened"),
    ],
)
def test_models_that_cannot_be_had(
    data: TokenData, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(config(**changes), data, tmp_path)


def test_models_that_do_not_fit(data: TokenData, tmp_path: Path) -> None:
    from transformers import BertConfig, MambaConfig

    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    MambaConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    BertConfig(**small, max_position_embeddings=8).save_pretrained(tmp_path / "short")
    BertConfig(**small, max_position_embeddings=64).save_pretrained(tmp_path / "bare")
    for name, message in (
        ("mamba", "not known to work with attention in both directions"),
        ("short", "takes at most 8 tokens; max_length is 12"),
        ("bare", "a config but no weights; from_scratch"),
    ):
        with pytest.raises(InputError, match=message):
            run(config(model_name_or_path=str(tmp_path / name)), data, tmp_path / "out")
    cfg = config(
        model_name_or_path=str(tmp_path / "bare"),
        from_scratch=True,
        max_train_steps=1,
        lr_warmup_steps=0,
    )
    losses, _ = run(cfg, data, tmp_path / "scratch")
    assert sorted(losses) == [1]


# Every objective


OBJECTIVES: dict[str, dict[str, Any]] = {
    "udlm": {"name": "udlm", "alpha_schedule": "cosine", "exclude_mask_from_uniform": False},
    "hybrid": {"name": "hybrid", "p_uniform": 0.2, "lambda_conf": 0.5, "max_loss_weight": 10.0},
    "hybrid-posterior": {"name": "hybrid", "loss_type": "cross_entropy"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_resumes_and_is_recorded(
    name: str, data: TokenData, tmp_path: Path
) -> None:
    cfg = config(
        objective=OBJECTIVES[name],
        model_name_or_path="builtin:dit-tiny",
        lr_scheduler="constant",
        lr_warmup_steps=0,
        max_train_steps=4,
    )
    whole, _ = run(cfg, data, tmp_path / "whole")
    first, _ = run(cfg.model_copy(update={"max_train_steps": 2}), data, tmp_path / "parts")
    rest, _ = run(cfg, data, tmp_path / "parts")
    assert {**first, **rest} == whole
    in_parts = cfg.model_copy(update={"per_device_train_batch_size": 3})
    (in_two,) = run_distributed([(in_parts, tmp_path / "two")], data, 2)
    assert in_two == pytest.approx(whole, rel=1e-5)
    built = TrainingRun.build(cfg, data, tmp_path / "built", world=World.current("cpu"))
    objective = built.trainer.objective
    assert isinstance(objective, TokenNoiseDiffusion)
    for field in ("loss_type", "max_loss_weight", "lambda_conf", "min_time"):
        assert getattr(objective, field) == getattr(cfg.objective, field)
    _, _, process = load_for_inference(tmp_path / "whole")
    assert process.objective == OBJECTIVES[name]["name"]
    assert process.prediction == ("posterior" if name == "hybrid-posterior" else "loo")
    kernel = process.kernel()
    if isinstance(kernel, UniformKernel):
        assert isinstance(kernel.schedule, Cosine)
        assert not kernel.exclude_mask
    else:
        assert isinstance(kernel, HybridKernel)
        assert kernel.p_uniform == OBJECTIVES[name].get("p_uniform", 0.1)
    _sample_with_gaps(tmp_path / "whole" / "final", tmp_path / "two" / "final")


def _sample_with_gaps(*checkpoints: Path) -> None:
    """What is given stays, gaps and the rest are filled, and nobody says what the noise is."""
    prompt = "ab[MASK]d[MASK][MASK]"
    sampling = GenerateConfig.model_validate({"sampler": {"num_inference_steps": 5}})
    for checkpoint in checkpoints:
        model = SamplingModel(checkpoint, sampling, device="cpu")
        rows = [GenerationRow(id=0, prompt=prompt), GenerationRow(id=1, prompt=None)]
        first, second = model.sample(rows)
        given = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        mask = model.process.mask_token_id
        assert len(first["tokens"]) == len(second["tokens"]) == LENGTH
        assert mask not in first["tokens"] + second["tokens"]
        kept = [
            token for token, there in zip(first["tokens"], given, strict=False) if there != mask
        ]
        assert kept == [token for token in given if token != mask]
        assert 0 < first["num_model_calls"] <= 5
        assert (first["gaps"], second["gaps"]) == ([2, 4, 5], [])
        one_by_one = sampling.model_copy(update={"batch_size": 1})
        told = _told_of(SamplingModel(checkpoint, one_by_one, device="cpu"), rows)
        # Two batches of a row each, told of as they begin and after each of five steps.
        open_tokens = (LENGTH - 3, LENGTH)
        expected = [
            (row + step / 5, row * open_tokens[0] + step / 5 * open_tokens[row])
            for row in range(2)
            for step in range(6)
        ]
        np.testing.assert_allclose(told, expected)


def _told_of(model: SamplingModel, rows: list[GenerationRow]) -> list[tuple[float, float]]:
    """How far the rows are said to have got, each time."""
    told: list[tuple[float, float]] = []
    list(model.samples(rows, on_progress=lambda figures: told.append(figures())))
    return told


# The noise process as other tools see it


def test_scheduler_config_is_what_the_published_classes_read(tmp_path: Path) -> None:
    """The names of their constructors' arguments, each with our value; the rest is ours."""
    schedule = {"alpha_schedule", "eps", "sigma_min", "sigma_max"}
    common = {"vocab_size", "mask_token_id", "num_train_timesteps"}
    theirs = {
        "absorbing": common | schedule | {"forward_process"},
        "uniform": common | schedule | {"forward_process", "exclude_mask_from_uniform"},
        "hybrid": common | {"p_uniform", "gamma"},
    }
    ours = {"_class_name", "objective", "prediction", "max_length"}
    for forward_process, names in theirs.items():
        process = NoiseProcess(
            forward_process=forward_process,
            vocab_size=30,
            mask_token_id=4,
            max_length=12,
            objective="x",
            alpha_schedule="log_linear" if forward_process == "hybrid" else "cosine",
            exclude_mask_from_uniform=forward_process != "uniform",
            p_uniform=0.3 if forward_process == "hybrid" else 0.0,
            prediction="posterior" if forward_process == "hybrid" else "loo",
        )
        process.save(tmp_path)
        fields = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert set(fields) == names | ours
        is_hybrid = forward_process == "hybrid"
        expected = "HybridTokenDiffusionScheduler" if is_hybrid else "TokenDiffusionScheduler"
        assert fields["_class_name"] == expected
        assert NoiseProcess.load(tmp_path) == process


@pytest.mark.parametrize("fields", [{"vocab_size": 15}, {"mask_token_id": 5}])
def test_a_process_of_another_tokenizer_is_refused(tmp_path: Path, fields: dict[str, int]) -> None:
    good = {"_class_name": "TokenDiffusionScheduler", "forward_process": "uniform"}
    folder = _published(tmp_path / "other", **{**good, **fields})
    with pytest.raises(InputError, match=r"are not those of the tokenizer beside it, 16 and 1"):
        load_for_inference(folder)


def test_files_that_are_no_scheduler_config_are_refused(tmp_path: Path) -> None:
    folder = _published(tmp_path / "bad", _class_name="TokenDiffusionScheduler")
    assert NoiseProcess.load(folder).forward_process == "absorbing"
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="max_length is missing"):
        NoiseProcess.load(folder)
    for text in ("[]", "{", '{"_class_name": 3}'):
        (folder / "scheduler_config.json").write_text(text)
        with pytest.raises(InputError, match=r"scheduler_config\.json: "):
            NoiseProcess.load(folder)


def _published(folder: Path, **fields: Any) -> Path:
    """A folder as the published scripts leave it: model, tokenizer and scheduler, no manifest."""
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(
        BertConfig(
            vocab_size=16,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=24,
        )
    )
    model.save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    common = {"_diffusers_version": "0.37.0.dev0", "vocab_size": 16, "mask_token_id": 1}
    text = json.dumps({**common, "num_train_timesteps": 1000, **fields})
    (folder / "scheduler_config.json").write_text(text)
    return folder


def test_checkpoints_of_the_published_scripts_open(tmp_path: Path) -> None:
    uniform = _published(
        tmp_path / "udlm",
        _class_name="TokenDiffusionScheduler",
        forward_process="uniform",
        alpha_schedule="cosine",
        eps=1e-3,
        sigma_min=1e-4,
        sigma_max=20.0,
        exclude_mask_from_uniform=True,
    )
    hybrid = _published(
        tmp_path / "hybrid",
        _class_name="HybridTokenDiffusionScheduler",
        t_eps=1e-4,
        p_uniform=0.1,
        clip_noise=20.0,
        gamma=1.0,
    )
    for folder, kind, prediction in (
        (uniform, UniformKernel, "loo"),
        (hybrid, HybridKernel, "posterior"),
    ):
        _, _, process = load_for_inference(folder)
        assert isinstance(process.kernel(), kind)
        assert (process.prediction, process.max_length) == (prediction, 24)
        identity = checkpoint_identity(folder)
        assert identity == checkpoint_identity(open_checkpoint(folder))
        (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
        assert checkpoint_identity(folder) != identity


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"_class_name": "DDPMScheduler"}, "_class_name 'DDPMScheduler' is not supported"),
        ({"forward_process": "gaussian"}, "forward_process 'gaussian' is not supported"),
        ({"mask_token_id": 16}, "mask_token_id 16 is not an id of the vocabulary of 16"),
        ({"prediction": "noise"}, "prediction must be 'loo' or 'posterior'"),
        ({"alpha_schedule": "sigmoid"}, "alpha_schedule must be one of"),
        (
            {"_class_name": "HybridTokenDiffusionScheduler", "p_uniform": 0.1, "gamma": 3.0},
            r"gamma must lie in \[0.05, 2\]",
        ),
        ({"vocab_size": "many"}, "vocab_size must be of type int, got 'many'"),
        ({"eps": None}, "eps must be of type float, got None"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"max_length": "12"}, "max_length must be of type int"),
    ],
)
def test_bad_noise_processes_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    good = {"_class_name": "TokenDiffusionScheduler", "forward_process": "absorbing"}
    folder = _published(tmp_path / "bad", **{**good, **fields})
    with pytest.raises(InputError, match=message):
        NoiseProcess.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert-tiny", "qwen3-tiny"])
def test_adapters_of_a_denoiser_of_whole_rows(name: str, data: TokenData, tmp_path: Path) -> None:
    """Resumed exactly, merged into what is saved, and nothing else of the model is changed."""
    cfg = config(
        model_name_or_path=f"builtin:{name}",
        lora_rank=2,
        lora_dropout=0.1,
        ema_decay=0.0,
        max_train_steps=4,
        learning_rate=0.03,
    )
    losses, _ = run(cfg, data, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "cut/checkpoint-2")
    resumed, _ = run(cfg, data, tmp_path / "cut")
    assert resumed == {step: loss for step, loss in losses.items() if step > 2}
    world = World.current("cpu")
    adapted: Any = TrainingRun.build(cfg, data, tmp_path, world=world).trainer.denoiser
    before = {n: p.clone() for n, p in adapted.named_parameters() if p.requires_grad is False}
    stored = load_file(tmp_path / f"whole/checkpoint-4/{ADAPTERS}.safetensors")
    for parameter, tensor in adapter_tensors(adapted.model).items():
        tensor.copy_(stored[parameter])
    merged = load_for_inference(tmp_path / "whole/final")[0]
    assert not any("lora" in parameter for parameter, _ in merged.named_parameters())
    tokens = torch.tensor(random_rows(2, LENGTH))
    tokens[:, 3:5] = 1
    with torch.no_grad():
        ours, theirs = (
            model.eval().head(model.encode(tokens, tokens > 0, torch.zeros(2)))
            for model in (adapted, merged)
        )
    ours[..., 1] = theirs[..., 1]  # the head may be tied, and then has the mask's new row now
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    embedding = adapted.model.get_input_embeddings()
    rows = before[
        next(n for n, p in adapted.named_parameters() if p is embedding.base_layer.weight)
    ]
    changed = (rows != merged.model.get_input_embeddings().weight).any(1)
    assert changed.nonzero()[:, 0].tolist() == [1], "only the mask's embedding"
