"""What MLflow has yet to get of one run, kept on disk until it is delivered.

`mlflow.json` in a run's folder holds its MLflow run id, the byte offset up to which `log.jsonl`
has arrived, and a queue of whatever else is to be stored. Nothing leaves it before MLflow has taken
it, so what is sent just before a crash is sent again. That is harmless: the SQL stores drop a
metric that equals one they hold (same name, step, time and value), and the rest replaces itself. A
run whose creation was not acknowledged is found again by a tag. What MLflow cannot do is forget:
points of steps that a later resume made void stay in its curves, with their earlier times.
"""

import dataclasses
import fcntl
import json
import logging
import os
import threading
import uuid
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.manifest import write_atomically
from tokendiff.tracking.mlflow_entities import metrics_and_tags
from tokendiff.tracking.mlflow_store import describe
from tokendiff.tracking.run_log import LOG_NAME, drop_superseded, follow

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

STATE_NAME = "mlflow.json"
CREATION_TAG = "tokendiff.creation"
_BATCH = 100  # MLflow's limit for params and for tags
# The same request would fail the same way; anything else may pass later.
_FINAL_CODES = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
}
logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunState:
    """What `mlflow.json` holds. `uri` is without credentials; times are milliseconds; `creation` is
    a tag by which a run is found whose id is not known.
    """

    uri: str
    experiment_id: str
    name: str
    start_time: int
    run_id: str | None = None
    creation: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: str = "RUNNING"
    end_time: int | None = None
    delivered_status: str | None = None
    offset: int = 0
    queue: list[list[Any]] = field(default_factory=list)
    """["param", name, value], ["tag", name, value], ["metric", name, value, time, step],
    ["input", name, digest, uri, context] or ["artifacts", path, artifact_path], oldest first; a
    metric's value is text, for NaN."""


def load_state(folder: Path) -> RunState | None:
    """The state kept in a folder; None if there is none or it is not readable as one."""
    try:
        return RunState(**json.loads((folder / STATE_NAME).read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        logger.warning("%s is passed over: %s", folder / STATE_NAME, error)
        return None


def is_waiting(folder: Path) -> bool:
    """Whether MLflow has yet to get something of the run whose state is kept in a folder."""
    state = load_state(folder)
    return state is not None and not Outbox(folder, state).is_delivered


def lock_folder(folder: Path, *, is_free_without_locks: bool) -> int | None:
    """Claim a run's folder for this process, until it ends or closes the descriptor that it gets.

    Args:
        is_free_without_locks: what a folder counts as on a file system that has no locks. Who owns
            the run goes on without one; who does not must take the run for alive.

    Returns:
        None if another process (or another run of this one) has it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # ENOTSUP, ENOSYS or ENOLCK: nobody can say who has it
        if not is_free_without_locks:
            os.close(descriptor)
            return None
    return descriptor


class Outbox:
    """One run's state and its delivery. `add` and `finish` may be called beside a `deliver`."""

    def __init__(self, folder: Path, state: RunState, *, recreate: bool = False) -> None:
        """
        Args:
            recreate: a run that was deleted from MLflow is made anew, with all of its log.
        """
        self.folder = folder
        self.state = state
        self._recreate = recreate
        self._may_be_there = (folder / STATE_NAME).exists()  # an attempt that did not hear of it
        self._is_verified = False
        self._refused = False
        self._is_unsaved = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def place(self) -> str:
        return f"MLflow at {self.state.uri}"

    @property
    def is_delivered(self) -> bool:
        state = self.state
        is_logged = follow(self.folder / LOG_NAME, state.offset)[1] == state.offset
        return not state.queue and state.status == state.delivered_status and is_logged

    def add(self, items: list[list[Any]]) -> None:
        with self._lock:
            self.state.queue.extend(items)
            self._save()

    def finish(self, status: str, end_seconds: float) -> None:
        with self._lock:
            self.state.status, self.state.end_time = status, int(end_seconds * 1000)
            self._save()

    def deliver(self, client: "MlflowClient") -> None:
        """Bring MLflow up to date; raises whatever its client does when that fails for now.

        What MLflow refuses for good is left out, with a warning for the first.
        """
        run_id = self._verified_run_id(client)
        self._deliver_queue(client, run_id)
        self._deliver_log(client, run_id)
        self._deliver_status(client, run_id)

    def _verified_run_id(self, client: "MlflowClient") -> str:
        state = self.state
        if state.run_id is not None and self._recreate and not self._is_verified:
            params = _params_of(client, state.run_id)
            if params is None:
                creation = uuid.uuid4().hex
                self._update(run_id=None, creation=creation, delivered_status=None, offset=0)
            else:
                self._keep_first_params(params)
        self._is_verified = True
        if state.run_id is None:
            run_id = self._create(client)
            self._update(run_id=run_id, delivered_status="RUNNING")
            return run_id
        return state.run_id

    def _create(self, client: "MlflowClient") -> str:
        """The id of a new run; of the one that an earlier attempt made, if that heard no answer or
        was killed before it wrote it down.
        """
        state = self.state
        if self._may_be_there:
            # In double quotes, for the name has a dot in it.
            asked = f"tags.\"{CREATION_TAG}\" = '{state.creation}'"
            for found in client.search_runs([state.experiment_id], asked, max_results=1):
                return found.info.run_id
        self._may_be_there = True
        run = client.create_run(
            state.experiment_id,
            run_name=state.name,
            start_time=state.start_time,
            tags={CREATION_TAG: state.creation},
        )
        return run.info.run_id

    def _keep_first_params(self, known: dict[str, str]) -> None:
        """MLflow refuses another value for a param: what a later attempt changed becomes a tag."""
        with self._lock:
            queue, self.state.queue = self.state.queue, []
            for kind, name, *rest in queue:
                if kind == "param" and name in known:
                    if [known[name]] != rest:
                        self.state.queue.append(["tag", f"resumed.{name}", *rest])
                else:
                    self.state.queue.append([kind, name, *rest])
            self._save()

    def _deliver_queue(self, client: "MlflowClient", run_id: str) -> None:
        while self.state.queue:
            kind = self.state.queue[0][0]
            batch = []
            for item in self.state.queue[: 1 if kind == "artifacts" else _BATCH]:
                if item[0] != kind:
                    break
                batch.append(item[1:])
            self._send(client, run_id, kind, batch)
            with self._lock:
                del self.state.queue[: len(batch)]
                self._save()

    def _deliver_log(self, client: "MlflowClient", run_id: str) -> None:
        events, offset = follow(self.folder / LOG_NAME, self.state.offset)
        if offset == self.state.offset:
            return
        metrics, tags = metrics_and_tags(drop_superseded(events), self.folder.absolute())
        self._send(client, run_id, "metric", metrics)
        self._send(client, run_id, "tag", list(tags.items()))
        self._update(offset=offset)

    def _deliver_status(self, client: "MlflowClient", run_id: str) -> None:
        status, end_time = self.state.status, self.state.end_time
        if status != self.state.delivered_status:
            self._send(client, run_id, "status", [status, end_time])
            self._update(delivered_status=status)

    def _send(self, client: "MlflowClient", run_id: str, kind: str, batch: list[Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.exceptions import MlflowException

        log_batch = partial(client.log_batch, run_id, synchronous=True)
        try:
            match kind:
                case "param":
                    log_batch(params=[Param(*item) for item in batch])
                case "tag":
                    log_batch(tags=[RunTag(*item) for item in batch])
                case "metric":
                    log_batch(metrics=[Metric(key, float(v), *rest) for key, v, *rest in batch])
                case "input":
                    client.log_inputs(run_id, datasets=[_dataset(*item) for item in batch])
                case "artifacts":
                    [(path, artifact_path)] = batch
                    send = client.log_artifacts if os.path.isdir(path) else client.log_artifact
                    send(run_id, path, artifact_path)
                case "status" if batch[0] == "RUNNING":
                    client.update_run(run_id, status="RUNNING")
                case "status":
                    client.set_terminated(run_id, *batch)
        except (MlflowException, FileNotFoundError, PermissionError) as error:
            if isinstance(error, MlflowException) and error.error_code not in _FINAL_CODES:
                raise
            if not self._refused:
                self._refused = True
                logger.warning("MLflow run %s goes without a %s: %s", run_id, kind, describe(error))

    def _update(self, **changes: Any) -> None:
        with self._lock:
            for name, value in changes.items():
                setattr(self.state, name, value)
            self._save()

    def _save(self) -> None:
        text = json.dumps(dataclasses.asdict(self.state), indent=1)
        try:
            write_atomically(self.folder / STATE_NAME, text.encode())
        except OSError as error:
            # No reason to stop a run: the state is only needed after a crash.
            if not self._is_unsaved:
                logger.warning("%s is not kept: %s", self.folder / STATE_NAME, error)
            self._is_unsaved = True


def _dataset(name: str, digest: str, uri: str, context: str) -> "DatasetInput":
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = json.dumps({"uri": uri})
    dataset = Dataset(name=name, digest=digest, source_type="local", source=source)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _params_of(client: "MlflowClient", run_id: str) -> dict[str, str] | None:
    """The params of a run; None if it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run.data.params if run.info.lifecycle_stage == "active" else None
