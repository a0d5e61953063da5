"""What every test starts from: no network, one thread, nothing written to the home folder."""

import ast
import functools
import gc
import importlib.util
import logging
import os
import shutil
import socket
import sqlite3
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from tests.fork_server import ForkServer
from tests.in_this_process import in_this_process  # noqa: F401  # a fixture

if TYPE_CHECKING:
    import psutil

_SCRATCH = tempfile.mkdtemp(prefix="tokendiff-", dir="/tmp")  # unix sockets need a short path
# Nobody else is given the port while this is bound. The server of the fixture `s3` may bind it too,
# even where a fork still holds this, and would be waited for without end if it could not.
_S3_SOCKET = socket.socket()
_S3_SOCKET.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
_S3_SOCKET.bind(("127.0.0.1", 0))
S3_PORT = _S3_SOCKET.getsockname()[1]

# Read when ray, torch, datasets and transformers are imported, and inherited by Ray's processes.
os.environ.update(
    {
        # s3:// is the server of the fixture `s3`, which Ray's processes must know from the start.
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3_PORT}",
        "AWS_SECRET_ACCESS_KEY": "test",
        "HF_DATASETS_CACHE": f"{_SCRATCH}/datasets",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more for each run
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "TOKENDIFF_CACHE": f"{_SCRATCH}/cache",
        "TOKENIZERS_PARALLELISM": "false",
    }
)

gc.set_threshold(50_000)  # as jobs have, which import as much


def pytest_unconfigure() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest -m gpu` runs where torch, transformers and pytest alone are installed; pyproject.toml
    has a setting of pytest-timeout.
    """
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds for a test; there is nothing here that reads it")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Of the files with other tests most need more than is installed there."""
    if config.option.markexpr != "gpu" or collection_path.suffix != ".py":
        return None
    return "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_finish() -> None:
    _freeze(len(sys.modules) // 100)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts a cluster is slow, so that `-m "not slow"` is all that need not."""
    for item in items:
        if item.get_closest_marker("ray") is not None:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)  # there is none without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Every test by itself to the process that is free, but all tests that use Ray to one, so
    that it starts once; and so with each other fixture that takes long to make. Several Rays side
    by side were slower: more processes start at once than two cores can bear.

    `--dist loadgroup` would do, but the groups of pytest-xdist 3.8 are lost under pytest 9.2. The
    process that hands tests out knows no more of them than their ids.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayInOneProcess(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, test = nodeid.partition("::")
            shared = _shared_by(config.rootpath / path).get(test.split("[")[0])
            return nodeid if shared is None else shared

    return RayInOneProcess(config, log)


@functools.cache
def _step_back() -> None:
    """The tests that use Ray, one behind the other, take longest, those of submitted jobs next; so
    the other processes of pytest-xdist leave the cores to theirs, and are done before them all the
    same.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.nice(5)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if {"ray_session", "head"}.isdisjoint(getattr(item, "fixturenames", ())):
        _step_back()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """A job in this process may have taken more threads, which spin beside the tests to come, and
    round sums otherwise.
    """
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    _freeze(len(sys.modules) // 100)


@functools.cache
def _freeze(num_modules_in_hundreds: int) -> None:
    """Exclude the objects that exist now, above all those of modules, from later collections of
    garbage: a job collects when it ends, which took half a second each time. The argument is there
    so that it is done once for every hundred modules.
    """
    gc.collect()
    gc.freeze()


_FORKS = "run_distributed"  # of a process that has imported what they need
_LONG_TO_MAKE = {
    name: name
    for name in (
        "groups",
        "head",
        "history",
        "portable_failures",
        "ray_session",
        "trained",
        "tried",
    )
} | {"whole": _FORKS, _FORKS: _FORKS}


@functools.cache
def _shared_by(path: Path) -> dict[str, str]:
    """Of the functions in a file of tests, those that take a fixture that is long to make, or call
    such a function; and which.
    """
    functions = [f for f in ast.walk(ast.parse(path.read_text())) if isinstance(f, ast.FunctionDef)]
    shared = {}
    for function in functions:
        names = {argument.arg for argument in function.args.args}
        names |= {_FORKS for node in ast.walk(function) if getattr(node, "id", None) == _FORKS}
        found = {_LONG_TO_MAKE[name] for name in names & _LONG_TO_MAKE.keys()}
        assert len(found) < 2, (
            f"{path}: {function.name} takes {found}, each of a process of its own"
        )
        if found:
            (shared[function.name],) = found
    return shared


@pytest.fixture(scope="session")
def workers_forked() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Makes a block that has the workers of a Ray that is started in it forked, where they can
    be.
    """
    if not hasattr(os, "pidfd_open"):
        yield nullcontext
        return
    server = ForkServer(Path(_SCRATCH))
    yield server.used
    server.close()


@pytest.fixture(scope="session")
def ray_session(workers_forked: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """A Ray of this machine's own, for all tests; its CPUs are counts, so 4 do on any machine."""
    import ray

    with workers_forked():
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=200 << 20,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=f"{_SCRATCH}/ray",
        )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True, scope="session")
def stores_copied() -> Iterator[None]:
    """MLflow takes a second to make the tables of a new sqlite file. In this process it makes them
    once, and the next files have a copy.
    """
    if importlib.util.find_spec("mlflow") is None:
        yield
        return
    from tokendiff.tracking import mlflow_store

    create, made = mlflow_store._create, sqlite3.connect(":memory:", check_same_thread=False)

    def create_with_copies(uri: str, database: Path) -> None:
        from mlflow.store.db import utils

        make_tables = utils._initialize_tables

        def copy_tables(engine: Any) -> None:
            with closing(engine.raw_connection()) as connection:
                if not made.execute("PRAGMA page_count").fetchone()[0]:
                    make_tables(engine)
                    connection.driver_connection.backup(made)
                else:
                    made.backup(connection.driver_connection)

        with mock.patch.object(utils, "_initialize_tables", copy_tables):
            create(uri, database)

    with closing(made), mock.patch.object(mlflow_store, "_create", create_with_copies):
        yield


@pytest.fixture(autouse=True, scope="session")
def activations_remembered() -> Iterator[None]:
    """To find what a pass of a small model keeps takes longer than the pass. In this process it is
    found once for each model, objective and shape.
    """
    if importlib.util.find_spec("torch") is None:
        yield
        return
    from tokendiff.training import memory

    find, found = memory.activation_bytes, {}

    def find_once(config: Any, model: Any, rows: int, length: int, device: Any) -> Any:
        settings = ("objective", "mixed_precision", "gradient_checkpointing", "keep_base")
        key = (
            *(str(getattr(config, name)) for name in settings),
            *(repr(model), repr(model.config), rows, length, device),
            *(parameter.requires_grad for parameter in model.parameters()),
        )
        if key not in found:
            found[key] = find(config, model, rows, length, device)
        return found[key]

    with mock.patch.object(memory, "activation_bytes", find_once):
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URI of a bucket on an S3 server in this process."""
    from moto import backends
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=S3_PORT, verbose=False)
    _S3_SOCKET.close()
    server.start()
    bucket = urllib.request.Request(f"http://127.0.0.1:{S3_PORT}/bucket", method="PUT")
    # It looks its modules up at each request, in the file system.
    modules = list(backends.list_of_moto_modules())
    with (
        mock.patch.object(backends, "list_of_moto_modules", return_value=modules),
        urllib.request.urlopen(bucket),
    ):
        yield "s3://bucket"
    server.stop()


@pytest.fixture
def load_served(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Load (store, model URI) as a server would. MLflow would leave the store in the environment,
    and the code that comes with the model in front of ours on the path, for tests still to come.
    """

    def load(store: str, uri: str) -> Any:
        import mlflow

        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        monkeypatch.setattr(sys, "path", list(sys.path))
        return mlflow.pyfunc.load_model(uri)

    return load


@pytest.fixture(scope="session", autouse=True)
def _no_processes_left_behind() -> Iterator[None]:
    """Set up first, so torn down last: after `ray_session`."""
    yield
    if importlib.util.find_spec("psutil") is None:  # nor is there Ray
        return
    import psutil

    # Helpers of multiprocessing end with this process.
    helpers = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
    children = [
        child
        for child in psutil.Process().children(recursive=True)
        if not any(helper in _command(child) for helper in helpers)
    ]
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, f"tests left processes running: {[_command(child) for child in alive]}"


def _command(process: "psutil.Process") -> str:
    import psutil

    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid} (gone)"
