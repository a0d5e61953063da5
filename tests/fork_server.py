"""Workers of Ray that find torch and transformers imported.

A worker takes one to seven seconds of a core until it has imported what it needs, and the tests
start hundreds. `ForkServer` imports most of that once. Its `executable` is given to Ray in place of
Python's: for a worker it hands arguments, environment, folder and streams to the server, waits, and
ends as the fork that ran them did. Anything else it runs in an ordinary process.

What is tested is imported by each worker anew, and so is Ray, which reads the environment when it
is imported. The other libraries have read theirs in the server: OMP_NUM_THREADS and HF_HOME of a
worker change nothing, and all workers have the hash seed of the server. Linux alone has what this
takes (`os.pidfd_open`).
"""

import array
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# The only thread that they start is one of Arrow's allocator, which does without it in a fork.
IMPORTED_BY_WORKERS = (
    "pandas",
    "pyarrow.parquet",
    "pydantic.dataclasses",
    "torch.distributed.fsdp",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.models.qwen3.modeling_qwen3",
    # What Ray imports.
    "click",
    "colorful",
    "fsspec.implementations.local",
    "google.protobuf.json_format",
    "jsonschema",
    "msgpack",
    "pyarrow.pandas_compat",
    "pydantic.deprecated.class_validators",
    "requests",
    "wcwidth",
)

# The first two lines are a shell's, since the path of Python may hold blanks. An ordinary process
# takes this script for its executable too: workers are started by a process of Ray that was itself
# started by it. How a fork ended is said as a code, or as minus a signal.
_CLIENT = """#!/bin/sh
'''exec' "{python}" -ISu "$0" "$@"
' '''
import array, json, os, socket, sys

given = sys.argv[1:]
if not any(each.endswith(("/default_worker.py", "/setup_worker.py")) for each in given):
    flags = [given.pop(0)] if given[0] == "-u" else []
    of = "module" if given[0] == "-m" else "path"
    if of == "module" or not given[0].startswith("-"):
        given = given[1:] if of == "module" else given
        place = "os.getcwd()" if of == "module" else "os.path.dirname(sys.argv[0])"
        code = "import os, runpy, sys; sys.executable = %r; del sys.argv[0]; sys.path[0] = %s; "
        code += "runpy.run_%s(sys.argv[0], run_name='__main__'%s)"
        more = ", alter_sys=True" if of == "module" else ""
        flags += ["-c", code % (sys.argv[0], place, of, more)]
    os.execv({python!r}, [{python!r}, *flags, *given])

server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
server.connect({address!r})
told = json.dumps([given, os.getcwd(), dict(os.environ)]).encode()
streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
server.sendmsg([len(told).to_bytes(8, "little")], streams)
server.sendall(told)
code = int.from_bytes(server.recv(4) or bytes([1, 0, 0, 0]), "little", signed=True)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class ForkServer:
    """A process that waits for `executable` to be run; it ends with the one that made it, and so do
    its forks.

    Args:
        folder: for the executable and the socket, whose path must be short.
        imported: modules that forks find imported.
    """

    def __init__(self, folder: Path, *, imported: Sequence[str] = IMPORTED_BY_WORKERS) -> None:
        address, client = folder / "fork.sock", folder / "python"
        client.write_text(_CLIENT.format(python=sys.executable, address=str(address)))
        client.chmod(0o755)
        self.executable = str(client)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            listening.bind(str(address))
            listening.listen(64)
            number = listening.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(number), *imported],
                stdin=subprocess.PIPE,
                pass_fds=[number],
                start_new_session=True,  # an interrupt from the keyboard is not for it
                cwd=Path(__file__).parents[1],
            )

    @contextmanager
    def used(self) -> Iterator[None]:
        """A Ray that is started in this block has its workers forked."""
        with mock.patch.object(sys, "executable", self.executable):
            yield

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:  # another process has the pipe
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, eq=False)
class _Fork:
    pid: int
    end: int  # a file that can be read once it has ended
    client: socket.socket


class _Server:
    def __init__(self, listening: socket.socket) -> None:
        self._listening = listening
        self._forks: dict[int, _Fork] = {}  # by each of its two files
        self._selector = selectors.DefaultSelector()
        self._selector.register(listening, selectors.EVENT_READ)
        self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ)

    def serve(self) -> list[str]:
        """Fork for each client. In a fork, returns what it is to run; in this process, nothing once
        the one that made it is gone.
        """
        try:
            while True:
                keys = [key for key, _ in self._selector.select()]
                if any(key.fd == sys.stdin.fileno() for key in keys):
                    return []
                for key in keys:
                    # Its number may be that of another file by now.
                    fork = self._forks.get(key.fd)
                    if fork is not None and fork is key.data:
                        if key.fd != fork.end:  # its client was killed, which stands for it
                            _kill(fork.pid)
                        self._finish(fork)
                is_asked = any(key.fd == self._listening.fileno() for key in keys)
                if is_asked and (arguments := self._fork()):
                    return arguments
        finally:
            for fork in self._forks.values():
                _kill(fork.pid)

    def _fork(self) -> list[str]:
        """What to run, in the fork; nothing in this process."""
        client, _ = self._listening.accept()
        streams, told = _read(client)
        if not told:  # it was killed before it had said all
            client.close()
        elif pid := os.fork():
            fork = _Fork(pid, os.pidfd_open(pid), client)
            for file in (fork.end, client.fileno()):
                self._forks[file] = fork
                self._selector.register(file, selectors.EVENT_READ, fork)
        else:
            return self._become(client, streams, *json.loads(told))
        for stream in streams:
            os.close(stream)
        return []

    def _become(
        self,
        client: socket.socket,
        streams: Sequence[int],
        arguments: list[str],
        folder: str,
        environment: dict[str, str],
    ) -> list[str]:
        for each in (self._selector, self._listening, client):
            each.close()
        for fork in set(self._forks.values()):
            os.close(fork.end)
            fork.client.close()
        self._forks.clear()
        os.setpgid(0, 0)  # Ray kills the group of a worker that has ended
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return arguments

    def _finish(self, fork: _Fork) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])
        with suppress(OSError):
            fork.client.sendall(code.to_bytes(4, "little", signed=True))
        for file in (fork.end, fork.client.fileno()):
            self._selector.unregister(file)
            del self._forks[file]
        os.close(fork.end)
        fork.client.close()


def _read(client: socket.socket) -> tuple[Sequence[int], bytes]:
    """The streams of a client, and what it told; nothing of one that ended meanwhile."""
    streams = array.array("i")
    try:
        size, sent, _, _ = client.recvmsg(8, socket.CMSG_SPACE(3 * streams.itemsize))
        for _, _, data in sent:
            streams.frombytes(data)
        told = client.makefile("rb").read(int.from_bytes(size, "little"))
    except OSError:
        return streams, b""
    is_whole = len(streams) == 3 and len(told) == int.from_bytes(size, "little")
    return streams, told if is_whole else b""


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _run(arguments: list[str]) -> None:
    """As Python runs a script with these arguments."""
    script, *_ = sys.argv = arguments[1:] if arguments[0] == "-u" else arguments
    importlib.import_module("numpy").random.seed(None)  # else the same in each fork
    given = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    others = [path for path in sys.path[1:] if path not in given]  # the first was this one's folder
    sys.path[:] = [os.path.dirname(script), *given, *others]
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    number, *imported = sys.argv[1:]
    for name in imported:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # memory that is not written to stays shared
    if arguments := _Server(socket.socket(fileno=int(number))).serve():
        _run(arguments)


if __name__ == "__main__":
    main()
