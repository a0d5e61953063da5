"""What a job costs per training step: the quickstart's own training, by itself and as a job.

    python -m benchmarks.job_overhead [--rounds 6] [--steps 40]

Three ways to take the same steps on the same rows, each with all cores: `train_in_process` in a
plain Python process, as in a notebook; `jobs.train`, which needs no Ray for one worker on one
machine; and `jobs.train --address local`, which starts Ray. A round runs each way once from its
start, in another order each time, and compares their median steps behind the first ten, so that
what else runs on the machine meanwhile hits all alike. The losses of all runs must be equal.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from tests import ROOT
from tokendiff.config.loader import load_config
from tokendiff.data.rows import TokenData
from tokendiff.tracking.run_log import RunLog, read_events
from tokendiff.training.run import train_in_process

QUICKSTART = ROOT / "pipelines/quickstart.yaml"
WARM_UP = 10
ALONE, JOB, ON_RAY = "by itself", "jobs.train", "jobs.train on Ray"
WAYS = (ALONE, JOB, ON_RAY)


def settings(data: Path, output: Path, steps: int) -> list[str]:
    """What differs from the quickstart: the steps taken, each logged, none saved before the end."""
    changed = {
        "train.data_path": data,
        "train.output_dir": output,
        "train.max_train_steps": steps,
        "train.lr_warmup_steps": 0,
        "train.logging_steps": 1,
        "train.checkpointing_steps": 10**6,
        "tracking.enabled": "false",
    }
    return [f"{name}={value}" for name, value in changed.items()]


def train_alone(data: Path, output: Path, steps: int) -> None:
    """What the process of the first way does."""
    config = load_config(QUICKSTART, settings(data, output, steps)).train
    log = RunLog(output / "run/log.jsonl")
    train_in_process(config, TokenData.open(data, split="train"), output, on_event=log.write)


def command(way: str, data: Path, output: Path, steps: int) -> list[str]:
    if way == ALONE:
        return ["benchmarks.job_overhead", "--alone", str(data), str(output), "--steps", str(steps)]
    overrides = [f"--override={setting}" for setting in settings(data, output, steps)]
    ray = ["--address", "local"] if way == ON_RAY else []
    return ["jobs.train", "--config", str(QUICKSTART), *overrides, *ray]


def run(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout.decode()


def steps_of(output: Path) -> tuple[float, list[float]]:
    """(seconds of the median step behind the first ones, the losses)."""
    events = [e for e in read_events(output / "run/log.jsonl") if e["event"] == "metrics"]
    times = [event["time"] for event in events][WARM_UP:]
    return statistics.median(b - a for a, b in pairwise(times)), [e["loss"] for e in events]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--alone", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone is not None:
        data, output = args.alone
        train_alone(data, output, args.steps)
        return
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        data = root / "data"
        overrides = (
            f"--override=preprocess.output_dir={data}",
            "--override=tracking.enabled=false",
        )
        run("jobs.preprocess", "--config", str(QUICKSTART), *overrides)
        expected: list[float] | None = None
        for number in range(args.rounds):
            first = number % len(WAYS)
            for way in (*WAYS[first:], *WAYS[:first]):
                output = root / f"{number}-{WAYS.index(way)}"
                run(*command(way, data, output, args.steps))
                step, losses = steps_of(output)
                expected = expected or losses
                assert losses == expected, f"{way} has other losses"
                seconds[way].append(step)
            print(", ".join(f"{way} {1e3 * seconds[way][-1]:.0f} ms" for way in WAYS), flush=True)
    for way in (JOB, ON_RAY):
        ratios = [own / alone for own, alone in zip(seconds[way], seconds[ALONE], strict=True)]
        print(
            f"{way}: {statistics.median(ratios):.3f} times the step by itself "
            f"({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds; the aim is <= 1.05)"
        )


if __name__ == "__main__":
    main()
