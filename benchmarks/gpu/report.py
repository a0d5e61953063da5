"""Rows of the table, and the files that hold them: a JSON file that is written anew after each row,
and a page with the table at the end.
"""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HOLDS, FAILS = "holds", "FAILS"  # of what is correct or not
MET, MISSED, MEASURED = "met", "missed", "measured"  # of an aim; without one
ERROR, NO_TIME = "ERROR", "no time"
_MAX_MESSAGE = 300


class OutOfTimeError(BaseException):
    """A case took longer than it may. No Exception, for compilers catch those and go on."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a case found.

    Attributes:
        figure: the error or the speed, with its unit.
        limit: what it is judged by; empty where there is nothing to judge.
        values: the same and more for programs, plain JSON.
    """

    figure: str
    limit: str
    verdict: str
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to be.

    Attributes:
        name: of the row in its part.
        compared: with what, in words.
        is_proof: whether it decides if the code is correct, and with it the exit code.
        most_seconds: after which it is stopped; the time of its part where that is less.
    """

    name: str
    compared: str
    run: Callable[[], Finding]
    is_proof: bool = False
    most_seconds: float = 120.0


@dataclass(frozen=True, kw_only=True)
class Row:
    part: str
    name: str
    compared: str
    figure: str
    limit: str
    verdict: str
    seconds: float
    is_proof: bool
    values: dict[str, Any] = field(default_factory=dict)


def within(error: float, limit: float, **values: Any) -> Finding:
    """An error holds where it is at most `limit`; one that is no number does not."""
    return Finding(
        figure=f"{error:.1e}" if error else "0",
        limit=f"{limit:.0e}" if limit else "0",
        verdict=HOLDS if error <= limit else FAILS,
        values={"error": error, "limit": limit, **values},
    )


def run_case(part: str, case: Case, *, seconds_left: float) -> Row:
    """The row of a case. Whatever goes wrong is its verdict."""
    start = time.monotonic()
    if seconds_left <= 0.0:
        finding = Finding(figure="", limit="", verdict=NO_TIME)
    else:
        most = min(case.most_seconds, seconds_left)
        try:
            with at_most(most):
                finding = case.run()
        except OutOfTimeError:
            finding = Finding(figure=f"stopped after {most:.0f} s", limit="", verdict=NO_TIME)
        except Exception as error:  # the verdict of this row; the others go on
            message = f"{type(error).__name__}: {error}".replace("\n", " ")
            finding = Finding(figure=message[:_MAX_MESSAGE], limit="", verdict=ERROR)
    return Row(
        part=part,
        name=case.name,
        compared=case.compared,
        seconds=round(time.monotonic() - start, 2),
        is_proof=case.is_proof,
        **vars(finding),
    )


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in this block when it takes longer: compilers know no limit. In threads
    other than the main one there is no such clock.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise OutOfTimeError(f"took more than {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # of whoever set it before
        signal.signal(signal.SIGALRM, handler)


class Report:
    """
    Args:
        about: the device, versions and date.
        folder: that gets `gpu.json` and `gpu.md`.
    """

    def __init__(self, about: dict[str, Any], folder: Path) -> None:
        self._about, self._folder = about, folder
        self.rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        whole = {**self._about, "rows": [asdict(row) for row in self.rows]}
        path = self._folder / "gpu.json"
        new = path.with_suffix(".json.new")
        new.write_text(json.dumps(whole, indent=1))
        new.replace(path)

    def unproven(self) -> list[str]:
        """Names of the rows that should prove something and do not, for want of time too."""
        return [row.name for row in self.rows if row.is_proof and row.verdict != HOLDS]

    def finish(self) -> str:
        """Write the page; returns it."""
        page = "\n".join([*self._head(), *self._tables(), self._summary(), ""])
        (self._folder / "gpu.md").write_text(page)
        return page

    def _head(self) -> list[str]:
        return [f"- {name}: {value}" for name, value in self._about.items()]

    def _tables(self) -> Iterator[str]:
        for part in dict.fromkeys(row.part for row in self.rows):
            yield f"\n## {part}\n"
            yield "| what | compared with | figure | limit or aim | verdict | s |"
            yield "|---|---|---|---|---|---|"
            for row in self.rows:
                if row.part == part:
                    cells = (row.name, row.compared, row.figure, row.limit, row.verdict)
                    shown = " | ".join(cell.replace("|", "/") for cell in cells)
                    yield f"| {shown} | {row.seconds:.1f} |"

    def _summary(self) -> str:
        verdicts = [row.verdict for row in self.rows]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        return f"\n{len(self.rows)} rows: {counts}"
