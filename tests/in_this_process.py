"""Jobs in the process of the test: what Ray would start other processes for is done here.

That takes a fifth of the time. It is for tests that are not about Ray; others show that Ray changes
no result. TESTS_ON_RAY=1 leaves it to Ray all the same.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest


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
    config: Any, cluster: Any, data: Any, folder: Any, checkpoint: Any, on_event: Any
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


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "TESTS_ON_RAY" in os.environ:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    monkeypatch.setattr("ray.data.from_items", RowsHere.from_items)
    monkeypatch.setattr("tokendiff.cluster.train._fit_once", fit_here)
    yield
    torch.set_num_threads(threads)
