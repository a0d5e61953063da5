"""What a person sees of a running stage: its log and its progress, followed by a thread and printed
as they grow: something moves at least every ten seconds, in a file later every minute.
"""

import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from tokendiff.tracking.run_log import follow, read_progress

if TYPE_CHECKING:
    from rich.progress import Progress

Events = list[dict[str, Any]]
# Without a bar: what is told within so many seconds of a line makes no line of its own, and where
# nothing is told for some seconds more, that is said. With the seconds between two reports of a
# job, and those between two looks, no more than ten pass between two lines at first. Later they
# come less often, one a minute after twenty: a file would hold hundreds for each hour. A logged
# step is a line whenever it comes.
_LINE_SECONDS, _MOST_LINE_SECONDS = 7.0, 60.0
_LINE_SHARE = 0.05  # of the time since the start
_MORE_IF_SILENT_SECONDS = 2.0
_RATE_SECONDS = 60.0
_BAR_WIDTH, _CLOCK_WIDTH = 16, 7  # of the bar on a terminal, and of 0:00:00 behind it
# The time left is not told before so many seconds and so many steps (or rows, ...) were measured.
_LEAST_SECONDS = 5.0
_LEAST_DONE = 3.0
logger = logging.getLogger(__name__)


class LogTailer:
    """Follows a log in a thread, and hands each batch of new events to every consumer.

        with LogTailer(folder / LOG_NAME, [printer.consume, run.consume]):
            ...

    It starts at the present end of the log (its start, if there is none yet): what an earlier
    attempt wrote is not told again. Leaving the block hands over everything written until then.
    A consumer that raises is reported once and called again with the next batch: what it does
    wrong never stops the run.

    Args:
        on_look: called after every look at the log, whether it has grown or not.
    """

    def __init__(
        self,
        path: Path,
        consumers: Sequence[Callable[[Events], None]],
        *,
        on_look: Callable[[], None] = lambda: None,
        poll_seconds: float = 0.5,
    ) -> None:
        self._path = path
        self._consumers = consumers
        self._on_look = on_look
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
            for index, consumer in enumerate(self._consumers if events else ()):
                self._call(index, consumer, events)
            self._call(len(self._consumers), self._on_look)

    def _call(self, index: int, consumer: Callable[..., None], *events: Events) -> None:
        try:
            consumer(*events)
        except Exception as error:
            name = getattr(consumer, "__qualname__", consumer)
            self._warn_once(index, f"{name} failed on events of {self._path}: {error!r}")

    def _warn_once(self, about: int, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            logger.warning("%s", message)


class ProgressPrinter:
    """Prints the events of one stage: a bar on a terminal, elsewhere lines.

    A context, since a bar must be taken off the screen again; `consume` and `look` are for a
    `LogTailer`.

    Args:
        log_path: the log beside which the job tells of its progress; without it, what `consume` is
            given is all there is.
    """

    def __init__(
        self,
        stage: str,
        *,
        log_path: Path | None = None,
        stream: TextIO | None = None,
        has_bar: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._stage = stage
        self._log_path = log_path
        self._stream = stream or sys.stdout
        self._clock = clock
        self._start_time = self._line_time = self._news_time = clock()
        self._status, self._silence, self._is_told = "at work", "{} so far", True
        self._progress: dict[str, Any] = {}  # the last of its events
        self._of_before = log_path and read_progress(log_path)  # what an earlier attempt left
        self._total: float | None = None
        self._step: int | None = None  # the last one in the log, of the present attempt
        self._rate = Rate()
        has_bar = has_bar and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._bar = _make_bar(self._stream) if has_bar else None
        self._task = self._bar.add_task(stage, text="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def consume(self, events: Events) -> None:
        for event in events:
            if event["event"] != "progress" or self._is_for_the_log_to_tell(event):
                self._show(event)

    def look(self) -> None:
        """Show what the job tells beside its log, or that it has told nothing for a while."""
        progress = read_progress(self._log_path) if self._log_path else None
        is_new = progress is not None and progress not in (self._of_before, self._progress)
        # Beside the log stands what was told seconds ago; the log may be ahead of it by many steps.
        if progress is not None and is_new and not is_behind(progress, self._step):
            self._show(progress)
        if self._bar is None and not self._is_told and self._is_line_due():
            self._print_status()
        elif self._bar is None and self._is_line_due(later=_MORE_IF_SILENT_SECONDS):
            silent = duration_in_words(self._clock() - self._news_time)
            self._print_status(f"  ({self._silence.format(silent)})")

    def _is_for_the_log_to_tell(self, event: dict[str, Any]) -> bool:
        """Whether a "progress" of the log is to be shown: it keeps a few, and all are seen beside
        it, but the last word on one thing may soon be replaced there by the first on another.
        """
        is_last_word = event["done"] >= event["total"]
        is_new = event["time"] > self._progress.get("time", 0.0)
        return self._log_path is None or (is_last_word and is_new)

    def _show(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "progress":
                self._show_progress(event)
            case "metrics":
                self._step = event["step"]
                self._rate.add(event["time"], event["step"])
                self._show_place(event["step"], "steps", _facts(event), is_line=True)
            case "start" | "resume":
                self._total = event.get("max_train_steps", self._total)
                self._step = event.get("step", 0)
                self._rate = Rate()
                self._rate.add(event["time"], event.get("step", 0))
            case "doing":
                self._keep_status(event["what"], silence="{} so far")
                self._print_status()
            case "stopping":
                self._print(f"{self._stage}  {self._stopping()}")
        if text := _describe(event):
            self._print(f"{self._stage}  {text}")

    def _stopping(self) -> str:
        """What a signal to stop waits for, and for how long if that can be known."""
        is_of_steps = self._progress.get("unit") == "steps"
        at = max(self._progress["done"] if is_of_steps else 0.0, self._step or 0)
        seconds = self._rate.seconds_per_unit
        if seconds is None:
            return "SIGTERM received: ends once the step under way is taken and saved"
        left = seconds * (math.floor(at) + 1 - at)
        return (
            f"SIGTERM received: ends once step {math.floor(at) + 1:,} is taken and saved, in about "
            f"{duration_in_words(left)} and the time that saving takes"
        )

    def _show_progress(self, event: dict[str, Any]) -> None:
        before, self._progress = self._progress, event
        done, self._total = event["done"], event["total"]
        is_new = (event.get("unit"), self._total) != (before.get("unit"), before.get("total"))
        if is_new or done < before["done"]:  # what was lost is done again
            self._rate = Rate()
        self._rate.add(event["time"], done, event.get("tokens"))
        facts = _facts(event)
        if (speed := self._rate.tokens_per_second) is not None:
            facts["tokens_per_second"] = f"{speed:,.0f} tokens/s"
        is_over = done >= event["total"] and done != before.get("done")
        self._show_place(done, event.get("unit"), facts, is_line=is_new or is_over)

    def _show_place(
        self, done: float, unit: str | None, facts: dict[str, str], *, is_line: bool
    ) -> None:
        left = 0.0 if self._total is None else self._total - done
        if left > 0.0 and (seconds := self._rate.seconds_for(left)) is not None:
            facts["left"] = f"{duration_in_words(seconds)} left"
        place = place_in_words(done, self._total, unit)
        text = "  ".join(facts[key] for key in _ORDER if key in facts)
        self._keep_status(f"{place}  {text}".rstrip(), silence="nothing new for {}")
        if self._bar and self._task is not None:
            text = self._cut_to_fit(f"{place}  {text}".rstrip())
            self._bar.update(self._task, completed=done, total=self._total, text=text)
        elif is_line or self._is_line_due():
            self._print_status()

    def _is_line_due(self, later: float = 0.0) -> bool:
        now = self._clock()
        seconds = _LINE_SHARE * (now - self._start_time)
        seconds = min(max(seconds, _LINE_SECONDS), _MOST_LINE_SECONDS)
        return now - self._line_time >= seconds + later

    def _cut_to_fit(self, text: str) -> str:
        """On a narrow terminal the last facts are cut off, and nothing before them."""
        assert self._bar is not None
        room = self._bar.console.width - len(self._stage) - _BAR_WIDTH - _CLOCK_WIDTH - 3
        return text if len(text) <= room else f"{text[: max(room - 1, 0)]}…"

    def _keep_status(self, status: str, *, silence: str) -> None:
        """Keep what is shown soon, and again where nothing new is told, and how that is said."""
        self._is_told = status == self._status
        self._status, self._silence, self._news_time = status, silence, self._clock()

    def _print_status(self, silence: str = "") -> None:
        self._is_told = True
        self._line_time = self._clock()
        self._print(f"{self._stage}  {self._status}{silence}")

    def _print(self, line: str) -> None:
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)


class Rate:
    """How fast the present attempt goes: over its last minute, by the times in its events.

    What is not known yet is None. Before anything has moved lies start-up (workers, weights, the
    first batch), which would make every estimate too long: from the second report on it is measured
    since the first that has moved. The first steps are slower than the others, so that the time
    left is not known from one or two of them.
    """

    def __init__(self) -> None:
        self._points: list[tuple[float, float, float | None]] = []  # (time, done, tokens)
        self._is_start_in = True

    def add(self, time: float, done: float, tokens: float | None = None) -> None:
        points = self._points
        has_moved = not points or done != points[-1][1] or (tokens or 0) > (points[-1][2] or 0)
        if len(points) == 1 and not has_moved:
            points.clear()
        if has_moved or not points:
            points.append((time, done, tokens))
        if self._is_start_in and len(points) > 2:
            self._is_start_in = False
            del points[0]
        while len(points) > 2 and points[1][0] <= time - _RATE_SECONDS:
            del points[0]

    def seconds_for(self, left: float) -> float | None:
        (start_time, start, _), (time, done, _) = self._points[0], self._points[-1]
        is_long = time - start_time >= _LEAST_SECONDS and done - start >= _LEAST_DONE
        is_known = is_long and not self._is_start_in
        return left * (time - start_time) / (done - start) if is_known else None

    @property
    def seconds_per_unit(self) -> float | None:
        """What one step (or row, ...) takes, as well as it can be told by now."""
        if self._is_start_in:
            return None
        (start_time, start, _), (time, done, _) = self._points[0], self._points[-1]
        return (time - start_time) / (done - start) if done > start else None

    @property
    def tokens_per_second(self) -> float | None:
        counted = [(time, tokens) for time, _, tokens in self._points if tokens is not None]
        if len(counted) < 2:
            return None
        (start_time, start), (time, tokens) = counted[0], counted[-1]
        return (tokens - start) / (time - start_time) if tokens > start else None


def is_behind(progress: dict[str, Any], step: int | None) -> bool:
    """Whether a "progress" of a training was told before the step that the log has reached."""
    return progress.get("unit") == "steps" and step is not None and progress["done"] < step


_ORDER = (
    *("rows", "heldout_rows", "loss", "errors", "lr", "tokens_per_second"),
    *("left", "data_wait_fraction"),
)
_SCALES = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def place_in_words(done: float, total: float | None, unit: str | None) -> str:
    """How far it is, as in "step 3/400", "64/4,096 rows" or "1.2/33.6 MB"."""
    if unit == "bytes" and total is not None:
        for name, size in _SCALES.items():
            if total >= size:
                return f"{done / size:,.1f}/{total / size:,.1f} {name}"
    count = f"{int(done):,}" if total is None else f"{int(done):,}/{int(total):,}"
    if unit == "steps":
        return f"step {count}"
    return count if unit is None else f"{count} {unit}"


def _facts(event: dict[str, Any]) -> dict[str, str]:
    """What is shown of an event, by its field; what the event lacks is left out."""
    shown = {
        "rows": "{:,} rows",
        "loss": "loss {:.3f}",
        "lr": "lr {:.1e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "data_wait_fraction": "{:.1%} of the time waiting for data",
    }
    if event.get("errors"):
        shown["errors"] = (
            "{:,} unusable rows" if event.get("unit") == "bytes" else "{:,} unusable prompts"
        )
    facts = {key: form.format(event[key]) for key, form in shown.items() if key in event}
    if "heldout_rows" in event:
        facts["heldout_rows"] = "judging held-out rows, {:,} of {:,}".format(*event["heldout_rows"])
    return facts


def _describe(event: dict[str, Any]) -> str | None:
    """One line for an event that is not progress; None for those that a person need not see."""
    match event["event"]:
        case "start":
            all_are_trained = event.get("num_trained_params") == event.get("num_params")
            shown = [
                f"{event[key]:,} {one if event[key] == 1 else many}"
                for key, (one, many) in _START_FACTS.items()
                if key in event and not (key == "num_trained_params" and all_are_trained)
            ]
            return f"training starts: {', '.join(shown)}" if shown else "training starts"
        case "memory":
            return f"a worker needs {event['description']}"
        case "checkpoint":
            return f"checkpoint at step {event['step']}: {event['path']}"
        case "resume":
            return f"goes on from step {event['step']}"
        case "heldout":
            return _describe_heldout(event)
        case "stopped_early":
            return f"ends early after step {event['step']:,}: {event['reason']}"
        case "stopped":
            return f"stopped after step {event['step']}, which is saved"
        case "advice" | "warning" | "error" as kind:
            return f"{kind}: {event['message']}"
    return None


def _describe_heldout(event: dict[str, Any]) -> str:
    value, unit = event.get("heldout_nats_per_token"), "nats per token"
    if value is None:
        value, unit = event["heldout_acceptance_length"], "tokens a block accepted"
    figure = f"{value:.4f} ± {event['heldout_standard_error']:.4f} {unit}"
    if "heldout_since_best" not in event:
        return f"held-out rows before training: {figure}"
    since_best = event["heldout_since_best"]
    rank = f"no better than at step {event['heldout_best_step']:,}" if since_best else "the best"
    if since_best > 1:
        rank += f", {since_best} times in a row"
    return f"held-out rows at step {event['step']:,}: {figure}, {rank}"


_START_FACTS = {
    "num_workers": ("worker", "workers"),
    "num_params": ("parameter", "parameters"),
    "num_trained_params": ("of them trained", "of them trained"),
    "rows": ("row", "rows"),
    "tokens_per_step": ("token a step", "tokens a step"),
}


def _make_bar(stream: TextIO) -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=_BAR_WIDTH),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(file=stream),
    )


def duration_in_words(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
