"""What Ray costs per training step: the same model and rows, with Ray and in a plain loop.

    python -m benchmarks.overhead [--turns 20] [--seconds 3]

Both sides train all the while, each with one torch thread, and take turns: while one runs, every
process of the other is suspended. Only steps that lie wholly within a turn count, and each of Ray's
turns is compared with the plain loop's turns right before and after it. So neither has the machine
to share with the other, and what else runs on it hits both alike. Needs a system with SIGSTOP.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.errors import InputError

LENGTH, ROWS, WARM_UP = 128, 512, 10
WAIT_SECONDS = 300.0


def bench_config(rows_per_step: int) -> TrainConfig:
    return TrainConfig(
        model_name_or_path="builtin:bert-mini",
        max_train_steps=5000,  # more than are taken
        per_device_train_batch_size=rows_per_step,
        logging_steps=1,
        checkpointing_steps=10**6,
    )


class StepTimes:
    """Notes when each step of a training run ended, and ends the run once `stop` is there."""

    def __init__(self, path: Path) -> None:
        self.path, self.stop = path, path.with_suffix(".stop")

    def __call__(self, event: str, **fields: Any) -> None:
        if event == "metrics":
            with self.path.open("a") as file:  # one clock for all processes of the machine
                file.write(f"{time.monotonic()} {time.process_time()}\n")
        if self.stop.exists():
            raise InputError("enough was measured")  # of the errors that are never retried

    def read(self) -> list[tuple[float, float]]:
        """(time, CPU time of the process) at the end of each step so far."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")[:-1]
        return [(float(line.split()[0]), float(line.split()[1])) for line in lines]

    def wait_for_warm_up(self) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while len(self.read()) < WARM_UP:
            assert time.monotonic() < deadline, f"no {WARM_UP} steps in {WAIT_SECONDS:g} s"
            time.sleep(0.1)


def plain_loop(config: TrainConfig, folder: Path, times: StepTimes) -> None:
    """The loop that anyone would write: rows in memory, no Ray, no resuming, no log."""
    import torch
    from transformers import AutoTokenizer, get_scheduler

    from tokendiff.diffusion.interfaces import TokenBatch
    from tokendiff.diffusion.kernels import AbsorbingKernel
    from tokendiff.diffusion.random import RowGenerator, strata_of
    from tokendiff.diffusion.schedules import LogLinear
    from tokendiff.models.opening import load_denoiser
    from tokendiff.objectives.mdlm import MDLM

    torch.set_num_threads(1)
    os.setsid()  # as Ray's workers have: Linux shares the cores out by session first
    data = TokenData.open(folder, split="train")
    tokenizer = AutoTokenizer.from_pretrained(data.tokenizer_path)
    model = load_denoiser(config.model_name_or_path, tokenizer=tokenizer, max_length=LENGTH)
    groups = range(len(data.row_group_sizes))
    tokens = torch.cat([torch.as_tensor(data.read_group(group).tokens).long() for group in groups])
    objective = MDLM(
        kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=tokenizer.mask_token_id)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    schedule = get_scheduler("cosine", optimizer, 0, config.max_train_steps)
    size = config.rows_per_step
    for step in range(config.max_train_steps):
        rows = torch.arange(step * size, (step + 1) * size) % len(tokens)
        batch = TokenBatch(tokens=tokens[rows], is_valid=torch.ones(size, LENGTH, dtype=torch.bool))
        strata = strata_of(step, torch.arange(size), size)
        output = objective.loss(model, batch, RowGenerator.for_rows(step, rows, strata=strata))
        optimizer.zero_grad()
        (output.loss_sum / output.num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        output.loss_sum.item()  # whoever trains looks at the loss
        times("metrics")


@contextmanager
def plain_side(config: TrainConfig, folder: Path, times: StepTimes) -> Iterator[BaseProcess]:
    """The plain loop, in a process of its own, warm."""
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=plain_loop, args=(config, folder, times), daemon=True)
    process.start()
    try:
        times.wait_for_warm_up()
        yield process
    finally:
        process.kill()
        process.join()


@contextmanager
def ray_side(config: TrainConfig, folder: Path, times: StepTimes, output: Path) -> Iterator[None]:
    """`jobs.train`'s own way, in the Ray that is connected, warm."""
    from tokendiff.cluster.train import train

    cluster = ClusterConfig(threads_per_worker=1)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            train(config, cluster, data_path=folder, output_dir=output, on_event=times)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        times.wait_for_warm_up()
        yield
    finally:
        times.stop.touch()
        thread.join(WAIT_SECONDS)
    if not all(isinstance(error, InputError) for error in failures):
        raise failures[0]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """When one side ran, and the CPU seconds that its processes and the machine spent meanwhile."""

    start: float
    end: float
    own_cpu_seconds: float
    all_cpu_seconds: float


def processes_of_ray(plain: psutil.Process) -> list[psutil.Process]:
    """All of this process's descendants but the plain loop and multiprocessing's own helper."""
    children = psutil.Process().children(recursive=True)
    return [p for p in children if p != plain and "resource_tracker" not in " ".join(p.cmdline())]


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(p.cpu_times().user + p.cpu_times().system for p in processes)


def machine_cpu_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def take_turn(processes: Sequence[psutil.Process], seconds: float) -> Turn:
    for process in processes:
        process.resume()
    start, own, whole = time.monotonic(), cpu_seconds(processes), machine_cpu_seconds()
    time.sleep(seconds)
    end, own, whole = (
        time.monotonic(),
        cpu_seconds(processes) - own,
        machine_cpu_seconds() - whole,
    )
    for process in processes:
        process.suspend()
    return Turn(start=start, end=end, own_cpu_seconds=own, all_cpu_seconds=whole)


def alternate(plain: psutil.Process, turns: int, seconds: float) -> tuple[list[Turn], list[Turn]]:
    """(turns + 1 of the plain loop, `turns` of Ray's between them)."""
    ray = processes_of_ray(plain)
    for process in [plain, *ray]:
        process.suspend()
    try:
        plain_turns, ray_turns = [take_turn([plain], seconds)], []
        for _ in range(turns):
            ray_turns.append(take_turn(ray, seconds))
            plain_turns.append(take_turn([plain], seconds))
    finally:
        for process in [plain, *ray]:
            process.resume()
    return plain_turns, ray_turns


def steps_within(turn: Turn, times: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(seconds, CPU seconds of the training process) of each step that the turn holds whole."""
    return [
        (end - start, cpu_end - cpu_start)
        for (start, cpu_start), (end, cpu_end) in pairwise(times)
        if turn.start <= start and end <= turn.end
    ]


def mean_step(turn: Turn, times: Sequence[tuple[float, float]]) -> float:
    steps = steps_within(turn, times)
    assert steps, (
        f"no step in a turn of {turn.end - turn.start:.1f} s; take longer ones (--seconds)"
    )
    return statistics.fmean(seconds for seconds, _ in steps)


def report(
    plain: tuple[list[Turn], list[tuple[float, float]]],
    ray: tuple[list[Turn], list[tuple[float, float]]],
) -> list[str]:
    """The lines to print, from each side's turns and step times."""
    before_after = pairwise(mean_step(turn, plain[1]) for turn in plain[0])
    ratios = [
        mean_step(turn, ray[1]) / statistics.fmean(sides)
        for turn, sides in zip(ray[0], before_after, strict=True)
    ]
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    plain_steps, ray_steps = (
        [step for turn in turns for step in steps_within(turn, times)]
        for turns, times in (plain, ray)
    )
    quick_plain, quick_ray = (
        statistics.quantiles((seconds for seconds, _ in steps), n=4)[0]
        for steps in (plain_steps, ray_steps)
    )
    plain_cpu, ray_cpu = (statistics.fmean(cpu for _, cpu in s) for s in (plain_steps, ray_steps))
    beside = sum(t.own_cpu_seconds for t in ray[0]) / sum(t.end - t.start for t in ray[0])
    beside -= sum(cpu for _, cpu in ray_steps) / sum(seconds for seconds, _ in ray_steps)
    others = [
        (turn.all_cpu_seconds - turn.own_cpu_seconds) / (turn.end - turn.start)
        for turn in (*plain[0], *ray[0])
    ]
    return [
        f"a step, median of turns' means: plain loop "
        f"{1e3 * statistics.median(mean_step(t, plain[1]) for t in plain[0]):.1f} ms, "
        f"on Ray {1e3 * statistics.median(mean_step(t, ray[1]) for t in ray[0]):.1f} ms",
        f"ratio {middle:.3f}, quartiles {low:.3f} to {high:.3f} of {len(ratios)} pairs of turns, "
        f"standard error of the mean {error:.3f} (1 is no cost; the aim is <= 1.05)",
        f"lower quartiles of all steps: {1e3 * quick_plain:.1f} and {1e3 * quick_ray:.1f} ms, "
        f"ratio {quick_ray / quick_plain:.3f}",
        f"CPU time of the training process per step: {1e3 * plain_cpu:.1f} and "
        f"{1e3 * ray_cpu:.1f} ms, ratio {ray_cpu / plain_cpu:.3f}; Ray's other processes keep "
        f"{beside:.2f} of a core busy",
        f"the rest of the machine kept {statistics.fmean(others):.2f} of {psutil.cpu_count()} "
        f"cores busy ({min(others):.2f} to {max(others):.2f})",
    ]


def main() -> None:
    from tokendiff.cluster.session import ray_session

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--rows_per_step", type=int, default=8)
    args = parser.parse_args()
    config = bench_config(args.rows_per_step)
    with tempfile.TemporaryDirectory() as name, ray_session(ClusterConfig(address="local")):
        root = Path(name)
        folder = token_folder(
            root / "data",
            files=[random_rows(ROWS, LENGTH)],
            max_length=LENGTH,
            tokenizer=letter_tokenizer(),
        )
        plain_times, ray_times = StepTimes(root / "plain"), StepTimes(root / "ray")
        with (
            ray_side(config, folder, ray_times, root / "output"),
            plain_side(config, folder, plain_times) as plain,
        ):
            turns = alternate(psutil.Process(plain.pid), args.turns, args.seconds)
            sides = list(zip(turns, (plain_times.read(), ray_times.read()), strict=True))
        print("\n".join(report(*sides)))


if __name__ == "__main__":
    main()
