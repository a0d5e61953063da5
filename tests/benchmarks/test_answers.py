"""The questions of `benchmarks.answers` in short: one model, one sampler with its strategies."""

from pathlib import Path

import pytest

from benchmarks.answers import run


@pytest.mark.slow
def test_a_small_model_answers_questions_that_it_has_not_seen(tmp_path: Path) -> None:
    found = list(
        run(
            ["block_refinement 2d"],
            language="reverse",
            steps=300,
            num_train=4000,
            num_asked=64,
            folder=tmp_path,
        )
    )
    assert [answers.strategy for answers in found] == [
        "quota of 1",
        "threshold 0.9",
        "2 steps, edited",
    ]
    for answers in found[:2]:  # so briefly trained, it is surer than right where it edits
        assert answers.exact >= 0.9, answers
    assert found[0].tokens_per_forward == 1.0
    assert found[1].tokens_per_forward > 1.5
