"""Stopping a block of code from another thread, whatever signals the process was started without.

A process inherits which signals are ignored and which are blocked. SIGINT is ignored in a process
that a script starts with `&`, and blocked in all that Ray starts, submitted jobs included. So this
uses SIGURG: nobody else needs it, and it does no harm if it comes too late.
"""

import signal
import sys
import threading
from typing import Any, Self

_SIGNAL = signal.SIGURG
_AGAIN_SECONDS = 0.01
_entered: list["Interrupt"] = []


class Interrupt:
    """A block that other threads can interrupt.

        with Interrupt() as interrupt:
            threading.Timer(60.0, interrupt.send).start()
            ...

    What is raised in it is KeyboardInterrupt, without a word: Ray's calls let nothing else through.
    So who sends one notes why, and says it outside of the block.

    Where it comes in a destructor, which Python lets nothing out of, it is sent again.

    Only the main thread can be interrupted; of another one the block is entered, and `send` does
    nothing.
    """

    def __init__(self) -> None:
        self._is_sent = False
        self._raised: KeyboardInterrupt | None = None
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._is_main:
            self._before = signal.signal(_SIGNAL, _raise_what_was_sent)
            self._hook_before = sys.unraisablehook
            sys.unraisablehook = self._send_again
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {_SIGNAL})
            _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            _entered.remove(self)  # from here on nothing is raised
            signal.signal(_SIGNAL, self._before)
            sys.unraisablehook = self._hook_before
            self._raised = None  # it holds all that the block had

    def send(self) -> None:
        """Raise KeyboardInterrupt in the block, if that is not over; for another thread to call."""
        thread_id = threading.main_thread().ident
        if self._is_main and thread_id is not None:
            self._is_sent = True
            signal.pthread_kill(thread_id, _SIGNAL)

    def _send_again(self, unraisable: Any) -> None:
        error = unraisable.exc_value
        while error is not None and error is not self._raised:  # which another may hide
            error = error.__cause__ or error.__context__
        if error is not None:
            threading.Timer(_AGAIN_SECONDS, self.send).start()  # in here it would be lost as well
        if error is None or error is not unraisable.exc_value:
            self._hook_before(unraisable)


def _raise_what_was_sent(*_: object) -> None:
    for interrupt in _entered:  # also what was sent to a block around the innermost
        if interrupt._is_sent:
            interrupt._is_sent = False
            interrupt._raised = KeyboardInterrupt()
            raise interrupt._raised
