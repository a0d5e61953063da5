"""How many training workers the cluster has room for, and when that is about to change.

Ray Train can change the number of its workers too, but ends them where they are: what they learnt
since their last checkpoint is lost. Here they save a step and end, and as many as there is room for
go on from there.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from tokendiff.cluster.session import DATA_CPUS, worker_resources
from tokendiff.cluster.stopping import check_stop
from tokendiff.errors import InputError

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig

Resources = Mapping[str, float]

_POLL_SECONDS = 1.0
_SETTLED_SECONDS = 5.0  # nodes often join together, and are not to cost a restart each
_SETTLED_POLLS = round(_SETTLED_SECONDS / _POLL_SECONDS)
_ANSWER_SECONDS = 20.0  # a process of Python starts in two
_LOOK_SECONDS = 2.0


def slots(free: Mapping[str, Resources], each: Resources) -> int:
    """How many workers fit on these nodes beside Ray Data's tasks, which need a CPU on one of them:
    of workers with 1.5 CPUs, two on a node of 4 and one on a node of 2.

    Args:
        free: for each node what nobody has reserved.
        each: what one worker reserves.
    """

    def workers_on(node: Resources, *, cpus_kept: int = 0) -> int:
        have = {**node, "CPU": node.get("CPU", 0.0) - cpus_kept}
        # Amounts are sums of fractions such as 0.1.
        return min(int(have.get(name, 0.0) / amount + 1e-6) for name, amount in each.items())

    lost_to_data = [
        workers_on(node) - workers_on(node, cpus_kept=DATA_CPUS)
        for node in free.values()
        if node.get("CPU", 0.0) >= DATA_CPUS
    ]
    return sum(map(workers_on, free.values())) - min(lost_to_data) if lost_to_data else 0


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away: a spot market's notice, or a downscaling.

    Source: what `ray.train.get_preemption_info` tells. That waits for all workers; here one is
    enough, since they agree on their last step anyway. Ray has no public call that does not wait.
    """
    from ray._private.state import state

    return set(state.get_draining_nodes())


def room(each: Resources, *, without: Collection[str] = ()) -> int:
    """How many more workers the connected cluster could start now.

    Args:
        without: ids of nodes that do not count, beside those that are about to be taken away.
    """
    from ray._private.state import available_resources_per_node

    leaving = {*without, *draining_nodes()}
    free = available_resources_per_node().items()
    return slots({node: have for node, have in free if node not in leaving}, each)


def workers_to_start(config: "ClusterConfig", on_event: Callable[..., None]) -> int:
    """As many as there is room for, up to `max_workers`; waits until there is for `min_workers`.

    Raises:
        InputError: there still is not after `worker_start_timeout_s`.
        KeyboardInterrupt: SIGTERM came.
    """
    each = worker_resources(config)
    deadline = time.monotonic() + config.worker_start_timeout_s
    silent: set[str] = set()
    is_told, counts = False, [0]  # since there was room for the least without a break
    since = time.monotonic()
    while True:
        check_stop()
        now, found = time.monotonic(), min(room(each, without=silent), config.max_workers)
        if (found < config.min_workers) != (counts[-1] < config.min_workers):
            counts, since = [], now
        counts.append(found)
        is_settled = now - since >= _SETTLED_SECONDS
        if found == config.max_workers or (is_settled and found >= config.min_workers):
            # Ray may take a minute to notice that a node is lost, and would start workers there.
            silent = _silent_nodes()
            least = min(found, *counts[-_SETTLED_POLLS:])  # others come and go
            if min(room(each, without=silent), config.max_workers) >= least >= config.min_workers:
                return found if found == config.max_workers else least
        lacking = f"it has room for {found} of at least {config.min_workers} training workers"
        if now > deadline:
            raise InputError(
                f"the cluster is too small ({lacking}), and it did not grow within "
                f"worker_start_timeout_s = {config.worker_start_timeout_s:g}; ask for fewer or "
                "smaller ones (num_workers, cpus_per_worker, use_gpu), or wait longer"
            )
        if found < config.min_workers and is_settled and not is_told:
            is_told = True
            on_event("warning", message=f"waiting for the cluster to grow: {lacking}")
        time.sleep(_POLL_SECONDS)


def _silent_nodes() -> set[str]:
    """Those that Ray takes for alive, and that do not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    answer = ray.remote(num_cpus=0, max_retries=0)(lambda: None)
    leaving = draining_nodes()  # which start no tasks
    nodes = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    asked = [answer.options(scheduling_strategy=place).remote() for place in places]
    # One that fails is ready too: its node was lost just now, and does not count anyway.
    _, waiting = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_SECONDS)
    return {node for node, task in zip(nodes, asked, strict=True) if task in waiting}


class Outlook:
    """What a training worker sees coming, looked up by a thread while it trains.

    Attributes:
        is_leaving: its node is about to be taken away.
        has_room: there is room for more workers than train now, and there was the time before: a
            CPU that is free between two tasks does not count.
    """

    is_leaving = False
    has_room = False

    def __init__(self, config: "ClusterConfig", *, num_workers: int, is_main: bool) -> None:
        import ray

        self._node = ray.get_runtime_context().get_node_id()
        can_grow = is_main and num_workers < config.max_workers
        self._each = worker_resources(config) if can_grow else None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="outlook", daemon=True)

    def __enter__(self) -> "Outlook":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look_on(self) -> None:
        had_room = False
        while not self._is_over.wait(_LOOK_SECONDS):
            try:
                self.is_leaving = self._node in draining_nodes()
                has_room = self._each is not None and room(self._each) > 0
            except Exception:  # the head is busy, or away for a moment; it is asked again
                continue
            self.has_room, had_room = has_room and had_room, has_room
