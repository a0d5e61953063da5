"""Two runs on one page: losses in one plot, figures in one table, samples in pairs.

A run is a folder: that of a pipeline, or what jobs wrote into one output folder. Of stages that ran
more than once there, the newest counts.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokendiff.artifacts.manifest import MANIFEST_NAME, load_manifest, write_atomically
from tokendiff.data.samples import KIND as SAMPLES
from tokendiff.data.samples import first_records
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.evaluation.inputs import KIND as EVALUATION
from tokendiff.evaluation.report import Points, Report, Table, render_page
from tokendiff.tracking.live import logs_under
from tokendiff.tracking.run_log import metrics_by_step

_SEARCH_DEPTH = 3
_SHOWN_SAMPLES = 4
_HELDOUT = "loss on held-out rows, nats per token"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is compared of a run.

    Attributes:
        loss, heldout: (step, nats per token).
        figures: those of its evaluation, or, without one, of its last logged step.
    """

    name: str
    loss: Points
    heldout: Points
    figures: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, *, name: str) -> "Run":
        """
        Raises:
            InputError: nothing of a run is there.
        """
        logs = [log for log in logs_under(folder) if metrics_by_step(log)]
        committed = dict(_committed(folder))  # the newest of each kind
        if not logs and not committed:
            raise InputError(
                f"{folder}: no run has left a log or a result there; give the folder of a pipeline "
                "or the output folder of a job"
            )
        metrics = metrics_by_step(logs[-1]) if logs else []
        heldout = metrics_by_step(logs[-1], event="heldout") if logs else []
        figures = {k: v for k, v in (metrics[-1] if metrics else {}).items() if _is_number(k, v)}
        if EVALUATION in committed:
            figures = load_manifest(committed[EVALUATION]).metadata["metrics"]
        samples = committed.get(SAMPLES)
        return cls(
            name=name,
            loss=[(event["step"], event["loss"]) for event in metrics],
            heldout=[
                (event["step"], event["heldout_nats_per_token"])
                for event in heldout
                if "heldout_nats_per_token" in event
            ],
            figures=dict(figures),
            samples=first_records(samples, _SHOWN_SAMPLES) if samples else [],
        )


def write_side_by_side(page: Path, first: Path, second: Path) -> None:
    """Write the page; the runs are called by the parts of their paths that differ."""
    # Not Path.resolve, which fails at a link to itself.
    names = _names(*(Path(os.path.realpath(folder)) for folder in (first, second)))
    runs = [Run.read(f, name=name) for f, name in zip((first, second), names, strict=True)]
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page, render_page(side_by_side(*runs)))


def side_by_side(first: Run, second: Run) -> Report:
    pairs = [
        [
            {**record, "id": f"{record['id']} of {run.name}"}
            for run, record in zip((first, second), records, strict=True)
        ]
        for records in zip(first.samples, second.samples, strict=False)
    ]
    is_watched = bool(first.heldout) and bool(second.heldout)
    return Report(
        title=f"{first.name} and {second.name}",
        subtitle="two runs side by side",
        loss_curve=first.loss,
        heldout_curve=second.loss,
        curve_names=(first.name, second.name),
        pairs={_HELDOUT: (first.heldout, second.heldout)} if is_watched else {},
        samples=[record for pair in pairs for record in pair],
        tables=[_figures(first, second)] if first.figures or second.figures else [],
    )


def _figures(first: Run, second: Run) -> Table:
    names = dict.fromkeys([*first.figures, *second.figures])
    rows = []
    for name in names:
        a: Any = first.figures.get(name)
        b: Any = second.figures.get(name)
        is_known = _is_number(name, a) and _is_number(name, b)
        rows.append([name, a, b, float(b) - float(a) if is_known else None])
    return "Figures", ["", first.name, second.name, "difference"], rows


def _names(first: Path, second: Path) -> tuple[str, str]:
    """What differs of two paths, behind what they share and before the end that they share."""
    shared = len(os.path.commonpath([first, second]).rstrip("/")) + 1
    a, b = (path.parts for path in (Path(str(first)[shared:]), Path(str(second)[shared:])))
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return "/".join(a) or first.name, "/".join(b) or second.name


def _committed(folder: Path) -> Iterator[tuple[str, Path]]:
    """(kind, folder) of the results at or below a folder, the newest last."""
    found = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        depth = len(here.relative_to(folder).parts)
        folders[:] = [f for f in folders if depth < _SEARCH_DEPTH and not f.startswith(".")]
        if MANIFEST_NAME in files:
            found.append(here)
    for here in sorted(found, key=lambda path: (path / MANIFEST_NAME).stat().st_mtime):
        try:
            kind = load_manifest(here).kind
        except CorruptFileError:
            continue
        if kind in (EVALUATION, SAMPLES):
            yield kind, here


def _is_number(name: str, value: Any) -> bool:
    return name != "time" and isinstance(value, int | float) and not isinstance(value, bool)
