"""One worker and no cluster: the work is done in the process of the job, and Ray is not started."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.builders import letter_tokenizer, random_rows, save_ref, tiny_causal, token_folder
from tests.in_this_process import jobs_here
from tokendiff.artifacts.manifest import commit, load_manifest
from tokendiff.artifacts.model_folders import held_commits
from tokendiff.cluster import evaluate, session
from tokendiff.cluster.generate import generate
from tokendiff.cluster.progress import JobProgress
from tokendiff.cluster.stopping import is_stop_requested
from tokendiff.cluster.train import train
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.errors import InputError
from tokendiff.models import layers
from tokendiff.tracking.run_log import RunLog, metrics_by_step, read_events
from tokendiff.training.identity import run_identity
from tokendiff.training.inputs import check_training
from tokendiff.training.run import TrainingRun, train_in_process

LENGTH = 12
CONFIG = TrainConfig.model_validate(
    {
        "model_name_or_path": "builtin:bert-tiny",
        "max_train_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "checkpointing_steps": 100,
    }
)


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_folder(
        tmp_path_factory.mktemp("data") / "tokens",
        files=[random_rows(32, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(16, LENGTH, seed=1),
    )


def losses_of(path: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in metrics_by_step(path)}


def test_ray_is_started_when_it_is_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connected: list[str] = []
    monkeypatch.setattr(session, "is_connected", lambda: False)
    monkeypatch.setattr(session, "_start_or_join", lambda *args: connected.append("started"))
    with session.ray_session(ClusterConfig()):
        assert connected == []
        assert session.works_here(1)
        assert not session.works_here(2)
        session.need_ray()
        assert connected == ["started"]
    session.need_ray()  # outside of a session Ray itself does, with the first call to it
    assert connected == ["started"]
    for address in ("local", "10.0.0.1:6379"):
        with session.ray_session(ClusterConfig(address=address)):
            assert connected == ["started"] * 2
        connected.pop()
    monkeypatch.setenv("RAY_ADDRESS", "")  # as a manifest leaves it that has none to give
    with session.ray_session(ClusterConfig()):
        assert connected == ["started"]
        assert not session.is_shared(ClusterConfig())
    monkeypatch.setattr(session, "is_connected", lambda: True)
    assert not session.works_here(1)


def test_the_losses_are_those_of_plain_training_and_sigterm_costs_no_step(
    data_path: Path, tmp_path: Path
) -> None:
    plain: dict[int, float] = {}

    def keep(event: str, **fields: Any) -> None:
        if event == "metrics":
            plain[fields["step"]] = fields["loss"]

    data = TokenData.open(data_path, split="train")
    train_in_process(CONFIG, data, tmp_path / "plain", on_event=keep)
    out = tmp_path / "out"
    with RunLog(out / "run" / "log.jsonl") as log, jobs_here():

        def stop_at_3(event: str, **fields: Any) -> None:
            log.write(event, **fields)
            if event == "metrics" and fields["step"] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                until = time.monotonic() + 10.0  # a slow step: that the signal has come is said
                while time.monotonic() < until and "stopping" not in log.path.read_text():
                    time.sleep(0.05)

        arguments: dict[str, Any] = {"data_path": data_path, "output_dir": out}
        with session.ray_session(ClusterConfig()):
            with pytest.raises(KeyboardInterrupt, match="goes on from the step it was at"):
                train(CONFIG, ClusterConfig(), on_event=stop_at_3, **arguments)
            assert is_stop_requested()
        stopped = max(losses_of(log.path))
        assert [e["event"] for e in read_events(log.path)].count("stopping") == 1
        assert stopped in (3, 4)
        with session.ray_session(ClusterConfig()):
            final = train(CONFIG, ClusterConfig(), on_event=log.write, **arguments)
        resumed = [e["step"] for e in read_events(log.path) if e["event"] == "resume"]
    assert resumed == [stopped]
    assert losses_of(log.path) == plain
    weights = [folder / "model.safetensors" for folder in (final, tmp_path / "plain" / "final")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_trained_model_is_gone_before_the_next_stage(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    fit = TrainingRun.fit

    def noting(run: TrainingRun, *args: Any, **options: Any) -> bool:
        models.append(weakref.ref(run.trainer.denoiser.model))
        return fit(run, *args, **options)

    monkeypatch.setattr(TrainingRun, "fit", noting)
    gc.disable()  # it would come by chance
    try:
        with jobs_here(), session.ray_session(ClusterConfig()):
            train(
                CONFIG.model_copy(update={"max_train_steps": 1}),
                ClusterConfig(),
                data_path=data_path,
                output_dir=tmp_path,
                on_event=lambda event, **fields: None,
            )
        left = [model() is not None for model in models]  # before Python looks for cycles again
    finally:
        gc.enable()
    assert left == [False]


@pytest.mark.slow
def test_each_training_of_a_process_is_compiled_anew(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that one training keeps; two would exceed it together, and fail here."""
    compile_it, num_kinds = torch.nn.Module.compile, 3  # kinds of layers
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_it(self, backend="eager"))
    monkeypatch.setattr(layers, "_MOST_COMPILATIONS", num_kinds)
    data = TokenData.open(data_path, split="train")
    limits = {"recompile_limit": num_kinds, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        for size in ("tiny", "mini"):  # the variants of a matrix
            fields = {"model_name_or_path": f"builtin:bert-{size}", "max_train_steps": 1}
            config = CONFIG.model_copy(update={"compile": True, **fields})
            train_in_process(config, data, tmp_path / size)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_workers_of_ray_wait_as_the_job_does(
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    given: dict[str, str],
    expected: dict[str, str],
) -> None:
    """A Ray that is started here inherits it; workers of one that is joined are told."""
    import ray  # noqa: F401

    seen: dict[str, str] = {}

    def init(*, runtime_env: Any = None, **fields: Any) -> None:
        seen.update(os.environ if runtime_env is None else runtime_env["env_vars"])

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(os, "environ", dict(given))
    session._start_or_join(ClusterConfig(address=address), 1, lambda message: None)
    assert {name: seen[name] for name in expected} == expected
    assert ("GOMP_SPINCOUNT" in seen) == ("GOMP_SPINCOUNT" in expected)


def test_a_cluster_that_cannot_be_joined_may_ask_for_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray  # noqa: F401

    def init(**fields: Any) -> None:
        raise ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(InputError, match=r"10\.0\.0\.1:6379: no Ray .* RAY_AUTH_MODE=token if"):
        session._start_or_join(ClusterConfig(address="10.0.0.1:6379"), 1, lambda message: None)


@pytest.mark.parametrize(
    ("load", "cores", "threads", "is_given"),
    [(8.3, 2, None, True), (2.5, 2, None, False), (8.3, 2, 2, False), (8.3, 1, None, False)],
)
def test_fewer_threads_are_advised_where_others_keep_the_cores_busy(
    monkeypatch: pytest.MonkeyPatch, load: float, cores: int, threads: int | None, is_given: bool
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    advice = session.advice_on_threads(ClusterConfig(threads_per_worker=threads))
    assert (advice is not None) == is_given
    if advice is not None:
        assert "8 processes wanted its 2 cores" in advice
        assert "with -o cluster.threads_per_worker=1 may be faster" in advice


def test_ray_is_started_with_the_cores_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part of the machine, where a scheduler shares it out."""
    monkeypatch.setattr(session, "is_connected", lambda: False)
    monkeypatch.setattr("os.cpu_count", lambda: 128)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert session.num_cpus(ClusterConfig()) == 16


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"cluster\.use_gpu true: torch finds no GPU"):
        session.set_up_torch(ClusterConfig(use_gpu=True), use_gpu=True)


def test_a_single_task_needs_no_ray_however_many_actors_there_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "is_connected", lambda: False)
    monkeypatch.setattr("tokendiff.cluster.progress.is_connected", lambda: False)
    monkeypatch.setattr("torch.set_num_threads", lambda num_threads: None)
    monkeypatch.setattr(evaluate, "need_ray", lambda: pytest.fail("Ray would be started"))
    with JobProgress(lambda event, **fields: None) as progress:
        progress.begin("checks", total=1)
        answer = evaluate._run_task(
            lambda device, on_progress: device,
            ClusterConfig(num_actors=4),
            progress,
            use_gpu=False,
        )
    assert answer == "cpu"


_JOBS = """
import sys
from jobs import evaluate, generate, train

data, out = sys.argv[1:]
quiet = ["-o", "tracking.enabled=false"]
steps = ["--max_train_steps", "2", "--model_name_or_path", "builtin:bert-tiny"]
assert train.main(["--data_path", data, "--output_dir", f"{out}/run", *steps, *quiet]) == 0
model = ["--checkpoint_path", f"{out}/run/final"]
sampling = ["--num_samples", "2", "--num_inference_steps", "2", "--output_dir", f"{out}/samples"]
assert generate.main([*model, *sampling, *quiet]) == 0
judging = ["--samples_path", f"{out}/samples", "--max_eval_rows", "4"]
assert evaluate.main([*model, *judging, "--output_dir", f"{out}/evaluation", *quiet]) == 0
print("ray" in sys.modules)
"""


@pytest.mark.slow
def test_jobs_on_one_machine_do_without_ray(data_path: Path, tmp_path: Path) -> None:
    """Not even its import, which takes seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", _JOBS, str(data_path), str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_what_is_kept_for_a_gpu_is_given_back_on_the_host_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_back: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("device"))
    monkeypatch.setattr(
        torch._C, "_host_emptyCache", lambda: given_back.append("host"), raising=False
    )
    session.give_back_memory()
    assert given_back == ["device", "host"]


def test_a_run_is_checked_and_trained_at_the_commits_that_it_began_with(
    data_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, repository = "a" * 40, "b" * 40, tmp_path / "models--some--model"
    for sha in (old, new):
        (repository / "snapshots" / sha).mkdir(parents=True)
        (repository / "snapshots" / sha / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    held: list[dict[str, str]] = []

    def note(*args: Any) -> None:
        held.append(dict(held_commits()))

    for place in ("cluster.train.check_inputs", "cluster.train._train"):
        monkeypatch.setattr(f"tokendiff.{place}", note)
    monkeypatch.setattr("tokendiff.training.inputs.check_inputs", note)
    cfg, out = CONFIG.model_copy(update={"model_name_or_path": "some/model"}), tmp_path / "run"
    options: dict[str, Any] = {"data_path": data_path, "output_dir": out}

    def begin() -> None:
        held.clear()
        train(cfg, ClusterConfig(), **options, on_event=lambda event, **fields: None)
        check_training(cfg, **options, num_workers=1)

    save_ref(repository, "main", old)
    begin()
    assert held == [{}, {"some/model": old}, {}]
    (out / "checkpoint-1").mkdir(parents=True)
    metadata = {"run": run_identity(cfg, TokenData.open(data_path, split="train")), "step": 1}
    metadata["commits"] = {"model_name_or_path": old}
    commit(out / "checkpoint-1", kind="checkpoint", metadata=metadata)
    save_ref(repository, "main", new)
    begin()
    assert held == [{"some/model": old}] * 3


@pytest.mark.slow
def test_samples_go_on_with_the_commit_that_they_began_with(
    in_this_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--some--model"
    for seed, sha in enumerate(("a" * 40, "b" * 40)):
        folder = repository / "snapshots" / sha
        tiny_causal(vocab_size=16, seed=seed, num_hidden_layers=1).float().save_pretrained(folder)
        letter_tokenizer().save_pretrained(folder)
        (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = GenerateConfig.model_validate(
        {
            "model_id": "some/model",
            "prompt": ["abcd", "fade"],
            "batch_size": 1,
            "sampler": {"name": "ar", "max_new_tokens": 8},
        }
    )

    def parts_of(name: str) -> list[bytes]:
        def on_event(event: str, **fields: Any) -> None:
            if (event, name) == ("part", "cut"):
                raise KeyboardInterrupt

        out = tmp_path / name
        generate(config, ClusterConfig(), checkpoint_path=None, output_dir=out, on_event=on_event)
        assert load_manifest(out).metadata["commits"] == {"model_id": expected}
        return [path.read_bytes() for path in sorted(out.glob("part-*"))]

    expected = "a" * 40
    save_ref(repository, "main", expected)
    whole = parts_of("whole")
    with pytest.raises(KeyboardInterrupt):
        parts_of("cut")
    # Its commit is none of another model, whose samples these are not.
    other = tmp_path / "models--other--model"
    shutil.copytree(repository / "snapshots" / ("b" * 40), other / "snapshots" / ("c" * 40))
    save_ref(other, "main", "c" * 40)
    with pytest.raises(InputError, match="holds samples of another checkpoint"):
        generate(
            config.model_copy(update={"model_id": "other/model"}),
            ClusterConfig(),
            checkpoint_path=None,
            output_dir=tmp_path / "cut",
            on_event=lambda event, **fields: None,
        )
    (tmp_path / "cut").rename(tmp_path / "resumed")
    save_ref(repository, "main", "b" * 40)
    assert parts_of("resumed") == whole
    expected = "b" * 40
    assert parts_of("anew")[1] != whole[1]
