"""How the runs under a folder stand, by their logs alone: running, finished or cut off.

Nothing is asked of the processes that do the work, so this looks at a run of any machine whose
folder it sees, and costs the run nothing.
"""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokendiff.artifacts.manifest import RECORD_FOLDER
from tokendiff.tracking.progress import (
    Rate,
    duration_in_words,
    is_behind,
    place_in_words,
)
from tokendiff.tracking.run_log import (
    LOG_NAME,
    PROGRESS_NAME,
    drop_superseded,
    read_events,
    read_progress,
)

_SEARCH_DEPTH = 5
_SILENT_SECONDS = 120.0  # jobs tell of their progress every second or two; start-up takes longer
_ENDS = {"end": "done", "error": "failed", "stopped": "stopped"}


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One run as a row of a table; what its log does not tell is empty.

    Attributes:
        name: of the run's folder, below the one that was looked through.
        state: running, done, failed, stopped, or "silent for ..." of one that may have been killed.
        place: as in "step 3/400" or "64/4,096 rows".
        loss, heldout: the last ones.
        left: an estimate from its last minute.
        news: the last warning or error, or what was begun last.
    """

    name: str
    state: str
    place: str = ""
    loss: str = ""
    heldout: str = ""
    tokens_per_second: str = ""
    left: str = ""
    news: str = ""

    @property
    def is_running(self) -> bool:
        return self.state == "running"


def logs_under(folder: Path) -> list[Path]:
    """The logs of all runs at or below a folder, the one that was written to last at the end."""
    found: list[Path] = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        depth = len(here.relative_to(folder).parts)
        folders[:] = [
            name
            for name in folders
            if depth < _SEARCH_DEPTH and not name.startswith(("checkpoint-", ".", "mlartifacts"))
        ]
        if LOG_NAME in files and (here.name == RECORD_FOLDER or here == folder):
            found.append(here / LOG_NAME)
    return sorted(found, key=_changed)


def standing_of(log_path: Path, *, folder: Path, now: float | None = None) -> Standing:
    """How the run with this log stands.

    Args:
        folder: what its name is relative to.
    """
    now = time.time() if now is None else now
    events, progress = drop_superseded(read_events(log_path)), read_progress(log_path)
    run = log_path.parent.parent if log_path.parent.name == RECORD_FOLDER else log_path.parent
    name = str(run.relative_to(folder)) if run.is_relative_to(folder) and run != folder else ""
    state = _state(events, now - _changed(log_path))
    last = {event["event"]: event for event in events}
    metrics, heldout = last.get("metrics", {}), last.get("heldout", {})
    facts = _place(events, progress if state == "running" else None)
    rate = metrics.get("tokens_per_second")
    return Standing(
        name=name or run.name,
        state=state,
        place=facts.get("place", ""),
        loss=f"{metrics['loss']:.4f}" if "loss" in metrics else "",
        heldout=_heldout(heldout),
        tokens_per_second=facts.get("speed") or ("" if rate is None else f"{rate:,.0f}"),
        left=facts.get("left", "") if state == "running" else "",
        news=_news(events),
    )


def _changed(log_path: Path) -> float:
    """When the run told of itself last."""
    beside = log_path.with_name(PROGRESS_NAME)
    return max(path.stat().st_mtime for path in (log_path, beside) if path.exists())


def _state(events: list[dict[str, Any]], silence: float) -> str:
    if events and events[-1]["event"] in _ENDS:
        return _ENDS[events[-1]["event"]]
    if silence > _SILENT_SECONDS:
        return f"silent for {duration_in_words(silence)}"
    return "running"


def _place(events: list[dict[str, Any]], progress: dict[str, Any] | None) -> dict[str, str]:
    """Where the present attempt is, how fast, and how long it will take."""
    rate, total, done = Rate(), None, None
    step: int | None = None  # the last one in the log, of the present attempt
    unit: str | None = "steps"
    for event in [*events, *([progress] if progress else [])]:
        match event["event"]:
            case "start" | "resume":
                total, rate, unit = event.get("max_train_steps", total), Rate(), "steps"
                done = step = event.get("step", 0)
                rate.add(event["time"], done)
            case "metrics":
                done = step = event["step"]
                rate.add(event["time"], done)
            case "progress" if not is_behind(event, step):
                is_other = event.get("unit") != unit
                rate = Rate() if is_other or (done or 0) > event["done"] else rate
                done, total, unit = event["done"], event["total"], event.get("unit")
                rate.add(event["time"], done, event.get("tokens"))
    if done is None:
        return {}
    facts = {"place": place_in_words(done, total, unit)}
    if (speed := rate.tokens_per_second) is not None:
        facts["speed"] = f"{speed:,.0f}"
    if total is not None and (seconds := rate.seconds_for(total - done)) is not None:
        facts["left"] = duration_in_words(seconds)
    return facts


def _heldout(event: dict[str, Any]) -> str:
    value = event.get("heldout_nats_per_token", event.get("heldout_acceptance_length"))
    return "" if value is None else f"{value:.4f}"


def _news(events: Iterable[dict[str, Any]]) -> str:
    news = ""
    for event in events:
        match event["event"]:
            case "warning" | "error" as kind:
                news = f"{kind}: {event['message']}"
            case "doing":
                news = str(event["what"])
            case "stopping":
                news = "SIGTERM received: ends once the step under way is taken and saved"
            case "metrics" | "end":
                news = news if news.startswith(("warning", "error")) else ""
    return news
