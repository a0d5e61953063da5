"""What every test starts from: no network, one thread, nothing written to the home folder."""

import ast
import functools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import psutil

_SCRATCH = tempfile.mkdtemp(prefix="tokendiff-", dir="/tmp")  # unix sockets need a short path

# Read when ray, torch, datasets and transformers are imported, and inherited by Ray's processes.
os.environ.update(
    {
        "HF_DATASETS_CACHE": f"{_SCRATCH}/datasets",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
)


def pytest_unconfigure() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)  # there is none without pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Every test by itself to the process that is free, but all tests that use Ray to one, so that
    it starts once.

    `--dist loadgroup` would do, but the groups of pytest-xdist 3.8 are lost under pytest 9.2. The
    process that hands tests out knows no more of them than their ids.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayInOneProcess(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, test = nodeid.partition("::")
            return "ray" if test.split("[")[0] in _ray_tests(config.rootpath / path) else nodeid

    return RayInOneProcess(config, log)


@functools.cache
def _ray_tests(path: Path) -> set[str]:
    """Names of the functions in a file of tests that take `ray_session`."""
    functions = [f for f in ast.walk(ast.parse(path.read_text())) if isinstance(f, ast.FunctionDef)]
    return {f.name for f in functions if "ray_session" in [a.arg for a in f.args.args]}


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of this machine's own, for all tests; its CPUs are counts, so 4 do on any machine."""
    import ray

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


@pytest.fixture(scope="session", autouse=True)
def _no_processes_left_behind() -> Iterator[None]:
    """Set up first, so torn down last: after `ray_session`."""
    import psutil

    yield
    children = psutil.Process().children(recursive=True)
    _, alive = psutil.wait_procs(children, timeout=10)
    left = [name for name in map(_command, alive) if "resource_tracker" not in name]
    assert not left, f"tests left processes running: {left}"


def _command(process: "psutil.Process") -> str:
    import psutil

    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid} (gone)"
