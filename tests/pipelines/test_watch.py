"""Watching runs by their logs: what the table says of them, and when it ends."""

import io
import json
import os
import re
from pathlib import Path

import pytest

from jobs import pipeline
from pipelines import watch
from tokendiff.errors import InputError
from tokendiff.tracking.live import logs_under, standing_of
from tokendiff.tracking.run_log import LOG_NAME, RunLog

NOW = 1_700_000_000.0


def run_log(folder: Path, *, changed: float, start: float = NOW - 100.0) -> tuple[RunLog, Path]:
    """A log whose clock moves by ten seconds with each event."""
    times = iter(start + 10.0 * i for i in range(100))
    path = folder / "run" / LOG_NAME
    log = RunLog(path, clock=lambda: next(times))
    os.utime(path, (changed, changed))
    return log, path


def touch(path: Path, changed: float) -> None:
    for file in path.parent.iterdir():
        os.utime(file, (changed, changed))


def test_a_training_run_as_it_goes(tmp_path: Path) -> None:
    log, path = run_log(tmp_path / "train-1", changed=NOW)

    def now() -> dict[str, str]:
        touch(path, NOW)
        found = standing_of(path, folder=tmp_path, now=NOW + 1.0)
        return {name: value for name, value in vars(found).items() if value}

    log.write("doing", what="starting 2 workers")
    assert now() == {"name": "train-1", "state": "running", "news": "starting 2 workers"}
    log.write("start", step=0, max_train_steps=100)
    for step in (10, 20, 30):  # 10 steps in 10 seconds
        log.write("metrics", step=step, loss=5.0 - step / 10, tokens_per_second=1234.5)
    log.write("heldout", step=30, heldout_nats_per_token=2.25, heldout_standard_error=0.1)
    assert now() == {
        "name": "train-1",
        "state": "running",
        "place": "step 30/100",
        "loss": "2.0000",
        "heldout": "2.2500",
        "tokens_per_second": "1,234",
        "left": "1:10",  # 70 steps at one a second
    }
    log.write("stopping")
    assert now()["news"].startswith("SIGTERM received")
    log.write("warning", message="worker 1 was lost")
    log.write("resume", step=20)
    found = now()
    assert found["place"] == "step 20/100"
    assert found["loss"] == "3.0000"  # that of step 30 counts no more
    assert found["news"] == "warning: worker 1 was lost"
    assert "left" not in found
    log.write("metrics", step=100, loss=1.0, tokens_per_second=1000.0)
    log.write("end")
    found = now()
    assert (found["state"], found["place"]) == ("done", "step 100/100")
    assert "left" not in found
    log.close()


@pytest.mark.parametrize(
    ("event", "fields", "state"),
    [
        ("stopped", {"step": 1}, "stopped"),
        ("error", {"message": "no space left"}, "failed"),
        ("metrics", {"step": 1, "loss": 1.0}, "silent for 5:00"),
    ],
)
def test_runs_that_do_not_run(
    tmp_path: Path, event: str, fields: dict[str, object], state: str
) -> None:
    log, path = run_log(tmp_path / "train-1", changed=NOW)
    with log:
        log.write("start", step=0, max_train_steps=9)
        log.write(event, **fields)
    touch(path, NOW)
    found = standing_of(path, folder=tmp_path, now=NOW + 300.0)
    assert found.state == state
    assert found.news == ("error: no space left" if event == "error" else "")


def test_progress_beside_the_log_tells_of_other_jobs(tmp_path: Path) -> None:
    log, path = run_log(tmp_path / "generate-1", changed=NOW)
    with log:
        for done in (0, 10, 20, 30):
            log.write("progress", done=done, total=100, unit="rows", tokens=50 * done)
    touch(path, NOW)
    found = standing_of(path, folder=tmp_path, now=NOW + 1.0)
    assert (found.place, found.tokens_per_second, found.left) == ("30/100 rows", "50", "1:10")


def test_logs_are_found_newest_last_and_not_in_checkpoints(tmp_path: Path) -> None:
    for age, name in enumerate(["train-1", "train-1/checkpoint-2", "evaluate-2", ".hidden"]):
        log, path = run_log(tmp_path / name, changed=NOW)
        log.close()
        touch(path, NOW - age)
    assert [path.parent.parent.name for path in logs_under(tmp_path)] == ["evaluate-2", "train-1"]
    # The folder of one job, and the folder of its record.
    assert len(logs_under(tmp_path / "train-1")) == 1
    assert len(logs_under(tmp_path / "train-1" / "run")) == 1
    with pytest.raises(InputError, match="no run has left a log"):
        watch.standings(tmp_path / "train-1" / "checkpoint-2" / "nothing")


def test_the_page_refreshes_until_no_run_is_left(tmp_path: Path) -> None:
    runs, page = tmp_path / "runs", tmp_path / "live.html"
    log = RunLog(runs / "train-1" / "run" / LOG_NAME)
    log.write("start", step=0, max_train_steps=2)
    log.write("metrics", step=1, loss=3.0, tokens_per_second=10.0)
    pages = []

    def sleep(seconds: float) -> None:
        pages.append(page.read_text())
        if len(pages) == 2:
            log.write("metrics", step=2, loss=2.0, tokens_per_second=10.0)
            log.write("heldout", step=2, heldout_nats_per_token=2.5, heldout_standard_error=0.1)
            log.write("end")

    watch.watch(runs, page=page, stream=io.StringIO(), sleep=sleep)
    assert len(pages) == 2
    refreshes = [re.findall(r'http-equiv="refresh" content="(\d+)"', p) for p in pages]
    assert refreshes == [["5"], ["5"]]
    last = page.read_text()
    assert "refresh" not in last.partition("<body>")[0]
    assert "lowest 2 at step 2" in last
    assert "Held out: From 2.5" in last
    log.close()


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    with RunLog(folder / "run" / LOG_NAME) as log:
        log.write("start", step=0, max_train_steps=2)
        log.write("error", message="[red]no space left")
    assert pipeline.main(["watch", str(folder)]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["stage", "state", "place", "news"]
    assert row.split(maxsplit=4) == ["out", "failed", "step", "0/2", row.split(maxsplit=4)[-1]]
    assert "[red]no space left" in row
    assert pipeline.main(["watch", str(folder), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["name"], found["state"]) == ("out", "failed")

    file = tmp_path / "run.yaml"
    file.write_text(f"name: mine\nroot: {tmp_path}\n")
    assert pipeline.main(["watch", str(file)]) == 2
    assert "no run has left a log" in capsys.readouterr().err
