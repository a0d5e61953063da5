"""What a process inherits of signals, by who started it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_STOPPING = {signal.SIGALRM, signal.SIGINT, signal.SIGTERM, signal.SIGURG}
# Name -> (signals that are ignored, signals that are blocked).
_INHERITED: dict[str, tuple[set[signal.Signals], set[signal.Signals]]] = {
    "a shell": (set(), set()),
    "a script, with &": ({signal.SIGINT}, set()),
    "Ray's job server": (set(), {signal.SIGINT}),
    "whoever ignores all": (_STOPPING, set()),
    "whoever blocks all": (set(), _STOPPING),
}
STARTERS = list(_INHERITED)


@contextmanager
def started_by(starter: str) -> Iterator[None]:
    """This process, as if that had started it."""
    ignored, blocked = _INHERITED[starter]
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
