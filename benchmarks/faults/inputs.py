"""Files that nobody would write, for every reader of what a user gives (`tests.fuzz`)."""

import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.faults.in_suite import ROOT
from benchmarks.faults.subject import Subject
from benchmarks.faults.table import Broken, Case

DEFAULT = 20_000  # three minutes on a busy machine; each run draws others


def fuzzed(subject: Subject, chance: random.Random, folder: Path, *, inputs: int) -> str:
    start = chance.randrange(1 << 20)
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", str(inputs), "--seed", str(start)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode != 0:
        told = [line for line in lines if ": seed " in line] or lines[-1:]
        raise Broken(f"inputs from seed {start}: {'; '.join(told)}")
    tried = [int(n.replace(",", "")) for n in re.findall(r": ([\d,]+) inputs,", done.stdout)]
    return f"{sum(tried):,} inputs for {len(tried)} readers, from seed {start}: no other error"


def case_of(inputs: int) -> Case:
    return Case(
        name="fuzz",
        promise="A result, or an error of the package's own that names what is wrong.",
        done="YAML, overrides, prompts, jsonl, chats, scheduler_config.json and manifests that "
        "nobody would write",
        trial=partial(fuzzed, inputs=inputs),
        moments=1,
    )
