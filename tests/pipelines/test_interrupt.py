"""An interrupt arrives, wherever the main thread is."""

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

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        (nested if is_nested else work)(interrupt)
    assert swallowed
    assert time.monotonic() - start < 4
