"""An interrupt arrives, wherever the main thread is."""

import sys
import threading
import time

import pytest

from pipelines.interrupt import Interrupt


@pytest.mark.parametrize("is_nested", [False, True])
def test_one_that_a_destructor_swallows_is_sent_again(is_nested: bool) -> None:
    """As the callbacks of weak references do, of which imports have many."""
    swallowed = []

    class Slow:
        def __del__(self) -> None:
            try:
                time.sleep(5)
            except KeyboardInterrupt:
                swallowed.append(True)
                raise

    def work(interrupt: Interrupt) -> None:
        threading.Timer(0.1, interrupt.send).start()
        Slow()
        time.sleep(5)

    def nested(interrupt: Interrupt) -> None:
        with Interrupt():
            work(interrupt)

    start, hook = time.monotonic(), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        (nested if is_nested else work)(interrupt)
    assert swallowed
    assert time.monotonic() - start < 4
    assert sys.unraisablehook is hook


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_a_destructor_makes_another_error_of_is_sent_again() -> None:
    class Slow:
        def __del__(self) -> None:
            try:
                time.sleep(5)
            except KeyboardInterrupt as error:
                raise ValueError("not closed") from error

    def work(interrupt: Interrupt) -> None:
        threading.Timer(0.1, interrupt.send).start()
        Slow()
        time.sleep(5)

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        work(interrupt)
    assert time.monotonic() - start < 4
