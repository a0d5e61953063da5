"""Training: on Ray Train workers (`train_workers`), or in this process where one worker is asked
for and no cluster, with the same losses.

Checkpoints are our own (`tokendiff.artifacts.checkpoint`): the newest sound one is found again at
every start, so what stops a run costs the steps since then.
"""

from typing import TYPE_CHECKING

from tokendiff.artifacts.checkpoint import newest_sound_checkpoint
from tokendiff.artifacts.last_notes import take_notes
from tokendiff.artifacts.locations import Location
from tokendiff.cluster.session import (
    advice_on_threads,
    memory_given_back,
    need_ray,
    set_up_torch,
    wants_gpu,
    works_here,
)
from tokendiff.cluster.stopping import (
    STOPPED,
    is_stop_requested,
    sigterm_held,
    told_when_requested,
)
from tokendiff.data.rows import TokenData, step_batches, step_plan
from tokendiff.training.commits import commits_as_opened, commits_of_run
from tokendiff.training.identity import check_same_run, finished_run
from tokendiff.training.inputs import check_inputs
from tokendiff.training.run import TrainingRun
from tokendiff.training.trainer import MEMORY_REMEDY, OnEvent
from tokendiff.training.world import World

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig
    from tokendiff.config.train import TrainConfig


def train(
    config: "TrainConfig",
    cluster: "ClusterConfig",
    *,
    data_path: str | Location,
    output_dir: Location,
    on_event: OnEvent,
) -> Location:
    """Train on the Ray cluster, or in this process; returns `output_dir/final`.

    Running it again resumes: from the newest sound checkpoint, or not at all where the run is
        finished.

    Args:
        output_dir: a URI, or a folder that every node sees under the same path.
        on_event: must be picklable: the main worker calls it too (say `RunLog(path).write`), or
            with a URI a process on this node.

    Raises:
        InputError: the config cannot work with this data, model or cluster, or output_dir holds
            another run.
        FloatingPointError: the loss or the gradient stopped being finite.
        RuntimeError: more than `max_failures` workers were lost.
        KeyboardInterrupt: SIGTERM came; the last step taken is in a checkpoint.
    """
    data = TokenData.open(data_path, split="train")
    step_plan(config, data, rank=0, world_size=cluster.max_workers)

    def warn(message: str) -> None:
        on_event("warning", message=message)

    with commits_of_run(config, output_dir):
        check_inputs(config, data)
        if (final := finished_run(output_dir, config, data, warn=warn)) is not None:
            return final
        with commits_as_opened(config):
            return _train(config, cluster, data, output_dir, on_event)


def _train(
    config: "TrainConfig",
    cluster: "ClusterConfig",
    data: TokenData,
    output_dir: Location,
    on_event: OnEvent,
) -> Location:
    output_dir.mkdir(parents=True, exist_ok=True)
    if notes := take_notes(output_dir):
        on_event(
            "warning",
            message=f"an earlier attempt was killed at {'; '.join(notes[:2])}; if its memory ran "
            f"out, {MEMORY_REMEDY}",
        )
    if works_here(cluster.max_workers):
        with memory_given_back():
            _train_here(config, cluster, data, output_dir, on_event)
    else:
        need_ray()
        from tokendiff.cluster.train_workers import train_on_workers

        train_on_workers(config, cluster, data, output_dir, on_event)
    final = finished_run(output_dir, config, data)
    if final is None:
        raise KeyboardInterrupt(f"{STOPPED}; the same command goes on from the step it was at")
    return final


def _train_here(
    config: "TrainConfig",
    cluster: "ClusterConfig",
    data: TokenData,
    output_dir: Location,
    on_event: OnEvent,
) -> None:
    """Train to the end, or to the end of the step at which a SIGTERM comes."""

    def warn(message: str) -> None:
        on_event("warning", message=message)

    checkpoint = newest_sound_checkpoint(output_dir, warn=warn)
    if checkpoint is not None:
        check_same_run(checkpoint, config, data)
    device = set_up_torch(cluster, use_gpu=wants_gpu(cluster))
    if device == "cpu" and (advice := advice_on_threads(cluster)) is not None:
        on_event("advice", message=advice)
    world = World.current(device)
    with sigterm_held(), told_when_requested(lambda: on_event("stopping")):
        run = TrainingRun.build(config, data, output_dir, world=world, on_event=on_event)
        if checkpoint is not None:
            run.resume(checkpoint)
        plan = step_plan(config, data, rank=world.rank, world_size=world.size)
        batches = step_batches(data, plan, run.trainer.step, config.max_train_steps)
        run.fit(batches, should_stop=is_stop_requested)
