"""MLflow mirrors the log: a parent run for a pipeline, a child for each stage, or a job's own run.

    with MlflowMirror.open(config.tracking, root, run_name=config.name) as parent:
        with (
            parent.stage("train", folder=folder, params=config.train.model_dump()) as run,
            LogTailer(folder / LOG_NAME, [run.consume]),
        ):
            ...
            run.log_artifacts(folder / "report", "report")

Only the driver imports this. Only `open` waits for MLflow: later a thread for each run delivers,
from the log itself and from a queue on disk, and tries again as long as the run lives; what is left
then is delivered when the next run starts. A run that failed or was interrupted is continued in
MLflow, under the new parent, when its folder is opened again.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tokendiff.artifacts.locations import Location, mirror_of
from tokendiff.errors import InputError
from tokendiff.secrets import without_credentials
from tokendiff.tracking.log_sinks import check_sinks, open_sinks
from tokendiff.tracking.mlflow_delivery import Delivery, replay_pending
from tokendiff.tracking.mlflow_entities import (
    MAX_DIGEST_LENGTH,
    clean_tags,
    flatten_params,
    metrics_and_tags,
)
from tokendiff.tracking.mlflow_outbox import Outbox, RunState, load_state, lock_folder
from tokendiff.tracking.mlflow_store import (
    check_store,
    get_experiment_id,
    make_client,
    resolve_uri,
    unusable,
)
from tokendiff.tracking.system_metrics import sampled

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tokendiff.config.pipeline import TrackingConfig

logger = logging.getLogger(__name__)


class MirroredRun:
    """One run in MLflow. Nothing here waits for MLflow or fails because of it.

    As a context it ends the run as FINISHED, as FAILED on an exception, as KILLED on an interrupt.
    Without a delivery (MLflow is off) it only serves the other trackers, if there are any.

    Args:
        sinks: TensorBoard and Weights & Biases, which take the log and nothing else.
    """

    def __init__(
        self, delivery: "Delivery[Outbox] | None", sinks: Sequence[Delivery[Any]] = ()
    ) -> None:
        self._delivery = delivery
        self._sinks = sinks

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None while the run is not created there."""
        return self._delivery.outbox.state.run_id if self._delivery else None

    def consume(self, events: list[dict[str, Any]]) -> None:
        """Learn that the log has grown; what is new is read from there, where it is safe."""
        for each in (self._delivery, *self._sinks):
            if each is not None:
                each.wake()

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Store numbers that are not in the log, such as an evaluation's results."""
        event = {**metrics, "event": "metrics", "time": time.time(), "step": step}
        entities, tags = metrics_and_tags([event], Path())
        self._add([["metric", name, repr(value), *rest] for name, value, *rest in entities])
        self._add(_tags(tags))

    def log_artifacts(self, path: Path, artifact_path: str | None = None) -> None:
        """Store a file, or all that is in a folder, under the run's `artifact_path`."""
        self._add([["artifacts", str(path.absolute()), artifact_path]])

    def log_input(self, *, name: str, digest: str, source: Location, context: str) -> None:
        """Say which data the run reads, by the digest of its content.

        Args:
            context: what it is read for: "training", "evaluation", ...
        """
        uri = source.absolute().as_uri() if isinstance(source, Path) else str(source)
        self._add([["input", name, digest[:MAX_DIGEST_LENGTH], uri, context]])

    def system_metrics(self) -> AbstractContextManager[None]:
        """While this block runs, record how busy the machine is."""
        if self._delivery is None:
            return nullcontext()
        return sampled(self.log_metrics)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            status = "FINISHED"
        else:
            status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        for each in (self._delivery, *self._sinks):
            if each is not None:
                each.close(status, time.time())

    def _add(self, items: list[list[Any]]) -> None:
        if self._delivery:
            self._delivery.add(items)


class MlflowMirror(MirroredRun):
    """The pipeline's own run, if it has one, and where the stages' runs come from."""

    def __init__(
        self,
        delivery: "Delivery[Outbox] | None",
        store: "_Store | None",
        *,
        config: "TrackingConfig | None" = None,
        parent_run_id: str | None = None,
    ) -> None:
        super().__init__(delivery)
        self._store, self._config = store, config
        self._parent_run_id = parent_run_id

    @classmethod
    def open(
        cls,
        config: "TrackingConfig",
        root: Location,
        *,
        run_name: str | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        parent_run_id: str | None = None,
    ) -> "MlflowMirror":
        """Check the store, deliver what earlier runs under `root` left, and start the parent run.

        Args:
            run_name: of the parent run; without it there is none, and stages stand alone.
            parent_run_id: of a run that another process keeps, in place of one of its own.
            folder: where the parent keeps its state, by default `root/.mlflow/run_name`. An
                unfinished parent that is recorded there is continued. State is on this machine's
                disk: of a root behind a URI in its mirror, where only this machine continues it.

        Raises:
            InputError: the store cannot be used.
        """
        check_sinks(config)
        if not config.enabled:
            return cls(None, None, config=config)
        uri = resolve_uri(config, root)
        check_store(uri)
        here = mirror_of(root)
        replay_pending(here, uri)
        try:
            client = make_client(uri)
            experiment_id = get_experiment_id(client, config.experiment, root)
            store = _Store(client, without_credentials(uri), experiment_id)
            if run_name is None:
                return cls(None, store, config=config, parent_run_id=parent_run_id)
            folder = folder or here / ".mlflow" / run_name
            # In the foreground: the stages need its id.
            parent = store.start(run_name, folder, params, tags, in_foreground=True)
            return cls(parent, store, config=config)
        except InputError:
            raise
        except Exception as error:  # sqlalchemy, requests and MLflow raise their own
            raise unusable(uri, error) from None  # their messages hold the URI with its password

    def stage(
        self,
        name: str,
        *,
        folder: Path,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> MirroredRun:
        """The run of one stage; its log is `folder/log.jsonl`, what is there already included.

        A stage that was interrupted goes on in its old run. One that had finished and is run again
        gets a new run with the new part of the log.

        Args:
            params: settings, nested or flat; those named like secrets are left out.
        """
        sinks = open_sinks(self._config, name, folder, params or {}) if self._config else []
        if self._store is None:
            return MirroredRun(None, sinks)
        parent_id = self.run_id or self._parent_run_id
        parent = {} if parent_id is None else {"mlflow.parentRunId": parent_id}
        delivery = self._store.start(name, folder, params, {**(tags or {}), **parent})
        return MirroredRun(delivery, sinks)


@dataclass(frozen=True)
class _Store:
    client: "MlflowClient"
    uri: str
    experiment_id: str

    def start(
        self,
        name: str,
        folder: Path,
        params: Mapping[str, Any] | None,
        tags: Mapping[str, Any] | None,
        *,
        in_foreground: bool = False,
    ) -> "Delivery[Outbox] | None":
        """Begin a run, or continue the one that the folder's state tells of.

        Returns:
            None if a live run has the folder.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if (lock := lock_folder(folder, is_free_without_locks=True)) is None:
            logger.warning("%s is not recorded in MLflow: a live run has %s already", name, folder)
            return None
        outbox = Outbox(folder, self._first_state(name, folder), recreate=True)
        outbox.add([["param", *param] for param in flatten_params(params or {}).items()])
        outbox.add(_tags(tags or {}))
        try:
            if in_foreground:
                outbox.deliver(self.client)
        except BaseException:
            os.close(lock)
            raise
        return Delivery(outbox, self.client, lock)

    def _first_state(self, name: str, folder: Path) -> RunState:
        now = int(time.time() * 1000)
        state = RunState(uri=self.uri, experiment_id=self.experiment_id, name=name, start_time=now)
        before = load_state(folder)
        if before and before.uri == self.uri:
            state.offset = before.offset
            if before.status != "FINISHED" or not Outbox(folder, before).is_delivered:
                state.run_id, state.queue = before.run_id, before.queue
                state.creation = before.creation
                state.delivered_status = before.delivered_status
        return state


def _tags(tags: Mapping[str, Any]) -> list[list[Any]]:
    return [["tag", *tag] for tag in clean_tags(tags).items()]
