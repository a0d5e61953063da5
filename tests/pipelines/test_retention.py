"""What cleaning a pipeline deletes, and what it never does."""

import json
import logging
import shutil
import time
from pathlib import Path

import pytest

from jobs import pipeline as pipeline_job
from pipelines import lock
from pipelines.record import last_runs
from pipelines.retention import Item, clean, clean_held
from pipelines.stage import Stage
from tests.models.test_completion import block_checkpoint
from tests.pipelines.test_promotion import registered
from tests.pipelines.test_runner import Toy, toy  # noqa: F401  # a fixture
from tokendiff.artifacts.locations import Location, folders_in, mirror_of
from tokendiff.artifacts.manifest import commit, is_committed
from tokendiff.config.pipeline import Config, RunnerConfig, TrackingConfig
from tokendiff.errors import InputError


def keeping(config: Config, keep_runs: int | None) -> Config:
    runner = RunnerConfig(retry_wait_s=0.0, keep_runs=keep_runs)
    return config.model_copy(update={"runner": runner})


def night(toy: Toy, number: int) -> set[str]:  # noqa: F811
    """A run with a model of its own; returns the folders that it used."""
    toy.stages["model"] = toy.add("model", "data", settings={"night": number})
    toy.add("samples", "model", kind="generate")
    toy.add("judge", "model", "samples", kind="evaluate")
    record = toy.run()
    return {stage.folder.rpartition("/")[2] for stage in record.stages}


def there(toy: Toy) -> set[str]:  # noqa: F811
    return {path.name for path in folders_in(toy.root / "toy")} - {"runs", ".run"}


def deleted(items: list[Item]) -> set[str]:
    return {item.path.name for item in items if not item.why}


def test_what_the_last_runs_used_stays_and_the_rest_goes(toy: Toy) -> None:  # noqa: F811
    nights = [night(toy, number) for number in range(4)]
    (toy.root / "toy" / "mine-0123456789ab" / "file").parent.mkdir(parents=True, exist_ok=True)
    (toy.root / "toy" / "mine-0123456789ab" / "file").write_bytes(b"somebody else's")
    mine = {"mine-0123456789ab"}
    assert there(toy) == set.union(*nights) | mine
    config = keeping(toy.config, 2)
    old = nights[0] | nights[1]
    expected = old - nights[2] - nights[3]
    assert deleted(clean(config, toy.root, is_dry_run=True)) == expected
    assert there(toy) == set.union(*nights) | mine
    items = clean(config, toy.root)
    assert deleted(items) == expected
    assert all(item.num_bytes > 0 for item in items)
    assert not any(mirror_of(item.path).exists() for item in items if not item.why)
    assert there(toy) == nights[2] | nights[3] | mine
    assert clean(config, toy.root) == [i for i in items if i.why]
    # What was deleted is made again, and what stayed is not.
    assert night(toy, 3) == nights[3]
    assert toy.calls == []
    night(toy, 0)
    assert toy.calls == ["model", "samples", "judge"]


def test_a_clock_that_was_set_back_costs_no_result(
    toy: Toy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toy.config = keeping(toy.config, 1)
    clock = [2e9]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    night(toy, 0)
    (toy.root / "toy" / "runs" / "mine").mkdir()
    clock[0] = 1e9
    used = night(toy, 1)
    assert there(toy) == used
    records = last_runs(toy.root / "toy", 2)
    assert [record.started for record in records] == [
        "2001-09-09 01:46:40 UTC",
        "2033-05-18 03:33:20 UTC",
    ]


def test_runs_that_fail_push_no_result_out(toy: Toy) -> None:  # noqa: F811
    toy.config = keeping(toy.config, 1)
    good = night(toy, 0)

    def fail(stage: object) -> None:
        raise ValueError("bad text")

    toy.actions["model"] = fail
    for number in range(1, 4):
        with pytest.raises(ValueError, match="bad text"):
            night(toy, number)
    assert good <= there(toy)
    del toy.actions["model"]
    toy.config = keeping(toy.config, 2)
    second = night(toy, 4)
    assert good | second <= there(toy)
    toy.config = keeping(toy.config, 1)
    last = night(toy, 5)
    assert there(toy) == last  # each run that ends well cleans up after itself


def test_a_run_that_ends_with_a_rejection_is_one_of_those_that_stay(toy: Toy) -> None:  # noqa: F811
    toy.config = keeping(toy.config, 1)

    def reject(stage: Stage) -> None:
        (stage.output / "result.json").write_bytes(b'{"decision": "rejected"}')

    night(toy, 0)
    toy.actions["judge"] = reject
    last = night(toy, 1)
    assert there(toy) == last


def test_cleaning_that_fails_fails_no_run(
    toy: Toy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no answer")

    toy.config = keeping(toy.config, 1)
    first = night(toy, 0)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("pipelines.retention.clean_held", fail)
        second = night(toy, 1)
    assert there(toy) == first | second
    assert "runner.keep_runs: nothing old is deleted (no answer)" in caplog.text


def test_what_a_registered_version_holds_is_never_deleted(tmp_path: Path) -> None:
    root = tmp_path / "out"
    store = tmp_path / "store"
    store.mkdir()
    config = keeping(
        Config(name="toy", tracking=TrackingConfig(uri=f"sqlite:///{store}/mlflow.db")), 1
    )
    names = ("train-00000000000a", "train-00000000000b")
    for seed, name in enumerate(names):
        (root / "toy" / name / "run").mkdir(parents=True)
        block_checkpoint(root / "toy" / name / "final", seed=seed)
        (root / "toy" / name / "run" / "stage.json").write_text("{}")
    assert deleted(clean(config, root, is_dry_run=True)) == set(names)
    registry = registered(store, root, root / "toy" / names[0] / "final")
    (kept,) = [item for item in clean(config, root) if item.why]
    assert (kept.path.name, kept.why) == (names[0], "a registered version")
    assert not (root / "toy" / names[1]).exists()
    assert len(list(registry.versions())) == 1
    # What MLflow has yet to get would be lost with the folder.
    waiting = root / "toy" / "evaluate-00000000000c" / "run"
    waiting.mkdir(parents=True)
    (waiting / "stage.json").write_text("{}")
    state = {"uri": "http://x", "experiment_id": "0", "name": "evaluate", "start_time": 0}
    (waiting / "mlflow.json").write_text(json.dumps({**state, "queue": [["tag", "a", "b"]]}))
    (item,) = [item for item in clean(config, root) if "evaluate" in item.path.name]
    assert item.why == "MLflow has yet to get its figures"


def test_a_model_that_is_half_deleted_does_not_count(
    toy: Toy,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    night(toy, 0)
    final = toy.stages["model"].output / "final"
    final.mkdir(parents=True, exist_ok=True)
    (final / "weights").write_bytes(b"1")
    commit(final, kind="checkpoint")
    night(toy, 1)

    def die(folder: Location, **options: object) -> None:
        if folder == final.parent:
            raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.retention.remove", die)
    with pytest.raises(KeyboardInterrupt):
        clean(keeping(toy.config, 1), toy.root)
    assert not is_committed(final)


def test_what_cannot_be_known_is_not_deleted(toy: Toy) -> None:  # noqa: F811
    with pytest.raises(InputError, match=r"runner\.keep_runs: null keeps every run"):
        clean(toy.config, toy.root)
    config = keeping(toy.config, 1)
    with pytest.raises(InputError, match=r"pipeline toy has never run here"):
        clean(config, toy.root)
    toy.manifests["judge"] = {"kind": "promotion", "metadata": {"decision": "promoted"}}
    night(toy, 0)
    night(toy, 1)
    with pytest.raises(InputError, match=r"judge-\w+ registered a model.*leave tracking on"):
        clean(config, toy.root)
    broken = folders_in(toy.root / "toy" / "runs")[-1]
    (broken / "result.json").write_bytes(b"{")
    with pytest.raises(InputError, match=r"its record cannot be read .*; delete that folder"):
        clean_held(config, toy.root)
    with lock.alone(toy.root / "toy"), pytest.raises(BlockingIOError):
        clean(config, toy.root)


def test_clean_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / "toy" / "train-00000000000a"
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "stage.json").write_text("{}")
    path = tmp_path / "toy.yaml"
    path.write_text(f"name: toy\nroot: {tmp_path / 'out'}\ntracking: {{enabled: false}}\n")
    command = ["clean", str(path), "-o", "runner.keep_runs=1"]
    assert pipeline_job.main([*command, "--dry_run"]) == 0
    assert "train-00000000000a  0.0 MB  would be deleted" in capsys.readouterr().out
    assert folder.exists()
    assert pipeline_job.main([*command, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["folders"]
    assert (row["path"], row["num_bytes"], row["kept_for"]) == (str(folder), 2, None)
    assert not folder.exists()
    shutil.rmtree(tmp_path / "out")
    assert pipeline_job.main(command) == 2
