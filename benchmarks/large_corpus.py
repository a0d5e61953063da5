"""What an index of ten million row groups costs before and between the rows that are read.

Token shards are made as jobs.preprocess would leave those of some ten terabytes of text, but with
holes in place of rows: a manifest, and files of the right sizes. Measured, each in a process of its
own: opening them, as the driver does and a training worker gets them; the rows of the first step,
and of a window further on, as a process of Ray Data plans them. No row is read.

    python -m benchmarks.large_corpus --shards 100000 --row_groups 100
"""

import argparse
import multiprocessing
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.builders import letter_tokenizer, random_rows, token_folder
from tokendiff.artifacts.manifest import MANIFEST_NAME, commit, load_manifest
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData, step_plan

LENGTH, ROW_GROUP_ROWS, SHARD_BYTES, WINDOWS = 1024, 512, 64 << 20, 50
CONFIG = TrainConfig.model_validate(
    {"model_name_or_path": "builtin:bert-tiny", "per_device_train_batch_size": 1024}
)


def make(folder: Path, shards: int, row_groups: int) -> None:
    token_folder(folder, files=[random_rows(4, 8)], max_length=LENGTH, tokenizer=letter_tokenizer())
    metadata = load_manifest(folder).metadata
    (folder / MANIFEST_NAME).unlink()
    entries = [{"path": f"train/part-{i:05d}.parquet"} for i in range(shards)]
    known = {entry["path"]: f"{i:064x}" for i, entry in enumerate(entries)}
    for entry in entries:
        with open(folder / entry["path"], "wb") as file:
            file.truncate(SHARD_BYTES)
    groups = [ROW_GROUP_ROWS] * (row_groups - 1) + [ROW_GROUP_ROWS // 2]
    metadata["splits"]["train"] = {
        "rows": shards * sum(groups),
        "row_group_rows": ROW_GROUP_ROWS,
        "files": [{**entry, "rows": sum(groups)} for entry in entries],
    }
    commit(folder, kind="tokens", metadata=metadata, known_sha256=known)


def open_it(folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    data = TokenData.open(folder, split="train")
    plan = step_plan(CONFIG, data, rank=0, world_size=8)
    assert plan.order.num_rows == data.num_rows
    _ = data.fingerprint
    seconds = time.perf_counter() - start
    pickled = pickle.dumps(data)
    (folder.parent / "data.pickle").write_bytes(pickled)
    (folder.parent / "plan.pickle").write_bytes(pickle.dumps(plan))
    return {"seconds": seconds, "MB handed to a worker": len(pickled) / 1e6}


def receive(folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    data = pickle.loads((folder.parent / "data.pickle").read_bytes())
    step_plan(CONFIG, data, rank=3, world_size=8)
    return {"seconds": time.perf_counter() - start}


def plan_windows(folder: Path) -> dict[str, float]:
    start = time.perf_counter()
    plan = pickle.loads((folder.parent / "plan.pickle").read_bytes())
    times = []
    for window in range(WINDOWS):
        first = window * plan.window_steps * plan.rows_per_step
        plan.order.rows(first, first + plan.window_steps * plan.rows_per_step)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {
        "seconds to the first window": times[0],
        "seconds a window": statistics.median(times[1:]),
    }


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _measure(work: Callable[[Path], dict[str, float]], folder: Path, queue: Any) -> None:
    import torch  # loaded in all that are measured, and counted in none

    torch.set_num_threads(1)
    torch.argsort(torch.arange(10))
    before = peak_bytes()
    found = work(folder)
    queue.put({**found, "MB of memory at the peak": (peak_bytes() - before) / 1e6})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--row_groups", type=int, default=100)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tokens"
        make(folder, arguments.shards, arguments.row_groups)
        size = (folder / MANIFEST_NAME).stat().st_size / 1e6
        print(f"{arguments.shards:,} shards of {arguments.row_groups} row groups: ", end="")
        print(f"a manifest of {size:.0f} MB")
        for title, work in (
            ("the driver opens them", open_it),
            ("a training worker gets them", receive),
            ("a process that reads plans", plan_windows),
        ):
            queue = context.Queue()
            process = context.Process(target=_measure, args=(work, folder, queue))
            process.start()
            found = queue.get()
            process.join()
            print(f"{title:<28}", "; ".join(f"{v:.4g} {k}" for k, v in found.items()))


if __name__ == "__main__":
    main()
