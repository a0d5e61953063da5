"""Training runs in several processes of this machine, over gloo."""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.training.run import train_in_process

Losses = dict[int, float]
Job = tuple[TrainConfig, Path]  # and the folder that it writes to


def run_distributed(jobs: Sequence[Job], data: TokenData, size: int) -> list[Losses]:
    """Losses by step of several runs, one after the other, in the same `size` workers."""
    # Workers are forked from a server that has imported all this once; a spawned one would import
    # it again, which takes longer than the runs do.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    queue = context.Queue()
    workers = [
        context.Process(target=_work, args=(rank, size, jobs, data.folder, queue))
        for rank in range(size)
    ]
    losses: list[Losses] = answer_of(workers, queue)
    return losses


def _work(rank: int, size: int, jobs: Sequence[Job], data: Path, queue: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # A file and no port: one that is free now may be taken when it is listened to.
    meeting = f"file://{jobs[0][1]}.meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
    answers = []
    for config, folder in jobs:
        losses: Losses = {}

        def keep(event: str, losses: Losses = losses, **fields: Any) -> None:
            if event == "metrics":
                losses[fields["step"]] = fields["loss"]

        train_in_process(config, TokenData.open(data, split="train"), folder, on_event=keep)
        answers.append(losses)
    if rank == 0:
        queue.put(answers)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def answer_of(workers: Sequence[BaseProcess], queue: Any) -> Any:
    """What workers put into the queue, once all have ended well; none outlives a failure."""
    for worker in workers:
        worker.start()
    try:
        answer = queue.get(timeout=300)
        for worker in workers:
            worker.join(timeout=60)
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    return answer
