"""Acceptance lengths of samples, against sums over their blocks one by one."""

import math
import statistics
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tokendiff.evaluation.acceptance import (
    acceptance_metrics,
    accepted_by_row,
    speculation_tables,
    speedup_metrics,
)
from tokendiff.evaluation.paired import paired_standard_error


def record(
    gains: list[int], *, calls: int | None = None, source: str | None = None
) -> dict[str, object]:
    """A row of blocks that added so many tokens each, after one token of the prompt's own pass."""
    return {
        "blocks_by_gain": [gains.count(k) for k in range(1, 5)],
        "tokens": [0] * (3 + 1 + sum(gains)),
        "num_prompt_tokens": 3,
        "gaps": [],
        "num_model_calls": 1 + len(gains) if calls is None else calls,
        "source": source,
    }


def test_figures_are_those_of_the_blocks_one_by_one() -> None:
    rows = [[1, 4, 2], [2, 2], [3, 1, 1, 4, 4], [1]]
    metrics = acceptance_metrics([record(gains) for gains in rows])
    blocks = [gain for gains in rows for gain in gains]
    assert metrics["acceptance_length_mean"] == pytest.approx(statistics.mean(blocks))
    for k in range(1, 5):
        assert metrics[f"acceptance_share_{k}"] == pytest.approx(blocks.count(k) / len(blocks))
    tokens, passes = sum(blocks) + len(rows), len(blocks) + len(rows)
    assert metrics["tokens_per_target_forward"] == pytest.approx(tokens / passes)
    assert not [name for name in metrics if "/" in name]


def test_the_standard_error_is_that_of_repeating_the_whole() -> None:
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        # Rows differ from one another, so that blocks of one row are alike.
        levels = rng.integers(1, 4, size=40)
        rows = [(level + rng.integers(0, 2, size=rng.integers(1, 9))).tolist() for level in levels]
        metrics = acceptance_metrics([record(gains) for gains in rows])
        means.append(metrics["acceptance_length_mean"])
        errors.append(metrics["acceptance_length_standard_error"])
    assert statistics.stdev(means) == pytest.approx(statistics.mean(errors), rel=0.12)


def test_the_standard_error_of_few_rows_is_the_one_that_a_gate_takes() -> None:
    """A gate's error, against a figure without any, is that of the other alone."""
    records = [record(gains) for gains in ([1, 4, 2], [2, 2], [3, 1, 1, 4, 4], [1])]
    blocks = np.array([each["blocks_by_gain"] for each in records])
    rows = {"row_id": np.arange(4), **accepted_by_row(blocks)}
    certain = {**rows, "num_accepted": 2 * rows["num_blocks"]}
    error = paired_standard_error("acceptance_length_mean", rows, certain)
    assert acceptance_metrics(records)["acceptance_length_standard_error"] == pytest.approx(error)


@pytest.mark.parametrize("gains", [[1, 4, 2], []])
def test_a_single_row_has_no_standard_error(gains: list[int]) -> None:
    metrics = acceptance_metrics([record(gains)])
    assert metrics["acceptance_length_mean"] == pytest.approx(sum(gains) / max(len(gains), 1))
    assert "acceptance_length_standard_error" not in metrics
    assert "its standard error" not in [row[0] for row in speculation_tables(metrics)[0][2]]
    assert "acceptance_length_standard_error" in acceptance_metrics([record(gains)] * 2)


def test_records_are_gone_through_once_and_not_kept() -> None:
    alive: set[int] = set()

    class Record(dict[str, Any]):
        def __init__(self, *fields: Any) -> None:
            super().__init__(*fields)
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    most = 0

    def records() -> Iterator[Record]:
        nonlocal most
        for gain in (1, 2, 3, 4, 4):
            yield Record(record([gain], source=f"{gain}.txt"))
            most = max(most, len(alive))

    listed = [record([gain], source=f"{gain}.txt") for gain in (1, 2, 3, 4, 4)]
    assert acceptance_metrics(records()) == acceptance_metrics(listed)
    assert most <= 2
    assert acceptance_metrics(iter(())) == {}


def test_prompt_sources_are_told_apart() -> None:
    records = [
        record([4, 4], source="math.jsonl"),
        record([1], source="chat.jsonl"),
        record([3, 1], source="chat.jsonl"),
        record([2]),
    ]
    metrics = acceptance_metrics(records)
    assert metrics["acceptance_length_mean/math.jsonl"] == 4.0
    assert metrics["acceptance_length_mean/chat.jsonl"] == pytest.approx(5 / 3)
    assert metrics["acceptance_length_mean/prompt"] == 2.0
    assert metrics["acceptance_length_mean"] == pytest.approx(15 / 6)
    # MLflow refuses names with other characters.
    named = acceptance_metrics([record([2], source="my chats (1).jsonl"), record([4])])
    assert named["acceptance_length_mean/my_chats__1_.jsonl"] == 2.0


def test_rows_without_a_block_have_no_acceptance_length() -> None:
    metrics = acceptance_metrics([record([]), record([])])
    assert metrics["acceptance_length_mean"] == 0.0
    assert metrics["tokens_per_target_forward"] == 1.0
    assert not any(math.isnan(value) for value in metrics.values())


def test_speedup_is_a_ratio_of_tokens_per_second() -> None:
    measured = {
        "rows": 8,
        "seconds": 2.0,
        "new_tokens": 300,
        "seconds_alone": 5.0,
        "new_tokens_alone": 250,
        "same_rows": 6,
    }
    metrics = speedup_metrics(measured)
    assert metrics["speedup"] == pytest.approx((300 / 2) / (250 / 5))
    assert metrics["tokens_per_second_with_draft"] == 150.0
    assert metrics["tokens_per_second_alone"] == 50.0
    assert metrics["same_text_fraction"] == 0.75
    assert speedup_metrics({}) == {}


def test_the_report_shows_what_was_measured() -> None:
    metrics = acceptance_metrics([record([4, 1], source="a.txt"), record([2])])
    figures, lengths, sources = speculation_tables({**metrics, "nats_per_token": 1.0})
    assert [row[0] for row in figures[2]] == [
        "acceptance length",
        "its standard error",
        "tokens per target pass",
    ]
    assert lengths[2] == [[1, 1 / 3], [2, 1 / 3], [3, 0.0], [4, 1 / 3]]
    assert sources[2] == [["a.txt", 2.5], ["prompt", 2.0]]
    assert speculation_tables({"nats_per_token": 1.0}) == []
