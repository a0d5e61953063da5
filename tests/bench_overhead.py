"""What Ray costs per training step: the same model and rows, with Ray and in a plain loop.

    python -m tests.bench_overhead [--rounds 3] [--steps 40]

Both sides run in turn, each in a process of its own with one torch thread, and the ratio of the
medians is printed for every round. Nothing else should be running on the machine.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.config import ClusterConfig, TrainConfig
from tokendiff.data.rows import TokenData

LENGTH, ROWS, WARM_UP = 128, 512, 10


def bench_config(steps: int, rows_per_step: int) -> TrainConfig:
    return TrainConfig(
        model_name_or_path="builtin:bert-mini",
        max_train_steps=steps + WARM_UP,
        per_device_train_batch_size=rows_per_step,
        logging_steps=1,
        checkpointing_steps=10**6,
    )


def plain_loop(config: TrainConfig, folder: Path, seconds: Any) -> None:
    """The loop that anyone would write: rows in memory, no Ray, no resuming, no log."""
    import torch
    from transformers import AutoTokenizer, get_scheduler

    from tokendiff.interfaces import TokenBatch
    from tokendiff.kernels import AbsorbingKernel
    from tokendiff.models.loading import load_denoiser
    from tokendiff.objectives.mdlm import MDLM
    from tokendiff.random import RowGenerator, strata_of
    from tokendiff.schedules import LogLinear

    torch.set_num_threads(1)
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
    taken = []
    for step in range(config.max_train_steps):
        start = time.perf_counter()
        rows = torch.arange(step * size, (step + 1) * size) % len(tokens)
        batch = TokenBatch(tokens=tokens[rows], is_valid=torch.ones(size, LENGTH, dtype=torch.bool))
        strata = strata_of(step, torch.arange(size), size)
        output = objective.loss(model, batch, RowGenerator.for_rows(step, rows, strata=strata))
        optimizer.zero_grad()
        (output.loss_sum / output.num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        taken.append(time.perf_counter() - start)
    seconds.put(taken[WARM_UP:])


def time_plain(config: TrainConfig, folder: Path) -> list[float]:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=plain_loop, args=(config, folder, queue))
    process.start()
    seconds: list[float] = queue.get()
    process.join()
    return seconds


def time_ray(config: TrainConfig, folder: Path, output_dir: Path) -> list[float]:
    from tokendiff.cluster.train import train
    from tokendiff.tracking.run_log import RunLog, metrics_by_step

    with RunLog(output_dir / "run" / "log.jsonl") as log:
        cluster = ClusterConfig(threads_per_worker=1)
        train(config, cluster, data_path=folder, output_dir=output_dir, on_event=log.write)
        return [e["seconds_per_step"] for e in metrics_by_step(log.path)][WARM_UP:]


def main() -> None:
    from tokendiff.cluster.session import ray_session

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows_per_step", type=int, default=8)
    args = parser.parse_args()
    config = bench_config(args.steps, args.rows_per_step)
    with tempfile.TemporaryDirectory() as name, ray_session(ClusterConfig()):
        root = Path(name)
        folder = token_folder(
            root / "data",
            files=[random_rows(ROWS, LENGTH)],
            max_length=LENGTH,
            tokenizer=letter_tokenizer(),
        )
        ratios = []
        for index in range(args.rounds):
            plain = statistics.median(time_plain(config, folder))
            ray = statistics.median(time_ray(config, folder, root / f"ray-{index}"))
            ratios.append(ray / plain)
            print(
                f"round {index + 1}: plain loop {1e3 * plain:.1f} ms per step, "
                f"on Ray {1e3 * ray:.1f} ms, ratio {ratios[-1]:.3f}",
                flush=True,
            )
        print(f"median ratio {statistics.median(ratios):.3f} (1 is no cost; the aim is <= 1.05)")


if __name__ == "__main__":
    main()
