"""Training, sampling and evaluating on Ray: equal to the run without it, and what a kill costs."""

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.in_this_process import jobs_here
from tokendiff.artifacts.locations import RemotePath
from tokendiff.artifacts.manifest import load_manifest
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.data.samples import read_samples
from tokendiff.errors import InputError
from tokendiff.tracking.run_log import RunLog, metrics_by_step, read_events
from tokendiff.training.run import train_in_process

pytestmark = pytest.mark.ray

Events = list[dict[str, Any]]
LENGTH = 12
CLUSTER = ClusterConfig(num_workers=2, cpus_per_worker=0.5, threads_per_worker=1)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = random_rows(70, LENGTH)
    return token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[rows[:40], rows[40:]],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(30, LENGTH, seed=1),
    )


def train_config(**changes: Any) -> TrainConfig:
    fields = {
        "model_name_or_path": "builtin:bert-tiny",
        "max_train_steps": 24,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "checkpointing_steps": 5,
    }
    return TrainConfig.model_validate({**fields, **changes})


@pytest.fixture(scope="module")
def plain_run(
    data_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[int, float], Path]:
    """Losses and final checkpoint of the uninterrupted run without Ray."""
    losses: dict[int, float] = {}

    def keep(event: str, **fields: Any) -> None:
        if event == "metrics":
            losses[fields["step"]] = fields["loss"]

    folder = tmp_path_factory.mktemp("plain")
    data = TokenData.open(data_path, split="train")
    return losses, train_in_process(train_config(), data, folder, on_event=keep)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RunLog]:
    with RunLog(tmp_path / "out" / "run" / "log.jsonl") as log:
        yield log


class Killer(threading.Thread):
    """SIGKILLs one process as soon as the log says so; `pid` is the one it killed."""

    def __init__(self, log: RunLog, is_time: Callable[[Events], bool], actor_name: str) -> None:
        super().__init__()
        self._log, self._is_time, self._actor_name = log, is_time, actor_name
        self.pid: int | None = None

    def run(self) -> None:
        deadline = time.monotonic() + 300  # Ray starts slowly on a busy machine
        while self.pid is None and time.monotonic() < deadline:
            if self._is_time(read_events(self._log.path)):
                self.pid = pid_of(self._actor_name)
            time.sleep(0.02)
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)


def pid_of(actor_name: str) -> int | None:
    import psutil

    for process in psutil.Process().children(recursive=True):  # of this Ray, and no other
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            if actor_name in " ".join(process.cmdline()[:1]):
                return int(process.pid)
    return None


def test_a_worker_killed_in_mid_run_costs_nothing_but_time(
    ray_session: None, data_path: Path, log: RunLog, plain_run: tuple[dict[int, float], Path]
) -> None:
    """Two workers on Ray, one of them killed: the losses of one process that was left alone."""
    from tokendiff.cluster.train import train

    def reached_step_12(events: Events) -> bool:
        return any(e["event"] == "metrics" and e["step"] >= 12 for e in events)

    out = log.path.parent.parent
    killer = Killer(log, reached_step_12, "ray::RayTrainWorker")
    killer.start()
    final = train(train_config(), CLUSTER, data_path=data_path, output_dir=out, on_event=log.write)
    killer.join()
    assert killer.pid is not None
    events = read_events(log.path)
    resumed = [e["step"] for e in events if e["event"] == "resume"]
    assert len(resumed) == 1
    assert resumed[0] >= 5  # the checkpoint of step 10 may still be being written
    assert any("was lost" in e["message"] for e in events if e["event"] == "warning")
    assert not list((out / "run").glob("at-*"))
    expected, _ = plain_run
    losses = {e["step"]: e["loss"] for e in metrics_by_step(log.path)}
    assert sorted(losses) == sorted(expected)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert final == out / "final"
    assert not (out / ".ray-train").exists()
    # The same command again: finished, and no Ray worker is started for it.
    before = len(read_events(log.path))
    assert train(train_config(), CLUSTER, data_path=data_path, output_dir=out, on_event=log.write)
    assert len(read_events(log.path)) == before
    # Cut off between the last checkpoint and final/: no step is left to take, and final/ is made.
    weights = (final / "model.safetensors").read_bytes()
    shutil.rmtree(final)
    with jobs_here():
        train(train_config(), CLUSTER, data_path=data_path, output_dir=out, on_event=log.write)
    assert (final / "model.safetensors").read_bytes() == weights


def test_the_worker_that_died_is_named_with_its_step_and_rows(tmp_path: Path) -> None:
    """And not the peer whose collective broke, which Ray may then have killed in the same step."""
    from ray.exceptions import OutOfMemoryError
    from ray.train import WorkerGroupError

    from tokendiff.artifacts.last_notes import LastNote
    from tokendiff.cluster.train_workers import _reason_to_retry

    for rank in range(2):
        note = LastNote(tmp_path, f"worker-{rank}").__enter__()
        note.write(f"step 7, worker {rank}: 4 rows")
    broken, killed = RuntimeError("gloo: connection closed by peer"), OutOfMemoryError("node full")
    error: Any = WorkerGroupError("two failed", {0: broken, 1: killed})
    reason = _reason_to_retry(error, tmp_path)
    assert reason.startswith("worker 1 was lost (node full) at step 7, worker 1: 4 rows; if its")
    # Behind a URI there are no notes.
    reason = _reason_to_retry(error, RemotePath(f"memory://{tmp_path.name}"))
    assert reason == "worker 1 was lost (node full)"


def test_a_gpu_that_fails_is_a_lost_worker(tmp_path: Path) -> None:
    """And an assertion in one of its kernels is not: that is of the input, and would come again."""
    from ray.train import WorkerGroupError

    from tokendiff.cluster.train_workers import _reason_to_retry

    says = "CUDA error: {}\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    broken = torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0.")
    lost = torch.AcceleratorError(says.format("uncorrectable ECC error encountered"))
    error: Any = WorkerGroupError("two failed", {0: broken, 1: lost})
    reason = _reason_to_retry(error, tmp_path)
    assert reason == "worker 1 was lost (CUDA error: uncorrectable ECC error encountered)"
    for of_run in ("device-side assert triggered", "out of memory"):
        failed = torch.AcceleratorError(says.format(of_run))
        error = WorkerGroupError("two failed", {0: broken, 1: failed})
        with pytest.raises(torch.AcceleratorError, match=of_run):
            _reason_to_retry(error, tmp_path)


def test_divergence_is_not_retried(
    ray_session: None, data_path: Path, log: RunLog, plain_run: tuple[dict[int, float], Path]
) -> None:
    from tokendiff.cluster.train import train

    out = log.path.parent.parent
    config = train_config(learning_rate=1e30, max_train_steps=40, checkpointing_steps=1)
    with pytest.raises(FloatingPointError, match=r"stopped before the optimiser step"):
        train(config, CLUSTER, data_path=data_path, output_dir=out, on_event=log.write)
    assert len([e for e in read_events(log.path) if e["event"] == "start"]) == 1


def test_a_run_without_a_step_to_take_has_no_rows(ray_session: None, data_path: Path) -> None:
    from tokendiff.cluster.rank_rows import RankRows

    data = TokenData.open(data_path, split="train")
    for first_step, num_batches in ((24, 0), (22, 2)):
        shards = RankRows(data, train_config(), first_step).configure({}, 2)
        batches = [list(shard["train"].iter_batches(batch_size=4)) for shard in shards]
        assert [len(found) for found in batches] == [num_batches] * 2


def test_too_many_workers_for_the_batch(data_path: Path, tmp_path: Path) -> None:
    from tokendiff.cluster.train import train

    with pytest.raises(InputError, match="8 rows cannot be shared by 9 workers"):
        train(
            train_config(),
            ClusterConfig(num_workers=9),
            data_path=data_path,
            output_dir=tmp_path,
            on_event=print,
        )


def generate_config(**changes: Any) -> GenerateConfig:
    fields = {"num_samples": 40, "batch_size": 4, "sampler": {"num_inference_steps": 8}}
    return GenerateConfig.model_validate({**fields, **changes})


def test_samples_survive_a_killed_actor_and_do_not_depend_on_their_number(
    ray_session: None, log: RunLog, tmp_path: Path, plain_run: tuple[dict[int, float], Path]
) -> None:
    from tokendiff.cluster.generate import generate

    checkpoint = str(plain_run[1])
    config = generate_config(sampler={"num_inference_steps": 100})
    one = ClusterConfig(cpus_per_worker=0.5, num_actors=1, threads_per_worker=1)
    two = ClusterConfig(cpus_per_worker=0.5, num_actors=2, threads_per_worker=1)

    def three_parts(events: Events) -> bool:
        return any(e["event"] == "progress" and e["done"] >= 12 for e in events)

    killer = Killer(log, three_parts, "ray::MapWorker")
    killer.start()
    generate(config, two, checkpoint_path=checkpoint, output_dir=tmp_path / "a", on_event=log.write)
    killer.join()
    assert killer.pid is not None
    generate(config, one, checkpoint_path=checkpoint, output_dir=tmp_path / "b", on_event=log.write)
    killed = read_samples(tmp_path / "a")
    assert [record["id"] for record in killed] == list(range(40))
    assert killed == read_samples(tmp_path / "b")
    assert all(1 not in record["tokens"] for record in killed)  # 1 is the mask
    assert all(record["num_model_calls"] <= LENGTH for record in killed)
    # Cut off after some parts: the others are made, these are not made again, and no other job
    # takes them for its own.
    folder = tmp_path / "b"
    identity = load_manifest(folder).metadata["identity"]
    (folder / "MANIFEST.json").unlink()
    (folder / "run" / "samples.unfinished").write_text(identity)
    (folder / "part-00005.jsonl").unlink()
    kept = (folder / "part-00003.jsonl").stat().st_mtime_ns
    other = generate_config(seed=1)
    with pytest.raises(InputError, match="holds samples of another checkpoint, config or prompts"):
        generate(other, one, checkpoint_path=checkpoint, output_dir=folder, on_event=log.write)
    with jobs_here():
        generate(config, one, checkpoint_path=checkpoint, output_dir=folder, on_event=log.write)
    assert read_samples(folder) == killed
    assert (folder / "part-00003.jsonl").stat().st_mtime_ns == kept
    with pytest.raises(InputError, match="holds samples of another checkpoint, config or prompts"):
        generate(other, one, checkpoint_path=checkpoint, output_dir=folder, on_event=log.write)


def test_prompts_are_kept_and_parquet_holds_the_same(
    in_this_process: None, log: RunLog, tmp_path: Path, plain_run: tuple[dict[int, float], Path]
) -> None:
    from tokendiff.cluster.generate import generate

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "abc"}\n\n{"prompt": "bcdefghijkla"}\n')
    (tmp_path / "prompts.txt").write_text("de\u2028f\n")
    config = generate_config(
        num_samples=2,
        prompt=["a"],
        prompts=[str(tmp_path / "prompts.jsonl"), str(tmp_path / "*.txt")],
    )
    cluster = ClusterConfig(cpus_per_worker=0.5)
    for output_format in ("jsonl", "parquet"):
        generate(
            config.model_copy(update={"output_format": output_format}),
            cluster,
            checkpoint_path=str(plain_run[1]),
            output_dir=tmp_path / output_format,
            on_event=log.write,
        )
    records = read_samples(tmp_path / "jsonl")
    # Parquet has the columns of all samplers, those of a draft too, which has none here.
    others = {"blocks_by_gain": None, "source": None}
    assert [{**others, **record} for record in records] == read_samples(tmp_path / "parquet")
    assert [r["prompt"] for r in records] == ["a"] * 2 + ["abc"] * 2 + ["bcdefghijkla"] * 2 + [
        "de\u2028f"
    ] * 2
    assert records[2]["tokens"][:3] == [4, 5, 6]
    assert records[2]["num_prompt_tokens"] == 3
    assert records[2]["tokens"] != records[3]["tokens"]
    assert records[4]["num_model_calls"] == 0  # the prompt fills the whole sample
    assert records[4]["text"] == "bcdefghijkla"
    with pytest.raises(InputError, match=r"'abcabcabcabca' has 13 tokens; it must fit seq_len 12"):
        generate(
            generate_config(prompt=["abcabcabcabca"]),
            cluster,
            checkpoint_path=str(plain_run[1]),
            output_dir=tmp_path / "long",
            on_event=log.write,
        )


def test_evaluation_is_that_of_one_process_and_writes_a_report(
    ray_session: None,
    log: RunLog,
    tmp_path: Path,
    data_path: Path,
    plain_run: tuple[dict[int, float], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import json

    from tokendiff.cluster.evaluate import evaluate
    from tokendiff.cluster.generate import generate
    from tokendiff.evaluation.bound import summarize
    from tokendiff.evaluation.evaluator import Evaluator
    from tokendiff.evaluation.generation_metrics import unigram_entropy_nats
    from tokendiff.evaluation.paired import read_rows

    monkeypatch.setattr("tokendiff.cluster.evaluate._ROWS_PER_TASK", 8)  # several parts

    cluster = ClusterConfig(cpus_per_worker=0.5)
    checkpoint = plain_run[1]
    with jobs_here():
        generate(
            generate_config(),
            cluster,
            checkpoint_path=str(checkpoint),
            output_dir=tmp_path / "samples",
            on_event=log.write,
        )
    config = EvaluateConfig(batch_size=7, num_mask_samples=3)
    out = tmp_path / "evaluation"
    evaluate(
        config,
        cluster,
        title="toy",
        checkpoint_path=str(checkpoint),
        data_path=None,  # what the checkpoint says it was trained on
        samples_path=tmp_path / "samples",
        training_log=[{"step": 1, "loss": 2.5, "lr": 1e-3, "tokens_per_second": 10.0}],
        config_yaml="name: toy\n",
        output_dir=out,
        on_event=log.write,
    )
    metrics = json.loads((out / "metrics.json").read_text())
    data = TokenData.open(data_path, split="heldout")
    evaluator = Evaluator(checkpoint, config, device="cpu")
    parts = [evaluator.bounds(data.read_group(group)) for group in range(2)]
    import numpy as np

    nats, tokens, num_bytes = (
        np.concatenate([part[name] for part in parts])
        for name in ("nats", "num_tokens", "num_bytes")
    )
    expected = summarize(nats, tokens, num_bytes)
    assert metrics["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-6)
    assert metrics["standard_error"] == pytest.approx(expected.standard_error, rel=1e-6)
    assert metrics["num_tokens"] == 30 * LENGTH
    assert metrics["unigram_entropy_nats"] == pytest.approx(np.log(12), abs=0.05)
    token_counts = sum(part["token_counts"][0] for part in parts)
    assert metrics["unigram_entropy_nats"] == pytest.approx(unigram_entropy_nats(token_counts))
    by_row = read_rows(out, "nats_per_token")
    assert by_row is not None
    ids = np.concatenate([data.read_group(group).row_ids for group in range(2)])
    assert np.array_equal(by_row["row_id"], ids)
    assert by_row["nats"] == pytest.approx(nats, rel=1e-6)
    assert np.array_equal(by_row["num_tokens"], tokens)
    page = (out / "report" / "index.html").read_text()
    assert f"{expected.nats_per_token:.3f}" in page
