"""As many training workers as there is room for: nodes that are lost, taken away and added."""

import importlib
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.cluster import elastic
from tokendiff.cluster.session import Demand, worker_resources
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.errors import InputError
from tokendiff.tracking.run_log import RunLog, metrics_by_step, read_events
from tokendiff.training.run import train_in_process

Events = list[dict[str, Any]]
LENGTH = 12


@pytest.mark.parametrize(
    ("given", "ends"), [(1, (1, 1)), ("8", (8, 8)), ("4:16", (4, 16)), ("3:3", (3, 3))]
)
def test_a_number_or_a_range_of_workers(given: Any, ends: tuple[int, int]) -> None:
    config = ClusterConfig(num_workers=given)
    assert (config.min_workers, config.max_workers) == ends


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (0, "a whole number from 1, or two of them as MIN:MAX"),
        (True, "a whole number from 1"),
        (2.0, "a whole number from 1"),
        ("04", "a whole number from 1"),
        ("0:4", "two of them as MIN:MAX"),
        ("4:", "two of them as MIN:MAX"),
        ("4:16:2", "two of them as MIN:MAX"),
        ("16:4", "16 exceeds 4; write the smaller one first"),
    ],
)
def test_what_is_neither_is_refused(given: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ClusterConfig(num_workers=given)


@pytest.mark.parametrize(
    ("free", "each", "count"),
    [
        ([], {"CPU": 1.0}, 0),
        ([{"CPU": 4.0}], {"CPU": 1.0}, 3),  # one CPU is Ray Data's
        ([{"CPU": 1.0}], {"CPU": 1.0}, 0),
        ([{"CPU": 0.9}] * 3, {"CPU": 0.3}, 0),  # none has a CPU for it
        ([{"CPU": 4.0}, {"CPU": 2.0}], {"CPU": 1.5}, 3),  # on what is left of the first
        ([{"CPU": 2.1}], {"CPU": 0.1}, 11),  # 1.1 / 0.1 is 11.000000000000002, 2.1 - 1 a bit less
        ([{"CPU": 32.0, "GPU": 8.0}] * 2, {"CPU": 4.0, "GPU": 1.0}, 15),
        ([{"CPU": 33.0, "GPU": 8.0}] * 2, {"CPU": 4.0, "GPU": 1.0}, 16),
        ([{"CPU": 32.0}, {"CPU": 16.0, "GPU": 8.0}], {"CPU": 1.0, "GPU": 1.0}, 8),
        ([{"memory": 1e9}, {"CPU": 3.0}], {"CPU": 1.0}, 2),  # of the first all CPUs are taken
    ],
)
def test_workers_that_fit(free: list[dict[str, float]], each: dict[str, float], count: int) -> None:
    assert elastic.slots({str(i): node for i, node in enumerate(free)}, each) == count


@pytest.mark.ray
def test_a_cluster_without_room_for_the_least_is_waited_for(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic, "_SETTLED_SECONDS", 0.0)
    wait_until(lambda: elastic.room({"CPU": 1.0}) == 3)  # the test before has left
    told: Events = []
    cluster = ClusterConfig(num_workers="7:9", worker_start_timeout_s=1.5, use_gpu=False)
    room = r"room for 3 of at least 7 training workers"
    with pytest.raises(InputError, match=rf"{room}.*worker_start_timeout_s = 1.5"):
        elastic.workers_to_start(cluster, lambda event, **fields: told.append(fields))
    (fields,) = told
    assert "waiting for the cluster to grow: it has room for 3 of at least 7" in fields["message"]
    cluster = ClusterConfig(num_workers="2:9", use_gpu=False)
    assert elastic.workers_to_start(cluster, print) == 3


def test_room_that_comes_and_goes_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now, found = 0.0, itertools.chain([6, 5, 3], itertools.cycle([5, 6]))

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(elastic.time, "monotonic", lambda: now)
    monkeypatch.setattr(elastic.time, "sleep", sleep)
    monkeypatch.setattr(elastic, "room", lambda each, without=(): next(found))
    monkeypatch.setattr(elastic, "_silent_nodes", set)
    cluster = ClusterConfig(num_workers="4:16", use_gpu=False)
    assert elastic.workers_to_start(cluster, print) == 5
    assert now == 8.0  # five seconds after there was room for fewer than four


@pytest.mark.ray
def test_an_autoscaler_is_asked_whatever_others_ask(ray_session: None) -> None:
    """What it reads is the sum of all requests, those of Ray Train and Ray Data among them."""

    def asked() -> list[dict[str, float]]:
        kv: Any = importlib.import_module("ray.experimental.internal_kv")
        channel = importlib.import_module("ray.autoscaler._private.constants")
        found = kv._internal_kv_get(channel.AUTOSCALER_RESOURCE_REQUEST_CHANNEL)
        bundles = json.loads(found) if found else []
        return [each.get("resources", each) for each in bundles]

    odd = {"CPU": 0.375}
    with Demand() as first, Demand() as second:
        first.ask(odd, 3)
        second.ask(odd, 2)
        wait_until(lambda: asked().count(odd) == 5, seconds=60)
        first.ask(odd, 1)
        wait_until(lambda: asked().count(odd) == 3, seconds=60)
    wait_until(lambda: odd not in asked(), seconds=60)


@contextmanager
def second_node() -> Iterator["subprocess.Popen[bytes]"]:
    """A node of two CPUs beside that of the tests, until the block ends or it is killed."""
    import ray

    address = ray.get_runtime_context().gcs_address
    with tempfile.TemporaryDirectory(prefix="node-", dir="/tmp") as folder:
        process = subprocess.Popen(
            [
                *[sys.executable, "-m", "ray.scripts.scripts", "start", "--block"],
                *[f"--address={address}", "--node-ip-address=127.0.0.2", "--num-cpus=2"],
                *[f"--temp-dir={folder}", "--object-store-memory=100000000"],
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: len(nodes_up()) == 2)
            yield process
        finally:
            kill_tree(process)


def nodes_up() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def wait_until(condition: Callable[[], object], *, seconds: float = 400.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def kill_tree(process: "subprocess.Popen[bytes]") -> None:
    """What losing its machine is to the others."""
    if process.poll() is None:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in tree:
            each.kill()
        psutil.wait_procs(tree[1:], timeout=10)
    process.wait()


def announce_end_of(node_id: str) -> None:
    """As a spot market does, through the autoscaler."""
    import ray

    raylet: Any = importlib.import_module("ray._raylet")
    reasons: Any = importlib.import_module("ray.core.generated.autoscaler_pb2").DrainNodeReason
    client = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = reasons.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int(time.time() * 1000) + 120_000
    is_accepted, why_not = client.drain_node(node_id, reason, "to be taken away", deadline_ms)
    assert is_accepted, why_not


class Ended(Exception):
    pass


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Writes the log, holds the workers after the step that a file says, and ends all at the fourth
    start.
    """

    log: RunLog
    limit: Path

    def allow(self, step: int) -> None:
        (new := self.limit.with_suffix(".new")).write_text(str(step))
        new.replace(self.limit)

    def __call__(self, event: str, **fields: Any) -> None:
        self.log.write(event, **fields)
        if event == "doing" and [e["event"] for e in read_events(self.log.path)].count(event) == 4:
            raise Ended
        while event == "metrics" and fields["step"] >= int(self.limit.read_text()):
            time.sleep(0.02)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.deep
def test_nodes_are_lost_added_and_taken_away(ray_session: None, tmp_path: Path) -> None:
    """Three workers on two nodes, two on one, and three again: as one that is left alone."""
    from tokendiff.cluster.train import train

    rows = random_rows(70, LENGTH)
    data_path = token_folder(
        tmp_path / "tokens",
        files=[rows[:40], rows[40:]],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
    )
    config = TrainConfig.model_validate(
        {
            "model_name_or_path": "builtin:bert-tiny",
            "max_train_steps": 1000,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "checkpointing_steps": 20,
        }
    )
    # Two workers of 1.5 CPUs fit on the 4 of the first node, and one on the 2 of the second.
    cluster = ClusterConfig(
        num_workers="2:3", cpus_per_worker=1.5, threads_per_worker=1, use_gpu=False
    )
    out = tmp_path / "out"
    log = RunLog(out / "run" / "log.jsonl")
    pace = Pace(log=log, limit=tmp_path / "limit")

    def train_on() -> None:
        with pytest.raises(Ended):
            train(config, cluster, data_path=data_path, output_dir=out, on_event=pace)

    training = threading.Thread(target=train_on)

    def last(name: str, field: str) -> Any:
        return [e[field] for e in read_events(log.path) if e["event"] == name][-1]

    def begun(count: int, *, num_workers: int) -> bool:
        """Whether workers have started so often, and those of the last time have taken steps."""
        events = read_events(log.path)
        places = [place for place, event in enumerate(events) if event["event"] == "start"]
        if len(places) < count:
            return False
        start = events[places[-1]]
        assert start["num_workers"] == num_workers
        steps = [e["step"] for e in events[places[-1] :] if e["event"] == "metrics"]
        return bool(steps and steps[-1] >= start["step"] + 5)

    def on_until_stopped(times: int) -> None:
        """A few steps at a time."""
        while len([e for e in read_events(log.path) if e["event"] == "stopped"]) < times:
            assert last("metrics", "step") < config.max_train_steps
            pace.allow(last("metrics", "step") + 5)
            time.sleep(0.4)
        pace.allow(last("metrics", "step") + 5)

    pace.allow(30)
    with second_node() as node:
        wait_until(lambda: elastic.room(worker_resources(cluster)) == 3)  # the test before has left
        training.start()
        wait_until(lambda: begun(1, num_workers=3) and last("metrics", "step") == 30)
        kill_tree(node)
    pace.allow(40)
    wait_until(lambda: begun(2, num_workers=2))
    with second_node():
        on_until_stopped(1)
        wait_until(lambda: begun(3, num_workers=3))
        (second,) = [n for n in nodes_up() if n["Resources"]["CPU"] == 2.0]
        announce_end_of(second["NodeID"])
        on_until_stopped(2)
        training.join(timeout=400)
    events = read_events(log.path)
    messages = [e["message"] for e in events if e["event"] == "warning"]
    assert len(messages) == 3
    assert "was lost" in messages[0]
    assert "there is room for more workers; restarting after step" in messages[1]
    assert "node 127.0.0.2 is about to be taken away; restarting after step" in messages[2]
    # No step is lost but those that the lost node took with it.
    stopped, left = [e["step"] for e in events if e["event"] == "stopped"]
    assert [e["step"] for e in events if e["event"] == "resume"] == [20, stopped]
    assert stopped % 20 == 0
    assert last("doing", "what") == "starting 2 training workers"
    assert (out / f"checkpoint-{left}" / "MANIFEST.json").is_file()

    losses: dict[int, float] = {}

    def keep(event: str, **fields: Any) -> None:
        if event == "metrics":
            losses[fields["step"]] = fields["loss"]
            if fields["step"] == left:
                raise Ended

    data = TokenData.open(data_path, split="train")
    with pytest.raises(Ended):
        train_in_process(config, data, tmp_path / "plain", on_event=keep)
    found = {e["step"]: e["loss"] for e in metrics_by_step(log.path)}
    assert sorted(found) == list(range(1, left + 1))
    assert found == pytest.approx({step: losses[step] for step in found}, rel=1e-4)
