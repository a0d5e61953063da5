"""Jobs in the process of the test: what Ray would start other processes for is done here.

That takes a fifth of the time. It is for tests, and parts of tests, that are not about Ray; others
show that Ray changes no result. TESTS_ON_RAY=1 leaves it to Ray all the same.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

_NODE_ID = "0" * 56


class RowsHere:
    """As much of `ray.data.Dataset` as the jobs use, in this process."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._rows = rows

    @classmethod
    def from_items(cls, items: list[Any], **kwargs: Any) -> "RowsHere":
        return cls(item if isinstance(item, dict) else {"item": item} for item in items)

    def map(self, task: Callable[[dict[str, Any]], dict[str, Any]]) -> "RowsHere":
        return RowsHere(map(task, self._rows))

    def map_batches(
        self, actor: Callable[..., Any], *, fn_constructor_args: tuple[Any, ...], **kwargs: Any
    ) -> "RowsHere":
        return RowsHere(self._by(actor(*fn_constructor_args)))

    def _by(self, actor: Callable[..., Iterable[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            for batch in actor({name: np.array([value]) for name, value in row.items()}):
                for values in zip(*batch.values(), strict=True):
                    yield dict(zip(batch, values, strict=True))

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)


def fit_here(
    config: Any,
    cluster: Any,
    num_workers: int,
    data: Any,
    folder: Any,
    checkpoint: Any,
    on_event: Any,
) -> None:
    """As `tokendiff.cluster.train._fit_once`, in this process."""
    from tokendiff.data.rows import step_batches, step_plan
    from tokendiff.training.run import TrainingRun
    from tokendiff.training.world import World

    run = TrainingRun.build(config, data, folder, world=World.current("cpu"), on_event=on_event)
    if checkpoint is not None:
        run.resume(checkpoint)
    plan = step_plan(config, data, rank=0, world_size=1)
    run.fit(step_batches(data, plan, run.trainer.step, config.max_train_steps))


class RemoteHere:
    """A function or class behind `ray.remote`, called in this process."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, **kwargs: Any) -> "RemoteHere":
        return self

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        made = self._call(*args, **kwargs)
        return ActorHere(made) if isinstance(self._call, type) else made


class ActorHere:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> RemoteHere:
        return RemoteHere(getattr(self._actor, name))


def remote_here(*args: Any, **kwargs: Any) -> Any:
    """`ray.remote(thing)`, or `ray.remote(num_cpus=1)(thing)`."""
    return RemoteHere(*args) if args else RemoteHere


@pytest.fixture
def in_this_process(request: pytest.FixtureRequest) -> Iterator[None]:
    if "TESTS_ON_RAY" in os.environ:
        request.getfixturevalue("ray_session")
    with jobs_here():
        yield


@contextmanager
def jobs_here() -> Iterator[None]:
    """Jobs that run inside this block run in this process, unless TESTS_ON_RAY is set."""
    if "TESTS_ON_RAY" in os.environ:
        yield
        return
    node = {"Alive": True, "NodeID": _NODE_ID, "NodeManagerAddress": "127.0.0.1"}
    stand_ins = {
        "ray.cluster_resources": lambda: {"CPU": 4.0},
        "ray.data.from_items": RowsHere.from_items,
        "ray.get": lambda answer, timeout=None: answer,
        "ray.get_runtime_context": lambda: SimpleNamespace(get_node_id=lambda: _NODE_ID),
        "ray.is_initialized": lambda: True,
        "ray.kill": lambda actor: None,
        "ray.nodes": lambda: [node],
        "ray.remote": remote_here,
        "tokendiff.cluster.train._fit_once": fit_here,
        # Threads that spin take the cores from the tests beside this one.
        "torch.set_num_threads": lambda num_threads: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(name, stand_in)
        yield
