"""A case: its promise, three moments drawn from a seed, and the row of `docs/faults.md`."""

import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.faults.subject import Subject

MOMENTS = 3
NOT_RUN = "not run yet"
_HEAD = ("case", "promise", "done", "seen", "verdict")


class Broken(AssertionError):
    """A promise was not kept; the message says what was seen in its place."""


class CannotTry(Exception):
    """This machine or user lacks what the case takes; its row says "not run yet"."""


Trial = Callable[["Subject", random.Random, Path], str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault.

    Attributes:
        done: what is done to the subject.
        trial: does it once, at a moment that it draws, in a new folder; returns what was seen.
        moments: how often it is tried.
    """

    name: str
    promise: str
    done: str
    trial: Trial
    moments: int = MOMENTS


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table; `verdict` is "held", "broken" or NOT_RUN."""

    case: str
    promise: str
    done: str
    seen: str = ""
    verdict: str = NOT_RUN


def try_case(case: Case, subject: "Subject", seed: int) -> Row:
    """Try a fault at each of its moments; the first promise that is not kept ends it."""
    seen: list[str] = []
    verdict = "held"
    for number in range(1, case.moments + 1):
        folder = subject.scratch / f"{case.name}-{number}"
        chance = random.Random(f"{seed}/{case.name}/{number}")
        try:
            seen.append(case.trial(subject, chance, folder))
        except CannotTry as error:
            return Row(case=case.name, promise=case.promise, done=case.done, seen=str(error))
        except Exception as error:  # whatever else goes wrong breaks the promise as well
            name = "" if isinstance(error, Broken) else f"{type(error).__name__}: "
            seen.append(f"{number}: {name}{error}")
            verdict = "broken"
            break
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if verdict == "held":
        seen = list(dict.fromkeys(seen))
    text = "; ".join(seen)
    return Row(
        case=case.name,
        promise=case.promise,
        done=case.done,
        seen=f"{text} (seed {seed})",
        verdict=verdict,
    )


def read_rows(path: Path) -> dict[str, Row]:
    """The rows that a table holds, by case."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text().splitlines():
        cells = [c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == len(_HEAD) and cells[0].startswith("`"):
            row = Row(**dict(zip(_HEAD, [cells[0].strip("`"), *cells[1:]], strict=True)))
            found[row.case] = row
    return found


def write_rows(path: Path, cases: Sequence[Case], rows: Mapping[str, Row], intro: str) -> None:
    """Write the table: every case there is, with its row where it has been run."""
    lines = [intro.strip(), "", "| " + " | ".join(_HEAD) + " |", "|---" * len(_HEAD) + "|"]
    for case in cases:
        row = rows.get(case.name, Row(case=case.name, promise=case.promise, done=case.done))
        cells = (f"`{case.name}`", case.promise, case.done, row.seen, row.verdict)
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    counts = {
        v: sum(rows[c.name].verdict == v for c in cases if c.name in rows)
        for v in ("held", "broken")
    }
    lines += [
        "",
        f"{len(cases)} cases: {counts['held']} held, {counts['broken']} broken, "
        f"{len(cases) - sum(counts.values())} not run yet.",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def cell(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
