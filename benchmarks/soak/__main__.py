"""Run a month of nights: python -m benchmarks.soak --nights 30 --minutes 30 --seed 7

Prints a line per night and a verdict, and writes them to `docs/soak.md`.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

# Read when torch, tokenizers and transformers are imported.
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from benchmarks.faults.disturbances import mounted
from benchmarks.faults.subject import prepared
from benchmarks.faults.table import CannotTry
from benchmarks.soak.month import FAULTS, FULL_DISK, Month
from benchmarks.soak.page import line_of, verdict_of, write_page

PAGE = Path(__file__).parents[2] / "docs" / "soak.md"
_DISK_MB, _DISK_MB_PER_NIGHT = 64, 12


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--nights", type=int, default=30, help="of the month (30)")
    parser.add_argument("--minutes", type=float, default=30.0, help="no night begins later (30)")
    parser.add_argument("--seed", type=int, help="of text and faults; drawn by default")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that is written")
    options = parser.parse_args()
    if options.nights < 1:
        parser.error("--nights must be at least 1")
    seed = int.from_bytes(os.urandom(2)) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        return _run(options, seed, Path(scratch))


@contextmanager
def _small_disk(folder: Path, nights: int) -> Iterator[bool]:
    """A disk for the month that can be filled; False where this user may not mount one."""
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        size = _DISK_MB + _DISK_MB_PER_NIGHT * nights
        try:
            stack.enter_context(mounted(folder, f"size={size}m"))
        except CannotTry as error:
            print(f"no night with a full disk: {error}", flush=True)
            yield False
        else:
            yield True


def _run(options: argparse.Namespace, seed: int, scratch: Path) -> int:
    os.environ |= {"TOKENDIFF_CACHE": f"{scratch}/cache"}
    month_root = scratch / "month" / "out"
    end = time.monotonic() + 60.0 * options.minutes
    nights = []
    with prepared(scratch) as subject, _small_disk(month_root, options.nights) as can_fill:
        import mlflow  # noqa: F401  # once here, and not in the process of every night

        faults = {**FAULTS, **({"full disk": FULL_DISK} if can_fill else {})}
        month = Month(
            subject=subject, root=month_root, nights=options.nights, seed=seed, faults=faults
        )
        for night in month.run():
            nights.append(night)
            print(line_of(night), flush=True)
            if time.monotonic() > end:
                break
    print(verdict_of(nights, options.nights))
    write_page(options.page, nights, options.nights, seed)
    return int(any(night.broken for night in nights))


if __name__ == "__main__":
    sys.exit(main())
