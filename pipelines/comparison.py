"""The variants of a matrix side by side: what was varied, and what came of it."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.graph import Variant
from pipelines.record import RunRecord
from tokendiff.artifacts.locations import mirror_of
from tokendiff.artifacts.manifest import write_atomically
from tokendiff.evaluation.report import Report, render_page

PAGE_NAME = "comparison.html"
_KINDS = ("train", "generate", "evaluate", "frontier", "promote")  # whose figures are compared
_SHOWN = (
    *("nats_per_token", "standard_error", "ar_nats_per_token", "bits_per_byte"),
    "tokens_per_forward",
    *("acceptance_length_mean", "speedup", "generative_perplexity"),
    *("loss", "step", "tokens_per_second"),
)
_MAX_COLUMNS = 6


def comparison_rows(variants: Sequence[Variant], record: RunRecord) -> list[dict[str, Any]]:
    """A row per variant: its values, then the figures of its stages; none without a matrix.

    A figure has its stage's name before it where several stages have one of its name.
    """
    if len(variants) < 2:
        return []
    rows = []
    for variant in variants:
        stages = [record.of(stage.title) for stage in variant.stages if stage.kind in _KINDS]
        names = {stage.title: stage.name for stage in variant.stages}
        figures: dict[str, Any] = {}
        all_names = [name for stage in stages for name in _figures(stage.result)]
        for stage in stages:
            for name, value in _figures(stage.result).items():
                is_alone = all_names.count(name) == 1
                figures[name if is_alone else f"{names[stage.stage]}.{name}"] = value
        states = {stage.state for stage in stages}
        failed = "failed" if "failed" in states else "" if states <= {"done", "ran"} else "partly"
        rows.append({**variant.values, **figures, **({"state": failed} if failed else {})})
    return rows


def comparison_table(rows: Sequence[dict[str, Any]], axes: Sequence[str]) -> list[str]:
    """The rows as lines of Markdown: the axes, and the figures that say most."""
    columns, shown = _short_table(rows, axes)
    cells = [columns, *shown]
    widths = [max(len(row[at]) for row in cells) for at in range(len(columns))]
    lines = [
        " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]
    rule = " | ".join("-" * width for width in widths)
    return [f"| {line} |" for line in (lines[0], rule, *lines[1:])]


def write_comparison(record: RunRecord) -> list[Path]:
    """The table in the run's folder, whole as CSV, short as Markdown, and both as a page; no files
    without rows.

    Returns:
        Where they are on this machine.
    """
    rows = record.comparison
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names)
    writer.writeheader()
    writer.writerows(rows)
    table = comparison_table(rows, record.axes)
    files = {
        "comparison.csv": text.getvalue().encode(),
        "comparison.md": "\n".join([*table, ""]).encode(),
        PAGE_NAME: render_page(_page(record)),
    }
    here = mirror_of(record.folder)
    here.mkdir(parents=True, exist_ok=True)
    for folder in dict.fromkeys([here, record.folder]):
        for name, content in files.items():
            write_atomically(folder / name, content)
    return [here / name for name in files]


def _page(record: RunRecord) -> Report:
    rows, axes = record.comparison, record.axes
    columns, shown = _short_table(rows, axes)
    known = [name for row in rows for name, value in row.items() if value is not None]
    names = [name for name in dict.fromkeys(known) if name not in axes]
    titles = [", ".join(f"{axis} {_shown(row[axis])}" for axis in axes) for row in rows]
    reports = [
        [stage.stage, stage.result["report"]] for stage in record.stages if "report" in stage.result
    ]
    tables = [
        ("Variants", columns, shown),
        ("All figures", ["", *titles], [[n, *(_shown(r.get(n)) for r in rows)] for n in names]),
        *([("Reports", ["stage", "page"], reports)] if reports else []),
    ]
    return Report(
        title=f"{record.pipeline}: {len(rows)} variants side by side",
        subtitle=f"varied: {', '.join(axes)}; all else is the same",
        tables=tables,
    )


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in result.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def _short_table(
    rows: Sequence[dict[str, Any]], axes: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """The axes and the figures that say most: their names, and a line for each variant."""
    columns = _columns(rows, axes)
    return columns, [[_shown(row.get(name)) for name in columns] for row in rows]


def _columns(rows: Sequence[dict[str, Any]], axes: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    figures = [name for name in names if name not in axes]
    known = [name for shown in _SHOWN for name in figures if name.split(".")[-1] == shown]
    differing = [name for name in figures if len({json.dumps(row.get(name)) for row in rows}) > 1]
    chosen = list(dict.fromkeys([*(n for n in known if n in differing), *differing]))[:_MAX_COLUMNS]
    return [*axes, *chosen, *(["state"] if "state" in names and "state" not in chosen else [])]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
