"""Nights as a table, and the verdict."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.table import cell
from benchmarks.soak.month import KEEP_RUNS, Night

_HEAD = (
    *("night", "fault", "exit codes", "candidate - champion", "champion"),
    *("stage folders", "at most", "seconds", "verdict"),
)
_MB = 1e6


def cells_of(night: Night) -> list[str]:
    found, disk = night.compared, night.disk
    return [
        f"{night.number}{' (poison)' if night.is_poisoned else ''}",
        night.fault + ("" if night.is_hit else " (after its end)"),
        ", ".join(map(str, night.codes)),
        f"{found.difference:+.3f} ± {found.error:.3f}" if found else "",
        f"v{night.champion}{' (new)' if night.moved else ''}",
        f"{disk.num_bytes / _MB:.1f} MB" if disk else "",
        f"{disk.bound / _MB:.1f} MB" if disk else "",
        f"{night.seconds:.0f}",
        f"broken: {night.broken}" if night.broken else "held",
    ]


def line_of(night: Night) -> str:
    return "  ".join(filter(None, cells_of(night)))


def verdict_of(nights: Sequence[Night], asked: int) -> str:
    """One sentence or two."""
    broken = [str(night.number) for night in nights if night.broken]
    words = [f"{len(nights)} of {asked} nights were run"]
    words.append(f"broken in night {', '.join(broken)}" if broken else "all promises were kept")
    seconds = sorted(night.seconds for night in nights)
    moved = sum(night.moved for night in nights)
    text = f"{'; '.join(words)}. The champion changed {moved} times. "
    return f"{text}A night took {seconds[len(seconds) // 2]:.0f} s (median)."


def write_page(path: Path, nights: Sequence[Night], asked: int, seed: int) -> None:
    faults = Counter(night.fault for night in nights)
    rows = [" | ".join(map(cell, cells_of(night))) for night in nights]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"{_INTRO.strip()}\n\n## The last run, seed {seed}\n\n{verdict_of(nights, asked)}\n"
        f"Faults: {', '.join(f'{name} {count}' for name, count in sorted(faults.items()))}.\n"
        "Differences are in nats per held-out token, with the standard error of resampled rows;\n"
        "a model becomes the champion only below 0.\n\n"
        f"| {' | '.join(_HEAD)} |\n{'|---' * len(_HEAD)}|\n"
        + "".join(f"| {row} |\n" for row in rows)
    )


_INTRO = f"""
# A month of nights, with faults

```bash
make soak
python -m benchmarks.soak --nights 3 --seed 7
```

`make soak` runs a retraining pipeline for 30 nights within 30 minutes and writes this page. Each
night brings a new text file. The language of the text drifts, and the file of one night in the
middle is noise ("poison"), which is taken away the next morning. Each night a fault is drawn, and
happens before a random write of the run; the same command is then run again, as cron would do it.
The seed decides text, faults and moments. Jobs run as processes of their own, without Ray, and with
MLflow in a sqlite file.

After each night the following must be true, or the command ends with exit code 1:

- The run came to an end, with exit code 0, or 3 where the gate turned the new model away.
- If the champion changed, the new one is better on the night's held-out rows by what the gate asks
  for. This is computed anew, by resampling rows. No model trained on poison is the champion.
- The stage folders are no larger than what the last {KEEP_RUNS} runs used (`runner.keep_runs`),
  plus one train stage and one promotion for each registered version. The copies that MLflow keeps
  of registered models come on top: one per version, until you delete it.
- No process, lock, temporary file or run in state RUNNING is left, in MLflow or in the pipeline's
  own records.
"""
