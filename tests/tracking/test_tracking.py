"""The run's log, what is printed of it, and its mirror in MLflow (real stores, a real server)."""

import contextlib
import errno
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import tokendiff
from tokendiff.config.pipeline import TrackingConfig
from tokendiff.errors import InputError
from tokendiff.tracking import mlflow_delivery, mlflow_store, system_metrics
from tokendiff.tracking.live import standing_of
from tokendiff.tracking.mlflow_delivery import Delivery, replay_pending
from tokendiff.tracking.mlflow_entities import flatten_params, metrics_and_tags
from tokendiff.tracking.mlflow_mirror import MlflowMirror
from tokendiff.tracking.mlflow_outbox import Outbox, RunState, load_state, lock_folder
from tokendiff.tracking.mlflow_store import check_store, make_client, open_command, resolve_uri
from tokendiff.tracking.progress import LogTailer, ProgressPrinter
from tokendiff.tracking.run_log import (
    LOG_NAME,
    PROGRESS_NAME,
    RunLog,
    follow,
    metrics_by_step,
    read_events,
    read_progress,
)

ON = TrackingConfig()
# For subprocesses, which may run in another folder than the checkout.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tokendiff.__file__).parents[1])}


# The log


def write_raw(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def test_lines_are_standard_json_and_floats_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / LOG_NAME
    with RunLog(path, clock=lambda: 12.5) as log:
        log.write("metrics", step=3, loss=math.nan, norm=-math.inf, nested=[math.inf, {"a": "é"}])
        log.write("checkpoint", step=3, path=Path("/x/checkpoint-3"))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = path.read_text().splitlines()
    raw = [json.loads(line, parse_constant=refuse) for line in lines]
    assert raw[0]["loss"] == "NaN"
    assert raw[1] == {"time": 12.5, "event": "checkpoint", "step": 3, "path": "/x/checkpoint-3"}
    event = read_events(path)[0]
    assert math.isnan(event.pop("loss"))
    assert event == {
        "time": 12.5,
        "event": "metrics",
        "step": 3,
        "norm": -math.inf,
        "nested": [math.inf, {"a": "é"}],
    }


def test_a_field_that_is_not_json_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    with RunLog(tmp_path / LOG_NAME) as log, pytest.raises(TypeError):
        log.write("metrics", step=1, loss=object())
    assert (tmp_path / LOG_NAME).read_bytes() == b""


def test_a_writer_killed_in_mid_line_costs_that_line_alone(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    with RunLog(path) as first, RunLog(path) as second:
        first.write("metrics", step=1)
        write_raw(path, b'{"time": 1, "event": "metr')  # a worker dies here
        assert [event["step"] for event in read_events(path)] == [1]
        second.write("metrics", step=2)  # the driver had the file open all along
        first.write("metrics", step=3)
        write_raw(path, b'{"time": 1, "event": "metrics", "step": 4}')
    with RunLog(path) as third:
        third.write("metrics", step=5)
    write_raw(path, b'\xff\xfe\n[1, 2]\n{"no": "event"}\n')
    # Step 4 lacked only its newline, so it is whole.
    assert [event["step"] for event in read_events(path)] == [1, 2, 3, 4, 5]


def test_follow_gives_the_same_events_wherever_it_is_cut(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / LOG_NAME
    with RunLog(whole, clock=lambda: 1.0) as log:
        for step in range(3):
            log.write("metrics", step=step, text="ü")
    data = whole.read_bytes()
    assert follow(path, 7) == ([], 7)
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        events, offset = follow(path)
        assert len(events) == data[:cut].count(b"\n")
        path.write_bytes(data)
        rest, end = follow(path, offset)
        assert [event["step"] for event in events + rest] == [0, 1, 2]
        assert end == len(data)
    path.write_bytes(data[: len(data) // 3])  # the folder was emptied and the stage begun again
    assert len(follow(path, len(data))[0]) == 1


def test_a_resume_voids_what_came_after_its_step(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    assert metrics_by_step(path) == []
    with RunLog(path) as log:
        for step in (10, 20, 30, 40):
            log.write("metrics", step=step, loss=f"first {step}")
        log.write("resume", step=20)
        log.write("metrics", step=30, loss="second 30")
        log.write("metrics", step=50, loss="second 50")
        log.write("resume", step=30)
        log.write("metrics", step=60, loss="third 60")
        log.write("metrics", step=10, loss="third 10")
        losses = [event["loss"] for event in metrics_by_step(path)]
        assert losses == ["third 10", "first 20", "second 30", "third 60"]
        log.write("start", step=0)  # there was no checkpoint to resume from
        log.write("metrics", step=20, loss="fourth 20")
    assert [event["loss"] for event in metrics_by_step(path)] == ["fourth 20"]


WRITER = """
import pickle, sys
from pathlib import Path
from tokendiff.tracking.run_log import RunLog
heavy = {"torch", "ray", "mlflow", "pydantic", "rich", "numpy"} & set(sys.modules)
assert not heavy, heavy
with RunLog(Path(sys.argv[1])) as log:
    for step in range(300):
        log.write("metrics", step=step, writer=sys.argv[2], text="x" * 300)
    pickle.loads(pickle.dumps(log.write))("end", writer=sys.argv[2])  # as a worker gets it
"""


def test_writers_in_several_processes_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, name], env=ENVIRONMENT) for name in "abcd"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    events = read_events(path)
    for name in "abcd":
        mine = [e for e in events if e["writer"] == name]
        assert [e["step"] for e in mine[:-1]] == list(range(300))
        assert mine[-1]["event"] == "end"


# What is printed


def at(time: float, event: str, **fields: Any) -> dict[str, Any]:
    return {"time": time, "event": event, **fields}


def printed(stage: str, events: list[dict[str, Any]]) -> list[str]:
    """What is printed where each event is seen when it happens."""
    stream, now = io.StringIO(), [0.0]
    with ProgressPrinter(stage, stream=stream, clock=lambda: now[0]) as printer:
        for event in events:
            now[0] = event["time"]
            printer.consume([event])
    return stream.getvalue().splitlines()


def judged(value: float, *, best: int | None = None, since: int = 0) -> dict[str, Any]:
    figures = {"heldout_nats_per_token": value, "heldout_standard_error": 0.25}
    rank = {"heldout_best_step": best, "heldout_since_best": since}
    return figures if best is None else {**figures, **rank}


def test_a_line_for_each_event() -> None:
    facts = {"lr": 3e-4, "tokens_per_second": 18_400.4, "data_wait_fraction": 0.0123}
    shown = "lr 3.0e-04  18,400 tokens/s"
    waiting = "1.2% of the time waiting for data"
    lines = printed(
        "train",
        [
            at(0, "doing", what="starting 2 training workers"),
            at(0, "start", step=0, max_train_steps=400, num_workers=2, num_params=4_400_000),
            at(0, "start", step=0, num_params=4_400_000, num_trained_params=4_400_000),
            at(0, "start", step=0, num_params=4_400_000, num_trained_params=9_000, rows=1),
            at(100, "metrics", step=10, loss=7.1, **facts),
            at(110, "metrics", step=20, loss=5.2134, grad_norm=1.0, **facts),
            at(115, "metrics", step=30, loss=math.nan, **facts),
            at(115, "heldout", step=0, **judged(4.0)),
            at(115, "heldout", step=20, **judged(3.0, best=20, since=0)),
            at(115, "heldout", step=1030, **judged(3.1, best=1020, since=1)),
            at(115, "heldout", step=1040, **judged(3.2, best=1020, since=2)),
            at(115, "stopped_early", step=1040, reason="2 evaluations said so"),
            at(116, "checkpoint", step=30, path="/out/checkpoint-30"),
            at(117, "warning", message="worker 1 [died]"),
            at(200, "resume", step=20),
            at(260, "metrics", step=30, loss=5.0),
            at(300, "end"),
            at(300, "something new"),
        ],
    )
    assert lines == [
        "train  starting 2 training workers",
        "train  training starts: 2 workers, 4,400,000 parameters",
        "train  training starts: 4,400,000 parameters",
        "train  training starts: 4,400,000 parameters, 9,000 of them trained, 1 row",
        # 100 s for 10 steps, start-up included: how long the others take is not known yet.
        f"train  step 10/400  loss 7.100  {shown}  {waiting}",
        # 1 s a step since the first report, then 15 s for 20 steps.
        f"train  step 20/400  loss 5.213  {shown}  6:20 left  {waiting}",
        f"train  step 30/400  loss nan  {shown}  4:38 left  {waiting}",
        "train  held-out rows before training: 4.0000 ± 0.2500 nats per token",
        "train  held-out rows at step 20: 3.0000 ± 0.2500 nats per token, the best",
        "train  held-out rows at step 1,030: 3.1000 ± 0.2500 nats per token, "
        "no better than at step 1,020",
        "train  held-out rows at step 1,040: 3.2000 ± 0.2500 nats per token, "
        "no better than at step 1,020, 2 times in a row",
        "train  ends early after step 1,040: 2 evaluations said so",
        "train  checkpoint at step 30: /out/checkpoint-30",
        "train  warning: worker 1 [died]",
        "train  goes on from step 20",
        "train  step 30/400  loss 5.000",
    ]
    assert printed("train", [at(0, "metrics", step=5, loss=1.0)]) == ["train  step 5  loss 1.000"]


def progress(time: float, done: float, total: float, unit: str, **fields: Any) -> dict[str, Any]:
    return at(time, "progress", done=done, total=total, unit=unit, **fields)


def test_progress_is_counted_in_words_and_told_when_it_is_over() -> None:
    rows = "generate  {}  {} unusable prompts  {} tokens/s{}"
    assert printed(
        "generate",
        [
            progress(0, 0, 6400, "rows", tokens=0, errors=0),
            progress(30, 0, 6400, "rows", tokens=0, errors=0),  # weights are read
            progress(40, 1600.5, 6400, "rows", tokens=64_020, errors=2),
            progress(41, 1700, 6400, "rows", tokens=68_000, errors=2),  # one second later
            progress(50, 3200, 6400, "rows", tokens=128_000, errors=2),
            progress(51, 6400, 6400, "rows", tokens=256_000, errors=2),
            at(52, "error", message="boom"),
        ],
    ) == [
        "generate  0/6,400 rows",
        "generate  0/6,400 rows",
        rows.format("1,600/6,400 rows", 2, "6,402", ""),
        rows.format("3,200/6,400 rows", 2, "6,398", "  0:20 left"),
        "generate  6,400/6,400 rows  2 unusable prompts  17,453 tokens/s",
        "generate  error: boom",
    ]
    assert printed(
        "preprocess",
        [
            progress(0, 0, 33_600_000, "bytes", tokens=0, rows=0),
            progress(10, 16_800_000, 33_600_000, "bytes", tokens=5_000_000, rows=39_062),
            progress(20, 25_200_000, 33_600_000, "bytes", tokens=10_000_000, rows=58_593),
        ],
    ) == [
        "preprocess  0.0/33.6 MB  0 rows",
        "preprocess  16.8/33.6 MB  39,062 rows  500,000 tokens/s",
        "preprocess  25.2/33.6 MB  58,593 rows  500,000 tokens/s  0:10 left",
    ]
    assert printed("x", [progress(0, 39, 40, "bytes")]) == ["x  39/40 bytes"]
    # Another thing is counted, at another speed.
    assert printed(
        "evaluate",
        [
            progress(0, 0, 64, "rows", tokens=0),
            progress(10, 64, 64, "rows", tokens=640),
            progress(11, 0, 71, "checks", tokens=0),
            progress(18, 7, 71, "checks", tokens=0),
            progress(25, 14, 71, "checks", tokens=0),
        ],
    ) == [
        "evaluate  0/64 rows",
        "evaluate  64/64 rows  64 tokens/s",
        "evaluate  0/71 checks",
        "evaluate  7/71 checks",
        "evaluate  14/71 checks  0:57 left",
    ]


def test_the_time_left_is_not_told_before_it_is_known() -> None:
    """Steps of 4 s each, told of every 2 s, behind a first one that took 60 s."""
    times = [(2.0 * told, max(0.0, told - 28) / 2) for told in range(40)]
    lines = printed("train", [progress(time, done, 100, "steps", tokens=0) for time, done in times])
    left = [line for line in lines if "left" in line]
    assert all(float(line.split("step ")[1].split("/")[0]) >= 3 for line in left)
    for line in left:  # and then it is right
        minutes, seconds = line.split("  ")[-1].removesuffix(" left").split(":")
        done = int(line.split("step ")[1].split("/")[0])
        assert abs(60 * int(minutes) + int(seconds) - 4 * (100 - done)) <= 4
    assert 0 < len(left) < len(lines)


def test_a_signal_to_stop_is_answered_with_what_is_awaited() -> None:
    asked = "train  SIGTERM received: ends once"
    assert printed("train", [at(0, "start", step=0, max_train_steps=9), at(1, "stopping")])[1:] == [
        f"{asked} the step under way is taken and saved"
    ]
    events = [progress(10.0 * told, told / 2, 9, "steps", tokens=0) for told in range(8)]
    assert printed("train", [*events, at(71, "stopping")])[-1] == (
        f"{asked} step 4 is taken and saved, in about 0:10 and the time that saving takes"
    )


def test_what_is_told_beside_the_log_does_not_go_behind_the_log(tmp_path: Path) -> None:
    """A training shorter than two reports: its last word beside the log is of its first step."""
    stream, path = io.StringIO(), tmp_path / LOG_NAME
    with (
        RunLog(path) as log,
        ProgressPrinter("train", log_path=path, stream=stream) as printer,
        LogTailer(path, [printer.consume], on_look=printer.look, poll_seconds=0.05),
    ):
        log.write("start", step=0, max_train_steps=10)
        log.write("progress", done=0.5, total=10, unit="steps", tokens=8)
        log.write("metrics", step=10, loss=1.0)
        wait_until(lambda: "10/10" in stream.getvalue())
        time.sleep(0.2)
    assert stream.getvalue().splitlines()[-1] == "train  step 10/10  loss 1.000"
    shown = standing_of(path, folder=tmp_path)
    assert (shown.state, shown.place) == ("running", "step 10/10")


@pytest.mark.slow
def test_something_moves_every_ten_seconds_later_every_minute_and_the_log_stays_short(
    tmp_path: Path,
) -> None:
    """An hour in which a job tells of its progress every second, but for a minute of silence."""
    now, stream = [0.0], io.StringIO()
    path, times = tmp_path / LOG_NAME, []
    with (
        RunLog(path, clock=lambda: now[0]) as log,
        ProgressPrinter("generate", log_path=path, stream=stream, clock=lambda: now[0]) as printer,
    ):
        for half_second in range(7200):
            now[0] = half_second / 2
            is_silent = 100 < now[0] < 160
            if half_second % 2 == 0 and not is_silent:
                done = now[0] * 500
                log.write("progress", done=done, total=3e6, unit="rows", tokens=done * 100)
            before = stream.tell()
            printer.look()
            if stream.tell() > before:
                times.append(now[0])
    lines = stream.getvalue().splitlines()
    pauses = [(sooner, later - sooner) for sooner, later in pairwise([*times, now[0]])]
    assert max(pause for start, pause in pauses if start < 120) <= 10.0
    assert max(pause for _, pause in pauses) <= 63.0
    assert len(lines) < 120
    moving = [line for line in lines if "nothing new" not in line]
    assert len(set(moving)) == len(moving) > 90
    assert moving[-1].startswith("generate  1,7")
    assert re.search(r"rows  50,000 tokens/s  4\d:\d\d left$", moving[-1])
    silent = [line for line in lines if "nothing new" in line]
    assert re.search(
        r"rows  50,000 tokens/s  1:3\d:\d\d left  \(nothing new for 0:\d\d\)$", silent[0]
    )
    assert len(silent) == 5
    # 60 % were done: a line of the log for each, whatever the number of reports.
    assert sum(event["event"] == "progress" for event in read_events(path)) == 60
    assert read_progress(path) == read_events(path)[-1] | {
        "time": 3599.0, "done": 1_799_500.0, "tokens": 179_950_000.0,
    }  # fmt: skip


def test_before_anything_is_counted_it_is_said_what_is_done(tmp_path: Path) -> None:
    now, stream = [0.0], io.StringIO()
    path = tmp_path / LOG_NAME
    with RunLog(path) as log:
        log.write("progress", done=5, total=10, unit="rows")  # of an attempt that was killed
    with ProgressPrinter("train", log_path=path, stream=stream, clock=lambda: now[0]) as printer:
        for now[0] in range(20):
            if now[0] == 5:
                printer.consume([at(5, "doing", what="starting 1 training worker")])
            printer.look()
    assert stream.getvalue().splitlines() == [
        "train  starting 1 training worker",
        "train  starting 1 training worker  (0:09 so far)",
    ]
    (tmp_path / PROGRESS_NAME).unlink()
    assert read_progress(path) is None
    (tmp_path / PROGRESS_NAME).write_text('{"time": 1, "even')
    assert read_progress(path) is None


def test_the_last_word_on_one_thing_is_not_lost_to_the_first_on_another(tmp_path: Path) -> None:
    stream, path = io.StringIO(), tmp_path / LOG_NAME
    with (
        RunLog(path) as log,
        ProgressPrinter("evaluate", log_path=path, stream=stream) as printer,
        LogTailer(path, [printer.consume], on_look=printer.look, poll_seconds=0.05),
    ):
        log.write("progress", done=0, total=8, unit="rows", tokens=0)
        wait_until(lambda: "0/8" in stream.getvalue())
        log.write("progress", done=8, total=8, unit="rows", tokens=800)
        log.write("progress", done=0, total=71, unit="checks", tokens=0)
        wait_until(lambda: "0/71" in stream.getvalue())
        log.write("progress", done=71, total=71, unit="checks", tokens=0)
    places = [line.split("  ")[1] for line in stream.getvalue().splitlines()]
    assert places == ["0/8 rows", "8/8 rows", "0/71 checks", "71/71 checks"]


def test_progress_that_cannot_be_shown_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / PROGRESS_NAME).mkdir()
    with RunLog(tmp_path / LOG_NAME) as log:
        log.write("progress", done=1, total=2, unit="rows")
    assert read_progress(tmp_path / LOG_NAME) is None
    assert len(read_events(tmp_path / LOG_NAME)) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with ProgressPrinter("train", stream=stream) as printer:
        printer.consume([at(0, "start", step=0, max_train_steps=400)])
        printer.consume([at(1, "metrics", step=20, loss=6.5)])
        printer.consume([at(11, "metrics", step=40, loss=5.25)])
        printer.consume([at(1, "warning", message="[bold]kept as it is")])
    shown = stream.getvalue()
    assert "━" in shown
    assert "step 40/400" in shown
    assert "loss 5.250  3:00 left" in shown
    assert "train  warning: [bold]kept as it is" in shown


def test_a_narrow_terminal_cuts_off_what_matters_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "70")
    facts = {"lr": 3e-4, "tokens_per_second": 18_400.4, "data_wait_fraction": 0.0123}
    stream = Terminal()
    with ProgressPrinter("train", stream=stream) as printer:
        printer.consume([at(0, "start", step=0, max_train_steps=400)])
        printer.consume([at(1, "metrics", step=40, loss=5.25, **facts)])
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", stream.getvalue())
    text = " ".join(shown.split())
    assert re.search(r"train ━[━╸╺ ]+ 0:00:0\d step 40/400 loss 5.250 .*…", text)


def test_the_tailer_hands_on_everything_new_in_order(tmp_path: Path) -> None:
    path = tmp_path / LOG_NAME
    seen: list[int] = []
    arrived = threading.Event()

    def consume(events: list[dict[str, Any]]) -> None:
        seen.extend(event["step"] for event in events)
        arrived.set()

    with LogTailer(path, [consume], poll_seconds=0.01), RunLog(path) as log:
        log.write("metrics", step=0)
        assert arrived.wait(10), "nothing is seen while the run lives"
        for step in range(1, 100):
            log.write("metrics", step=step)
    assert seen == list(range(100))
    with LogTailer(path, [consume], poll_seconds=60), RunLog(path) as log:
        log.write("metrics", step=100)  # seen on leaving, without waiting; the old ones are not
    assert seen == list(range(101))


def test_a_consumer_that_raises_is_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / LOG_NAME
    calls: list[int] = []
    seen: list[int] = []

    def broken(events: list[dict[str, Any]]) -> None:
        calls.append(len(events))
        raise BrokenPipeError("no one reads")

    def sound(events: list[dict[str, Any]]) -> None:
        seen.append(len(events))

    with LogTailer(path, [broken, sound], poll_seconds=0.01), RunLog(path) as log:
        for count in range(1, 4):
            log.write("metrics", step=count)
            wait_until(lambda count=count: sum(seen) == count)  # type: ignore[misc]
    assert calls == seen
    assert len(seen) == 3
    assert [r.message for r in caplog.records if "no one reads" in r.message] != []
    assert len(caplog.records) == 1


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


# The store


@pytest.fixture(autouse=True)
def every_warning_is_captured(caplog: pytest.LogCaptureFixture) -> None:
    # pytest has one capturing handler for all tests, whose level any library may have raised.
    caplog.handler.setLevel(0)


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "sqlite:////base/mlflow.db"),
        ("sqlite:///runs/a.db", "sqlite:////base/runs/a.db"),
        ("sqlite:///../a.db?timeout=9", "sqlite:////a.db?timeout=9"),
        ("sqlite:////abs/a.db", "sqlite:////abs/a.db"),
        ("file:./mlruns", "file:///base/mlruns"),
        ("file:///abs/mlruns", "file:///abs/mlruns"),
        ("mlruns", "file:///base/mlruns"),
        ("http://host:5000", "http://host:5000"),
        ("postgresql://u:p@host/db", "postgresql://u:p@host/db"),
        ("databricks", "databricks"),
    ],
)
def test_uris_are_absolute_and_the_environment_comes_first(
    given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path("/base")
    assert resolve_uri(TrackingConfig(uri=given), root) == expected
    if given is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert resolve_uri(TrackingConfig(uri="http://another"), root) == expected


def test_a_relative_root_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(ON, Path("out")) == f"sqlite:///{tmp_path}/out/mlflow.db"


def test_the_command_that_opens_the_store_has_no_password() -> None:
    assert open_command("https://user:p@ss@host:1/x") == "https://host:1/x"
    assert open_command("sqlite:////a b/m.db") == (
        "mlflow ui --backend-store-uri 'sqlite:////a b/m.db'"
    )
    assert "secret" not in open_command("postgresql://user:secret@host/db")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_a_server_that_is_down_is_an_error_that_says_how_to_go_on(tmp_path: Path) -> None:
    config = TrackingConfig(uri=f"http://user:hunter2@127.0.0.1:{free_port()}")
    check_imports_are_paid_for()
    start = time.monotonic()
    with pytest.raises(InputError, match=r"-o tracking\.enabled=false") as raised:
        MlflowMirror.open(config, tmp_path, run_name="run")
    assert time.monotonic() - start < 10
    assert str(raised.value).startswith("tracking.uri: the MLflow store http://127.0.0.1:")
    assert "refused" in str(raised.value)
    assert "hunter2" not in "".join(traceback.format_exception(raised.value))


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "_CHECK_SECONDS", 0.5)
    check_imports_are_paid_for()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        start = time.monotonic()
        with pytest.raises(InputError, match=r"^MLFLOW_TRACKING_URI: .*no answer within"):
            check_store(uri)
        assert time.monotonic() - start < 3


def test_a_store_of_an_unusable_kind_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sqlite"):  # MLflow's own advice
        check_store(f"file://{tmp_path}/mlruns")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used"):
        check_store(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_a_store_whose_making_was_cut_off_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, places = f"sqlite:///{tmp_path}/mlflow.db", []

    def cut_off(uri: str) -> None:
        places.append(Path(uri.removeprefix("sqlite:///")))
        places[-1].write_bytes(b"half a database")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient", cut_off)
        with pytest.raises(KeyboardInterrupt):
            make_client(uri)
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db.lock"]
    places[0].parent.mkdir()  # as a process leaves it that is killed
    places[0].write_bytes(b"half a database")
    places[0].with_name("mlflow.db-journal").write_bytes(b"half a journal")
    check_store(uri)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def check_imports_are_paid_for() -> None:
    import mlflow  # noqa: F401


CREATOR = """
import sys
from tokendiff.tracking.mlflow_store import check_store
check_store(sys.argv[1])
"""


@pytest.mark.slow
def test_processes_that_create_a_store_together_all_succeed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CREATOR, f"sqlite:///{tmp_path}/new/mlflow.db"]
    creators = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT)
        for _ in range(2)
    ]
    errors = [creator.communicate(timeout=120)[1] for creator in creators]
    assert [creator.returncode for creator in creators] == [0, 0], errors
    assert errors == ["", ""]  # no word of migrations
    assert {path.name for path in tmp_path.iterdir()} == {"new"}  # nothing in the working folder


# What is stored


def test_params_are_flat_short_and_without_secrets() -> None:
    params = {
        "train": {"learning_rate": 1e-4, "objective": {"name": "mdlm"}, "compile": False},
        "files": ["a", "b"],
        "nothing": None,
        "prompt": "x" * 7000,
        "odd(name)": 1,
        "uri": "http://me:pw@host/",
        "tokenizer_name_or_path": "bpe",
        "max_new_tokens": 7,
        "mask_token_id": 4,
        "hf_token": "s",
        "TOKEN": "s",
        "db": {"password": "s", "client-secret": "s"},
        "credentials": {"user": "s"},
    }
    flat = flatten_params(params)
    assert flat.pop("prompt") == "x" * 5997 + "..."
    assert flat == {
        "train.learning_rate": "0.0001",
        "train.objective.name": "mdlm",
        "train.compile": "false",
        "files": '["a", "b"]',
        "nothing": "null",
        "odd_name_": "1",
        "uri": "http://host/",
        "tokenizer_name_or_path": "bpe",
        "max_new_tokens": "7",
        "mask_token_id": "4",
    }


def test_events_become_metrics_and_tags() -> None:
    events = [
        at(1.5, "start", step=0, num_params=7),
        at(2.0, "metrics", step=1, loss=2.5, is_odd=True, name="x", norm=math.inf),
        at(2.5, "heldout", step=1, heldout_nats_per_token=3.0, heldout_best_step=1),
        at(3.0, "checkpoint", step=1, path="checkpoint-1"),
        at(4.0, "checkpoint", step=2, path="s3://bucket/checkpoint-2"),
        at(5.0, "error", message="boom"),
    ]
    metrics, tags = metrics_and_tags(events, Path("/out"))
    assert metrics == [
        ("loss", 2.5, 2000, 1),
        ("heldout_nats_per_token", 3.0, 2500, 1),
        ("heldout_best_step", 1, 2500, 1),
    ]
    assert tags == {
        "start.step": "0",
        "start.num_params": "7",
        "infinite.norm": "inf at step 1",
        "checkpoint": "s3://bucket/checkpoint-2",
        "checkpoint.step": "2",
        "error": "boom",
    }
    assert metrics_and_tags(events[:4], Path("/out"))[1]["checkpoint"] == "file:///out/checkpoint-1"


# The mirror


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    check_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def root(tmp_path: Path, empty_store: Path) -> Path:
    """An output root whose store exists already: making one takes seconds."""
    (tmp_path / "root").mkdir()
    shutil.copy(empty_store, tmp_path / "root" / "mlflow.db")
    return tmp_path / "root"


def runs_of(uri: str) -> dict[str, Any]:
    """Every run of the store by name, the newest of each."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, order_by=["attributes.start_time ASC"])
    return {run.info.run_name: run for run in found}


def history(uri: str, run_id: str, key: str) -> list[tuple[int, int, float]]:
    from mlflow import MlflowClient

    points = MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((p.step, p.timestamp, p.value) for p in points)


def logged(folder: Path, key: str) -> list[tuple[int, int, float]]:
    return [
        (e["step"], round(e["time"] * 1000), e[key]) for e in metrics_by_step(folder / LOG_NAME)
    ]


def sqlite_uri(root: Path) -> str:
    return resolve_uri(ON, root)


@pytest.mark.slow
def test_a_pipeline_is_a_parent_with_a_child_per_stage(root: Path) -> None:
    from mlflow import MlflowClient

    folder, report = root / "run" / "train-1", root / "report"
    report.mkdir()
    (report / "index.html").write_text("<html>")
    with MlflowMirror.open(ON, root, run_name="quick", tags={"code": "abc"}) as parent:
        with (
            parent.stage("train", folder=folder, params={"train": {"seed": 0}}) as run,
            RunLog(folder / LOG_NAME) as log,
            LogTailer(folder / LOG_NAME, [run.consume], poll_seconds=0.01),
        ):
            for step in range(1, 401):
                log.write("metrics", step=step, loss=math.nan if step == 7 else 1 / step, lr=0.5)
            log.write("checkpoint", step=400, path=folder / "final")
        evaluate_folder = root / "evaluate"
        with parent.stage("evaluate", folder=evaluate_folder, tags={"best": {"a": 1}}) as run:
            run.log_metrics({"nelbo": 3.25, "gap": math.inf}, step=400)
            run.log_artifacts(report, "report")
            run.log_artifacts(report / "index.html")
            run.log_artifacts(report / "missing.png")  # never stops a run

    uri = sqlite_uri(root)
    runs = runs_of(uri)
    assert {name: run.info.status for name, run in runs.items()} == {
        "quick": "FINISHED",
        "train": "FINISHED",
        "evaluate": "FINISHED",
    }
    train, evaluate, quick = runs["train"], runs["evaluate"], runs["quick"]
    assert quick.data.tags["code"] == "abc"
    for child in (train, evaluate):
        assert child.data.tags["mlflow.parentRunId"] == quick.info.run_id
    assert train.data.params == {"train.seed": "0"}
    assert train.data.tags["checkpoint"] == f"file://{folder}/final"
    assert history(uri, train.info.run_id, "lr") == logged(folder, "lr")
    losses = [p for p in history(uri, train.info.run_id, "loss") if p[0] != 7]
    assert losses == [p for p in logged(folder, "loss") if p[0] != 7]
    assert len(losses) == 399
    assert math.isnan(next(v for s, _, v in history(uri, train.info.run_id, "loss") if s == 7))
    assert evaluate.data.metrics == {"nelbo": 3.25}
    assert evaluate.data.tags["infinite.gap"] == "inf at step 400"
    assert evaluate.data.tags["best"] == '{"a": 1}'
    client = MlflowClient(uri)
    for place, expected in ((None, ["index.html", "report"]), ("report", ["report/index.html"])):
        found = client.list_artifacts(evaluate.info.run_id, place)
        assert sorted(f.path for f in found) == expected
    assert str(root / "mlartifacts") in evaluate.info.artifact_uri


def test_a_run_tells_its_data_and_how_busy_the_machine_was(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_metrics, "SAMPLE_SECONDS", 0.05)
    with MlflowMirror.open(ON, root) as mirror, mirror.stage("train", folder=root / "x") as run:
        run.log_input(name="toy/data", digest="ab" * 32, source=root / "data", context="training")
        with run.system_metrics():
            wait_until(lambda: (root / "x" / "mlflow.json").read_text().count("system/cpu") > 0)
            time.sleep(0.2)
    train = runs_of(sqlite_uri(root))["train"]
    (data,) = train.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("toy/data", "ab" * 18)
    assert json.loads(data.dataset.source) == {"uri": (root / "data").as_uri()}
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "training"}
    busy = history(sqlite_uri(root), train.info.run_id, "system/cpu_utilization_percentage")
    assert [step for step, _, _ in busy] == list(range(len(busy)))
    assert len(busy) >= 2
    assert all(0.0 <= value <= 100.0 for _, _, value in busy)
    assert train.data.metrics["system/system_memory_usage_megabytes"] > 1


def test_a_run_ends_as_the_block_does(root: Path) -> None:
    mirror = MlflowMirror.open(ON, root)
    for name, error in (("failed", ValueError("x")), ("killed", KeyboardInterrupt())):
        with pytest.raises(type(error)), mirror.stage(name, folder=root / name):
            raise error
    runs = runs_of(sqlite_uri(root))
    assert {name: run.info.status for name, run in runs.items()} == {
        "failed": "FAILED",
        "killed": "KILLED",
    }
    assert "mlflow.parentRunId" not in runs["failed"].data.tags


def test_off_is_off(tmp_path: Path) -> None:
    off = TrackingConfig(enabled=False, uri="http://127.0.0.1:9")
    with (
        MlflowMirror.open(off, tmp_path, run_name="x") as parent,
        parent.stage("train", folder=tmp_path / "train", params={"a": 1}) as run,
    ):
        run.consume([])
        run.log_metrics({"a": 1.0})
        run.log_artifacts(tmp_path)
        assert run.run_id is None
    assert list(tmp_path.iterdir()) == []


def test_a_deleted_experiment_is_an_input_error(root: Path) -> None:
    from mlflow import MlflowClient

    MlflowMirror.open(ON, root)
    client = MlflowClient(sqlite_uri(root))
    experiment = client.get_experiment_by_name(ON.experiment)
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(InputError, match=r"tracking\.experiment: 'tokendiff' was deleted"):
        MlflowMirror.open(ON, root)


def test_a_run_whose_creation_was_not_acknowledged_is_found_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after MLflow made it, and before its id was written down."""
    update = Outbox._update

    def die(outbox: Outbox, **changes: Any) -> None:
        if changes.get("run_id"):
            raise KeyboardInterrupt
        update(outbox, **changes)

    def open_and_close() -> None:
        with MlflowMirror.open(ON, root, run_name="quick"):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(Outbox, "_update", die)
        with pytest.raises(KeyboardInterrupt):
            open_and_close()
    open_and_close()
    client = make_client(sqlite_uri(root))
    experiment = client.get_experiment_by_name(ON.experiment)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    open_and_close()  # another one, for this one had finished
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_what_a_store_raises_is_not_printed_by_mlflow_as_well(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import sqlite3
    from contextlib import closing

    client = make_client(sqlite_uri(root))
    with closing(sqlite3.connect(sqlite_uri(root).removeprefix("sqlite:///"))) as database:
        database.execute("ALTER TABLE experiments RENAME TO gone")
    capfd.readouterr()
    with pytest.raises(Exception, match="no such table"):
        client.search_experiments()
    assert capfd.readouterr().err == ""


DRIVER = """
import sys, time
from pathlib import Path
from tokendiff.config.pipeline import TrackingConfig
from tokendiff.tracking.mlflow_entities import flatten_params, metrics_and_tags
from tokendiff.tracking.mlflow_mirror import MlflowMirror
from tokendiff.tracking.mlflow_outbox import Outbox, RunState, load_state, lock_folder
from tokendiff.tracking.run_log import LOG_NAME, RunLog
root = Path(sys.argv[1])
parent = MlflowMirror.open(TrackingConfig(), root, run_name="quick")
run = parent.stage("train", folder=root / "quick" / "train", params={"seed": 0, "num_workers": 1})
with RunLog(root / "quick" / "train" / LOG_NAME) as log:
    for step in (10, 20, 30):
        log.write("metrics", step=step, loss=1.0 / step)
run.consume([])
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_driver_is_closed_and_its_stage_goes_on_in_the_same_run(root: Path) -> None:
    uri, folder = sqlite_uri(root), root / "quick" / "train"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        wait_until(lambda: "train" in runs_of(uri) and runs_of(uri)["train"].data.metrics != {})
        state, size = folder / "mlflow.json", (folder / LOG_NAME).stat().st_size
        wait_until(lambda: json.loads(state.read_text())["offset"] == size)
        assert replay_pending(root, uri) == 0  # it is alive
        assert runs_of(uri)["train"].info.status == "RUNNING"
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
    with RunLog(folder / LOG_NAME) as log:
        log.write("metrics", step=40, loss=0.5)  # a worker's last word

    assert replay_pending(root, uri) == 2
    killed = runs_of(uri)
    assert {killed[name].info.status for name in ("quick", "train")} == {"KILLED"}
    assert history(uri, killed["train"].info.run_id, "loss") == logged(folder, "loss")
    assert replay_pending(root, uri) == 0

    with (
        MlflowMirror.open(ON, root, run_name="quick") as parent,
        parent.stage("train", folder=folder, params={"seed": 0, "num_workers": 4, "new": 1}),
        RunLog(folder / LOG_NAME) as log,
    ):
        log.write("resume", step=40)
        log.write("metrics", step=50, loss=0.25)
    resumed = runs_of(uri)
    assert len(resumed) == 2
    for name in ("quick", "train"):
        assert resumed[name].info.run_id == killed[name].info.run_id
        assert resumed[name].info.status == "FINISHED"
    run = resumed["train"]
    assert history(uri, run.info.run_id, "loss") == logged(folder, "loss")
    assert run.data.params == {"seed": "0", "num_workers": "1", "new": "1"}
    assert run.data.tags["resumed.num_workers"] == "4"


def test_a_finished_stage_that_is_run_again_gets_a_run_for_what_is_new(root: Path) -> None:
    uri, folder = sqlite_uri(root), root / "train"
    mirror = MlflowMirror.open(ON, root)
    ids = []
    for step in (1, 2):
        with mirror.stage("train", folder=folder), RunLog(folder / LOG_NAME) as log:
            log.write("metrics", step=step, loss=0.5)
        ids.append(runs_of(uri)["train"].info.run_id)
    assert ids[0] != ids[1]
    steps = [[point[0] for point in history(uri, run_id, "loss")] for run_id in ids]
    assert steps == [[1], [2]]


def test_a_finished_run_that_lacks_something_gets_it_before_another_one_begins(root: Path) -> None:
    uri, folder = sqlite_uri(root), root / "train"
    mirror = MlflowMirror.open(ON, root)
    for step in (1, 2):
        with RunLog(folder / LOG_NAME) as log:
            log.write("metrics", step=step, loss=0.5)
        with mirror.stage("train", folder=folder):
            pass
    run_id = runs_of(uri)["train"].info.run_id
    assert history(uri, run_id, "loss") == logged(folder, "loss")


def test_a_run_that_goes_on_tells_what_it_had_yet_to_tell(root: Path) -> None:
    """In a process of its own, under the parent that another one keeps."""
    mirror, folder = MlflowMirror.open(ON, root, parent_run_id="0123"), root / "train"
    folder.mkdir()
    state = RunState(uri=sqlite_uri(root), experiment_id="0", name="train", start_time=1)
    Outbox(folder, state).add([["tag", "earlier", "1"]])
    for seed in (0, 1):
        run = mirror.stage("train", folder=folder, params={"seed": seed, "rate": 0.5})
        run.__exit__(KeyboardInterrupt)
    data = runs_of(sqlite_uri(root))["train"].data
    assert {"earlier": "1", "mlflow.parentRunId": "0123"}.items() <= data.tags.items()
    assert data.params == {"seed": "0", "rate": "0.5"}
    assert {name for name in data.tags if name.startswith("resumed.")} == {"resumed.seed"}


def test_another_store_is_told_all_from_the_beginning(root: Path) -> None:
    uri, folder = sqlite_uri(root), root / "train"
    with RunLog(folder / LOG_NAME) as log:
        log.write("metrics", step=1, loss=0.5)
    state = RunState(uri="sqlite:////other.db", experiment_id="0", name="train", start_time=1)
    state.run_id, state.offset = "0123", (folder / LOG_NAME).stat().st_size
    Outbox(folder, state).add([["tag", "of", "the other"]])
    with MlflowMirror.open(ON, root).stage("train", folder=folder):
        pass
    run = runs_of(uri)["train"]
    assert history(uri, run.info.run_id, "loss") == logged(folder, "loss")
    assert "of" not in run.data.tags


def test_a_run_deleted_from_mlflow_is_made_anew_when_its_stage_goes_on(root: Path) -> None:
    from mlflow import MlflowClient

    uri, folder = sqlite_uri(root), root / "train"
    mirror = MlflowMirror.open(ON, root)
    with RunLog(folder / LOG_NAME) as log:
        log.write("metrics", step=1, loss=0.5)
    with pytest.raises(KeyboardInterrupt), mirror.stage("train", folder=folder):
        raise KeyboardInterrupt
    deleted = runs_of(uri)["train"].info.run_id
    MlflowClient(uri).delete_run(deleted)
    with RunLog(folder / LOG_NAME) as log:
        log.write("metrics", step=2, loss=0.25)
    assert replay_pending(root, uri) == 1  # refused once, and not tried for ever
    assert replay_pending(root, uri) == 0
    with mirror.stage("train", folder=folder):
        pass
    again = runs_of(uri)["train"].info.run_id
    assert again != deleted
    assert history(uri, again, "loss") == logged(folder, "loss")


@pytest.mark.parametrize("asked", ["load_state", "_last_sign_of_life", "lock_folder"])
def test_a_folder_that_is_deleted_meanwhile_holds_no_start_up(
    root: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """By the retention of another pipeline below the same root."""
    uri = sqlite_uri(root)
    for name in ("a", "b"):
        (root / name).mkdir()
        state = RunState(uri=uri, experiment_id="0", name=name, start_time=1)
        Outbox(root / name, state).add([["tag", "x", "1"]])
    ask = getattr(mlflow_delivery, asked)

    def ask_too_late(folder: Path, **fields: Any) -> Any:
        if folder.name == "a":
            shutil.rmtree(folder, ignore_errors=True)
        return ask(folder, **fields)

    monkeypatch.setattr(mlflow_delivery, asked, ask_too_late)
    assert replay_pending(root, uri) == 1
    assert set(runs_of(uri)) == {"b"}


def test_a_run_that_ends_while_it_is_looked_at_is_not_said_to_be_killed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = RunState(uri=sqlite_uri(root), experiment_id="0", name="a", start_time=1)
    Outbox(root, state).add([["tag", "x", "1"]])

    def end_first(folder: Path, **fields: Any) -> Any:
        Outbox(folder, replace(state, queue=[], delivered_status="FINISHED")).finish("FINISHED", 2)
        return lock_folder(folder, **fields)

    monkeypatch.setattr(mlflow_delivery, "lock_folder", end_first)
    assert replay_pending(root, state.uri) == 0
    ended = load_state(root)
    assert ended is not None
    assert ended.status == "FINISHED"
    descriptor = lock_folder(root, is_free_without_locks=False)
    assert descriptor is not None
    os.close(descriptor)


def test_a_folder_is_recorded_by_one_run_at_a_time(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mirror = MlflowMirror.open(ON, root)
    with (
        mirror.stage("first", folder=root / "train"),
        mirror.stage("second", folder=root / "train"),
    ):
        assert "second is not recorded in MLflow" in caplog.text
    assert set(runs_of(sqlite_uri(root))) == {"first"}


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK])
def test_without_file_locks_only_the_owner_takes_a_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    uri, folder = sqlite_uri(root), root / "train"
    folder.mkdir()
    state = RunState(uri=uri, experiment_id="0", name="train", start_time=1)
    Outbox(folder, state).add([["tag", "a", "1"]])
    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", refuse)
        assert replay_pending(root, uri) == 0
        descriptor = lock_folder(folder, is_free_without_locks=True)
        assert descriptor is not None
        os.close(descriptor)
    assert replay_pending(root, uri) == 1


def test_a_run_that_is_told_of_late_ended_when_it_did(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it said; the one that was killed at its last word."""
    uri = sqlite_uri(root)
    fields: dict[str, Any] = {"experiment_id": "0", "start_time": 1}
    folders = {name: root / "toy" / f"{name}-0" / "run" for name in ("ended", "killed")}
    for folder in folders.values():
        with RunLog(folder / LOG_NAME) as log:
            log.write("metrics", step=1, loss=0.5)
        os.utime(folder / LOG_NAME, (7, 7))
    ended = RunState(uri=uri, name="ended", status="FAILED", end_time=5678, **fields)
    for state in (ended, RunState(uri=uri, name="killed", **fields)):
        Outbox(folders[state.name], state).add([])
    with monkeypatch.context() as patch:  # where the store is slow, a start does not wait for all
        patch.setattr("tokendiff.tracking.mlflow_delivery._REPLAY_SECONDS", -1.0)
        assert replay_pending(root, uri) == 0
    assert replay_pending(root, uri) == 2
    found = [runs_of(uri)[name].info for name in ("ended", "killed")]
    assert [(run.status, run.end_time) for run in found] == [("FAILED", 5678), ("KILLED", 7000)]


def test_what_a_store_with_a_password_lacks_is_brought_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file has the password, so that a run's state is compared without it."""
    asked: list[str] = []
    monkeypatch.setattr("tokendiff.tracking.mlflow_delivery.make_client", asked.append)
    state = RunState(uri="http://host", experiment_id="0", name="train", start_time=1)
    Outbox(tmp_path, state).add([["tag", "a", "1"]])
    assert replay_pending(tmp_path, "http://other") == 0
    assert asked == []
    assert replay_pending(tmp_path, "http://me:hunter2@host") == 0  # by a client that is none
    assert asked == ["http://me:hunter2@host"]


def test_a_stage_that_empties_its_folder_is_not_stopped(root: Path) -> None:
    folder = root / "data"
    with MlflowMirror.open(ON, root).stage("preprocess", folder=folder) as run:
        shutil.rmtree(folder)
        run.log_metrics({"rows": 1.0})
        with RunLog(folder / LOG_NAME) as log:
            log.write("metrics", step=1, loss=0.5)
    run_id = runs_of(sqlite_uri(root))["preprocess"].info.run_id
    assert history(sqlite_uri(root), run_id, "loss") == logged(folder, "loss")


class Away:
    """An outbox whose tracker takes nothing the first few times."""

    name, place = "run", "Nowhere at all"

    def __init__(self, num_failures: int) -> None:
        self.num_failures, self.num_tries, self.status = num_failures, 0, ""
        self.is_delivered = False

    def add(self, items: list[list[Any]]) -> None:
        pass

    def finish(self, status: str, end_seconds: float) -> None:
        self.status = status

    def deliver(self, client: Any) -> None:
        self.num_tries += 1
        if self.num_tries <= self.num_failures:
            raise ConnectionError("away")
        self.is_delivered = bool(self.status)


def test_news_is_delivered_while_the_run_lives_and_its_folder_is_free_afterwards(
    tmp_path: Path,
) -> None:
    outbox, lock = Away(0), lock_folder(tmp_path, is_free_without_locks=True)
    assert lock is not None
    delivery = Delivery(outbox, None, lock)
    wait_until(lambda: outbox.num_tries == 1)
    delivery.add([["tag", "a", "1"]])
    wait_until(lambda: outbox.num_tries == 2)
    assert lock_folder(tmp_path, is_free_without_locks=True) is None
    assert delivery.close("FINISHED", 1.0)
    again = lock_folder(tmp_path, is_free_without_locks=True)
    assert again is not None
    os.close(again)


def test_a_tracker_that_stays_away_is_told_once_and_so_is_what_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outbox = Away(99)
    delivery = Delivery(outbox, None, os.open(tmp_path, os.O_RDONLY))
    wait_until(lambda: outbox.num_tries >= 1)
    assert not delivery.close("FINISHED", 1.0)
    assert outbox.num_tries >= 2
    assert [message.partition(" on run ")[0] for message in caplog.messages] == [
        "Nowhere at all fails",
        "Nowhere at all does not have all of run 'run' yet; the next start delivers the rest",
    ]


# A server that dies


@contextlib.contextmanager
def server(port: int, store: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{store}"]
    command += ["--artifacts-destination", str(store.parent / "artifacts")]
    environment = {**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(store.parent / "server.log", "ab") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        wait_until(lambda: is_up(f"http://127.0.0.1:{port}/health"), seconds=120)
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """End the server with the worker that it started: they are a process group of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.slow
def test_a_server_that_dies_in_mid_run_stops_nothing_and_gets_the_rest_later(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    config, folder = TrackingConfig(uri=uri), root / "train"
    (root / "plot.png").write_bytes(b"png")
    slowest = 0.0

    with server(port, root / "mlflow.db") as process:
        parent = MlflowMirror.open(config, root, run_name="quick")
        run = parent.stage("train", folder=folder, params={"seed": 0})
        stack = contextlib.ExitStack()
        log = stack.enter_context(RunLog(folder / LOG_NAME))
        for step in range(1, 51):
            log.write("metrics", step=step, loss=1 / step)
        run.consume([])
        wait_until(lambda: run.run_id is not None and len(history(uri, run.run_id, "loss")) == 50)
        kill(process)

        for step in range(51, 301):
            log.write("metrics", step=step, loss=1 / step)
            start = time.perf_counter()
            run.consume([])
            slowest = max(slowest, time.perf_counter() - start)
            time.sleep(0.005)
        run.log_metrics({"late": 1.0})
        run.log_artifacts(root / "plot.png", "plots")
        late = parent.stage("evaluate", folder=root / "evaluate")  # never heard of by the server
        late.log_metrics({"nelbo": 2.5}, step=300)
        start = time.perf_counter()
        for each in (late, run, parent):
            each.__exit__(None)
        exit_seconds = time.perf_counter() - start
        stack.close()
    assert slowest < 0.05
    assert exit_seconds < 15
    messages = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert sum("'train'" in m and "sent again later" in m for m in messages) == 1
    assert sum("does not have all of run" in m for m in messages) == 3

    with server(port, root / "mlflow.db"):
        assert replay_pending(root, uri) == 3
        assert replay_pending(root, uri) == 0
        runs = runs_of(uri)
        assert {name: r.info.status for name, r in runs.items()} == {
            "quick": "FINISHED",
            "train": "FINISHED",
            "evaluate": "FINISHED",
        }
        train = runs["train"]
        assert train.info.run_id == run.run_id
        assert history(uri, train.info.run_id, "loss") == logged(folder, "loss")
        assert len(logged(folder, "loss")) == 300
        assert train.data.metrics["late"] == 1.0
        assert runs["evaluate"].data.metrics == {"nelbo": 2.5}
        assert runs["evaluate"].data.tags["mlflow.parentRunId"] == runs["quick"].info.run_id
        from mlflow import MlflowClient

        [plot] = MlflowClient(uri).list_artifacts(train.info.run_id, "plots")
        assert plot.path == "plots/plot.png"
