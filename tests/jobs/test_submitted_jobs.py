"""Jobs as people submit them: to a head with token authentication, followed, stopped, and cut off.

One head for all, a cluster of its own beside the one that other tests share: it runs no tasks, as
in cluster.yaml, and has one worker node.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests import ROOT
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.tracking.run_log import metrics_by_step, read_events
from tokendiff.training.run import train_in_process

# Of a minute on an idle machine; every process that Ray starts waits for the tests beside it.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

RAY = ["-m", "ray.scripts.scripts"]
TRAIN: dict[str, Any] = {
    "model_name_or_path": "builtin:bert-tiny",
    "max_train_steps": 200,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "checkpointing_steps": 20,
    "learning_rate": 1e-3,
}


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A `ray job submit` under way, and where what it prints goes."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def wait_for(self, condition: Callable[[], Any], *, seconds: float) -> Any:
        """The first true value of `condition`, which must come before the job ends."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return found

    def finish(self, *, seconds: float = 600) -> tuple[int, str]:
        """Exit code, and all that was printed."""
        code = self.process.wait(timeout=seconds)
        return code, self.log.read_text()


@dataclass(frozen=True, kw_only=True)
class Head:
    """A Ray head that answers on loopback."""

    address: str
    dashboard: str
    token: str
    environment: dict[str, str]
    workers_forked: Callable[[], AbstractContextManager[None]]

    def request(self, path: str, *, token: str | None = None, **kwargs: Any) -> Any:
        """What the job server answers to a request, as JSON."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        request = urllib.request.Request(f"{self.dashboard}{path}", headers=headers, **kwargs)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def nodes(self) -> int:
        """How many nodes are up."""
        answer = self.request(
            "/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE"
        )
        return int(answer["data"]["result"]["num_filtered"])

    def submit(self, name: str, *command: str, folder: Path) -> "Submission":
        """`ray job submit` of `python -m COMMAND`, which follows the job's log until it ends."""
        variables = {"TOKENDIFF_ROOT": str(folder), "RAY_JOB_STOP_WAIT_TIME_S": "60"}
        log = folder / f"{name}.out"
        process = subprocess.Popen(
            [
                *[
                    sys.executable,
                    *RAY,
                    "job",
                    "submit",
                    "--address",
                    self.dashboard,
                    "--working-dir",
                    str(ROOT),
                ],
                *["--runtime-env-json", json.dumps({"env_vars": variables})],
                *["--submission-id", name, "--", sys.executable, "-m", *command],
            ],
            env=self.environment,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )
        return Submission(process=process, log=log)

    @contextmanager
    def node(self, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
        """A node, started by `ray start` with these arguments; a worker node by default."""
        # Its own folder, as on a machine of its own: in a shared one nodes delete each other's
        # copy of the upload.
        folder = tempfile.mkdtemp(dir=self.environment["RAY_TMPDIR"])
        worker = [f"--address={self.address}", "--num-cpus=3"]
        common = [f"--temp-dir={folder}", "--object-store-memory=100000000"]
        with self.workers_forked():
            process = start_ray(self.environment, *(arguments or worker), *common)
        try:
            yield process
        finally:
            kill_tree(process.pid)
            process.wait()


def start_ray(environment: dict[str, str], *arguments: str) -> "subprocess.Popen[bytes]":
    log = Path(environment["RAY_TMPDIR"]) / f"{secrets.token_hex(4)}.out"
    return subprocess.Popen(
        [sys.executable, *RAY, "start", "--block", "--node-ip-address=127.0.0.1", *arguments],
        env=environment,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )


def kill_tree(pid: int) -> None:
    """SIGKILL a process and all that it started: what losing its machine is to the others."""
    try:
        root = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    tree = [root, *root.children(recursive=True)]
    for process in tree:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=10)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head(workers_forked: Callable[[], AbstractContextManager[None]]) -> Iterator[Head]:
    port, dashboard, client, agent = free_ports(4)
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp") as folder:
        token = secrets.token_hex(32)
        (Path(folder) / "token").write_text(token)
        (Path(folder) / "token").chmod(0o600)
        environment = {
            **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{folder}/token",
            "RAY_TMPDIR": folder,
            "HOME": folder,
        }
        head = Head(
            address=f"127.0.0.1:{port}",
            dashboard=f"http://127.0.0.1:{dashboard}",
            token=token,
            environment=environment,
            workers_forked=workers_forked,
        )
        arguments = [
            *["--head", f"--port={port}", "--num-cpus=0", "--disable-usage-stats"],
            *["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"],
            *[f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"],
        ]

        def is_up() -> bool:
            try:
                return isinstance(head.request("/api/jobs/"), list)
            except OSError:
                return False

        with head.node(*arguments):
            deadline = time.monotonic() + 60
            while not is_up():
                assert time.monotonic() < deadline, "the head's job server does not come up"
                time.sleep(0.1)
            yield head


@pytest.fixture(scope="module")
def worker_node(head: Head) -> Iterator["subprocess.Popen[bytes]"]:
    with head.node() as process:
        deadline = time.monotonic() + 120
        while head.nodes() < 2:  # a job that starts sooner sees the head alone
            assert time.monotonic() < deadline, "the worker node does not join"
            time.sleep(0.1)
        yield process


def losses_alone(data_path: Path, folder: Path) -> dict[int, float]:
    """Losses of the same training in this process, without Ray, never interrupted."""
    losses: dict[int, float] = {}

    def keep(event: str, **fields: Any) -> None:
        if event == "metrics":
            losses[fields["step"]] = fields["loss"]

    data = TokenData.open(data_path, split="train")
    train_in_process(TrainConfig.model_validate(TRAIN), data, folder, on_event=keep)
    return losses


def steps_in(log: Path) -> list[int]:
    return [event["step"] for event in read_events(log) if event["event"] == "metrics"]


def test_only_the_token_opens_the_job_server(head: Head) -> None:
    with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
        head.request("/api/jobs/", token="0" * 64)


@pytest.fixture(scope="module")
def refused(
    head: Head, worker_node: object, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Submission]:
    """Jobs that cannot work, side by side: nearly all that they do is start."""
    folder = tmp_path_factory.mktemp("refused")
    # It is another folder in every process, as a local disk is on every node.
    path = folder / "local.yaml"
    path.write_text("name: local\nroot: /proc/self/cwd\npreprocess: {use_dummy_data: true}\n")
    commands = {
        "bad-config": ["jobs.train", "--max_train_stepz", "3"],
        "run": ["jobs.pipeline", "run", str(path), "-o", "tracking.enabled=false"],
    }
    return {name: head.submit(name, *words, folder=folder) for name, words in commands.items()}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("bad-config", "did you mean --max_train_steps?"),
        ("run", "root /proc/self/cwd is not visible on 1 of the cluster's 2 nodes"),
    ],
)
def test_a_job_that_cannot_work_fails_with_code_2(
    head: Head, refused: dict[str, Submission], name: str, says: str
) -> None:
    code, output = refused[name].finish()
    assert code == 1  # all that `ray job submit` says of a failure
    assert says in output
    answer = head.request(f"/api/jobs/{name}")
    assert answer["status"] == "FAILED"
    assert answer["driver_exit_code"] == 2


def test_a_stopped_pipeline_has_saved_its_step_and_goes_on(
    head: Head, worker_node: object, tmp_path: Path
) -> None:
    """One training, stopped and gone on with: as if left alone."""
    config = {
        "name": "nightly",
        "root": str(tmp_path / "root"),
        "preprocess": {"use_dummy_data": True, "num_dummy_samples": 64, "max_length": 12,
                       "tokenizer_name_or_path": "bytes"},
        "train": TRAIN,
        "generate": None,
        "evaluate": None,
        "cluster": {"cpus_per_worker": 0.5, "threads_per_worker": 1, "use_gpu": False},
        "tracking": {"enabled": False},
    }  # fmt: skip
    path = tmp_path / "nightly.yaml"
    path.write_text(yaml.safe_dump(config))
    command = ["jobs.pipeline", "run", str(path)]
    first = head.submit("first", *command, folder=tmp_path)

    def train_log() -> Path | None:
        found = list((tmp_path / "root/nightly").glob("train-*/run/log.jsonl"))
        return found[0] if found and steps_in(found[0]) else None

    log = first.wait_for(train_log, seconds=600)
    assert head.request("/api/jobs/first/stop", method="POST") == {"stopped": True}
    _, output = first.finish()
    assert head.request("/api/jobs/first")["status"] == "STOPPED"
    (stopped,) = [event["step"] for event in read_events(log) if event["event"] == "stopped"]
    assert [event["event"] for event in read_events(log)].count("stopping") == 1
    assert stopped == steps_in(log)[-1] < TRAIN["max_train_steps"]
    checkpoints = log.parent.parent
    assert (checkpoints / f"checkpoint-{stopped}" / "MANIFEST.json").is_file()
    assert "stopped by SIGTERM" in output

    second = head.submit("second", *command, folder=tmp_path)
    code, output = second.finish()
    assert code == 0, output
    assert "preprocess  done (made by an earlier run" in output
    assert f"goes on from step {stopped}" in output
    assert [event["step"] for event in read_events(log) if event["event"] == "resume"] == [stopped]
    assert head.request("/api/jobs/second")["status"] == "SUCCEEDED"
    assert (checkpoints / "final" / "MANIFEST.json").is_file()
    (data,) = (tmp_path / "root/nightly").glob("preprocess-*")
    losses = {event["step"]: event["loss"] for event in metrics_by_step(log)}
    assert losses == losses_alone(data, tmp_path / "alone")
