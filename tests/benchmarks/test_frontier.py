"""The frontier of `benchmarks.frontier` in short: a model hardly trained, eight settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.frontier import SHORT, run
from benchmarks.toy_chain import MarkovChain


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_frontier_is_that_of_an_exhaustive_run(
    tmp_path: Path, load_served: Callable[[str, str], Any]
) -> None:
    """Points, fronts and operating points by two rules; and each registered model writes what the
    sampler writes with the settings that its rule chose.
    """
    findings = run(MarkovChain.random(seed=7), tmp_path, SHORT, load_served)
    assert findings.differences == []
    assert len(set(findings.chosen.values())) > 1  # or the rules could not be told apart
    assert len({point.tokens_per_forward for point in findings.points}) > 2
