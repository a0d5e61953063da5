"""Keeping what means nothing to a user off the terminal."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Ray Data puts what its actors are made from into the object store, of whatever size, and lets them
# restart, so Ray's C++ reports an error each time that a pool of them starts
# (ray-project/ray#57733). The driver holds these objects as long as it runs: nothing is lost.
_HARMLESS = re.compile(
    rb"\[[^\[\n]*has constructor arguments in the object store and max_restarts > 0[^\n]*\n"
)
_BLOCK_BYTES = 1 << 16
_DRAIN_SECONDS = 1.0


@contextmanager
def without_restart_warning() -> Iterator[None]:
    """In this block, which runs a pool of Ray Data's actors, all of stderr passes but that line.

    No logger or setting of Ray's reaches it but one that would silence every C++ process of a
    cluster, in its log files too. It is written to file descriptor 2 itself, and so is read there.
    """
    try:
        terminal = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    source, sink = os.pipe()
    _flush()
    os.dup2(sink, 2)
    os.close(sink)
    pump = threading.Thread(target=_pump, args=(source, terminal), name="stderr", daemon=True)
    pump.start()
    try:
        yield
    finally:
        _flush()
        os.dup2(terminal, 2)
        # It ends with the last writer, which may be a process that was started meanwhile.
        pump.join(_DRAIN_SECONDS)


def _pump(source: int, terminal: int) -> None:
    while block := os.read(source, _BLOCK_BYTES):
        left = _HARMLESS.sub(b"", block)  # the line is one write, and so in one block
        with contextlib.suppress(OSError):  # a terminal that is gone must not stop who writes
            while left:
                left = left[os.write(terminal, left) :]
    os.close(source)
    os.close(terminal)


def _flush() -> None:
    with contextlib.suppress(OSError, ValueError):  # gone, or closed
        sys.stderr.flush()
