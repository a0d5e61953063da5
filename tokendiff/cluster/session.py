"""Connecting to Ray: a running cluster, or one started on this machine for the length of a job.

Where no cluster is named, Ray is started only when a job asks for more than one process: a single
worker does its work in the process of the job, which is seconds faster and has the same results.
"""

import gc
import logging
import math
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.locations import Location
from tokendiff.errors import InputError

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig

# CPUs that Ray Data's tasks need beside the workers; without them training waits for rows for ever.
DATA_CPUS = 1
_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 20.0  # a process of Python starts in two
_ASK_SECONDS = 20.0  # as Ray Train does
# Processes that want a core, for each core. With four and more for each of two cores, training
# steps with one thread were 1.5 to 3.4 times as fast as with two.
_BUSY_LOAD = 3.0
_LOCAL = "local"  # the address that has Ray started on this machine at once, as in `ray.init`

# Starts the Ray that the innermost `ray_session` has put off.
_start_put_off: Callable[[], None] | None = None


@contextmanager
def data_context(*, preserve_order: bool = False) -> Iterator[None]:
    """Settings for the Ray Data pipelines that are started in this block: quiet, and in order."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = preserve_order
    # One part or partition is one task, and may well take longer than Ray's idea of being stuck.
    context.execution_no_progress_timeout_s = -1
    for handler in logging.getLogger("ray.data").handlers:
        # Ray's own console handler; its log file keeps everything, and others' handlers theirs.
        is_console = isinstance(handler, logging.StreamHandler)
        if is_console and type(handler).__module__.startswith("ray."):
            handler.setLevel(logging.ERROR)
    with ray.data.DataContext.current(context):
        yield


def is_shared(config: "ClusterConfig") -> bool:
    """Whether `ray_session` would join a cluster that others may use, and not start one."""
    return is_connected() or _address(config) not in (None, _LOCAL)


def _address(config: "ClusterConfig") -> str | None:
    return config.address or os.environ.get("RAY_ADDRESS") or None  # empty is unset, as Ray has it


def is_connected() -> bool:
    """Whether this process is connected to a Ray cluster."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def works_here(num_workers: int) -> bool:
    """Whether so many workers, or actors, do their work in this process: only one does, and only
    where Ray has not been started.
    """
    return num_workers == 1 and not is_connected()


def need_ray() -> None:
    """Start the Ray that `ray_session` has put off. Without one, Ray's first call starts it."""
    if _start_put_off is not None and not is_connected():
        _start_put_off()


@contextmanager
def ray_session(
    config: "ClusterConfig",
    *,
    side_by_side: int = 1,
    tell: Callable[[str], None] = lambda message: None,
) -> Iterator[None]:
    """Inside this block Ray can be used, and SIGTERM ends it in order (`cluster.stopping`).

    A session that is already there is used, and left as it is. A cluster that the config or
    RAY_ADDRESS names is joined at once. Without one, `need_ray` starts Ray on this machine.

    Args:
        side_by_side: how many stages a cluster that is started here must have room for at once.
        tell: hears what is about to take some seconds.
    """
    global _start_put_off
    if is_connected():
        yield
        return
    from tokendiff.cluster.stopping import ray_starting, sigterm_stops

    def start() -> None:
        with ray_starting():
            _start_or_join(config, side_by_side, tell)

    before, _start_put_off = _start_put_off, start
    try:
        if _address(config) is not None:
            start()
        with sigterm_stops():
            yield
    finally:
        _start_put_off = before
        if is_connected():
            import ray

            ray.shutdown()


def thread_policy() -> dict[str, str]:
    """How OpenMP threads wait in a process that computes, as environment variables, which torch
    reads when it is loaded. What the user has set stays.

    They spin briefly, then sleep. Threads that go on spinning take the cores from whatever runs
    beside them: on two busy cores a step took 4.6 times as long. The short spin made training 1.5
    times as fast on idle ones.
    """
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if "OMP_WAIT_POLICY" in given:
        return given
    return {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "20000", **given}


def _start_or_join(config: "ClusterConfig", side_by_side: int, tell: Callable[[str], None]) -> None:
    import ray

    # The controller looks at its workers this often; the default of 2 s is felt at every start and
    # end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # With MIN:MAX a minute is enough: room was there a moment ago, and where it has gone, fewer
    # workers are started.
    is_elastic = config.min_workers < config.max_workers
    start_timeout = min(config.worker_start_timeout_s, 60.0 if is_elastic else math.inf)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(start_timeout)
    # Said at every start of a cluster on this machine, which nobody else is to reach anyway.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    address = _address(config)
    if address not in (None, _LOCAL):
        tell(f"joining the Ray cluster at {address}")
        try:
            ray.init(
                address=address,
                runtime_env={"env_vars": thread_policy()},
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"cluster.address {address}: no Ray cluster can be joined there ({error}); start "
                "one with 'ray start --head', set RAY_AUTH_MODE=token if that cluster asks for a "
                "token, or leave address and RAY_ADDRESS unset to start Ray on this machine"
            ) from error
    else:
        os.environ.update(thread_policy())
        # Ray's workers are nice to all else by 15: Linux weighs them at a thirtieth of any other
        # program, which is nothing for the user who waits for this very job.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # One machine has no nodes that are taken away, which a process of each training looks for.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # By the machine's cores Ray would take the processes that CPUs which are only counts let it
        # start for far too many, and warn each driver of it again and again.
        cpus = _cpus_here(config, side_by_side)
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(cpus))
        tell("starting Ray on this machine")
        ray.init(
            address=_LOCAL,  # not one that happens to run here, whose CPUs are not ours to set
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _node_ip_address="127.0.0.1",
        )


def _cpus_here(config: "ClusterConfig", side_by_side: int) -> int:
    """CPUs are only counts to Ray. Reserving more than there are lets a small machine run workers
    and data tasks side by side where real counts would deadlock.
    """
    reserved = max(config.max_workers, config.num_actors) * config.cpus_per_worker
    return max(_cores(), side_by_side * (int(reserved) + 1 + DATA_CPUS))


def _cores() -> int:
    """Cores that this process may use: of a machine that a scheduler such as Slurm shares out, its
    part. Only Linux says which these are.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def num_cpus(config: "ClusterConfig") -> int:
    """CPUs of the connected cluster, or of the one that would be started here."""
    if not is_connected():
        return _cpus_here(config, side_by_side=1)
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


def check_seen_by_all(config: "ClusterConfig", root: Location) -> None:
    """Nodes hand folders to each other: every one of a running cluster must see `root`.

    Nothing is asked of a cluster that a job would start itself, which has one node.

    Raises:
        InputError: naming the nodes that do not.
    """
    is_running = _address(config) not in (None, _LOCAL)
    if not is_running or not isinstance(root, Path):  # a URI is the same from everywhere
        return
    with ray_session(config):
        _look_from_all(root)


def _look_from_all(root: Path) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) == 1:
        return
    root.mkdir(parents=True, exist_ok=True)
    with mark_in(root) as mark:
        look = ray.remote(num_cpus=0, max_retries=0)(lambda: mark is not None and mark.exists())
        places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        asked = [look.options(scheduling_strategy=place).remote() for place in places]
        ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_SECONDS)
        seen = [_answer(each) for each in asked]
    blind = sorted(
        address for address, sees in zip(nodes.values(), seen, strict=True) if sees is False
    )
    if blind:
        raise InputError(
            f"root {root} is not visible on {len(blind)} of the cluster's {len(nodes)} nodes "
            f"({', '.join(blind[:5])}); choose a folder on storage that all of them mount"
        )


def _answer(asked: Any) -> bool | None:
    """What a node sees; None of one that is lost or does not answer, where nothing runs either."""
    import ray

    try:
        return bool(ray.get(asked, timeout=0))
    except ray.exceptions.RayError:
        return None


@contextmanager
def mark_in(folder: Location) -> Iterator[Path | None]:
    """A file that is in a folder during the block, by which other nodes tell whether it is the same
    there: that such a folder exists says little. None for a URI, the same from everywhere.
    """
    if not isinstance(folder, Path):
        yield None
        return
    # Named as a temporary file: what a killed driver leaves is never part of a result.
    mark = folder / f".seen.{uuid.uuid4().hex[:8]}.tmp"
    mark.touch()
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def check_sees(mark: Path | None) -> None:
    """Raise InputError on a node that does not see a mark of the driver's."""
    import ray

    if mark is not None and not mark.exists():
        raise InputError(
            f"output_dir {mark.parent} is not the same on every node: node "
            f"{ray.util.get_node_ip_address()} does not see what the driver wrote there; choose a "
            "folder on storage that all nodes mount, or a URI such as s3://BUCKET/PATH"
        )


@contextmanager
def naming_node(driver: str) -> Iterator[None]:
    """In this block an InputError on another node than the driver's says where it was.

    Args:
        driver: address of its node.
    """
    try:
        yield
    except InputError as problem:
        raise at_node(problem, driver) from problem.__cause__


def at_node(problem: InputError, driver: str) -> InputError:
    """The same problem with its node, where files may be missing that the driver has found."""
    import ray

    if (here := ray.util.get_node_ip_address()) == driver:
        return problem
    return InputError(
        f"node {here}: {problem}; the job's own node {driver} may have what is missing here: "
        "what a job reads must be on storage that all nodes mount, or behind a URI such as "
        "s3://BUCKET/PATH"
    )


def wants_gpu(config: "ClusterConfig") -> bool:
    """Whether workers and actors get a GPU each: as configured, else whether the cluster has one
    now, or this machine where the work is done in this process.
    """
    if config.use_gpu is not None:
        return config.use_gpu
    if not is_connected():
        import torch

        return torch.cuda.is_available()
    import ray

    return ray.cluster_resources().get("GPU", 0) > 0


def worker_resources(config: "ClusterConfig", *, gpus: float = 1.0) -> dict[str, float]:
    """What Ray reserves for one worker or actor."""
    return {"CPU": config.cpus_per_worker, **({"GPU": gpus} if wants_gpu(config) else {})}


@contextmanager
def memory_given_back(*, is_needed: bool = True) -> Iterator[None]:
    """For work in this process whose models are not needed after it.

    A worker of Ray ends, and its memory is free. Here a trainer is a cycle that stays until Python
    looks for some, and torch keeps what it took of a GPU from the processes beside this one.
    """
    try:
        yield
    finally:
        if is_needed:
            give_back_memory()


def give_back_memory() -> None:
    """Free what nothing refers to any more, on a GPU too, and memory that was locked for it."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # torch.accelerator.empty_host_cache is newer than torch 2.11


class Demand:
    """What an autoscaler is asked for beside what runs, while a `with` block lasts.

    Through the coordinator by which Ray Train and Ray Data ask: once that is there, it sends the
    sum of all requests every 20 s, in place of whatever `ray.autoscaler.sdk.request_resources` was
    told.
    """

    def __init__(self) -> None:
        self._bundles: list[dict[str, float]] = []
        self._changed, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._ask_on, name="demand", daemon=True)

    def __enter__(self) -> "Demand":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._changed.set()
        self._thread.join()

    def ask(self, each: dict[str, float], count: int) -> None:
        """Room for `count` workers, and for Ray Data's tasks."""
        self._bundles = [{"CPU": float(DATA_CPUS)}, *[each] * count]
        self._changed.set()

    def _ask_on(self) -> None:
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            DefaultAutoscalingCoordinator,
            ResourceRequestPriority,
        )

        asking = None
        while not self._is_over.is_set():
            self._changed.clear()
            if self._bundles:
                asking = asking or DefaultAutoscalingCoordinator(f"tokendiff-{uuid.uuid4().hex}")
                asking.request_resources(
                    self._bundles,
                    expire_after_s=3 * _ASK_SECONDS,
                    priority=ResourceRequestPriority.LOW,  # what runs goes first
                )
            self._changed.wait(_ASK_SECONDS)
        if asking is not None:
            asking.cancel_request()


def wait_for_resources(
    config: "ClusterConfig",
    *,
    count: int,
    what: str,
    on_event: Callable[..., None],
    gpus: float = 1.0,
) -> None:
    """Return once the cluster is large enough for `count` workers or actors and Ray Data's tasks.

    An autoscaling cluster is asked to grow. Without this wait Ray would wait for ever, and in
    silence.

    Raises:
        InputError: it still is not after `worker_start_timeout_s`.
    """
    import ray

    each = worker_resources(config, gpus=gpus)
    needed = {name: count * amount for name, amount in each.items()}
    needed["CPU"] += DATA_CPUS
    deadline = time.monotonic() + config.worker_start_timeout_s
    if not (lacking := _lacking(ray.cluster_resources(), needed)):
        return
    on_event("warning", message=f"waiting for the cluster to grow: it has {lacking}")
    with Demand() as demand:
        demand.ask(each, count)
        while lacking := _lacking(ray.cluster_resources(), needed):
            if time.monotonic() > deadline:
                raise InputError(
                    f"{count} {what} and Ray Data need more than the cluster has ({lacking}), and "
                    "it did not grow within worker_start_timeout_s = "
                    f"{config.worker_start_timeout_s:g}; ask for fewer or smaller ones "
                    "(num_workers, num_actors, min_actors, cpus_per_worker, use_gpu)"
                )
            time.sleep(_POLL_SECONDS)


def _lacking(have: Mapping[str, float], needed: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name} {have.get(name, 0):g} of {amount:g}"
        for name, amount in needed.items()
        if have.get(name, 0) < amount
    )


def set_up_torch(config: "ClusterConfig", *, use_gpu: bool, num_processes: int = 1) -> str:
    """The device of this worker, one of `num_processes`; on a CPU, torch is told its share of the
    cores.

    Raises:
        InputError: a GPU is asked for, and torch has none here.
    """
    import torch

    if use_gpu:
        if not torch.cuda.is_available():
            raise InputError(
                "cluster.use_gpu true: torch finds no GPU on this machine; leave use_gpu out, or "
                "install a torch that is built for the GPU and its driver"
            )
        return "cuda"
    torch.set_num_threads(threads_on_this_node(config, num_processes))
    return "cpu"


def advice_on_threads(config: "ClusterConfig") -> str | None:
    """What may make a worker on this machine's CPU faster while others keep the cores busy."""
    threads = threads_on_this_node(config, 1)
    if config.threads_per_worker is not None or threads == 1 or not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < _BUSY_LOAD * cores:
        return None
    return (
        f"this machine is busy: over the last minute {load:.0f} processes wanted its {cores} "
        f"cores, and each step waits for the last of {threads} threads; the same command with "
        "-o cluster.threads_per_worker=1 may be faster, and goes on where this one is stopped"
    )


def threads_on_this_node(config: "ClusterConfig", num_processes: int) -> int:
    """torch threads for one of `num_processes` CPU processes that share this machine."""
    if config.threads_per_worker is not None:
        return config.threads_per_worker
    return max(1, _cores() // num_processes)
