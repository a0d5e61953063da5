"""Pipelines and jobs as a person runs them: from a file or flags to results, and again."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import evaluate as evaluate_job
from jobs import generate as generate_job
from jobs import pipeline as pipeline_job
from jobs import preprocess as preprocess_job
from jobs import train as train_job
from pipelines.graph import pipeline_stages
from pipelines.paths import input_path, output_path
from pipelines.runner import plan, run_pipeline
from tests import ROOT
from tests.in_this_process import jobs_here
from tokendiff.artifacts.identity import content_identity
from tokendiff.artifacts.locations import RemotePath
from tokendiff.artifacts.manifest import verify
from tokendiff.config.loader import load_config
from tokendiff.config.pipeline import Config
from tokendiff.data.samples import read_samples
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.tracking.run_log import metrics_by_step

SMALL: dict[str, Any] = {
    "name": "small",
    "preprocess": {"max_length": 32, "tokenizer_name_or_path": "bytes", "heldout_fraction": 0.02},
    "train": {
        "model_name_or_path": "builtin:bert-tiny",
        "max_train_steps": 4,
        "logging_steps": 2,
        "learning_rate": 1e-3,
    },
    "generate": {"num_samples": 2, "sampler": {"num_inference_steps": 4}},
    "evaluate": {"max_eval_rows": 8, "num_mask_samples": 1},
    "cluster": {"cpus_per_worker": 0.5, "threads_per_worker": 1},
    "tracking": {"enabled": False},
}


def write_config(folder: Path, **sections: Any) -> Path:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "root": str(folder / "out"), **sections}))
    return path


def small(folder: Path, *overrides: str) -> tuple[Config, Path]:
    config = load_config(write_config(folder), overrides)
    return config, Path(config.root)


def keys(folder: Path, *overrides: str) -> dict[str, str]:
    config, root = small(folder, *overrides)
    return {stage.name: stage.key for stage in pipeline_stages(config, root)}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("train.learning_rate=2e-3", {"train", "generate", "evaluate"}),
        ("train.max_train_steps=5", {"train", "generate", "evaluate"}),
        ("preprocess.max_length=64", {"preprocess", "train", "generate", "evaluate"}),
        ("preprocess.tokenizer_name_or_path=bpe", {"preprocess", "train", "generate", "evaluate"}),
        ("generate.seed=1", {"generate", "evaluate"}),
        ("evaluate.num_mask_samples=2", {"evaluate"}),
        ("train.global_batch_size=16", {"train", "generate", "evaluate"}),
        # How it runs, not what it makes:
        ("cluster.num_workers=2", set()),
        ("train.logging_steps=1", set()),
        ("train.checkpointing_steps=1", set()),
        ("train.global_batch_size=8", set()),
        ("tracking.enabled=true", set()),
    ],
)
def test_a_key_changes_with_what_decides_the_result(
    tmp_path: Path, override: str, changed: set[str]
) -> None:
    before, after = keys(tmp_path), keys(tmp_path, override)
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_key_changes_with_the_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one\n")
    overrides = ("preprocess.dataset_name=text", f"preprocess.data_files=[{text}]")
    before = keys(tmp_path, *overrides)
    assert keys(tmp_path, *overrides) == before
    text.write_text("two\nthree\n")
    assert keys(tmp_path, *overrides)["evaluate"] != before["evaluate"]


def test_paths_that_the_pipeline_decides_are_refused(tmp_path: Path) -> None:
    config, root = small(tmp_path, "train.output_dir=elsewhere")
    with pytest.raises(InputError, match=r"train\.output_dir is decided by the pipeline"):
        plan(config, root)


def test_relative_output_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/people/someone")
    monkeypatch.delenv("TOKENDIFF_ROOT", raising=False)
    assert output_path("out") == tmp_path / "out"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # a submitted job
    assert output_path("out") == Path("/people/someone/tokendiff/out")
    monkeypatch.setenv("TOKENDIFF_ROOT", "/shared")
    assert output_path("out") == Path("/shared/out")
    assert output_path("/absolute") == Path("/absolute")
    monkeypatch.setenv("TOKENDIFF_ROOT", "s3://bucket/runs")
    assert output_path("out") == RemotePath("s3://bucket/runs/out")
    assert output_path("gs://other") == RemotePath("gs://other")
    assert input_path("s3://bucket/data", what="data_path") == "s3://bucket/data"


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_pipelines_of_this_repository_are_valid(path: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text\n")
    config = load_config(path)
    assert config.name == path.stem
    if config.preprocess.data_files:  # the user's own
        config = load_config(path, [f"preprocess.data_files=[{tmp_path}/*.txt]"])
    steps = plan(config, tmp_path).steps
    assert steps
    assert {step.state for step in steps} <= {"run", "skip"}


def test_the_first_plan_of_retraining(tmp_path: Path) -> None:
    """Without a champion nothing is compared with it, and a model starts from its preset."""
    (tmp_path / "text.txt").write_text("some text\n")
    files = f"preprocess.data_files=[{tmp_path}/*.txt]"
    config = load_config(ROOT / "pipelines" / "retrain.yaml", [files])
    steps = {step.stage.title: (step.state, step.why) for step in plan(config, tmp_path).steps}
    assert steps["evaluate-champion"] == ("skip", "there is no models:/tokendiff@champion yet")
    assert [state for state, _ in steps.values()] == ["run", "run", "run", "skip", "run"]


def test_the_offline_variant_of_mdlm_is_valid(tmp_path: Path) -> None:
    """The command in the file's own comment."""
    text = (ROOT / "pipelines" / "mdlm.yaml").read_text()
    comment = "".join(line.strip("# \\\n") + " " for line in text.splitlines() if line[:1] == "#")
    overrides = [word for word in comment.split() if "=" in word and "." in word.split("=")[0]]
    assert len(overrides) == 7
    config = load_config(ROOT / "pipelines" / "mdlm.yaml", overrides)
    assert config.preprocess.dataset_name == "builtin"
    assert config.train.model_name_or_path == "builtin:bert-tiny"


@pytest.mark.ray
def test_a_pipeline_from_file_to_report_and_again(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    path = write_config(tmp_path, tracking={"enabled": True})
    root = tmp_path / "out"
    assert pipeline_job.main(["run", str(path)]) == 0
    printed = capsys.readouterr().out
    for words in ("nats per held-out token", "bits/byte", "sample 0", "tokens/s", "mlflow ui"):
        assert words in printed
    config = load_config(path)
    stages = {stage.name: stage for stage in pipeline_stages(config, root / "small")}
    report = stages["evaluate"].folder / "report" / "index.html"
    assert str(report) in printed
    assert "small" in report.read_text()
    metrics = json.loads((stages["evaluate"].folder / "metrics.json").read_text())
    assert metrics["num_rows"] == 8
    assert 0 < metrics["standard_error"] < metrics["nats_per_token"] < math.log(300)
    assert len(read_samples(stages["generate"].folder)) == 2
    log = metrics_by_step(stages["train"].log_path)
    assert [event["step"] for event in log] == [2, 4]

    # MLflow has what the log has: a parent, a child per stage, losses at their steps, the report.
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tokendiff")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"small", "preprocess", "train", "generate", "evaluate"}
    parent = runs["small"].info.run_id
    for name, run in runs.items():
        assert run.info.status == "FINISHED"
        assert run.data.tags.get("mlflow.parentRunId") == (None if name == "small" else parent)
    history = client.get_metric_history(runs["train"].info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(e["step"], e["loss"]) for e in log]
    assert runs["train"].data.params["train.learning_rate"] == "0.001"
    artifacts = {
        item.path for item in client.list_artifacts(runs["evaluate"].info.run_id, "report")
    }
    assert artifacts == {"report/index.html", "report/loss_curve.png"}
    assert runs["small"].data.metrics["evaluate/nats_per_token"] == metrics["nats_per_token"]

    # Again: nothing is run, the same table is printed.
    untracked = ["-o", "tracking.enabled=false"]
    assert pipeline_job.main(["run", str(path), *untracked]) == 0
    again = capsys.readouterr().out
    assert again.count("  done (made by an earlier run, in ") == 4
    assert [e["step"] for e in metrics_by_step(stages["train"].log_path)] == [2, 4]
    assert pipeline_job.main(["plan", str(path), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["stages"]
    assert [row["state"] for row in rows] == ["done"] * 4
    assert pipeline_job.main(["status", str(path), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["stages"][-1]["result"]["num_rows"] == 8
    assert [run["state"] for run in status["runs"]] == ["succeeded"] * 2

    # Another evaluation of the same model: only that stage runs.
    changed = ["-o", "evaluate.seed=1", *untracked]
    with jobs_here():
        assert pipeline_job.main(["run", str(path), *changed]) == 0
    assert capsys.readouterr().out.count("  done (made by an earlier run, in ") == 3

    # A finished stage whose file is gone is said, not passed over.
    (stages["generate"].folder / "part-00000.jsonl").unlink()
    with pytest.raises(CorruptFileError, match=r"part-00000\.jsonl is missing"):
        run_pipeline(load_config(path, untracked[1:]), root)


@pytest.mark.slow
def test_a_pipeline_that_watches_itself_ends_early_and_shows_it(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    watched = {"eval_steps": 2, "early_stopping_patience": 1, "keep": "best", "max_eval_rows": 8}
    # Too fast to learn: the second evaluation is worse than the first.
    train = {**SMALL["train"], **watched, "max_train_steps": 40, "learning_rate": 0.3}
    path = write_config(tmp_path, train=train, tracking={"enabled": True}, generate=None)
    assert pipeline_job.main(["run", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "held-out rows before training: " in printed
    assert re.search(r"training +\d+ steps, the weights of step \d+, ", printed)
    assert re.search(r"ends early after step \d+: 1 evaluation in a row did not improve", printed)
    config = load_config(path)
    root = tmp_path / "out"
    stages = {stage.name: stage for stage in pipeline_stages(config, root / "small")}
    log = metrics_by_step(stages["train"].log_path, event="heldout")
    assert [event["step"] for event in log][:2] == [0, 2]
    assert log[-1]["step"] < 40
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tokendiff")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    history = client.get_metric_history(runs["train"].info.run_id, "heldout_nats_per_token")
    assert [(m.step, m.value) for m in history] == [
        (event["step"], event["heldout_nats_per_token"]) for event in log
    ]
    assert "held out" in (stages["evaluate"].folder / "report" / "index.html").read_text()
    # Again: it is done, though it has fewer steps than the file says.
    assert pipeline_job.main(["run", str(path), "-o", "tracking.enabled=false"]) == 0
    assert capsys.readouterr().out.count("  done (made by an earlier run, in ") == 3


@pytest.mark.ray
def test_variants_run_side_by_side_in_processes_of_their_own(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = {
        "stages": {
            "data": {"kind": "preprocess"},
            "model": {"kind": "train", "inputs": {"data": "data"}},
        },
        "matrix": {"train.seed": [0, 1]},
        "runner": {"max_parallel": 2},
        "train": {**SMALL["train"], "max_train_steps": 2, "logging_steps": 1},
    }
    path = write_config(tmp_path, **sections)
    assert pipeline_job.main(["run", str(path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    states = {stage["stage"]: stage["state"] for stage in record["stages"]}
    assert states == {"data": "ran", "model[seed=0]": "ran", "model[seed=1]": "ran"}
    assert [row["seed"] for row in record["comparison"]] == [0, 1]
    losses = [row["loss"] for row in record["comparison"]]
    assert losses[0] != losses[1]
    assert sum(stage["seconds"] for stage in record["stages"]) > record["seconds"]


def train_flags(folder: Path, *, steps: int) -> list[str]:
    """Flags that train on a text written to `folder`, into `folder/out`."""
    (folder / "corpus.txt").write_text("".join(f"line {n} of the text\n" for n in range(300)))
    return [
        *("--objective", "mdlm", "--lambda_conf", "0.1", "--dataset_name", "text"),
        *("--data_files", str(folder / "*.txt"), "--tokenizer_name_or_path", "bytes"),
        *("--max_length", "32", "--model_name_or_path", "builtin:bert-tiny"),
        *("--output_dir", str(folder / "out"), "--max_train_steps", str(steps)),
        *("--logging_steps", "1", "--checkpointing_steps", "2", "--enabled", "false"),
        *("--cpus_per_worker", "0.5", "--threads_per_worker", "1", "--json"),
    ]


@pytest.mark.slow
def test_train_from_flags_preprocesses_first_and_resumes(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train_job.main(train_flags(tmp_path, steps=3)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["step"] == 3
    assert (out / "final" / "MANIFEST.json").is_file()
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert train_job.main(train_flags(tmp_path, steps=5)) == 0
    log = metrics_by_step(out / "run" / "log.jsonl")
    assert [event["step"] for event in log] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_the_other_jobs_by_hand(
    in_this_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train_job.main(train_flags(tmp_path, steps=2)) == 0
    capsys.readouterr()
    common = ["--cpus_per_worker", "0.5", "--threads_per_worker", "1", "--enabled", "false"]
    checkpoint = ["--checkpoint_path", str(out / "final")]
    samples, evaluation = str(out / "samples"), str(out / "evaluation")
    flags = ["--num_samples", "3", "--num_inference_steps", "4", "--prompt", "line "]
    assert generate_job.main([*checkpoint, *flags, *common, "--output_dir", samples]) == 0
    assert "--- 0\nline " in capsys.readouterr().out
    verify(out / "samples", kind="samples")
    flags = ["--samples_path", samples, "--max_eval_rows", "4", "--num_mask_samples", "1"]
    assert evaluate_job.main([*checkpoint, *flags, *common, "--output_dir", evaluation]) == 0
    assert "nats_per_token" in capsys.readouterr().out
    verify(out / "evaluation", kind="evaluation")
    data = ["--dataset_name", "text", "--data_files", str(tmp_path / "*.txt")]
    shards = ["--output_dir", str(tmp_path / "shards"), "--tokenizer_name_or_path", "bytes"]
    for _ in range(2):  # and again, when there is nothing left to do
        assert preprocess_job.main([*data, *shards, "--enabled", "false", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["train_documents"] > 250
    verify(tmp_path / "shards", kind="tokens")

    # Somebody else's folder is left as it is.
    into_it = [*checkpoint, *common, "--output_dir", str(out / "final")]
    assert evaluate_job.main(into_it) == 2
    assert "holds checkpoint; choose another output_dir" in capsys.readouterr().err
    verify(out / "final", kind="checkpoint")


@pytest.mark.parametrize(
    ("job", "flag"),
    [
        (generate_job, "--checkpoint_path"),
        (evaluate_job, "--checkpoint_path"),
        (train_job, "--data_path"),
    ],
)
def test_a_mistyped_path_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, job: Any, flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert job.main([flag, "nowhere"]) == 2
    assert f"{flag[2:]} nowhere: no such folder (looked for" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_clean_message_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("train:\n  max_train_stepz: 3\n")
    assert pipeline_job.main(["plan", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: train.max_train_stepz: unknown field" in error
    assert "did you mean 'max_train_steps'?" in error
    assert "Traceback" not in error


def test_a_file_without_a_byte_is_no_new_text(tmp_path: Path) -> None:
    def why_skipped() -> str:
        fields = {
            "dataset_name": "text",
            "data_files": [f"{tmp_path}/*.txt"],
            "new_since": str(tmp_path / "known.json"),
        }
        stages = {"data": {"kind": "preprocess"}}
        config = Config.model_validate({"preprocess": fields, "stages": stages})
        (stage,) = pipeline_stages(config, tmp_path)
        return stage.skip

    (tmp_path / "old.txt").write_text("read already")
    known = [content_identity(tmp_path / "old.txt")]
    (tmp_path / "known.json").write_text(json.dumps(known))
    (tmp_path / "touched.txt").touch()
    assert why_skipped().startswith("no text is new since")
    (tmp_path / "touched.txt").write_text("news")
    assert why_skipped() == ""
