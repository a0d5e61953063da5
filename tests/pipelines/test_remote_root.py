"""Pipelines whose root is a URI. A machine is a TOKENDIFF_CACHE: nothing else of it is kept.

`tests.pipelines.test_runner` runs pipelines behind a URI too, each time from another machine.
"""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import pipeline as pipeline_job
from pipelines.execution import run_stage
from pipelines.graph import pipeline_stages
from pipelines.record import last_runs
from pipelines.registered import PinnedModels
from pipelines.runner import plan
from pipelines.stage import Stage
from tests import ROOT
from tokendiff.artifacts.checkpoint import open_checkpoint
from tokendiff.artifacts.identity import checkpoint_identity
from tokendiff.artifacts.locations import RemotePath, files_under, mirror_of, size_of
from tokendiff.artifacts.manifest import commit, verify
from tokendiff.cluster.session import check_seen_by_all
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.loader import load_config
from tokendiff.config.pipeline import Config, TrackingConfig
from tokendiff.tracking.mlflow_mirror import MlflowMirror
from tokendiff.tracking.mlflow_store import resolve_uri
from tokendiff.tracking.registry import Registry
from tokendiff.tracking.run_log import RunLog, metrics_by_step

SMALL: dict[str, Any] = {
    "name": "small",
    "preprocess": {
        "dataset_name": "text",
        "tokenizer_name_or_path": "bytes",
        "max_length": 32,
        "heldout_fraction": 0.1,
    },
    "train": {
        "model_name_or_path": "builtin:bert-tiny",
        "max_train_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    },
    "generate": {"num_samples": 2, "sampler": {"num_inference_steps": 4}},
    "evaluate": {"max_eval_rows": 8, "num_mask_samples": 1},
    "promote": {
        "registered_model": "toy",
        "gate": [{"metric": "nats_per_token", "direction": "lower", "limit": 100.0}],
    },
    "stages": {
        "data": {"kind": "preprocess"},
        "model": {"kind": "train", "inputs": {"data": "data"}},
        "samples": {"kind": "generate", "inputs": {"checkpoint": "model"}},
        "judge": {
            "kind": "evaluate",
            "inputs": {"checkpoint": "model", "data": "data", "samples": "samples"},
        },
        "promote": {"kind": "promote", "inputs": {"candidate": "judge"}},
    },
    "cluster": {"cpus_per_worker": 0.5, "threads_per_worker": 1},
}
Move = Callable[[str], Path]


@pytest.fixture
def move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Move:
    """Go on on the machine of that name; returns its cache."""

    def move(name: str) -> Path:
        monkeypatch.setenv("TOKENDIFF_CACHE", str(tmp_path / name))
        return tmp_path / name

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return move


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda p: p.stem)
def test_stages_are_those_of_a_local_root_with_every_path_behind_the_uri(
    path: Path, tmp_path: Path, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, and what each stage hands to the library, to the last field."""
    calls: list[Any] = []

    def note(*args: Any, **kwargs: Any) -> None:
        given = {name: str(value) for name, value in kwargs.items() if not name.startswith("on_")}
        calls.append([*map(str, args), given])

    for name in ("preprocess", "train", "generate", "evaluate"):
        monkeypatch.setattr(f"tokendiff.cluster.{name}.{name}", note)
    monkeypatch.setattr("tokendiff.cluster.frontier.run_frontier", note)
    monkeypatch.setattr("tokendiff.cluster.target_states.cache_target_states", note)
    monkeypatch.setattr("pipelines.builders._training_log", lambda path: [path])
    move("a")
    (tmp_path / "text.txt").write_text("some text\n")
    config = load_config(path)
    if config.preprocess.data_files:  # the user's own
        config = load_config(path, [f"preprocess.data_files=[{tmp_path}/*.txt]"])
    local = pipeline_stages(config, tmp_path / "out")
    remote = pipeline_stages(config, RemotePath("s3://bucket/out"))
    assert [stage.key for stage in remote] == [stage.key for stage in local]
    for stage, other in zip(remote, local, strict=True):
        below = other.output.name
        assert stage.output == RemotePath(f"s3://bucket/out/{below}")
        assert stage.folder == tmp_path / "a" / "runs" / "s3" / "bucket" / "out" / below
        assert {role: source.output for role, source in stage.inputs.items()} == {
            role: RemotePath(f"s3://bucket/out/{source.output.name}")
            for role, source in other.inputs.items()
        }
        if stage.kind == "promote":  # which reads its inputs alone
            continue
        for each in (stage, other):
            each.action(each, RunLog(tmp_path / "log.jsonl"))
        ours, theirs = (json.dumps(call) for call in calls[-2:])
        assert ours == theirs.replace(f"{tmp_path}/out", "s3://bucket/out")
        assert below in ours


def test_a_store_of_files_cannot_be_behind_a_uri(
    tmp_path: Path, move: Move, capsys: pytest.CaptureFixture[str]
) -> None:
    move("a")
    path = tmp_path / "small.yaml"
    path.write_text(f"name: small\nroot: memory://{tmp_path.name}\n")
    for command in ("plan", "run", "status"):
        assert pipeline_job.main([command, str(path)]) == 2
        error = capsys.readouterr().err
        assert "the MLflow store mlflow.db would be under root memory://" in error
        assert "-o tracking.enabled=false" in error
    relative = ["-o", "tracking.uri=sqlite:///other.db"]
    assert pipeline_job.main(["plan", str(path), *relative]) == 2
    assert pipeline_job.main(["plan", str(path), "-o", "tracking.enabled=false"]) == 0
    assert "folders  memory://" in capsys.readouterr().out
    for uri in ("http://server:5000", f"sqlite:///{tmp_path}/mlflow.db"):
        assert pipeline_job.main(["plan", str(path), "-o", f"tracking.uri={uri}"]) == 0
        assert resolve_uri(TrackingConfig(uri=uri), RemotePath("s3://bucket")) == uri


def test_nodes_are_not_asked_about_a_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where there is none
    check_seen_by_all(ClusterConfig(), RemotePath("s3://bucket/out"))


def test_who_watches_from_another_machine_is_told_where_the_logs_are(
    tmp_path: Path, move: Move, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "small.yaml"
    root = f"memory://{tmp_path.name}-watched"
    path.write_text(f"name: small\nroot: {root}\ntracking: {{enabled: false}}\n")
    move("a")
    with RunLog(mirror_of(RemotePath(f"{root}/small/train-9f2c") / "run") / "log.jsonl") as log:
        log.write("start", step=0, max_train_steps=4)
    assert pipeline_job.main(["watch", str(path)]) == 0
    assert "train-9f2c" in capsys.readouterr().out
    move("b")
    assert pipeline_job.main(["watch", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{root}/small: the machine that runs this pipeline keeps the logs" in error
    assert "`status` tells from any machine" in error


def test_a_log_goes_on_on_another_machine(tmp_path: Path, move: Move) -> None:
    """Whoever went on last has the log that counts; what a killed run had not copied stays."""
    steps: list[int] = []

    def act(stage: Stage, log: Any) -> None:
        log.write("metrics", step=steps[-1], loss=0.5)
        if steps[-1] < 4:
            raise ConnectionError("the machine is lost")
        commit(stage.output, kind="toy")

    stage = Stage(
        name="model",
        kind="train",
        settings={},
        base=RemotePath(f"memory://{tmp_path.name}"),
        action=act,
        result=lambda stage: {},
        is_keyed=True,
    )

    def attempt(machine: str, step: int) -> None:
        move(machine)
        steps.append(step)
        if step < 4:
            with pytest.raises(ConnectionError):
                run_stage(stage, MlflowMirror(None, None))
        else:
            run_stage(stage, MlflowMirror(None, None))

    def kept() -> list[int]:
        copy = tmp_path / "copy.jsonl"
        copy.write_text((stage.output / "run" / "log.jsonl").read_text())
        return [event["step"] for event in metrics_by_step(copy)]

    attempt("a", 1)
    assert kept() == [1]
    with stage.log_path.open("a") as file:  # killed before it was copied
        file.write('{"time": 1, "event": "metrics", "step": 2}\n')
    attempt("a", 3)
    assert kept() == [1, 2, 3]
    move("a")
    with stage.log_path.open("a") as file:
        file.write('{"time": 1, "event": "metrics", "step": 9}\n')
    attempt("b", 4)
    assert kept() == [1, 2, 3, 4]
    attempt("a", 4)
    assert kept() == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_pipeline_from_file_to_champion_and_again_from_another_machine(
    in_this_process: None,
    s3: str,
    tmp_path: Path,
    move: Move,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    # An artifact store that only the driver talks to, as a server's is.
    MlflowClient(store).create_experiment("tokendiff", artifact_location=f"{s3}/artifacts")
    root = RemotePath(s3) / "root"
    path = tmp_path / "small.yaml"
    (root / "text.txt").write_bytes(b"".join(b"line %d of the text\n" % n for n in range(300)))
    preprocess = {**SMALL["preprocess"], "data_files": [f"{root}/*.txt"]}
    sections = {"root": root.uri, "preprocess": preprocess, "tracking": {"uri": store}}
    path.write_text(yaml.safe_dump({**SMALL, **sections}))

    def command(*words: str) -> str:
        assert pipeline_job.main([words[0], str(path), *words[1:]]) == 0
        return capsys.readouterr().out

    cache, on_sigint = move("a"), signal.getsignal(signal.SIGINT)
    printed = command("run")
    for words in ("nats per held-out token", "sample 0", f"{root}/small", "models:/toy@champion"):
        assert words in printed
    assert signal.getsignal(signal.SIGINT) is on_sigint
    config = load_config(path)
    stages = {stage.name: stage for stage in pipeline_stages(config, root / "small")}
    for stage in stages.values():
        verify(stage.result_folder)
    # Nothing of it is left on this machine but its log, its state, and copies of what was read.
    top = {entry.name for entry in tmp_path.iterdir()} - {"mlflow.db.lock"}
    assert top == {"a", "mlflow.db", "small.yaml"}
    assert {entry.name for entry in cache.iterdir()} <= {"runs", "files", "folders"}
    here = {name.rpartition("/")[2] for name in files_under(cache / "runs")}
    assert here <= {"log.jsonl", "progress.json", "mlflow.json", ".lock"}
    assert mirror_of(root) == cache / "runs" / "s3" / "bucket" / "root"
    assert not (root / "small" / ".lock.holder").exists()

    cache = move("b")
    again = command("run", "--json").splitlines()
    states = {stage["stage"]: stage["state"] for stage in json.loads(again[-1])["stages"]}
    assert states == dict.fromkeys(SMALL["stages"], "done")
    assert not any(name.endswith("log.jsonl") for name in files_under(cache / "runs"))
    rows = {row["stage"]: row for row in json.loads(command("plan", "--json"))["stages"]}
    assert {row["why"] for row in rows.values()} == {"made by an earlier run"}
    assert rows["judge"]["folder"] == str(stages["judge"].output)
    status = json.loads(command("status", "--json"))
    results = {stage["stage"]: stage["result"] for stage in status["stages"]}
    assert results["model"]["step"] == 2
    assert results["model"]["loss"] is not None
    assert results["promote"]["version"] == 1
    assert [run["state"] for run in status["runs"]] == ["succeeded"] * 2
    assert "promoted" in command("status")
    assert "promote  done (made by an earlier run" in command("promote")
    assert pipeline_job.main(["rollback", str(path)]) == 2
    assert "v1 replaced no other version" in capsys.readouterr().err

    # Another rate: what changed is known from what the other machine made.
    changed = plan(load_config(path, ["train.learning_rate=0.002"]), root).steps
    assert {step.stage.name: step.why for step in changed if step.state == "run"} == {
        "model": "learning_rate changed from 0.001 to 0.002",
        "samples": "the input 'checkpoint' changed",
        "judge": "the input 'checkpoint' changed, the input 'samples' changed",
        "promote": "the input 'candidate' changed",
    }

    # The registered model is copied under the root, where every node finds it, and pinned there.
    model = Registry(config.tracking, root).open("models:/toy@champion")
    assert model is not None
    copy = f"{root}/models/toy-v1-{model.digest[:16]}"
    assert str(model.checkpoint).startswith(f"{copy}/artifacts/")
    assert checkpoint_identity(model.checkpoint) == checkpoint_identity(
        stages["model"].result_folder
    )
    assert (open_checkpoint(model.checkpoint) / "model.safetensors").is_file()
    (identity,) = json.loads(model.trained_on.read_text())
    assert identity[0] == size_of(root / "text.txt")
    judge = {"kind": "evaluate", "config": {"checkpoint_path": "models:/toy@champion"}}
    judging = Config.model_validate(
        {"name": "judging", "stages": {"judge": judge}, "tracking": {"uri": store}}
    )
    pinned = PinnedModels.read(judging, root, ["monday"])
    pinned.keep(root / "judging")
    MlflowClient(store).delete_registered_model_alias("toy", "champion")
    move("c")
    assert PinnedModels.read(judging, root, ["monday"]).models == pinned.models
    assert PinnedModels.read(judging, root, ["tuesday"]).models == {"models:/toy@champion": None}
    assert len(last_runs(root / "small", 5)) == 3
