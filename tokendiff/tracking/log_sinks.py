"""TensorBoard and Weights & Biases as mirrors of the log, beside MLflow and by the same thread.

The outbox is the log itself and, on disk, how far of it has arrived: `tensorboard/delivered.json`
or `wandb/delivered.json` in a run's folder. What was sent just before a crash is sent again, and
what a resumed run makes void is overruled: TensorBoard is told to forget the later steps, and
Weights & Biases keeps the first value of a step, which a run that resumes exactly only repeats. A
run that had finished and is made again is a new one there.
"""

import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tokendiff.artifacts.manifest import write_atomically
from tokendiff.errors import InputError
from tokendiff.tracking.mlflow_delivery import Delivery
from tokendiff.tracking.mlflow_entities import flatten_params, metrics_and_tags
from tokendiff.tracking.mlflow_outbox import lock_folder
from tokendiff.tracking.run_log import LOG_NAME, drop_superseded, follow

if TYPE_CHECKING:
    from tokendiff.config.pipeline import TrackingConfig

STATE_NAME = "delivered.json"
Events = list[dict[str, Any]]
logger = logging.getLogger(__name__)


class Sink(Protocol):
    """A tracker that takes the numbers of a log. Whatever it raises is tried again later."""

    def send(self, events: Events) -> None: ...

    def close(self, status: str) -> None: ...


class TensorBoardSink:
    """Scalars in event files of `folder`. A file begins with the step from which on what earlier
    files say no longer counts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def send(self, events: Events) -> None:
        for event in events:
            if event["event"] in ("start", "resume") and "step" in event:
                self._begin_file(event["step"] + 1)
                continue
            for name, value, time_ms, step in metrics_and_tags([event], self._folder)[0]:
                if self._writer is None:
                    self._begin_file(step)
                self._add(name, value, step, seconds=time_ms / 1000)
        if self._writer is not None:
            self._writer.flush()

    def close(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _begin_file(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.close("")
        self._writer = EventFileWriter(str(self._folder))
        begun = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=step, session_log=begun))

    def _add(self, name: str, value: float, step: int, *, seconds: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
        self._writer.add_event(Event(step=step, wall_time=seconds, summary=summary))


class WandbSink:
    """A run of Weights & Biases, resumed by its id. The key is read from the environment
    (WANDB_API_KEY) by wandb itself; WANDB_MODE=offline writes to the folder alone.
    """

    def __init__(
        self, folder: Path, *, project: str, name: str, run_id: str, params: Mapping[str, Any]
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            reinit="create_new",
            dir=str(folder),
            config=flatten_params(params),
            settings=wandb.Settings(
                silent=True,
                console="off",  # what a run prints stays here
                disable_code=True,
                disable_git=True,
                x_disable_stats=True,
            ),
        )

    def send(self, events: Events) -> None:
        by_step: dict[int, dict[str, float]] = {}
        for event in events:
            for name, value, _, step in metrics_and_tags([event], Path())[0]:
                if math.isfinite(value):
                    by_step.setdefault(step, {})[name] = value
        for step, values in by_step.items():
            # Steps that it has are left as they are.
            self._run.log(values, step=step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "FINISHED" else 1)


class LogOutbox:
    """The part of a run's log that a sink does not have yet; `Delivery` brings it there.

    Args:
        place: what warnings call the tracker.
        folder: of its own, in the run's folder; the log is one level up.
        make: opens the sink, given the id that the run has there. It is called by the thread.
    """

    def __init__(self, name: str, place: str, folder: Path, make: Callable[[str], Sink]) -> None:
        self.name, self.place = name, place
        self.folder, self._make = folder, make
        self._log = folder.parent / LOG_NAME
        self._sink: Sink | None = None
        self._status: str | None = None
        state = self._load()
        self._offset, self._run_id = state["offset"], state["run_id"]

    @property
    def is_delivered(self) -> bool:
        return follow(self._log, self._offset)[1] == self._offset

    def add(self, items: list[list[Any]]) -> None:
        """A sink takes what is in the log, and nothing else."""

    def finish(self, status: str, end_seconds: float) -> None:
        self._status = status

    def deliver(self, client: Any) -> None:
        """Bring the sink up to date; raises whatever it does where that fails."""
        status = self._status
        events, offset = follow(self._log, self._offset)
        if events or (status is not None and self._sink is not None):
            if self._sink is None:
                self._sink = self._make(self._run_id)
            self._sink.send(drop_superseded(events))
            self._offset = offset
            self._save()
        if status is not None and self._sink is not None:
            self._sink.close(status)
            self._sink = None
            self._save(is_finished=status == "FINISHED")

    def _load(self) -> dict[str, Any]:
        try:
            state = json.loads((self.folder / STATE_NAME).read_text())
            new = {"offset": int(state["offset"]), "run_id": uuid.uuid4().hex[:16]}
            return new if state["is_finished"] else {**new, "run_id": str(state["run_id"])}
        except FileNotFoundError:
            pass
        except (ValueError, TypeError, KeyError) as error:
            logger.warning("%s is passed over: %s", self.folder / STATE_NAME, error)
        return {"offset": 0, "run_id": uuid.uuid4().hex[:16]}

    def _save(self, *, is_finished: bool = False) -> None:
        state = {"offset": self._offset, "run_id": self._run_id, "is_finished": is_finished}
        write_atomically(self.folder / STATE_NAME, json.dumps(state).encode())


def check_sinks(config: "TrackingConfig") -> None:
    """Raise InputError where a package is missing that the config asks for."""
    for field, package in (("tensorboard", "tensorboard"), ("wandb_project", "wandb")):
        if getattr(config, field) and find_spec(package) is None:
            raise InputError(
                f"tracking.{field}: the package {package} is not installed; "
                f"pip install 'tokendiff[{package}]', or leave {field} out"
            )


def open_sinks(
    config: "TrackingConfig", name: str, folder: Path, params: Mapping[str, Any]
) -> list[Delivery]:
    """A thread for each mirror that the config asks for; each begins where the last attempt ended.

    Args:
        folder: of the run; its log is `folder/log.jsonl`.
    """
    wanted: list[LogOutbox] = []
    if config.tensorboard:
        place = folder / "tensorboard"
        wanted.append(LogOutbox(name, "TensorBoard", place, lambda _: TensorBoardSink(place)))
    if (project := config.wandb_project) is not None:
        beside = folder / "wandb"

        def make(run_id: str) -> Sink:
            return WandbSink(beside, project=project, name=name, run_id=run_id, params=params)

        wanted.append(LogOutbox(name, "Weights & Biases", beside, make))
    deliveries = []
    for outbox in wanted:
        outbox.folder.mkdir(parents=True, exist_ok=True)
        if (lock := lock_folder(outbox.folder, is_free_without_locks=True)) is None:
            logger.warning("%s is not mirrored: a live run has %s already", name, outbox.folder)
            continue
        deliveries.append(Delivery(outbox, None, lock))
    return deliveries
