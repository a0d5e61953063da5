"""What `jobs.generate` shows of its samples."""

from typing import Any

import pytest

from jobs.generate import _of_many_prompts


@pytest.mark.parametrize(
    ("prompts", "shown"),
    [("aaabbbcc", [0, 1, 3, 6]), ("abcdef", [0, 1, 2, 3]), ("aa", [0, 1]), ("", [])],
)
def test_a_sample_of_each_prompt_is_shown_first(prompts: str, shown: list[int]) -> None:
    records: list[dict[str, Any]] = [
        {"id": number, "prompt": prompt} for number, prompt in enumerate(prompts)
    ]
    assert [record["id"] for record in _of_many_prompts(records, 4)] == shown
