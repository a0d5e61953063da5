"""Training runs in several processes of this machine, over gloo."""

import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from tokendiff.artifacts.tensor_files import TensorFiles
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.training import run
from tokendiff.training.memory import MemoryPlan
from tokendiff.training.run import train_in_process

# What a run imports on its way, which each worker would do anew.
_IMPORTED_BY_A_RUN = (
    "pandas",
    "peft",
    "pyarrow.parquet",
    "torch.distributed.fsdp",
    "transformers.convert_slow_tokenizer",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bloom.modeling_bloom",
    "transformers.models.modernbert.modeling_modernbert",
    "transformers.trainer_pt_utils",
)

_NO_MEMORY = MemoryPlan(weights=0, gradients=0, optimizer=0, average=0, activations=0, logits=0)

Losses = dict[int, float]
Job = tuple[TrainConfig, Any]  # and the folder that it writes to
# A rank; and what it calls first, with a word of its own and the rank.
Killed = tuple[int, Callable[[str, int], None], str]


def assert_same_weights(sharded: Path, whole: Path) -> None:
    """That workers which share a model have written what one process did, to rounding."""
    expected = load_file(whole / "model.safetensors")
    with TensorFiles(sharded, "model") as files:
        assert files.names == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(files.read(name), tensor, rtol=1e-3, atol=1e-5)


def run_distributed(
    jobs: Sequence[Job],
    data: TokenData,
    size: int,
    *,
    local_size: int | None = None,
    killed: Killed | None = None,
) -> list[Losses]:
    """Losses by step of several runs, one after the other, in the same `size` workers.

    Args:
        local_size: workers that take themselves to be on one node; by default all.
        killed: what makes a worker end itself, which the others then do too; nothing is returned.
            With the word "raises" it does not end, and what it raises is raised here.
    """
    # Workers are forked from a server that has imported all this once; a spawned one would import
    # it again, which takes longer than the runs do.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *_IMPORTED_BY_A_RUN])
    queue = context.Queue()
    assert isinstance(data.folder, Path)
    meeting = data.folder.with_name(f"{uuid.uuid4().hex}.meeting")
    workers = [
        context.Process(
            target=_work,
            args=(rank, size, local_size or size, meeting, jobs, data.folder, queue, killed),
        )
        for rank in range(size)
    ]
    if killed is not None and killed[2] != "raises":
        end_with(workers, workers[killed[0]])
        return []
    losses: list[Losses] = answer_of(workers, queue)
    return losses


@contextmanager
def one_of(size: int) -> Iterator[None]:
    """This process is the first of so many workers, and the others do nothing: what they would
    send is any numbers.
    """
    if size == 1:
        yield
        return
    store = FakeStore()
    torch.distributed.init_process_group("fake", store=store, rank=0, world_size=size)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _work(
    rank: int,
    size: int,
    local_size: int,
    meeting: Path,
    jobs: Sequence[Job],
    data: Path,
    queue: Any,
    killed: Killed | None,
) -> None:
    if killed is not None and killed[0] == rank:
        killed[1](killed[2], rank)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["LOCAL_WORLD_SIZE"] = str(local_size)
    torch.set_num_threads(1)
    # A file and no port: one that is free now may be taken when it is listened to.
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size
    )
    try:
        answers = [_losses_of(config, data, folder) for config, folder in jobs]
    except Exception as error:
        queue.put(error)  # before it is raised: a group that others wait in does not end by itself
        raise
    if rank == 0:
        queue.put(answers)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _losses_of(config: TrainConfig, data: Path, folder: Any) -> Losses:
    losses: Losses = {}

    def keep(event: str, **fields: Any) -> None:
        if event == "metrics":
            losses[fields["step"]] = fields["loss"]

    # The plan of each worker's memory takes longer than these runs do, and has tests of its own.
    with mock.patch.object(run, "plan_memory", return_value=_NO_MEMORY):
        train_in_process(config, TokenData.open(data, split="train"), folder, on_event=keep)
    return losses


def end_with(workers: Sequence[BaseProcess], one: BaseProcess) -> None:
    """Run workers until one of them has been killed; the others are, then, as a cluster does."""
    for worker in workers:
        worker.start()
    try:
        one.join(timeout=120)
        assert one.exitcode == -signal.SIGKILL
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def answer_of(workers: Sequence[BaseProcess], queue: Any) -> Any:
    """What workers put into the queue, once all have ended well; none outlives a failure."""
    for worker in workers:
        worker.start()
    try:
        answer = queue.get(timeout=300)
        if isinstance(answer, Exception):
            raise answer
        for worker in workers:
            worker.join(timeout=60)
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return answer
