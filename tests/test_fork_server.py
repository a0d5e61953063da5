"""That a fork is, to whoever starts it, what Python would have been."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fork_server import ForkServer

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="forks need os.pidfd_open")

_SAYS = """
import os, sys
print(sys.argv[1:], sys.stdin.read(), os.getcwd(), os.environ.get("WORD"), "numpy" in sys.modules,
      sys.path[:2], __name__, os.environ.get("PATH"), flush=True)
print("to stderr", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # unix sockets need a short path
        server = ForkServer(Path(folder), imported=["numpy"])
        yield server
        server.close()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """What a worker of Ray is told by."""
    return tmp_path / "default_worker.py"


def test_a_fork_has_arguments_streams_environment_and_folder(
    server: ForkServer, script: Path, tmp_path: Path
) -> None:
    script.write_text(_SAYS + "sys.exit(7)\n")
    environment = {"WORD": "said", "PYTHONPATH": str(tmp_path / "more")}
    done = subprocess.run(
        [server.executable, "-u", str(script), "--a", "b c"],
        env=environment,
        cwd="/",
        input="asked",
        capture_output=True,
        text=True,
    )
    path = [str(tmp_path), str(tmp_path / "more")]
    assert done.stdout == f"['--a', 'b c'] asked / said True {path} __main__ None\n"
    assert done.stderr == "to stderr\n"
    assert done.returncode == 7


def test_it_ends_as_its_fork_does_and_the_fork_with_it(
    server: ForkServer, script: Path, tmp_path: Path
) -> None:
    script.write_text("import os\nos.kill(os.getpid(), 9)\n")
    assert subprocess.run([server.executable, str(script)]).returncode == -signal.SIGKILL
    script.write_text("raise ValueError('no')\n")
    failed = subprocess.run([server.executable, str(script)], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.endswith("ValueError: no\n")
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    client = subprocess.Popen([server.executable, str(script)], stdout=subprocess.PIPE)
    assert client.stdout is not None
    fork = psutil.Process(int(client.stdout.readline()))
    client.kill()
    client.wait()
    client.stdout.close()
    fork.wait(timeout=20)  # as long as the server needs to see it


def test_a_client_that_ends_before_it_has_said_all_is_none(
    server: ForkServer, script: Path
) -> None:
    address = str(Path(server.executable).with_name("fork.sock"))
    for said in (b"", b"12", (5).to_bytes(8, "little") + b"[]"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(address)
            client.sendall(said)
    script.write_text("print(5)\n")
    done = subprocess.run([server.executable, str(script), "-u"], capture_output=True, check=True)
    assert done.stdout == b"5\n"


def test_forks_end_with_their_server(script: Path) -> None:
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        server = ForkServer(Path(folder), imported=["numpy"])
        client = subprocess.Popen([server.executable, str(script)], stdout=subprocess.PIPE)
        assert client.stdout is not None
        fork = psutil.Process(int(client.stdout.readline()))
        server.close()
        fork.wait(timeout=20)
        assert client.wait(timeout=20) != 0
        client.stdout.close()


def test_all_else_is_an_ordinary_process_that_hands_the_executable_on(
    server: ForkServer, tmp_path: Path
) -> None:
    code = (
        "import os, sys; print(sys.executable, 'numpy' in sys.modules, sys.argv[1:], sys.path[0])"
    )
    (tmp_path / "module.py").write_text(code)
    expected = f"{server.executable} False ['a']"
    for command in (["-m", "module", "a"], ["-u", str(tmp_path / "module.py"), "a"]):
        said = subprocess.run(
            [server.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert said.stdout == f"{expected} {tmp_path}\n"
    said = subprocess.run(
        [server.executable, "-c", code, "a"], capture_output=True, text=True, check=True
    )
    assert said.stdout == f"{sys.executable} False ['a'] \n"
    with server.used():
        assert sys.executable == server.executable
    assert sys.executable != server.executable
