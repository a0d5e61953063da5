"""Where the MLflow store is, whether it answers, and a client for it."""

import contextlib
import fcntl
import logging
import os
import re
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tokendiff.artifacts.locations import Location
from tokendiff.errors import InputError
from tokendiff.secrets import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from tokendiff.config.pipeline import TrackingConfig

T = TypeVar("T")

_CHECK_SECONDS = 10.0
_SQLITE = re.compile(r"(sqlite(?:\+\w+)?:///)([^?]*)(.*)")
_ENVIRONMENT = {
    # MLflow's own retries block for minutes and repeat what may have arrived; ours are in a thread.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def resolve_uri(config: "TrackingConfig", root: Location) -> str:
    """The store's URI: MLFLOW_TRACKING_URI, else `config.uri`, else a sqlite file under `root`.

    Relative paths are taken from `root`: the working directory of a submitted job is a temporary
    upload.

    Raises:
        InputError: the store would be under a root that is behind a URI.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.uri or "sqlite:///mlflow.db"
    if match := _SQLITE.fullmatch(uri):
        return f"{match[1]}{_below(root, match[2])}{match[3]}"
    if uri.startswith("file:") or (":" not in uri and not uri.startswith("databricks")):
        return f"file://{_below(root, re.sub('^file:(//)?', '', uri))}"
    return uri


def _below(root: Location, path: str) -> str:
    if isinstance(root, Path):
        return os.path.abspath(root / path)
    if os.path.isabs(path):
        return os.path.abspath(path)
    raise InputError(
        f"tracking.uri: the MLflow store {path} would be under root {root}, and a store of files "
        "cannot be behind a URI; give a server (MLFLOW_TRACKING_URI or -o tracking.uri=http://...) "
        "or a file of this machine (-o tracking.uri=sqlite:////absolute/path/mlflow.db), or go on "
        "without MLflow with -o tracking.enabled=false"
    )


def open_command(uri: str) -> str:
    """How to look at the store: a server's own address, or the command that serves a database."""
    uri = without_credentials(uri)
    if _is_server(uri):
        return uri
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"


def is_missing(uri: str) -> bool:
    """Whether the store is a sqlite file that is not there, so that it holds nothing."""
    database = _sqlite_path(uri)
    return database is not None and not database.exists()


def check_store(uri: str) -> None:
    """Find out at the start whether the store can be used; a missing sqlite file is created.

    Raises:
        InputError: it cannot. A server that does not answer is given up after about 10 s.
    """
    # Of a file that another program has locked MLflow itself waits for 20 s.
    limit, attempts = (_CHECK_SECONDS, 3) if _is_server(uri) else (None, 1)
    try:
        client = make_client(uri)
        ask = partial(client.search_experiments, max_results=1)
        _within(limit, lambda: _patiently(ask, attempts))
    except Exception as error:  # sqlalchemy, requests and MLflow raise their own
        raise unusable(uri, error) from None  # their messages hold the URI with its password


def unusable(uri: str, error: Exception) -> InputError:
    """What to tell the user when the store fails before anything has been started."""
    place = "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "tracking.uri"
    return InputError(
        f"{place}: the MLflow store {without_credentials(uri)} cannot be used ({describe(error)}); "
        "bring it up, give another one with -o tracking.uri=..., or go on without MLflow with "
        "-o tracking.enabled=false"
    )


def make_client(uri: str) -> "MlflowClient":
    """A client that fails fast and says little; the first one takes seconds (import, new database).

    `MlflowClient` keeps no state of its own per thread, unlike the fluent `mlflow.log_*`.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It prints the traceback of what it then raises, at each try.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if (database := _sqlite_path(uri)) is None:
        return MlflowClient(uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    with _locked(database.with_name(f"{database.name}.lock")):  # two creators at once crash
        if not os.path.lexists(database):
            _create(uri, database)
        return MlflowClient(uri)


def _create(uri: str, database: Path) -> None:
    """Make a new sqlite file beside its place, and move it there.

    MLflow takes seconds to make one, and cannot use one whose making was cut off.
    """
    from mlflow import MlflowClient

    scratch = database.with_name(f".{database.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    scratch.mkdir()
    try:
        made = scratch / database.name
        MlflowClient(_SQLITE.sub(lambda match: f"{match[1]}{made}{match[3]}", uri))
        os.replace(made, database)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def get_experiment_id(client: "MlflowClient", name: str, root: Location) -> str:
    """The experiment of this name, created if it is missing.

    Without a server, artifacts go beside the sqlite file, else under `root`: MLflow's default is
    `mlruns` in the working directory.

    Raises:
        InputError: the experiment was deleted.
    """
    from mlflow.exceptions import MlflowException

    uri = client.tracking_uri
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database = _sqlite_path(uri)
        beside = database.parent if database else root
        artifacts = (beside.absolute() if isinstance(beside, Path) else beside) / "mlartifacts"
        place = artifacts.as_uri() if isinstance(artifacts, Path) else artifacts.uri
        location = None if _is_server(uri) else place
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:  # else another process was first
                raise error
    if experiment.lifecycle_stage != "active":
        raise InputError(
            f"tracking.experiment: {name!r} was deleted from {without_credentials(uri)}; restore "
            f"it (mlflow experiments restore -x {experiment.experiment_id}) or give another name"
        )
    return experiment.experiment_id


def describe(error: BaseException) -> str:
    """The first cause of an error, on one line and without credentials.

    MLflow wraps a refused connection four times, and its own message repeats the whole URI.
    """
    while cause := error.__cause__ or error.__context__:
        error = cause
    text = without_credentials(str(error)).strip() or type(error).__name__
    return " ".join(text.split())[:500]


def _is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://", "databricks"))


def _sqlite_path(uri: str) -> Path | None:
    match = _SQLITE.fullmatch(uri)
    return Path(match[2]) if match else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _patiently(call: Callable[[], T], attempts: int) -> T:
    """One refusal can be a server that just starts."""
    for _ in range(attempts - 1):
        with contextlib.suppress(Exception):
            return call()
        time.sleep(1.0)
    return call()


def _within(seconds: float | None, call: Callable[[], T]) -> T:
    """Run `call` in a thread, and leave it behind if it takes too long."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]
