"""One run at a time: a lock on the folder, and on a cluster a name that only one can have.

The system frees the first when its holder dies, the cluster the second: an actor goes with the
driver that made it.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_NAMESPACE = "tokendiff-locks"
_ANSWER_SECONDS = 5.0


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock.

    Raises:
        BlockingIOError: another run holds it; the message says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / ".lock.holder"
    try:
        with FileLock(folder / ".lock", timeout=0):
            holder.write_text(json.dumps(_myself()))
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout as error:
        raise _taken(folder, _read(holder)) from error


@contextmanager
def alone_on_cluster(folder: Path) -> Iterator[None]:
    """Hold the folder's name on the connected Ray cluster, whatever machine its file system is on.

    Raises:
        BlockingIOError: another driver holds it.
    """
    import ray

    class Holder:
        def __init__(self, description: dict[str, str]) -> None:
            self._description = description

        def describe(self) -> dict[str, str]:
            return self._description

    name = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
    options = {"name": name, "namespace": _NAMESPACE, "num_cpus": 0}
    try:
        actor: Any = ray.remote(Holder).options(**options).remote(_myself())
    except ValueError as error:  # the name is taken
        raise _taken(folder, _ask(name)) from error
    try:
        ray.get(actor.describe.remote())  # the name is ours once it answers
        yield
    finally:
        if ray.is_initialized():
            ray.kill(actor)


def _ask(name: str) -> dict[str, str]:
    import ray

    try:
        actor = ray.get_actor(name, namespace=_NAMESPACE)
        answer: Any = ray.get(actor.describe.remote(), timeout=_ANSWER_SECONDS)
    except (ValueError, ray.exceptions.RayError):  # it is just ending
        return {}
    return dict(answer)


def _myself() -> dict[str, str]:
    since = datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return {"host": socket.gethostname(), "pid": str(os.getpid()), "since": since}


def _read(path: Path) -> dict[str, str]:
    try:
        holder: dict[str, str] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return holder


def _taken(folder: Path, holder: dict[str, str]) -> BlockingIOError:
    who = (
        f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
        if {"pid", "host", "since"} <= holder.keys()
        else ""
    )
    return BlockingIOError(
        f"{folder}: another run that writes there is under way{who}; wait for it, or choose "
        "another folder or name"
    )
