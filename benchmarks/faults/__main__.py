"""Try every fault, or one: python -m benchmarks.faults --case driver-killed --seed 7

Writes `docs/faults.md`: rows of cases that are not run now stay as they are.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# Read when torch, tokenizers and transformers are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
SCRATCH = tempfile.TemporaryDirectory(prefix="faults-")
os.environ |= {"TOKENDIFF_CACHE": f"{SCRATCH.name}/cache"}

from benchmarks.faults import (  # noqa: E402
    damage,
    in_suite,
    inputs,
    object_store,
    signals,
    steps,
    surroundings,
)
from benchmarks.faults.subject import prepared  # noqa: E402
from benchmarks.faults.table import read_rows, try_case, write_rows  # noqa: E402

CASES = (
    *(*signals.CASES, *damage.CASES, *surroundings.CASES),
    *(*object_store.CASES, *steps.CASES),
    *in_suite.CASES,
)
PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
INTRO = """
# Faults, and what is promised under each

`make faults` tries each fault of this table at three moments drawn at random, on a pipeline of a
few steps, and writes this page. `python -m benchmarks.faults --case NAME --seed N` repeats one,
with the seed that its row names. Most cases run a job as a process of its own whose work is not
handed to Ray; a moment is the instant before it writes, renames or deletes some file.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description=__doc__)
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="these alone")
    parser.add_argument("--seed", type=int, help="of the moments; drawn by default")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--page", type=Path, default=PAGE, help="the table that is written")
    parser.add_argument(
        "--inputs",
        type=int,
        default=inputs.DEFAULT,
        help=f"of the case fuzz, for all readers together ({inputs.DEFAULT:,})",
    )
    options = parser.parse_args()
    if options.inputs < 1:
        parser.error("--inputs must be at least 1")
    cases = (*CASES, inputs.case_of(options.inputs))
    names = [case.name for case in cases]
    if options.list:
        print("\n".join(names))
        return 0
    if unknown := set(options.case) - set(names):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; --list prints them")
    seed = int.from_bytes(os.urandom(2)) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    rows = read_rows(options.page)
    is_broken = False
    with SCRATCH as scratch, prepared(Path(scratch)) as tiny:
        for case in cases:
            if options.case and case.name not in options.case:
                continue
            started = time.monotonic()
            row = rows[case.name] = try_case(case, tiny, seed)
            seconds = time.monotonic() - started
            print(f"{case.name}  {row.verdict}  {seconds:.0f} s  {row.seen}", flush=True)
            is_broken |= row.verdict == "broken"
            write_rows(options.page, cases, rows, INTRO)
    return int(is_broken)


if __name__ == "__main__":
    sys.exit(main())
