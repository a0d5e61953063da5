"""The rows of each training worker, as streams of Ray Data.

Apart from `tokendiff.cluster.train_workers`, since Ray Train's controller and its manager of
datasets, each a process that others wait for, import what this class needs: no model and no
objective.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import ray.data
from ray.train import DataConfig

from tokendiff.cluster.session import data_context
from tokendiff.data.rows import StepPlan, TokenData, step_plan

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig

_MAX_READ_BLOCKS = 1000


@lru_cache(maxsize=1)
def _got(shared: ray.ObjectRef) -> Any:
    """Once in each process, which then keeps what it knows of an epoch's order."""
    return ray.get(shared)


class RankRows(DataConfig):
    """Gives each worker its own stream of rows, read in the order of the steps.

    Ray Data's own splitting hands blocks to whoever asks first; which rows make a global batch
    would then depend on timing and on the number of workers.
    """

    def __init__(self, data: TokenData, config: "TrainConfig", first_step: int) -> None:
        super().__init__(datasets_to_split=[])
        self._data, self._config, self._first_step = data, config, first_step

    def configure(
        self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        plan = step_plan(self._config, self._data, rank=0, world_size=world_size)
        # No chunk at all where a run was cut off between its last checkpoint and final/.
        num_chunks = len(plan.chunks(self._first_step, self._config.max_train_steps))
        with data_context(preserve_order=True):
            # Numbers that are there already. `ray.data.range` would make a task of each block and
            # run them all at once, and Ray Data's loop, which keeps up with them, is a thread of
            # the training worker.
            source = ray.data.from_items(
                list(range(num_chunks)), override_num_blocks=_MAX_READ_BLOCKS
            )
            # Once on each node: an entry per row group may be a lot.
            shared = ray.put((self._data, plan.order))
            return [
                {"train": self._rows_of(replace(plan, rank=rank), source, shared).iterator()}
                for rank in range(world_size)
            ]

    def _rows_of(
        self, plan: StepPlan, source: ray.data.Dataset, shared: ray.ObjectRef
    ) -> ray.data.Dataset:
        first_step, stop_step = self._first_step, self._config.max_train_steps
        share = {"rank": plan.rank, "world_size": plan.world_size}
        rows_per_step = plan.rows_per_step

        def read(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
            data, order = _got(shared)
            plan = StepPlan(order=order, rows_per_step=rows_per_step, **share)
            chunks = plan.chunks(first_step, stop_step)
            for index in batch["item"]:
                yield from plan.read(data, *chunks[int(index)])

        return source.map_batches(read, batch_size=1, compute=ray.data.TaskPoolStrategy(size=2))
