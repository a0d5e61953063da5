"""TensorBoard and Weights & Biases: what their own readers find of a log that was mirrored."""

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tokendiff.config.pipeline import TrackingConfig
from tokendiff.errors import InputError
from tokendiff.tracking import log_sinks, mlflow_delivery
from tokendiff.tracking.log_sinks import STATE_NAME, LogOutbox, TensorBoardSink, check_sinks
from tokendiff.tracking.mlflow_mirror import MlflowMirror
from tokendiff.tracking.run_log import LOG_NAME, RunLog

TENSORBOARD = TrackingConfig(enabled=False, tensorboard=True)
WANDB = TrackingConfig(enabled=False, wandb_project="tests")


def write(folder: Path, *steps: int, resume: int | None = None) -> None:
    """What an attempt logs: loss 10 - step, and a held-out figure at the last step."""
    with RunLog(folder / LOG_NAME) as log:
        if resume is None:
            log.write("start", step=0, max_train_steps=9)
        else:
            log.write("resume", step=resume)
        for step in steps:
            log.write("metrics", step=step, loss=10.0 - step, note="text")
        log.write("heldout", step=steps[-1], heldout_nats_per_token=5.0)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing a tracker may take longer here, where many tests run, than a run waits for it."""
    monkeypatch.setattr(mlflow_delivery, "_LAST_TRY_SECONDS", 120.0)


def mirrored(folder: Path, config: TrackingConfig, **params: Any) -> None:
    """An attempt that finds the log as it stands."""
    mirror = MlflowMirror.open(config, folder.parent)
    with mirror.stage("train", folder=folder, params=params) as run:
        run.consume([])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def test_tensorboard_shows_the_log_once_whatever_was_cut_off(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, 1, 2, 3, 4)
    mirrored(folder, TENSORBOARD)
    write(folder, 3, 4, 5, resume=2)  # steps 3 and 4 are made again
    mirrored(folder, TENSORBOARD)
    expected = {
        "loss": [(step, 10.0 - step) for step in (1, 2, 3, 4, 5)],
        "heldout_nats_per_token": [(5, 5.0)],
    }
    assert scalars(folder) == expected

    state = folder / "tensorboard" / STATE_NAME
    state.write_text(json.dumps({**json.loads(state.read_text()), "offset": 0}))
    mirrored(folder, TENSORBOARD)  # killed before it was noted what had arrived
    assert scalars(folder) == expected


def test_tensorboard_forgets_what_a_restart_within_a_run_makes_void(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    place = folder / "tensorboard"
    outbox = LogOutbox("train", "TensorBoard", place, lambda _: TensorBoardSink(place))
    write(folder, 1, 2, 3, 4)
    outbox.deliver(None)
    write(folder, 4, resume=2)  # lost workers; with other logging_steps, step 3 is not told again
    outbox.deliver(None)
    outbox.finish("FINISHED", 0.0)
    outbox.deliver(None)
    assert scalars(folder)["loss"] == [(1, 9.0), (2, 8.0), (4, 6.0)]


def test_a_run_goes_on_while_its_mirror_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The mirror fails at first, and gets all of it once it works again."""
    failures = iter([OSError("no space left"), OSError("no space left")])
    send, recovered = TensorBoardSink.send, threading.Event()

    def failing(self: TensorBoardSink, events: Any) -> None:
        if (error := next(failures, None)) is not None:
            raise error
        send(self, events)
        recovered.set()

    monkeypatch.setattr(TensorBoardSink, "send", failing)
    folder = tmp_path / "run"
    write(folder, 1, 2)
    with (
        caplog.at_level(logging.WARNING),
        MlflowMirror.open(TENSORBOARD, tmp_path).stage("train", folder=folder) as run,
    ):
        run.consume([])
        assert recovered.wait(20)
    assert scalars(folder)["loss"] == [(1, 9.0), (2, 8.0)]
    (line,) = [record.getMessage() for record in caplog.records if "fails" in record.getMessage()]
    assert line.startswith("TensorBoard fails on run 'train' (")
    assert "no space left" in line


def test_a_live_run_is_mirrored_by_one_process_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    write(folder, 1)
    with MlflowMirror.open(TENSORBOARD, tmp_path).stage("train", folder=folder):
        mirrored(folder, TENSORBOARD)
    assert "a live run has" in caplog.text
    assert scalars(folder)["loss"] == [(1, 9.0)]


class FakeWandb:
    """As much of wandb as the sink calls; keeps the rows of each run as the service does."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.inits: list[dict[str, Any]] = []
        self.codes: list[int] = []

    def Settings(self, **kwargs: Any) -> dict[str, Any]:  # wandb's name
        return kwargs

    def init(self, **kwargs: Any) -> "FakeWandb":
        self.inits.append(kwargs)
        self.rows = self.runs.setdefault(kwargs["id"], {})
        return self

    def log(self, values: dict[str, float], *, step: int) -> None:
        if step >= max(self.rows, default=0):  # others are refused with a warning
            self.rows.setdefault(step, {}).update(values)

    def finish(self, *, exit_code: int) -> None:
        self.codes.append(exit_code)


def test_wandb_gets_each_step_once_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(log_sinks, "find_spec", lambda name: name)
    folder = tmp_path / "run"
    write(folder, 1, 2, 3)
    mirror = MlflowMirror.open(WANDB, tmp_path)
    params = {"train": {"seed": 3}, "api_key": "hunter2"}
    run = mirror.stage("train", folder=folder, params=params)
    run.__exit__(KeyboardInterrupt, None, None)
    write(folder, 3, 4, resume=2)
    mirrored(folder, WANDB)
    ((_, rows),) = fake.runs.items()  # it went on as the run that it was
    assert rows == {
        1: {"loss": 9.0},
        2: {"loss": 8.0},
        3: {"loss": 7.0, "heldout_nats_per_token": 5.0},
        4: {"loss": 6.0, "heldout_nats_per_token": 5.0},
    }
    assert fake.codes == [1, 0]
    assert fake.inits[0]["config"] == {"train.seed": "3"}
    assert fake.inits[0]["settings"]["console"] == "off"

    write(folder, 1)
    mirrored(folder, WANDB)  # it had finished: made again it is another run
    assert len(fake.runs) == 2


@pytest.mark.slow
def test_real_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    for name, value in {"MODE": "offline", "CACHE_DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    folder = tmp_path / "run"
    write(folder, 1, 2)
    mirrored(folder, WANDB)
    wandb.teardown()  # its service
    (file,) = folder.rglob("*.wandb")
    store, losses = DataStore(), []
    store.open_for_scan(str(file))
    while data := store.scan_data():
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or item.nested_key[0]: item for item in record.history.item}
        if "loss" in items:
            losses.append((record.history.step.num, json.loads(items["loss"].value_json)))
    assert losses == [(1, 9.0), (2, 8.0)]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_said_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(log_sinks, "find_spec", lambda name: None)
    check_sinks(TrackingConfig())
    with pytest.raises(InputError, match=rf"pip install 'tokendiff\[{package}\]'"):
        MlflowMirror.open({"tensorboard": TENSORBOARD, "wandb": WANDB}[package], tmp_path)


def test_a_log_without_news_opens_no_sink(tmp_path: Path) -> None:
    def never(run_id: str) -> log_sinks.Sink:
        raise AssertionError

    outbox = LogOutbox("train", "Nowhere", tmp_path / "run" / "sink", never)
    outbox.finish("FINISHED", 0.0)
    outbox.deliver(None)
    assert outbox.is_delivered
