"""Runs that watch themselves: what held-out rows say of a step, and what is decided by it."""

import json
import math
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.training.distributed import run_distributed
from tokendiff.artifacts.checkpoint import committed_checkpoints
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.errors import InputError
from tokendiff.evaluation.evaluator import Evaluator, evaluation_rows
from tokendiff.objectives.dflash import DFlash
from tokendiff.training.inputs import check_inputs
from tokendiff.training.run import TrainingRun, train_in_process
from tokendiff.training.watching import WATCH_STATE, is_better, yardstick_of
from tokendiff.training.world import World

LENGTH = 12
Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    """Few rows to learn by heart, so that held-out ones soon get worse."""
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[random_rows(8, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(37, LENGTH, seed=1),
    )
    return TokenData.open(folder, split="train")


def config(**changes: Any) -> TrainConfig:
    fields = {
        "model_name_or_path": "builtin:bert-tiny",
        "objective": "mdlm",
        "max_train_steps": 24,
        "global_batch_size": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "ema_decay": 0.5,
        "logging_steps": 3,
        "checkpointing_steps": 5,
        "eval_steps": 2,
        "max_eval_rows": 30,
    }
    return TrainConfig.model_validate({**fields, **changes})


def run(cfg: TrainConfig, data: TokenData, folder: Path) -> Events:
    events: Events = []
    train_in_process(
        cfg, data, folder, on_event=lambda event, **fields: events.append({"event": event} | fields)
    )
    return events


def of(events: Iterable[dict[str, Any]], kind: str) -> Events:
    return [event for event in events if event["event"] == kind]


def decisions(events: Events) -> list[tuple[int, int, int]]:
    return [
        (e["step"], e["heldout_best_step"], e["heldout_since_best"])
        for e in of(events, "heldout")
        if e["step"]
    ]


def losses(events: Events) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in of(events, "metrics")]


def judged(checkpoint: Path, data: TokenData, cfg: TrainConfig) -> dict[int, tuple[float, float]]:
    """By row: nats and tokens, by the evaluation of a checkpoint on disk."""
    evaluation = EvaluateConfig(num_mask_samples=1, seed=cfg.seed, batch_size=4)
    heldout = data.other_split("heldout")
    places = evaluation_rows(heldout, seed=cfg.seed, max_rows=cfg.max_eval_rows)
    rows = heldout.read(*places)
    found = Evaluator(checkpoint, evaluation, device="cpu").bounds(rows)
    figures = zip(found["nats"].tolist(), found["num_tokens"].tolist(), strict=True)
    return dict(zip(rows.row_ids.tolist(), figures, strict=True))


def ratio_and_error(rows: dict[int, tuple[float, float]]) -> tuple[float, float]:
    total = sum(x for _, x in rows.values())
    ratio = sum(y for y, _ in rows.values()) / total
    squares = sum((y - ratio * x) ** 2 for y, x in rows.values())
    return ratio, math.sqrt(len(rows) / (len(rows) - 1) * squares) / total


def decided_again(
    steps: dict[int, dict[int, tuple[float, float]]], patience: int | None
) -> list[tuple[int, int, int]]:
    """The decisions of plain loops over stored figures by row, and where they end."""
    decided: list[tuple[int, int, int]] = []
    best, since = 0, 0
    for step, rows in sorted(steps.items()):
        if not decided:
            best = step
        else:
            other = steps[best]
            gaps = []
            for row, (nats, tokens) in rows.items():
                nats_of_best, tokens_of_best = other[row]
                here = (nats - ratio_and_error(rows)[0] * tokens) / tokens
                there = (nats_of_best - ratio_and_error(other)[0] * tokens_of_best) / tokens_of_best
                gaps.append(here - there)  # rows are of one length here
            error = math.sqrt(sum(gap**2 for gap in gaps) / (len(gaps) - 1) / len(gaps))
            improves = ratio_and_error(rows)[0] + error < ratio_and_error(other)[0]
            best, since = (step, 0) if improves else (best, since + 1)
        decided.append((step, best, since))
        if since == patience:
            break
    return decided


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["mdlm", "ar"])
def test_decisions_are_those_of_a_second_program(
    data: TokenData, tmp_path: Path, objective: str
) -> None:
    """From figures that the evaluation of each checkpoint gives, and plain loops over them."""
    model = "builtin:qwen3-tiny" if objective == "ar" else "builtin:bert-tiny"
    base = {"objective": objective, "model_name_or_path": model}
    every = config(**base, checkpointing_steps=2, checkpoints_total_limit=100)
    events = run(every, data, tmp_path / "all")
    before, *_ = figures = of(events, "heldout")
    assert before.keys() == {*("event", "step", "heldout_nats_per_token", "heldout_standard_error")}
    assert (before["step"], figures[1]["step"]) == (0, 2)
    steps = {
        step: judged(tmp_path / "all" / f"checkpoint-{step}", data, every)
        for step in range(2, 25, 2)
    }
    for event in figures[1:]:
        value, error = ratio_and_error(steps[event["step"]])
        assert event["heldout_nats_per_token"] == pytest.approx(value, rel=1e-5)
        assert event["heldout_standard_error"] == pytest.approx(error, rel=1e-4)
    assert decisions(events) == decided_again(steps, None)
    stopped = config(**base, early_stopping_patience=3)
    expected = decided_again(steps, 3)
    assert expected[-1][0] < 24, "the data must make it stop early"
    assert expected[-1][1] > 2, "and not at once"
    assert decisions(run(stopped, data, tmp_path / "early")) == expected


def test_held_out_rows_are_judged_without_dropout(data: TokenData, tmp_path: Path) -> None:
    cfg = config(dropout=0.5, max_train_steps=2, max_eval_rows=8)
    event = of(run(cfg, data, tmp_path), "heldout")[-1]
    value, _ = ratio_and_error(judged(tmp_path / "checkpoint-2", data, cfg))
    assert event["heldout_nats_per_token"] == pytest.approx(value, rel=1e-5)


def test_a_run_that_stopped_early_is_finished(data: TokenData, tmp_path: Path) -> None:
    cfg = config(early_stopping_patience=2)
    events = run(cfg, data, tmp_path)
    last = of(events, "heldout")[-1]
    assert last["heldout_since_best"] == 2
    assert last["step"] < 24
    (end,) = of(events, "stopped_early")
    metadata = load_manifest(tmp_path / "final").metadata
    assert (metadata["step"], metadata["stopped_early"]) == (last["step"], end["reason"])
    assert end["reason"] == (
        f"2 evaluations in a row did not improve on that of step {last['heldout_best_step']}"
    )
    assert of(events, "metrics")[-1]["step"] == last["step"]
    assert run(cfg, data, tmp_path) == []
    with pytest.raises(InputError, match="early_stopping_patience: 2 there, 3 here"):
        run(config(early_stopping_patience=3), data, tmp_path)


@pytest.mark.slow
def test_watching_changes_no_loss(data: TokenData, tmp_path: Path) -> None:
    """Dropout, averaged weights and the gradient go on as if nothing had been judged."""
    plain = {"dropout": 0.1, "max_train_steps": 7, "logging_steps": 1}
    alone = config(**plain, eval_steps=None, max_eval_rows=256)
    unwatched = run(alone, data, tmp_path / "alone")
    watched = run(config(**plain, keep="best"), data, tmp_path / "watched")
    assert [event["step"] for event in of(watched, "heldout")] == [0, 2, 4, 6, 7]
    assert losses(watched) == losses(unwatched)
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        there, here = (tmp_path / f / "checkpoint-7" / name for f in ("alone", "watched"))
        assert there.read_bytes() == here.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_keep_best_keeps_the_weights_of_the_best_step(
    data: TokenData, tmp_path: Path, ema_decay: float
) -> None:
    """Byte for byte, though fewer checkpoints are kept than evaluations were made since."""
    cfg = config(keep="best", checkpoints_total_limit=1, ema_decay=ema_decay)
    events = run(cfg, data, tmp_path / "best")
    best = of(events, "heldout")[-1]["heldout_best_step"]
    assert 2 < best < 24
    assert best % cfg.checkpointing_steps, "a step that is a checkpoint for being the best alone"
    left = {folder.name for folder in committed_checkpoints(tmp_path / "best")}
    assert left == {f"checkpoint-{best}", "checkpoint-24"}
    metadata = load_manifest(tmp_path / "best" / "final").metadata
    assert (metadata["step"], metadata["best_step"]) == (24, best)
    assert "stopped_early" not in metadata
    # A run that ends there leaves the same.
    shorter = config(ema_decay=ema_decay, max_train_steps=best)
    run(shorter, data, tmp_path / "shorter")
    name = "model.safetensors"
    kept, end = ((tmp_path / f / "final" / name).read_bytes() for f in ("best", "shorter"))
    assert kept == end
    if not ema_decay:
        assert kept == (tmp_path / "best" / f"checkpoint-{best}" / name).read_bytes()
    last = load_file(tmp_path / "best" / "checkpoint-24" / name)
    assert any(not torch.equal(last[k], v) for k, v in load_file(kept_path(tmp_path)).items())


def kept_path(folder: Path) -> Path:
    return folder / "best" / "final" / "model.safetensors"


@pytest.mark.slow
def test_keep_best_keeps_the_adapters_of_the_best_step(data: TokenData, tmp_path: Path) -> None:
    adapters: dict[str, Any] = {
        "lora_rank": 2,
        "model_name_or_path": "builtin:qwen3-tiny",
        "objective": "ar",
    }
    adapters |= {"learning_rate": 0.02}  # which soon learns the few rows by heart
    base = tmp_path / "base"
    unwatched = {"eval_steps": None, "max_eval_rows": 256, "max_train_steps": 12}
    whole = {**adapters, "lora_rank": None, "learning_rate": 0.01}
    run(config(**{**whole, **unwatched}), data, base)
    adapters["model_name_or_path"] = str(base / "final")
    events = run(config(**adapters, keep="best"), data, tmp_path / "best")
    best = of(events, "heldout")[-1]["heldout_best_step"]
    assert best < 24
    run(config(**adapters, max_train_steps=best), data, tmp_path / "shorter")
    name = "model.safetensors"
    kept, end = ((tmp_path / f / "final" / name).read_bytes() for f in ("best", "shorter"))
    assert kept == end


@pytest.mark.slow
def test_a_draft_is_watched_by_what_is_accepted_of_it(data: TokenData, tmp_path: Path) -> None:
    target = {"objective": "ar", "model_name_or_path": "builtin:qwen3-tiny", "eval_steps": None}
    final = train_in_process(
        config(**target, max_eval_rows=256, max_train_steps=30), data, tmp_path / "target"
    )
    objective = {"name": "dflash", "draft_num_layers": 1, "block_size": 4, "num_anchors": 4}
    fields = config(max_train_steps=12).model_dump(
        exclude={"objective", "model_name_or_path"}, exclude_defaults=True
    )
    draft = TrainConfig.model_validate(
        {**fields, "objective": objective, "target_model_id": str(final)}
    )
    events = of(run(draft, data, tmp_path / "draft"), "heldout")
    assert [event["step"] for event in events] == [0, 2, 4, 6, 8, 10, 12]
    lengths = {event["step"]: event["heldout_acceptance_length"] for event in events}
    assert all(1.0 <= length <= 4.0 for length in lengths.values())
    for event in events[2:]:  # more is better
        if event["heldout_since_best"] == 0:
            before = [lengths[step] for step in lengths if 0 < step < event["step"]]
            assert lengths[event["step"]] > max(before)
    yardstick = yardstick_of(DFlash(block_size=4, mask_token_id=1), None)
    more, fewer = (
        {
            "row_id": np.arange(4),
            "num_accepted": np.array(accepted),
            "num_blocks": np.full(4, 3.0),
        }
        for accepted in ([9.0, 9.0, 9.0, 8.0], [6.0, 6.0, 6.0, 7.0])
    )
    assert is_better(yardstick, more, fewer)
    assert not is_better(yardstick, fewer, more)


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_gone_back_behind(data: TokenData, tmp_path: Path) -> None:
    cfg = config(keep="best", checkpoints_total_limit=1)
    events = run(cfg, data, tmp_path)
    best = of(events, "heldout")[-1]["heldout_best_step"]
    weights = (tmp_path / "final" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "final")
    (tmp_path / f"checkpoint-{best}" / "model.safetensors").write_bytes(b"damaged")
    again = run(cfg, data, tmp_path)
    assert decisions(again) == decisions(events)
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_manifest_of_an_older_checkpoint_that_cannot_be_read_stops_nothing(
    data: TokenData, tmp_path: Path
) -> None:
    cfg = config(max_train_steps=10, keep="best")
    run(cfg, data, tmp_path)
    oldest = committed_checkpoints(tmp_path)[0]
    (tmp_path / oldest.name / "MANIFEST.json").write_text("{")
    run(config(max_train_steps=20, keep="best"), data, tmp_path)
    assert load_manifest(tmp_path / "final").metadata["step"] == 20


def test_other_rows_may_be_judged_where_they_decide_nothing(
    data: TokenData, tmp_path: Path
) -> None:
    run(config(max_train_steps=4), data, tmp_path)
    events = run(config(max_train_steps=8, max_eval_rows=10), data, tmp_path)
    assert decisions(events)[0] == (6, 6, 0)  # the first of these rows


class _Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deadly", "lives"),
    [("heldout", [3, 2, 2, 3, 3]), ("checkpoint", [1, 2, 1, 1]), ("stopped_early", [1, 1])],
)
def test_kills_lose_and_double_no_decision(
    data: TokenData, tmp_path: Path, deadly: str, lives: list[int]
) -> None:
    """A run that is killed at such events, and begun again, decides as if it had lived: after an
    evaluation and before its checkpoint, and between the last checkpoint and final/.
    """
    cfg = config(early_stopping_patience=3, keep="best", checkpoints_total_limit=1)
    expected = run(cfg, data, tmp_path / "whole")
    seen: dict[int, dict[str, Any]] = {}
    for life in (*lives, math.inf):
        left = life

        def note(event: str, **fields: Any) -> None:
            nonlocal left
            if event == "heldout":
                assert seen.setdefault(fields["step"], fields) == fields
            left -= event == deadly
            if left <= 0:
                raise _Killed

        with nullcontext() if life == math.inf else pytest.raises(_Killed):
            train_in_process(cfg, data, tmp_path / "cut", on_event=note)
    assert list(seen.values()) == [
        {name: value for name, value in event.items() if name != "event"}
        for event in of(expected, "heldout")
    ]
    whole, cut = (tmp_path / f / "final" for f in ("whole", "cut"))
    assert load_manifest(cut).metadata == load_manifest(whole).metadata
    name = "model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_workers_decide_alike(data: TokenData, tmp_path: Path, size: int) -> None:
    """30 rows on 4 workers are uneven; the state in the last checkpoint holds all of them."""
    cfg = config(
        early_stopping_patience=3, keep="best", per_device_train_batch_size=2, logging_steps=1
    )
    alone = run(cfg, data, tmp_path / "1")
    run_distributed([(cfg, tmp_path / str(size))], data, size)
    step = of(alone, "heldout")[-1]["step"]
    one, several = (
        json.loads((tmp_path / name / f"checkpoint-{step}" / WATCH_STATE).read_text())
        for name in ("1", str(size))
    )
    decided = [(state["best_step"], state["since_best"]) for state in (one, several)]
    assert decided[0] == decided[1] == decisions(alone)[-1][1:]
    assert one["best"]["row_id"] == several["best"]["row_id"]
    assert several["best"]["nats"] == pytest.approx(one["best"]["nats"], rel=1e-3)
    first, second = (load_manifest(tmp_path / n / "final").metadata for n in ("1", str(size)))
    assert first == second


def test_judging_tells_progress_and_takes_no_training_time(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokendiff.training.trainer._TELL_SECONDS", 0.0)
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    cfg = config(max_train_steps=2, logging_steps=1, max_eval_rows=20)
    events: Events = []

    def note(event: str, **fields: Any) -> None:
        events.append({"event": event} | fields)
        if event == "progress":  # a second for each; 0, 1 and 2 steps, and parts of an evaluation
            clock[0] += 100.0 if "heldout_rows" in fields else 1.0

    train_in_process(cfg, data, tmp_path, on_event=note)
    told = [e["heldout_rows"] for e in of(events, "progress") if "heldout_rows" in e]
    assert told == 2 * [[8, 20], [16, 20], [20, 20]]
    assert of(events, "metrics")[-1]["seconds_per_step"] == 1.0


def test_a_bound_that_is_not_finite_is_never_the_best(data: TokenData, tmp_path: Path) -> None:
    built = TrainingRun.build(config(max_train_steps=4), data, tmp_path, world=World.current())
    watch, trainer = built.watch, built.trainer
    assert watch is not None
    weights = next(trainer.denoiser.model.parameters())
    assert trainer.average is not None
    kept = {name: value.clone() for name, value in trainer.average.tensors.items()}
    for value in trainer.average.tensors.values():
        value.fill_(math.nan)
    assert math.isnan(watch.evaluate(trainer)["heldout_nats_per_token"])
    trainer.average.load(kept)
    trainer.step = 2
    assert watch.evaluate(trainer)["heldout_best_step"] == 2
    trainer.average.tensors[next(iter(kept))].fill_(math.nan)
    trainer.step = 4
    figures = watch.evaluate(trainer)
    assert (figures["heldout_best_step"], figures["heldout_since_best"]) == (2, 1)
    assert torch.isfinite(weights).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience 2 has no effect with eval_steps"),
        ({"keep": "best"}, "keep 'best' has no effect with eval_steps null"),
        ({"max_eval_rows": 9}, "max_eval_rows 9 has no effect with eval_steps null"),
        ({"eval_steps": 0}, "greater than or equal to 1"),
        ({"eval_steps": 1, "max_eval_rows": 1}, "greater than or equal to 2"),
    ],
)
def test_fields_in_vain_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(fields)


def test_only_evaluations_that_decide_are_part_of_a_key() -> None:
    plain = TrainConfig().result_fields()
    assert TrainConfig(eval_steps=5, max_eval_rows=9).result_fields() == plain
    deciding = TrainConfig(eval_steps=5, keep="best").result_fields()
    assert deciding == {
        **plain,
        "eval_steps": 5,
        "max_eval_rows": 256,
        "early_stopping_patience": None,
        "keep": "best",
    }


def test_held_out_rows_must_be_there(tmp_path: Path) -> None:
    folder = token_folder(
        tmp_path / "data",
        files=[random_rows(8, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
    )
    data = TokenData.open(folder, split="train")
    for start in (
        lambda: check_inputs(config(), data),
        lambda: train_in_process(config(), data, tmp_path / "out"),
    ):
        with pytest.raises(InputError, match=r"'heldout' has no rows.*heldout_fraction"):
            start()
    assert not (tmp_path / "out").exists()
