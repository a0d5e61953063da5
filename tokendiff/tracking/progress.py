"""What a person sees of a running stage: its log, followed by a thread and printed as it grows."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from tokendiff.tracking.run_log import follow

if TYPE_CHECKING:
    from rich.progress import Progress

Events = list[dict[str, Any]]
logger = logging.getLogger(__name__)


class LogTailer:
    """Follows a log in a thread, and hands each batch of new events to every consumer.

        with LogTailer(folder / LOG_NAME, [printer.consume, run.consume]):
            ...

    It starts at the present end of the log (its start, if there is none yet): what an earlier
    attempt wrote is not told again. Leaving the block hands over everything written until then.
    A consumer that raises is reported once and called again with the next batch: what it does
    wrong never stops the run.
    """

    def __init__(
        self,
        path: Path,
        consumers: Sequence[Callable[[Events], None]],
        *,
        poll_seconds: float = 0.5,
    ) -> None:
        self._path = path
        self._consumers = consumers
        self._poll_seconds = poll_seconds
        self._offset = path.stat().st_size if path.exists() else 0
        self._stopped = threading.Event()
        self._warned: set[int] = set()
        self._thread = threading.Thread(target=self._run, name=f"tail {path}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stopped.wait(self._poll_seconds)  # then one last round
            try:
                events, self._offset = follow(self._path, self._offset)
            except OSError as error:
                self._warn_once(-1, f"{self._path} cannot be read: {error}; trying on")
                continue
            if events:
                self._hand_over(events)

    def _hand_over(self, events: Events) -> None:
        for index, consumer in enumerate(self._consumers):
            try:
                consumer(events)
            except Exception as error:
                name = getattr(consumer, "__qualname__", consumer)
                self._warn_once(index, f"{name} failed on events of {self._path}: {error!r}")

    def _warn_once(self, about: int, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            logger.warning("%s", message)


class ProgressPrinter:
    """Prints the events of one stage: a bar on a terminal, elsewhere a line for each.

    A context, since a bar must be taken off the screen again; `consume` is for a `LogTailer`.
    """

    def __init__(self, stage: str, *, stream: TextIO | None = None, has_bar: bool = True) -> None:
        self._stage = stage
        self._stream = stream or sys.stdout
        self._total: int | None = None
        self._rate = _Rate()
        has_bar = has_bar and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = _make_bar(self._stream) if has_bar else None
        self._task = self._bar.add_task(stage, total=None, facts="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def consume(self, events: Events) -> None:
        for event in events:
            self._show(event)

    def _show(self, event: dict[str, Any]) -> None:
        name = event["event"]
        if name in ("start", "resume"):
            self._total = event.get("max_train_steps", self._total)
            self._rate.restart(event["time"], event.get("step", 0))
        if name in ("metrics", "progress"):
            done = event["step"] if name == "metrics" else event["done"]
            self._total = event.get("total", self._total)
            self._rate.update(event["time"], done)
            self._show_progress(done, "step " if name == "metrics" else "", _facts(event))
        elif text := _describe(event):
            self._print(f"{self._stage}  {text}")

    def _show_progress(self, done: int, unit: str, facts: dict[str, str]) -> None:
        if self._total is not None and self._rate.is_known:
            facts = {**facts, "eta": f"eta {_duration(self._rate.seconds_for(self._total - done))}"}
        text = "  ".join(facts[key] for key in _ORDER if key in facts)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=self._total, facts=text)
        else:
            place = f"{unit}{done}" if self._total is None else f"{unit}{done}/{self._total}"
            self._print(f"{self._stage}  {place}  {text}".rstrip())

    def _print(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)


class _Rate:
    """Steps per second of the present attempt, from the times in its events.

    From the second report on it is measured since the first: before that lies start-up (workers,
    compilation, the first batch), which would make every estimate too long.
    """

    def __init__(self) -> None:
        # (time, step) of the attempt's start, its first report and its latest.
        self._points: list[tuple[float, int]] = []

    def restart(self, time: float, done: int) -> None:
        self._points = [(time, done)]

    def update(self, time: float, done: int) -> None:
        self._points = [*self._points[:2], (time, done)]

    @property
    def is_known(self) -> bool:
        return len(self._points) > 1 and self._points[-1][1] > self._points[-2][1]

    def seconds_for(self, steps: int) -> float:
        (start_time, start), (time, done) = self._points[-2:]
        return steps * (time - start_time) / (done - start)


_START_FACTS = {
    "num_workers": "workers",
    "num_params": "parameters",
    "rows": "rows",
    "tokens_per_step": "tokens/step",
}
_ORDER = ("loss", "errors", "lr", "tokens_per_second", "eta", "data_wait_fraction")


def _facts(event: dict[str, Any]) -> dict[str, str]:
    """What is shown of a metrics event, by its field; what the event lacks is left out."""
    shown = {
        "loss": "loss {:.3f}",
        "lr": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "data_wait_fraction": "data wait {:.1%}",
    }
    if event.get("errors"):
        shown["errors"] = "unusable prompts {:,}"
    return {key: form.format(event[key]) for key, form in shown.items() if key in event}


def _describe(event: dict[str, Any]) -> str | None:
    """One line for an event that is not progress; None for those that a person need not see."""
    match event["event"]:
        case "start":
            shown = [key for key in _START_FACTS if key in event]
            return "  ".join(["start", *(f"{_START_FACTS[key]} {event[key]:,}" for key in shown)])
        case "checkpoint":
            return f"checkpoint at step {event['step']}: {event['path']}"
        case "resume":
            return f"resumed from step {event['step']}"
        case "stopped":
            return f"stopped after step {event['step']}, which is saved"
        case "warning" | "error" as kind:
            return f"{kind}: {event['message']}"
    return None


def _make_bar(stream: TextIO) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        console=Console(file=stream),
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
