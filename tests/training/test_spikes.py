"""What a spike is, and runs that skip one, go back before it, or stop at it."""

import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.artifacts.checkpoint import KIND
from tokendiff.artifacts.manifest import commit, load_manifest
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData, step_batches, step_plan
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.training.run import TrainingRun, train_in_process
from tokendiff.training.spikes import MOST_SPIKES, SpikeWatch, spike_limit
from tokendiff.training.trainer import Trainer
from tokendiff.training.world import World

Spikes = Callable[[dict[int, float]], None]
Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[random_rows(70, 12)],
        max_length=12,
        tokenizer=letter_tokenizer(),
    )
    return TokenData.open(folder, split="train")


@pytest.fixture
def spikes(monkeypatch: pytest.MonkeyPatch) -> Spikes:
    """Multiplies the losses of some steps: 0 for the first step of a run."""
    factors: dict[int, float] = {}
    loss = Trainer._loss

    def with_factor(trainer: Trainer, *args: Any) -> tuple[Any, ...]:
        loss_sum, *rest = loss(trainer, *args)
        return loss_sum * factors.get(trainer.step, 1.0), *rest

    monkeypatch.setattr(Trainer, "_loss", with_factor)
    return factors.update


def config(**changes: Any) -> TrainConfig:
    fields = {
        "model_name_or_path": "builtin:bert-tiny",
        "max_train_steps": 6,
        "global_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_warmup_steps": 2,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "checkpointing_steps": 2,
    }
    return TrainConfig.model_validate({**fields, **changes})


def run(cfg: TrainConfig, data: TokenData, folder: Path) -> tuple[dict[str, Tensor], Events]:
    """Weights of the end, and what was told on the way."""
    events: Events = []
    train_in_process(
        cfg, data, folder, on_event=lambda event, **fields: events.append({"e": event, **fields})
    )
    return load_file(folder / "final" / "model.safetensors"), events


def losses_of(events: Events) -> dict[int, float]:
    return {e["step"]: e["loss"] for e in events if e["e"] == "metrics"}


def warnings_of(events: Events) -> str:
    return "\n".join(e["message"] for e in events if e["e"] == "warning")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left.keys() | right.keys())


def test_the_limit_is_median_and_scaled_mad() -> None:
    rng = np.random.default_rng(0)
    figures = rng.lognormal(size=101)
    middle = np.sort(figures)[50]
    deviation = np.sort(abs(figures - middle))[50]
    expected = middle + 7.0 * 1.4826 * deviation
    assert spike_limit(list(figures), deviations=7.0) == pytest.approx(expected, rel=1e-12)
    # One part in two may be wild without moving it far; a mean and a deviation would be.
    assert spike_limit([2.0] * 51 + [1e9] * 50, deviations=5.0) == pytest.approx(2.1)
    assert spike_limit([1.0] * 15, deviations=1.0) == float("inf")


def test_the_limit_itself_is_no_spike() -> None:
    """And finite figures are judged from the 16th on."""
    known = [1.0, 3.0] * 8
    assert spike_limit(known[:-1], deviations=1.0) == math.inf
    limit = spike_limit(known, deviations=1.0)
    assert limit == 2.0 + 1.4826
    for value, is_spike in ((limit, False), (math.nextafter(limit, math.inf), True)):
        watch = SpikeWatch(action="skip", window=16, deviations=1.0, figures={"loss": known})
        assert (watch.judge(17, loss=value) is not None) == is_spike


def test_a_spike_counts_for_the_window_and_no_step_longer() -> None:
    """The window of 20 that ends at step 20 begins at step 1."""
    for last, is_over in ((20, True), (21, False)):
        watch = SpikeWatch(action="skip", window=20, deviations=5.0)
        for step in (*range(1, MOST_SPIKES + 1), last):
            watch.judge(step, loss=math.inf)
        assert watch.is_over == is_over


def test_spikes_are_not_remembered_as_what_is_usual() -> None:
    watch = SpikeWatch(action="skip", window=20, deviations=5.0)
    rng = random.Random(0)
    for step in range(1, 40):
        assert watch.judge(step, loss=rng.uniform(0.9, 1.1)) is None
    limit = spike_limit(watch.figures["loss"], deviations=5.0)
    for step in range(40, 40 + MOST_SPIKES):
        assert "exceeds" in (watch.judge(step, loss=1.01 * limit) or "")
        assert not watch.is_over
    assert "is nan" in (watch.judge(50, loss=float("nan")) or "")
    assert watch.is_over
    assert len(watch.figures["loss"]) == 20
    assert watch.judge(51, loss=0.0) is None  # only upwards


def test_spikes_of_long_ago_do_not_end_a_run() -> None:
    watch = SpikeWatch(action="skip", window=20, deviations=5.0)
    for step in range(1, 300, 3):
        watch.judge(step, loss=float("inf"))
        assert not watch.is_over
    assert watch.num_spikes == 100


def taken_for(step: int, checkpoint: Path) -> None:
    """Make checkpoint-STEP of one that was saved earlier, by hand."""
    target = checkpoint.with_name(f"checkpoint-{step}")
    metadata = load_manifest(checkpoint).metadata
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(checkpoint, target)
    (target / "MANIFEST.json").unlink()
    state = json.loads((target / "trainer_state.json").read_text())
    (target / "trainer_state.json").write_text(json.dumps({**state, "step": step}))
    commit(target, kind=KIND, metadata={**metadata, "step": step})


@pytest.mark.slow
@pytest.mark.parametrize(("action", "base"), [("skip", 3), ("rewind", 2)])
def test_a_run_goes_on_as_from_an_earlier_checkpoint_with_the_next_rows(
    tmp_path: Path, data: TokenData, spikes: Spikes, action: str, base: int
) -> None:
    spikes({3: float("nan")})
    weights, events = run(config(on_spike=action), data, tmp_path / "spiked")
    assert "step 4: loss is nan" in warnings_of(events)
    plain = config(checkpointing_steps=1, checkpoints_total_limit=9)
    with pytest.raises(FloatingPointError, match="step 4: loss is nan"):
        run(plain, data, tmp_path / "plain")
    taken_for(4, tmp_path / "plain" / f"checkpoint-{base}")
    by_hand, later = run(plain, data, tmp_path / "plain")
    assert same(weights, by_hand)
    assert losses_of(events) == losses_of(events) | losses_of(later)
    assert losses_of(events).keys() == {1, 2, 3, 5, 6}
    learning_rates = [{e["step"]: e["lr"] for e in es if "lr" in e} for es in (events, later)]
    assert learning_rates[0].items() >= learning_rates[1].items()


def test_a_gradient_that_jumps_alone_is_a_spike(
    tmp_path: Path, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Trainer._loss

    def steep(trainer: Trainer, *args: Any) -> tuple[Any, ...]:
        loss_sum, *rest = loss(trainer, *args)
        slope = 1e4 if trainer.step == 17 else 0.0
        return loss_sum + slope * (loss_sum - loss_sum.detach()), *rest

    monkeypatch.setattr(Trainer, "_loss", steep)
    _, events = run(config(on_spike="skip", max_train_steps=20), data, tmp_path)
    assert re.search(r"step 18: gradient norm \S+ exceeds \S+, the limit", warnings_of(events))
    assert losses_of(events).keys() == set(range(1, 21)) - {18}


def test_rewinding_before_the_first_checkpoint_goes_back_to_the_start(
    tmp_path: Path, data: TokenData, spikes: Spikes
) -> None:
    spikes({1: float("inf")})
    _, events = run(config(on_spike="rewind", checkpointing_steps=5), data, tmp_path)
    assert "back to the weights of step 0" in warnings_of(events)
    assert losses_of(events).keys() == {1, 3, 4, 5, 6}


def test_steps_that_were_logged_before_a_rewind_are_not_logged_again(
    tmp_path: Path, data: TokenData, spikes: Spikes
) -> None:
    spikes({3: float("nan")})
    single, thirds = (
        losses_of(run(config(on_spike="rewind", logging_steps=steps), data, tmp_path / name)[1])
        for steps, name in ((1, "single"), (3, "thirds"))
    )
    means = {3: (single[1] + single[2] + single[3]) / 3, 6: (single[5] + single[6]) / 2}
    assert thirds == pytest.approx(means)


@pytest.mark.slow
@pytest.mark.parametrize(("action", "stop_at"), [("skip", 21), ("rewind", 20)])
def test_resuming_is_exact(
    tmp_path: Path, data: TokenData, spikes: Spikes, action: str, stop_at: int
) -> None:
    spikes({18: 300.0, 20: 300.0})
    cfg = config(
        max_train_steps=24,
        on_spike=action,
        spike_window=16,
        checkpointing_steps=8,
        checkpoints_total_limit=1,
    )
    weights, events = run(cfg, data, tmp_path / "whole")
    assert "step 19: loss" in warnings_of(events)
    assert "step 21: loss" in warnings_of(events)
    stopped = TrainingRun.build(cfg, data, tmp_path / "cut", world=World.current())
    plan = step_plan(cfg, data, rank=0, world_size=1)
    batches = step_batches(data, plan, 0, 24)
    assert not stopped.fit(batches, should_stop=lambda: stopped.trainer.step + 1 == stop_at)
    resumed, later = run(cfg, data, tmp_path / "cut")
    assert same(weights, resumed)
    assert losses_of(events).items() >= losses_of(later).items()
    last = [[e for e in es if e["e"] == "metrics"][-1]["num_spikes"] for es in (events, later)]
    assert last == [2, 2]


@pytest.mark.slow
def test_a_run_that_stopped_goes_on_with_skip_as_if_it_had_skipped(
    tmp_path: Path, data: TokenData, spikes: Spikes
) -> None:
    spikes({3: float("nan")})
    with pytest.raises(FloatingPointError, match="on_spike skip or rewind"):
        run(config(on_spike="stop"), data, tmp_path / "stopped")
    resumed, _ = run(config(on_spike="skip"), data, tmp_path / "stopped")
    skipped, _ = run(config(on_spike="skip"), data, tmp_path / "skipped")
    assert same(resumed, skipped)


def test_a_damaged_checkpoint_is_not_gone_back_to(
    tmp_path: Path, data: TokenData, spikes: Spikes, monkeypatch: pytest.MonkeyPatch
) -> None:
    spikes({3: float("nan")})
    judge = SpikeWatch.judge

    def damage(watch: SpikeWatch, step: int, **figures: float) -> str | None:
        if step == 4:
            deadline = time.monotonic() + 60  # it is written in the background
            while not (tmp_path / "checkpoint-2" / "MANIFEST.json").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"")
        return judge(watch, step, **figures)

    monkeypatch.setattr(SpikeWatch, "judge", damage)
    with pytest.raises(CorruptFileError, match="checkpoint-2, which on_spike rewind goes back to"):
        run(config(on_spike="rewind"), data, tmp_path)


@pytest.mark.slow
def test_without_spikes_nothing_changes(tmp_path: Path, data: TokenData) -> None:
    plain, events = run(config(), data, tmp_path / "plain")
    watched, told = run(config(on_spike="skip"), data, tmp_path / "watched")
    assert same(plain, watched)
    assert losses_of(events) == losses_of(told)


@pytest.mark.slow
def test_a_step_that_memory_does_not_suffice_for_is_named_with_its_rows(
    tmp_path: Path, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Trainer._loss
    rows = [[int(row) for row in batch["row_id"]] for batch in batches_of(data)]

    def hungry(trainer: Trainer, *args: Any) -> tuple[Any, ...]:
        if trainer.step == 2:
            torch.empty(1 << 46)
        return loss(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loss", hungry)
        with pytest.raises(MemoryError) as raised:
            run(config(), data, tmp_path / "hungry")
    named = ", ".join(map(str, rows[2]))
    assert re.match(
        rf"step 3, worker 0: 4 rows of up to 12 tokens, .*\(the first row_ids: {named}\): memory "
        r"ran out \(.*allocate.*\); lower per_device_train_batch_size",
        str(raised.value),
    )
    again, _ = run(config(), data, tmp_path / "hungry")
    whole, _ = run(config(), data, tmp_path / "whole")
    assert same(again, whole)


def batches_of(data: TokenData) -> list[dict[str, Any]]:
    cfg = config()
    plan = step_plan(cfg, data, rank=0, world_size=1)
    return list(step_batches(data, plan, 0, cfg.max_train_steps))


def test_keys_of_runs_that_no_spike_changes_stay() -> None:
    plain = config().result_fields()
    assert "on_spike" not in plain
    assert config(on_spike="stop", spike_deviations=3.0).result_fields() == plain
    assert config(on_spike="skip").result_fields() == {**plain, "on_spike": "skip"}
    rewinding = config(on_spike="rewind").result_fields()
    assert rewinding == {**plain, "on_spike": "rewind", "checkpointing_steps": 2}


def test_settings_without_on_spike_are_refused() -> None:
    with pytest.raises((ValueError, InputError), match="spike_window 32 has no effect"):
        config(spike_window=32)
