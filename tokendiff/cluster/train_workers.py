"""Training on Ray Train workers that read their rows through Ray Data.

Ray places the processes, sets up torch.distributed, streams rows and notices lost workers.
Checkpoints are our own (`tokendiff.artifacts.checkpoint`): the newest sound one is found again at
every start, so a lost worker costs the steps since then.
"""

import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.data
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from tokendiff.artifacts.checkpoint import newest_sound_checkpoint, step_of
from tokendiff.artifacts.last_notes import take_note, without_notes
from tokendiff.artifacts.locations import Location, remove
from tokendiff.artifacts.model_folders import held_commits, hub_commits
from tokendiff.cluster.elastic import Outlook, workers_to_start
from tokendiff.cluster.process_group import RayNetwork
from tokendiff.cluster.rank_rows import RankRows
from tokendiff.cluster.session import (
    Demand,
    check_sees,
    mark_in,
    naming_node,
    threads_on_this_node,
    wait_for_resources,
    wants_gpu,
    worker_resources,
)
from tokendiff.cluster.stopping import (
    DriverLink,
    check_stop,
    is_stop_requested,
    saving_first,
)
from tokendiff.data.rows import TokenData, step_plan
from tokendiff.errors import CorruptFileError, InputError, first_line, is_out_of_memory
from tokendiff.training.identity import check_same_run, finished_run
from tokendiff.training.run import TrainingRun, worker_name
from tokendiff.training.trainer import MEMORY_REMEDY, OnEvent
from tokendiff.training.world import World

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig
    from tokendiff.config.train import TrainConfig

_NEVER_RETRIED = (InputError, CorruptFileError, FloatingPointError)
_ABORT_SECONDS = 10.0


class _Trainer(TorchTrainer):
    """Ends its workers with whatever interrupts `fit`, and leaves SIGINT as it is.

    Ray Train ends them on SIGINT alone, by a handler of its own. It exits with code 0, stays when
    training is over, and is set where SIGINT was ignored too: in the background.
    """

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def fit(self) -> ray.train.Result:
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self._controller is not None:
                with suppress(ray.exceptions.RayError):  # it ends with the call
                    ray.get(self._controller.abort.remote(), timeout=_ABORT_SECONDS)
            raise


def train_on_workers(
    config: "TrainConfig",
    cluster: "ClusterConfig",
    data: TokenData,
    output_dir: Location,
    on_event: OnEvent,
) -> None:
    """Train to the end, or until a SIGTERM has been saved.

    Raises:
        RuntimeError: more than `max_failures` workers were lost.
        Exception: as `train`.
    """

    def warn(message: str) -> None:
        on_event("warning", message=message)

    # Decided once: when the last node with a GPU is lost, the run waits and does not go on on CPUs.
    cluster = cluster.model_copy(update={"use_gpu": wants_gpu(cluster)})
    is_elastic = cluster.min_workers < cluster.max_workers
    num_workers, num_failures, is_moving = cluster.max_workers, 0, True
    last_step = -1
    with Demand() if is_elastic else nullcontext() as demand, without_notes(output_dir):
        while True:
            check_stop()
            if demand is not None:
                demand.ask(worker_resources(cluster), cluster.max_workers)
                num_workers = workers_to_start(cluster, on_event)
                # Ray Train asks for those that run.
                demand.ask(worker_resources(cluster), cluster.max_workers - num_workers)
            elif is_moving:
                wait_for_resources(
                    cluster, count=num_workers, what="training workers", on_event=on_event
                )
            checkpoint = newest_sound_checkpoint(output_dir, warn=warn)
            if checkpoint is not None:
                check_same_run(checkpoint, config, data)
            step = -1 if checkpoint is None else step_of(checkpoint)
            if is_elastic and step > last_step:
                num_failures = 0  # nodes come and go; what counts is to get no further
            workers = f"{num_workers} training worker{'s' * (num_workers > 1)}"
            on_event("doing", what=f"starting {workers}")
            try:
                _fit_once(config, cluster, num_workers, data, output_dir, checkpoint, on_event)
            except ray.train.TrainingFailedError as error:
                reason = _reason_to_retry(error, output_dir)
                is_moving, last_step = False, step
                num_failures += 1
                if num_failures > cluster.max_failures:
                    raise RuntimeError(
                        f"training failed {num_failures} times, the last time because {reason}; "
                        "raise max_failures to go on, or run the same command again: it resumes "
                        "from the newest checkpoint"
                    ) from error
                on_event("warning", message=f"{reason}; restarting from the newest checkpoint")
            else:
                if finished_run(output_dir, config, data) is not None or is_stop_requested():
                    return
                newest = newest_sound_checkpoint(output_dir, warn=warn)
                if newest is None or step_of(newest) <= step:
                    raise RuntimeError(
                        f"training ended at step {step} without an error, and left nothing new in "
                        f"{output_dir}"
                    )
                is_moving, last_step = True, step


def _fit_once(
    config: "TrainConfig",
    cluster: "ClusterConfig",
    num_workers: int,
    data: TokenData,
    output_dir: Location,
    checkpoint: Location | None,
    on_event: OnEvent,
) -> None:
    """Train to the end, or until the workers are to be others: the newest checkpoint is then of the
    last step that they took.
    """
    use_gpu = wants_gpu(cluster)
    first_step = step_of(checkpoint) if checkpoint is not None else 0
    # Ray Train wants a folder for a state of its own that nothing here reads.
    ray_folder = output_dir / ".ray-train"
    remove(ray_folder)
    driver_address = ray.util.get_node_ip_address()
    commits = dict(held_commits())

    def work(driver: DriverLink) -> None:
        check_sees(mark)
        device = str(ray.train.torch.get_device()) if use_gpu else "cpu"
        context = ray.train.get_context()
        if not use_gpu:
            import torch

            torch.set_num_threads(threads_on_this_node(cluster, context.get_local_world_size()))
        world = World.current(device)
        # A log beside a remote result is on the driver's node; else all nodes see it. Progress is
        # written there by the driver's own: shared storage may show it much later.
        keep = on_event if isinstance(output_dir, Path) else driver.emit

        def report(event: str, **fields: Any) -> None:
            (driver.tell if event == "progress" else keep)(event, **fields)

        with naming_node(driver_address), hub_commits(commits):
            run = TrainingRun.build(config, data, output_dir, world=world, on_event=report)
            if checkpoint is not None:
                run.resume(checkpoint)
        rows = len(step_plan(config, data, rank=world.rank, world_size=world.size).positions)
        shard = ray.train.get_dataset_shard("train")
        batches = shard.iter_batches(batch_size=rows, batch_format="numpy", prefetch_batches=4)
        is_told_to_stop = driver.listen() if world.is_main else lambda: False

        def should_stop() -> bool:
            step, reason = run.trainer.step + 1, ""
            if outlook.is_leaving:
                reason = f"node {ray.util.get_node_ip_address()} is about to be taken away"
            elif outlook.has_room and step % config.checkpointing_steps == 0:
                reason = "there is room for more workers"
            if step == config.max_train_steps:
                reason = ""  # it is over anyway
            if reason and context.get_local_rank() == 0:
                message = f"{reason}; restarting after step {step} with the workers that fit"
                driver.emit("warning", message=message)
            return bool(reason) or is_told_to_stop()

        with Outlook(cluster, num_workers=world.size, is_main=world.is_main) as outlook:
            run.fit(iter(batches), should_stop=should_stop)

    with saving_first(on_event) as driver, mark_in(output_dir) as mark:
        _Trainer(
            lambda: work(driver),
            datasets={"train": ray.data.range(1)},
            dataset_config=RankRows(data, config, first_step),
            torch_config=RayNetwork(),
            scaling_config=ScalingConfig(
                num_workers=num_workers,
                use_gpu=use_gpu,
                resources_per_worker=worker_resources(cluster),
            ),
            run_config=RunConfig(
                name=f"attempt-{os.getpid()}-{first_step}",
                storage_path=str(ray_folder),
                failure_config=_no_retries(),
            ),
        ).fit()
    remove(ray_folder)


def _no_retries() -> FailureConfig:
    # Retrying is decided in `train`, which also knows which errors no other attempt gets around.
    return FailureConfig(  # type: ignore[call-arg]
        max_failures=0, max_preemption_failures=0, controller_failure_limit=0
    )


def _reason_to_retry(error: ray.train.TrainingFailedError, output_dir: Location) -> str:
    """What was lost, in words, and at which rows; or raises the error that no other attempt would
    get around.
    """
    if isinstance(error, ray.train.ControllerError):
        cause = _cause(error.controller_failure)
        if isinstance(cause, _NEVER_RETRIED):
            raise cause
        return f"the workers could not be started ({first_line(cause)})"
    failures = {
        rank: _cause(failure) for rank, failure in getattr(error, "worker_failures", {}).items()
    }
    # A lost peer breaks the others' collectives, and so does a peer that failed: the failure that
    # is no loss is the one that came first.
    for failure in failures.values():
        if not _is_loss(failure):
            raise failure from None
    if not failures:
        return f"the workers were preempted ({first_line(error)})"
    # A worker whose peer died may tell of it first.
    dead = {rank: failure for rank, failure in failures.items() if _is_death(failure)}
    of_gpus = {rank: failure for rank, failure in failures.items() if _is_of_gpu(failure)}
    rank, failure = min((dead or of_gpus or failures).items())
    place = take_note(output_dir, worker_name(rank))
    where = f" at {place}; if its memory ran out, {MEMORY_REMEDY}" if dead and place else ""
    return f"worker {rank} was lost ({first_line(failure)}){where}"


def _cause(failure: Exception) -> Exception:
    """The exception itself, where Ray has wrapped it with a remote traceback."""
    cause = getattr(failure, "cause", None)
    return cause if isinstance(cause, Exception) else failure


def _is_loss(failure: Exception) -> bool:
    """A worker that died, one whose GPU failed, or one whose collective broke because of another's
    loss.
    """
    import torch.distributed as dist

    if _is_death(failure) or _is_of_gpu(failure) or isinstance(failure, dist.DistError):
        return True
    # gloo reports a lost peer as a bare RuntimeError.
    return isinstance(failure, RuntimeError) and "gloo" in str(failure)


def _is_of_gpu(failure: Exception) -> bool:
    """A GPU that fell off the bus, has an uncorrectable error of its memory, or the like: another
    process, maybe on another GPU, can go on. An assertion in a kernel is of the input.
    """
    import torch

    is_of_run = is_out_of_memory(failure) or "assert" in first_line(failure)
    return isinstance(failure, torch.AcceleratorError) and not is_of_run


def _is_death(failure: Exception) -> bool:
    """Of a worker's process, or of its node; Ray names those that it ends for the node's memory."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    is_silent = type(failure).__name__.startswith("WorkerHealthCheck")
    return is_silent or isinstance(failure, RayActorError | OutOfMemoryError)
