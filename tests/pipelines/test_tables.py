"""What the table at the end of a run, and a job of samples, show."""

from typing import Any

import pytest

from pipelines import tables
from pipelines.record import StageRecord


@pytest.mark.parametrize(
    ("prompt", "text", "gaps", "shown"),
    [
        ("Why?", "system\nBe kind.\nuser\nWhy?\nassistant\nSo.", [], "Why?\n-> So."),
        ("Why?", "Why? So.", [], "Why? So."),
        ("Why?", " Why? So.", [], " Why? So."),
        ("Why?", "why? so.", [], "why? so."),
        ("Why [MASK]?", "I ask: Why [MASK]?", [3], "I ask: Why [MASK]?"),
        ('[{"role": "user", "content": "Why?"}]', "user\nWhy?\nSo.", [], "user\nWhy?\nSo."),
        (None, "So.", [], "So."),
    ],
)
def test_of_a_chat_question_and_answer_are_shown(
    prompt: str | None, text: str, gaps: list[int], shown: str
) -> None:
    record: dict[str, Any] = {"prompt": prompt, "text": text, "completion": "So.", "gaps": gaps}
    assert tables.to_read(record) == shown


def test_the_table_of_a_run_shows_chats_so(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"id": 0, "prompt": "Why?", "text": "user\nWhy?\nassistant\nSo.", "completion": "So."}
    monkeypatch.setattr(tables, "verify", lambda *_, **__: None)
    monkeypatch.setattr(tables, "first_records", lambda *_: [{**record, "gaps": []}])
    result = {"tokens_per_second": None, "output_dir": str(tmp_path)}
    assert tables._sampling_lines(result) == [("sample 0", "Why?\n-> So.")]


@pytest.mark.parametrize(
    ("state", "shown"), [("ran", "m is v2"), ("done", "m is v2, as an earlier run left it")]
)
def test_a_promotion_of_an_earlier_run_does_not_say_where_the_alias_is(
    state: Any, shown: str
) -> None:
    result = {"gate": ["passed"], "decision": "promoted", "summary": "m is v2"}
    record = StageRecord(stage="a", kind="promote", key="", folder="", state=state, result=result)
    assert tables.figure_lines([record]) == [("gate", "passed"), ("promoted", shown)]


def test_a_bound_above_the_entropy_is_no_proof_that_nothing_was_learnt() -> None:
    """The entropy of a few dozen held-out tokens is far below that of the language."""
    assert tables._apart(3.0, 2.0) == "50 % above that entropy: no use of context is shown yet"
    assert tables._apart(1.0, 2.0) == "50 % below that entropy"
