"""What of stderr reaches a terminal while a pool of Ray Data's actors runs."""

import os
import subprocess
import sys
import textwrap
import threading

import pytest

from tests import ROOT
from tokendiff.cluster.console import without_restart_warning

# As Ray 2.60 writes it.
LINE = (
    b"[2026-11-28 00:57:52,845 E 20180 20180] core_worker.cc:2465: Actor with class name: "
    b"'MapWorker(MapBatches(_PartSampler))' and ID: '7166263fa6d6983cc5f9760c01000000' has "
    b"constructor arguments in the object store and max_restarts > 0. If the arguments in the "
    b"object store go out of scope or are lost, the actor restart will fail. See "
    b"https://github.com/ray-project/ray/issues/53727 for more details.\n"
)


def test_that_line_alone_is_left_out(capfd: pytest.CaptureFixture[str]) -> None:
    with without_restart_warning():
        os.write(2, LINE)
        os.write(2, b"[E 1 1] core_worker.cc:9: something else\n" + LINE + b"half a ")
        os.write(2, LINE + b"line\n")
    os.write(2, b"behind it\n" + LINE)
    shown = "[E 1 1] core_worker.cc:9: something else\nhalf a line\nbehind it\n" + LINE.decode()
    assert capfd.readouterr().err == shown
    assert not [t for t in threading.enumerate() if t.name == "stderr"]


def test_an_error_and_much_text_pass(capfd: pytest.CaptureFixture[str]) -> None:
    text = "x" * 99 + "\n"

    def work() -> None:
        with without_restart_warning():
            for _ in range(10_000):
                os.write(2, text.encode())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert capfd.readouterr().err == text * 10_000


def test_a_process_that_was_started_meanwhile_keeps_its_stderr() -> None:
    """And one without a stderr has no need of it."""
    code = """
        import os, subprocess, sys, time
        from tokendiff.cluster.console import without_restart_warning
        with without_restart_warning():
            child = subprocess.Popen(
                [sys.executable, "-c", "import os, sys; sys.stdin.read(); os.write(2, b'child')"],
                stdin=subprocess.PIPE,
            )
        child.communicate()
        time.sleep(0.2)
        os.close(2)
        with without_restart_warning():
            print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (b"done\n", b"child")
