"""What `jobs.generate` shows of its samples."""

from typing import Any

import pytest

from jobs.generate import _of_many_prompts, _to_read


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [("aaabbbcc", [0, 1, 3, 6]), ("abcdef", [0, 1, 2, 3]), ("aa", [0, 1]), ("", [])],
)
def test_a_sample_of_each_prompt_is_shown_first(prompts: str, shown: list[int]) -> None:
    records: list[dict[str, Any]] = [
        {"id": number, "prompt": prompt} for number, prompt in enumerate(prompts)
    ]
    assert [record["id"] for record in _of_many_prompts(records, 4)] == shown


@pytest.mark.parametrize(
    ("prompt", "is_chat", "text", "shown"),
    [
        ("Why?", True, "system\nBe kind.\nuser\nWhy?\nassistant\nSo.", "Why?\n-> So."),
        ("Why?", False, "Why? So.", "Why? So."),
        ('[{"role": "user", "content": "Why?"}]', True, "user\nWhy?\nSo.", "user\nWhy?\nSo."),
        (None, True, "So.", "So."),
    ],
)
def test_of_a_chat_question_and_answer_are_shown(
    prompt: str | None, is_chat: bool, text: str, shown: str
) -> None:
    record: dict[str, Any] = {"prompt": prompt, "text": text, "completion": "So.", "gaps": []}
    assert _to_read(record, is_chat) == shown
