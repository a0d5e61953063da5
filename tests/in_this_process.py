"""Jobs in the process of the test, as jobs themselves do for one worker; here for any number.

That takes a fifth of the time. It is for tests, and parts of tests, that are not about Ray; others
show that Ray changes no result. TESTS_ON_RAY=1 leaves it to Ray all the same.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_WHO_ASKS = ("actors", "evaluate", "preprocess", "train")


@pytest.fixture
def in_this_process(request: pytest.FixtureRequest) -> Iterator[None]:
    if "TESTS_ON_RAY" in os.environ:
        request.getfixturevalue("ray_session")
    with jobs_here():
        yield


@contextmanager
def jobs_here() -> Iterator[None]:
    """Jobs that run inside this block run in this process, unless TESTS_ON_RAY is set."""
    if "TESTS_ON_RAY" in os.environ:
        yield
        return
    stand_ins: dict[str, Any] = {
        # Another test of this process may have connected it.
        "tokendiff.cluster.session.is_connected": lambda: False,
        "tokendiff.cluster.progress.is_connected": lambda: False,
        **{f"tokendiff.cluster.{module}.works_here": lambda count: True for module in _WHO_ASKS},
        # Threads that spin take the cores from the tests beside this one.
        "torch.set_num_threads": lambda num_threads: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(name, stand_in)
        yield
