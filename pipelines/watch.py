"""`jobs.pipeline watch`: a table that refreshes itself, and a page that does so in a browser."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tokendiff.artifacts.manifest import write_atomically
from tokendiff.errors import InputError
from tokendiff.evaluation.report import Report, render_page
from tokendiff.tracking.live import Standing, logs_under, standing_of
from tokendiff.tracking.run_log import metrics_by_step

if TYPE_CHECKING:
    from rich.table import Table

_LOOK_SECONDS = 2.0
_PAGE_SECONDS = 5
_MAX_ROWS = 12
_COLUMNS = {
    "name": "stage",
    "state": "state",
    "place": "place",
    "loss": "loss",
    "heldout": "held out",
    "tokens_per_second": "tokens/s",
    "left": "left",
    "news": "news",
}


def standings(folder: Path) -> list[Standing]:
    """The runs under a folder that were written to last, the newest at the end.

    Raises:
        InputError: there is none.
    """
    logs = logs_under(folder)[-_MAX_ROWS:]
    if not logs:
        raise InputError(
            f"{folder}: no run has left a log there yet; give a pipeline file that was started, or "
            "the output folder of a job"
        )
    return [standing_of(log, folder=folder) for log in logs]


def as_json(rows: Sequence[Standing]) -> dict[str, Any]:
    return {"runs": [dataclasses.asdict(row) for row in rows]}


def watch(
    folder: Path,
    *,
    page: Path | None = None,
    stream: TextIO | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the runs under a folder until none is running any more, or until it is interrupted.

    Elsewhere than on a terminal, and without a page, the table is printed once.

    Args:
        page: an HTML file that is written again at every look.
    """
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream or sys.stdout)
    rows = standings(folder)
    if not console.is_terminal and page is None:
        console.print(table(rows))
        return
    with Live(table(rows), console=console, auto_refresh=False) as live:
        while True:
            is_over = not any(row.is_running for row in rows)
            live.update(table(rows), refresh=console.is_terminal or is_over)
            if page is not None:
                write_atomically(page, live_page(folder, rows, is_over=is_over))
            if is_over:
                return
            sleep(_LOOK_SECONDS)
            rows = standings(folder)


def table(rows: Sequence[Standing]) -> "Table":
    """The columns that any row has something in."""
    from rich.markup import escape
    from rich.table import Table

    shown = [field for field in _COLUMNS if any(getattr(row, field) for row in rows)]
    found = Table(box=None, pad_edge=False)
    for field in shown:
        is_number = field in ("loss", "heldout", "tokens_per_second", "left")
        found.add_column(_COLUMNS[field], justify="right" if is_number else "left")
    for row in rows:
        style = {"running": "bold", "failed": "red"}.get(row.state, "")
        found.add_row(*(escape(getattr(row, field)) for field in shown), style=style)
    return found


def live_page(folder: Path, rows: Sequence[Standing], *, is_over: bool) -> bytes:
    """The runs as a report: the newest training's curves, and the table."""
    trained = [log for log in logs_under(folder) if metrics_by_step(log)]
    log = trained[-1] if trained else None
    heldout = metrics_by_step(log, event="heldout") if log else []
    body = [[getattr(row, field) for field in _COLUMNS] for row in rows]
    report = Report(
        title=folder.name,
        subtitle="all runs have ended" if is_over else "refreshes itself while a run goes on",
        loss_curve=[(e["step"], e["loss"]) for e in metrics_by_step(log)] if log else [],
        heldout_curve=[
            (e["step"], e["heldout_nats_per_token"])
            for e in heldout
            if "heldout_nats_per_token" in e
        ],
        tables=[("Runs", list(_COLUMNS.values()), body)],
        refresh_seconds=None if is_over else _PAGE_SECONDS,
    )
    return render_page(report)
