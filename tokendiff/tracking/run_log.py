"""A run's own log: `log.jsonl`, one JSON object per line, only ever appended to.

Each line is `{"time": unix seconds, "event": name, ...fields}`. Events, and the fields readers use:

    start       step (0, or the one resumed from), max_train_steps, and facts of the run: rows,
                tokens_per_step, num_params, num_trained_params, num_workers; of models of the hub
                commits, by the field that names one
    memory      total, bytes that a worker needs at the peak of a step; description: what for
    metrics     step, loss, lr, grad_norm, tokens_per_second, data_wait_fraction, and what the
                objective tells: of a draft draft_nll, draft_accuracy, draft_accuracy_1, ... by
                place in the block, and expected_acceptance_length
    progress    done and total, counted in unit (rows, steps, bytes, ...), and tokens, those of this
                attempt; parts of what is under way count. Preprocessing adds rows, sampling errors:
                the prompts that could not be used
                While held-out rows are judged, heldout_rows: [judged, all]
    heldout     step, heldout_nats_per_token (of a draft heldout_acceptance_length) and
                heldout_standard_error; after step 0, which is before training, also
                heldout_best_step, and heldout_since_best, the evaluations that have not improved
                on it
    doing       what: something that takes a while was begun
    part        part, rows, errors, new_tokens, model_calls, seconds: one part file that was sampled
    checkpoint  step, path
    resume      step
    stopping    SIGTERM came; the step under way is taken and saved first
    stopped     step, the last one taken: a stop was asked for, and this step is saved
    stopped_early  step, the last one; reason
    advice      message: what may make the run faster
    warning     message
    error       message
    end

Jobs tell of their progress every second or two, and a log must not grow with the time that a job
takes: of one thing that is counted, a line is kept for each percent. The latest word always stands
in `progress.json` beside the log, a file that is replaced.

An attempt begins with "start" or "resume" at its step; "metrics" and "heldout" of later steps that
earlier attempts wrote no longer count.

JSON has no NaN and no infinities: they are written as the strings "NaN", "Infinity" and
"-Infinity", and the readers here turn exactly these strings back into floats. This module imports
the standard library alone.
"""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from tokendiff.errors import naming

LOG_NAME = "log.jsonl"
PROGRESS_NAME = "progress.json"
_OF_STEPS = ("metrics", "heldout")  # events with figures of one step
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunLog:
    """Appends events to a log; any number of processes may write to one file at the same time.

    The folder is made if it is missing. A line is one `write` to a file opened for appending, so
    that lines of several writers never mix, and nothing waits in a buffer when the process is
    killed.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._clock = clock
        self._progress_lock = threading.Lock()
        self._percent: tuple[Any, ...] = ()  # of the last "progress" that was kept
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, event: str, /, **fields: Any) -> None:
        """Append one event.

        Raises:
            TypeError: a field is not plain JSON (paths are written as strings; tensors are not).
        """
        record = _to_json({"time": self._clock(), "event": event, **fields})
        line = json.dumps(record, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        if event == "progress" and not self._keeps(line, **fields):
            return
        if self._ends_in_torn_line():
            line = b"\n" + line
        with naming(self.path):
            while line:  # a full disk can cut a write short
                line = line[os.write(self._file, line) :]

    def _keeps(self, line: bytes, *, done: float, total: float, **fields: Any) -> bool:
        """Show a "progress" beside the log; whether it is one that the log keeps too."""
        percent = (fields.get("unit"), total, int(100 * done / total) if total else 100)
        with self._progress_lock:
            path = self.path.with_name(PROGRESS_NAME)
            temporary = path.with_name(f".{PROGRESS_NAME}.{os.getpid()}.tmp")
            with contextlib.suppress(OSError):  # what is only looked at ends no run
                try:
                    temporary.write_bytes(line)
                    os.replace(temporary, path)
                finally:  # also where a second signal comes in between
                    temporary.unlink(missing_ok=True)
            is_news, self._percent = percent != self._percent, percent
        return is_news

    def close(self) -> None:
        os.close(self._file)

    def __reduce__(self) -> tuple[type["RunLog"], tuple[Path]]:
        # A descriptor means nothing in another process: a copy opens the file by its path.
        return RunLog, (self.path,)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ends_in_torn_line(self) -> bool:
        # Looked up at every write: the writer that was killed in mid-line may be another process.
        size = os.fstat(self._file).st_size
        return size > 0 and os.pread(self._file, 1, size - 1) != b"\n"


def follow(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events in the complete lines after a byte offset, and the offset to go on from.

    A last line without its newline is left for the next call: its writer may not have finished.
    Lines that are not events (torn by a killed writer) are passed over. A missing file has no
    events yet; one shorter than `offset` was made anew, and is read from its start.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < offset:
                offset = 0
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    data = data[: data.rfind(b"\n") + 1]
    events = [event for line in data.split(b"\n") if (event := _parse(line)) is not None]
    return events, offset + len(data)


def read_progress(path: Path) -> dict[str, Any] | None:
    """The latest "progress" of the run whose log is at `path`; None where it has told of none,
    or cannot be asked.
    """
    try:
        return _parse(path.with_name(PROGRESS_NAME).read_bytes())
    except OSError:
        return None


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every event of a log in the order written, by the rules of `follow`."""
    return follow(path)[0]


def metrics_by_step(path: Path, *, event: str = "metrics") -> list[dict[str, Any]]:
    """The events of that name that count, sorted by step; of several of one step the last.

    Args:
        event: "metrics" or "heldout".
    """
    events = drop_superseded(read_events(path))
    by_step = {record["step"]: record for record in events if record["event"] == event}
    return [by_step[step] for step in sorted(by_step)]


def drop_superseded(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out figures of steps ("metrics", "heldout") that a later attempt went back behind."""
    kept: list[dict[str, Any]] = []
    for event in events:
        if event["event"] in ("start", "resume") and "step" in event:
            kept = [e for e in kept if e["event"] not in _OF_STEPS or e["step"] <= event["step"]]
        kept.append(event)
    return kept


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    if not isinstance(record, dict) or not {"time", "event"} <= record.keys():
        return None
    return {key: _from_json(value) for key, value in record.items()}


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
