"""What jobs do on hosts that share no disk, and where a host's name leads to itself alone."""

import os
import pickle
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.data

from tokendiff.artifacts.locations import RemotePath
from tokendiff.artifacts.manifest import is_temporary
from tokendiff.cluster import actors, preprocess, process_group
from tokendiff.cluster.actors import Crew, Item
from tokendiff.cluster.session import check_sees, mark_in, naming_node
from tokendiff.config.cluster import ClusterConfig
from tokendiff.errors import CorruptFileError, InputError

DRIVER, OTHER = "10.0.0.5", "10.0.0.6"
Address = namedtuple("Address", "address")


@pytest.fixture
def on_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: OTHER)


class Homebound(OSError):
    """Of a library whose errors cannot be opened where they were not raised."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class Doubling:
    """A worker that fails as it is told to."""

    def __init__(self, problem: Exception | None = None) -> None:
        if isinstance(problem, InputError | ConnectionError):
            raise problem
        self._problem = problem

    def __call__(self, items: Item) -> Iterator[Item]:
        for item in items["item"]:
            if self._problem is not None:
                raise self._problem
            yield {"item": [int(item)], "twice": [2 * int(item)]}


def answers(mark: Path | None, *arguments: Any, worker: Any = Doubling) -> list[Any]:
    node = actors._OnNode(worker, mark, DRIVER, arguments)
    return [pickle.loads(row["packed"][0]) for row in node({"item": [3]})]


def test_an_actor_refuses_a_folder_that_only_the_driver_sees(
    tmp_path: Path, on_other_node: None
) -> None:
    """Before it has opened a model or written anything: the driver would miss the files at its end,
    when all the work is done.
    """
    with mark_in(tmp_path) as mark:
        assert mark is not None
        assert mark.parent == tmp_path
        assert is_temporary(mark.name)  # so that one which a killed driver left is no result
        assert answers(mark) == [{"item": 3, "twice": 6}]
        (problem,) = answers(tmp_path / "elsewhere" / mark.name, worker=None)
    assert isinstance(problem, InputError)
    assert f"{tmp_path}/elsewhere is not the same on every node: node {OTHER} " in str(problem)
    assert "s3://BUCKET/PATH" in str(problem)
    assert list(tmp_path.iterdir()) == []
    with mark_in(RemotePath("s3://bucket/out")) as nothing:
        assert nothing is None


def test_what_an_actor_cannot_open_is_said_with_its_node(on_other_node: None) -> None:
    missing = InputError("/out/final: no scheduler_config.json")
    (problem,) = answers(None, missing)
    assert isinstance(problem, InputError)
    assert str(problem).startswith(f"node {OTHER}: {missing}; the job's own node {DRIVER} may have")
    with pytest.raises(InputError) as caught, naming_node(OTHER):  # which is the driver's here
        raise missing
    assert caught.value is missing
    (problem,) = answers(None, ConnectionError("s3://bucket/a: AWS Error SLOW_DOWN"))
    assert type(problem) is ConnectionError  # a pipeline tries such a stage again
    (problem,) = answers(None, CorruptFileError("row 3 is damaged"))
    assert isinstance(problem, CorruptFileError)
    assert "in __call__" in problem.__notes__[0]  # where, for those shown with a traceback
    (problem,) = answers(None, Homebound("the store said no", "twice"))
    assert str(problem) == "Homebound: the store said no twice"
    with pytest.raises(KeyError):  # a mistake of the program
        answers(None, KeyError("a"))


def test_a_training_worker_refuses_a_folder_of_the_same_name(
    tmp_path: Path, on_other_node: None
) -> None:
    """A log that is sent to a worker makes the folder on its node."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    with mark_in(here) as mark:
        assert mark is not None
        check_sees(mark)
        with pytest.raises(InputError, match=r"there is not the same on every node: node 10\.0\.0"):
            check_sees(there / mark.name)


def test_text_that_only_the_driver_has_is_said_with_the_node(
    tmp_path: Path, on_other_node: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a bad row, the same on all nodes, without."""
    done = {"stats": b"", "error": "/text/a.txt: cannot be read", "is_missing": True}
    works: list[Callable[[Any], Any]] = []

    class Source:
        def map(self, work: Callable[[Any], Any]) -> "Source":
            works.append(work)
            return self

        def iter_rows(self) -> list[Any]:
            return []

    monkeypatch.setattr(ray.data, "from_items", lambda *args, **kwargs: Source())
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: DRIVER)
    assert list(preprocess._by_tasks(lambda row: {**done, **row}, [{}])) == []
    (work,) = works
    assert work({})["error"] == "/text/a.txt: cannot be read"
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: OTHER)
    assert work({})["error"].startswith(f"node {OTHER}: /text/a.txt: cannot be read; the job's own")
    assert work({"is_missing": False})["error"] == "/text/a.txt: cannot be read"


@pytest.mark.ray
def test_the_driver_gets_an_actors_error_and_not_rays(ray_session: None, tmp_path: Path) -> None:
    cluster = ClusterConfig(num_actors=2, cpus_per_worker=0.5)
    crew = Crew(cluster=cluster, what="actor", least=1, most=2, writes_to=tmp_path)

    def all_answers(problem: Exception | None) -> list[Item]:
        items = [{"item": number} for number in range(4)]
        found = crew.answers(
            Doubling, lambda use_gpu: (problem,), items, on_event=lambda *_, **__: None
        )
        return sorted(found, key=lambda answer: answer["item"])

    assert all_answers(None) == [{"item": n, "twice": 2 * n} for n in range(4)]
    with pytest.raises(MemoryError, match=r"^rows 0, 1: memory ran out"):
        all_answers(MemoryError("rows 0, 1: memory ran out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "given", "named"),
    [
        (OTHER, None, "eth1"),
        (OTHER, "eth9", "eth9"),  # by the user
        ("127.0.0.1", None, None),  # all nodes are on this machine
        ("10.0.0.7", None, None),  # of no interface here
        ("node-7", None, None),  # as `ray start --node-ip-address` takes it
    ],
)
def test_gloo_listens_where_ray_does(
    monkeypatch: pytest.MonkeyPatch, address: str, given: str | None, named: str | None
) -> None:
    """And not at what the machine's name stands for, 127.0.1.1 on many."""
    interfaces = {"lo": [Address("127.0.0.1")], "eth0": [Address("192.168.0.2")]}
    interfaces["eth1"] = [Address("fe80::1"), Address(OTHER)]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.setattr(os, "environ", {} if given is None else {"GLOO_SOCKET_IFNAME": given})
    asked: list[Any] = []

    class Workers:
        def execute(self, work: Callable[[], None]) -> None:
            asked.append(work)
            work()

    def start(backend: Any, group: Any, config: Any) -> None:
        asked.append("start")

    monkeypatch.setattr(process_group._TorchBackend, "on_start", start)
    config = process_group.RayNetwork()
    config.backend_cls().on_start(Workers(), config)
    assert asked == [process_group.name_interface, "start"]
    assert os.environ.get("GLOO_SOCKET_IFNAME") == named


def test_workers_that_cannot_be_connected_give_their_room_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray Train keeps them and their CPUs, for which the next attempt would wait."""
    done: list[str] = []

    class Workers:
        def execute(self, work: Callable[[], None]) -> None:
            done.append(work.__name__)

        def abort(self) -> None:
            done.append("abort")

    def start(backend: Any, group: Any, config: Any) -> None:
        raise RuntimeError("Gloo connectFullMesh failed")

    monkeypatch.setattr(process_group._TorchBackend, "on_start", start)
    config = process_group.RayNetwork()
    with pytest.raises(RuntimeError, match="connectFullMesh"):
        config.backend_cls().on_start(Workers(), config)
    assert done == ["name_interface", "abort"]
