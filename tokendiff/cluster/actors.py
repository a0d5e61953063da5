"""Work that is handed out item by item to actors of Ray Data, or done in this process where one
actor is asked for and no cluster (`session.works_here`): with the same results, as no item's result
depends on who works at it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from tokendiff.cluster.console import without_restart_warning
from tokendiff.cluster.session import (
    data_context,
    memory_given_back,
    need_ray,
    wait_for_resources,
    wants_gpu,
    works_here,
)

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig
    from tokendiff.training.trainer import OnEvent

_MAX_BLOCKS = 4096
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
        gpus_per_actor: where the cluster has GPUs.
    """

    cluster: "ClusterConfig"
    what: str
    least: int
    most: int
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
            InputError: the cluster has no room, and does not grow in time.
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
        with data_context(preserve_order=in_order), without_restart_warning():
            source = ray.data.from_items(
                list(items), override_num_blocks=min(len(items), _MAX_BLOCKS)
            )
            dataset = source.map_batches(
                worker,
                fn_constructor_args=make_arguments(use_gpu),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(min_size=self.least, max_size=self.most),
                num_cpus=self.cluster.cpus_per_worker,
                num_gpus=self.gpus_per_actor if use_gpu else None,
            )
            yield from dataset.iter_rows()


def _answers_of(
    worker: Callable[..., Worker], arguments: tuple[Any, ...], items: Sequence[Item]
) -> Iterator[Item]:
    actor = worker(*arguments)
    for item in items:
        yield from map(_first, actor({name: [value] for name, value in item.items()}))


def _first(columns: Item) -> Item:
    return {name: values[0] for name, values in columns.items()}
