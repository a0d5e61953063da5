"""Work that is handed out item by item to actors of Ray Data, or done in this process where one
actor is asked for and no cluster (`session.works_here`): with the same results, as no item's result
depends on who works at it.
"""

import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokendiff.artifacts.locations import Location
from tokendiff.cluster.console import without_restart_warning
from tokendiff.cluster.session import (
    check_sees,
    data_context,
    mark_in,
    memory_given_back,
    naming_node,
    need_ray,
    wait_for_resources,
    wants_gpu,
    works_here,
)
from tokendiff.errors import CorruptFileError, InputError, that_travels

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig
    from tokendiff.training.trainer import OnEvent

_MAX_BLOCKS = 4096
_PACKED = "packed"
# Of the input, of stores and disks, of memory, of numbers: `jobs.cli` tells what to do.
_TOLD = (InputError, CorruptFileError, OSError, MemoryError, FloatingPointError)
Item = Mapping[str, Any]


class Worker(Protocol):
    """What an actor's class makes."""

    def __call__(self, items: Item) -> Iterable[Item]:
        """Columns of one value, for columns of one value."""
        ...


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The actors of a job.

    Attributes:
        what: they are, for messages: "sampling actor".
        least: how many the work begins with.
        most: how many it may come to as the cluster has room.
        writes_to: where the actors write. A folder must be there, and be the same on every node
            that gets an actor; None where they write nothing.
        gpus_per_actor: where the cluster has GPUs.
    """

    cluster: "ClusterConfig"
    what: str
    least: int
    most: int
    writes_to: Location | None = None
    gpus_per_actor: float = 1.0

    def answers(
        self,
        worker: Callable[..., Worker],
        make_arguments: Callable[[bool], tuple[Any, ...]],
        items: Sequence[Item],
        *,
        on_event: "OnEvent",
        in_order: bool = False,
    ) -> Iterator[Item]:
        """What the actors yield for each item.

        Args:
            worker: an actor's class.
            make_arguments: says whether there is a GPU for each actor; returns what the class is
                built with.
            in_order: answers come in the order of the items, and not in that of completion.

        Raises:
            InputError: the cluster has no room, and does not grow in time; or an actor's node does
                not see where it is to write.
        """
        if not items:
            return
        if works_here(self.most):
            use_gpu = wants_gpu(self.cluster)
            with memory_given_back(is_needed=use_gpu):
                yield from _answers_of(worker, make_arguments(use_gpu), items)
            return
        need_ray()
        import ray.data

        use_gpu = wants_gpu(self.cluster)
        wait_for_resources(
            self.cluster,
            count=self.least,
            what=f"{self.what}s",
            on_event=on_event,
            gpus=self.gpus_per_actor,
        )
        on_event("doing", what=f"starting {self.least} {self.what}{'s' * (self.least > 1)}")
        driver = ray.util.get_node_ip_address()
        with (
            data_context(preserve_order=in_order),
            without_restart_warning(),
            nullcontext() if self.writes_to is None else mark_in(self.writes_to) as mark,
        ):
            source = ray.data.from_items(
                list(items), override_num_blocks=min(len(items), _MAX_BLOCKS)
            )
            dataset = source.map_batches(
                _OnNode,
                fn_constructor_args=(worker, mark, driver, make_arguments(use_gpu)),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=self.least, max_size=self.most),
                num_cpus=self.cluster.cpus_per_worker,
                num_gpus=self.gpus_per_actor if use_gpu else None,
            )
            for row in dataset.iter_rows():
                if isinstance(answer := pickle.loads(row[_PACKED]), Exception):
                    raise answer
                yield answer


class _OnNode:
    """A worker in an actor, whose node must see what the driver has written for it.

    Answers travel as pickles, and so do errors that a user can do something about: of what an actor
    raises Ray Data hands on nothing but the words, within tracebacks.
    """

    def __init__(
        self,
        worker: Callable[..., Worker],
        mark: Path | None,
        driver: str,
        arguments: tuple[Any, ...],
    ) -> None:
        self._problem: Exception | None = None
        try:
            check_sees(mark)
            with naming_node(driver):
                self._worker = worker(*arguments)
        except _TOLD as problem:
            self._problem = _with_place(problem)

    def __call__(self, items: Item) -> Iterator[Item]:
        try:
            if self._problem is not None:
                raise self._problem
            for answer in self._worker(items):
                yield {_PACKED: [pickle.dumps(_first(answer))]}
        except _TOLD as problem:
            yield {_PACKED: [pickle.dumps(that_travels(_with_place(problem)))]}


def _with_place(problem: Exception) -> Exception:
    """With where it was raised, for those that are shown with a traceback."""
    if not hasattr(problem, "__notes__"):
        problem.add_note("".join(traceback.format_exception(problem)))
    return problem


def _answers_of(
    worker: Callable[..., Worker], arguments: tuple[Any, ...], items: Sequence[Item]
) -> Iterator[Item]:
    actor = worker(*arguments)
    for item in items:
        yield from map(_first, actor({name: [value] for name, value in item.items()}))


def _first(columns: Item) -> Item:
    return {name: values[0] for name, values in columns.items()}
