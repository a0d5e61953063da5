"""The chats of `benchmarks.chats` in short: one model, the loss on the answers."""

from pathlib import Path

import pytest

from benchmarks.chats import ENTROPY, run


@pytest.mark.slow
def test_a_small_model_learns_chats_and_answers_new_questions(
    in_this_process: None, tmp_path: Path
) -> None:
    learnt = next(run(["ar"], steps=250, num_train=3000, num_asked=64, root=tmp_path))
    assert (learnt.objective, learnt.train_on) == ("ar", "answers")
    assert learnt.exact >= 0.9
    assert learnt.bound is not None
    assert -3 * learnt.error < learnt.bound - ENTROPY < 0.02
