"""What sharding saves and costs, and for how long a checkpoint stops training.

A causal model of some 100 million parameters is trained for a few steps by two processes over gloo,
once whole in each of them and once in parts. Printed are the peak of the memory that is a process's
own, the time of a step, how long a save stops the training, and how long it would if training
waited until the checkpoint is written, hashed and committed. On cores of one machine the time of a
step says little of a cluster: what is gathered is copied by the cores that compute.

    python -m benchmarks.sharding
"""

import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.artifacts.manifest import commit
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData, step_batches, step_plan
from tokendiff.training.run import TrainingRun
from tokendiff.training.world import World

WAYS = ("none", "gradients", "full")
STEPS, LENGTH, WORKERS = 4, 128, 2
MiB = 2**20


class Peak:
    """The most memory of this process's own, while it is watched."""

    def __init__(self) -> None:
        self.most_bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.most_bytes = max(self.most_bytes, int(line.split()[1]) * 1024)
            time.sleep(0.02)


def work(rank: int, sharding: str, folder: Path, queue: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{sharding}", rank=rank, world_size=WORKERS
    )
    peak = Peak()
    time.sleep(0.1)
    before = peak.most_bytes
    config = TrainConfig.model_validate(
        {
            "model_name_or_path": "builtin:qwen3-base",
            "objective": "ar",
            "sharding": sharding,
            "max_train_steps": STEPS,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "checkpointing_steps": STEPS + 1,
        }
    )
    data = TokenData.open(folder / "data", split="train")
    seconds: list[float] = []

    def note(event: str, **fields: Any) -> None:
        if event == "metrics":
            seconds.append(fields["seconds_per_step"])

    world = World.current("cpu")
    run = TrainingRun.build(config, data, folder / f"out-{sharding}", world=world, on_event=note)
    trainer = run.trainer
    plan = step_plan(config, data, rank=rank, world_size=WORKERS)
    trainer.run(step_batches(data, plan, 0, STEPS), last_good=lambda: None, save=lambda: None)
    of_training = peak.most_bytes - before
    stops, waits = [], []
    for number in range(3):
        world.barrier()
        begun = time.perf_counter()
        run.saver.save(f"checkpoint-{number}", lambda: run.state.checkpoint({"step": 0}, None))
        stops.append(time.perf_counter() - begun)
        run.saver.wait()
        waits.append(time.perf_counter() - begun)
        world.barrier()
    alone = 0.0
    if sharding == "none" and rank == 0:
        begun = time.perf_counter()
        in_the_foreground(run, folder / "foreground")
        alone = time.perf_counter() - begun
    if rank == 0:
        parameters = sum(p.numel() for p in trainer.denoiser.model.parameters())
        queue.put(
            (
                parameters,
                run.memory.total,
                of_training,
                statistics.median(seconds[1:]),
                statistics.median(stops),
                statistics.median(waits),
                alone,
            )
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def in_the_foreground(run: TrainingRun, folder: Path) -> None:
    """One worker writes, reads again and hashes the state that it holds, and all others wait."""
    folder.mkdir()
    run.trainer.denoiser.model.save_pretrained(folder)
    save_file(run.trainer.state_tensors(), folder / "optimizer.safetensors")
    run.tokenizer.save_pretrained(folder)
    commit(folder, kind="checkpoint")


Measured = tuple[int, int, int, float, float, float, float]


def measure(sharding: str, folder: Path) -> Measured:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [
        context.Process(target=work, args=(rank, sharding, folder, queue))
        for rank in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    found: Measured = queue.get(timeout=600)
    for worker in workers:
        worker.join()
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = random_rows(32, LENGTH)
        token_folder(folder / "data", files=[rows], max_length=LENGTH, tokenizer=letter_tokenizer())
        results = {sharding: measure(sharding, folder) for sharding in WAYS}
    parameters, _, whole, *_, alone = results["none"]
    print(f"{parameters / 1e6:.0f} million parameters, {WORKERS} processes")
    print(f"a checkpoint that training waits for: {alone:.2f} s")
    print(
        "sharding   peak MiB  planned  of none  s per step  save stops s  of waiting  "
        "written after s"
    )
    for sharding, (_, plan, peak, step, stop, wait, _) in results.items():
        print(
            f"{sharding:10} {peak / MiB:8.0f}  {plan / MiB:7.0f}  {peak / whole:7.2f}  "
            f"{step:10.2f}  {stop:12.2f}  {stop / alone:10.2f}  {wait:15.2f}"
        )


if __name__ == "__main__":
    main()
