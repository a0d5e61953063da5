"""The paired standard error of two evaluations, against resampling the rows."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokendiff.artifacts.manifest import commit
from tokendiff.config.evaluate import PAIRED_METRICS
from tokendiff.config.promote import GateConfig
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.evaluation.bound import summarize
from tokendiff.evaluation.paired import (
    RATIOS,
    documents_file,
    paired_standard_error,
    read_rows,
    write_rows,
)

# The metrics once more, from sums of a numerator and a denominator.
METRICS: dict[str, Callable[[float, float], float]] = {
    "nats_per_token": lambda nats, tokens: nats / tokens,
    "bits_per_byte": lambda nats, num_bytes: nats / num_bytes / math.log(2.0),
    "perplexity": lambda nats, tokens: math.exp(nats / tokens),
    "ar_nats_per_token": lambda nats, tokens: nats / tokens,
    "expected_acceptance_length": lambda accepted, blocks: accepted / blocks,
    "acceptance_length_mean": lambda accepted, blocks: accepted / blocks,
    "tokens_per_target_forward": lambda tokens, passes: tokens / passes,
}


def made_up(
    n: int, *, shared: float = 1.0, better_by: float = 0.0, own: float = 0.2, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Two evaluations of n rows of unequal length, whose nats per token have `shared` in common and
    `own` apart; the second counts fewer tokens in some rows, as another objective does.
    """
    rng = np.random.default_rng(seed)
    tokens = 5 + rng.geometric(1 / 30, size=n)
    difficulty = 2.0 + rng.normal(size=n) * shared - 0.01 * tokens
    sides: list[dict[str, np.ndarray]] = []
    for worse_by in (0.0, better_by):
        counted = tokens - rng.integers(0, 3, size=n) * (len(sides) > 0)
        nats = counted * (difficulty + worse_by + rng.normal(size=n) * own)
        sides.append(
            {
                "row_id": np.arange(n) * 7,
                "nats": nats,
                "num_tokens": counted,
                "num_bytes": 3 * tokens + rng.integers(0, 9, size=n),
                "ar_nats": nats,
                "ar_tokens": counted,
                "num_accepted": nats,
                "num_blocks": counted,
                "num_new_tokens": nats,
                "num_model_calls": counted,
            }
        )
    return sides


def shuffled(rows: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    order = np.random.default_rng(seed).permutation(len(rows["row_id"]))
    return {name: column[order] for name, column in rows.items()}


@pytest.mark.parametrize("metric", PAIRED_METRICS)
@pytest.mark.parametrize("shared", [1.0, 0.0])
def test_the_standard_error_is_that_of_drawing_the_rows_again(metric: str, shared: float) -> None:
    rows, others = made_up(400, shared=shared)
    ratio, rng = RATIOS[metric], np.random.default_rng(1)
    differences = []
    for _ in range(2000):
        drawn = rng.integers(0, 400, size=400)  # the same rows of both: the bootstrap of pairs
        first, second = (
            METRICS[metric](
                float(side[ratio.numerator][drawn].sum()),
                float(side[ratio.denominator][drawn].sum()),
            )
            for side in (rows, others)
        )
        differences.append(first - second)
    error = paired_standard_error(metric, rows, shuffled(others))
    # Two thousand draws know a deviation to 1.6 %.
    assert error == pytest.approx(np.std(differences), rel=0.06)


def test_what_the_rows_have_in_common_is_not_in_it() -> None:
    rows, others = made_up(400)
    columns = ("nats", "num_tokens", "num_bytes")
    alone = [summarize(*(side[name] for name in columns)).standard_error for side in (rows, others)]
    error = paired_standard_error("nats_per_token", rows, others)
    assert error < 0.4 * min(alone)
    # Against an evaluation without deviation, it is the other's own.
    flat = {**rows, "nats": 2.0 * rows["num_tokens"]}
    assert paired_standard_error("nats_per_token", rows, flat) == pytest.approx(alone[0])
    assert paired_standard_error("nats_per_token", rows, shuffled(rows)) == 0.0


@pytest.mark.slow
def test_chance_passes_as_often_as_the_field_says() -> None:
    """Between two models that are equally good; with few rows the quantiles are Student's."""
    text = str(GateConfig.model_fields["min_standard_errors"].description)
    claims = re.findall(r"one of (\d+)(?: cases)? for (many|\d+) rows", text)
    assert [words for _, words in claims] == ["many", "10", "2"]
    rng, num_draws = np.random.default_rng(0), 5000
    for one_of, words in claims:
        n = 400 if words == "many" else int(words)
        passed = 0
        for _ in range(num_draws):
            first, second = rng.normal(size=(2, n))
            sides = [
                {"row_id": np.arange(n), "nats": 9.0 + nats, "num_tokens": np.ones(n)}
                for nats in (first, second)
            ]
            error = paired_standard_error("nats_per_token", *sides)
            passed += second.mean() - first.mean() > 2.0 * error
        share = 1 / int(one_of)
        deviation = math.sqrt(share * (1 - share) / num_draws)
        assert passed / num_draws == pytest.approx(share, abs=3 * deviation)


def test_a_difference_that_nothing_can_be_said_of() -> None:
    rows, others = made_up(30)
    one = [{name: column[:1] for name, column in side.items()} for side in (rows, others)]
    assert paired_standard_error("nats_per_token", *one) == math.inf
    # Two right answers against two wrong ones; a hundred that differ by the same, but for rounding.
    columns: dict[str, np.ndarray] = {"row_id": np.arange(2), "count": np.ones(2)}
    right, wrong = ({**columns, "quiz/acc": np.full(2, value)} for value in (1.0, 0.0))
    assert paired_standard_error("quiz/acc", right, wrong) == math.inf
    assert paired_standard_error("quiz/acc", right, right) == 0.0
    scores = np.random.default_rng(0).random(100)
    columns = {"row_id": np.arange(100), "count": np.ones(100)}
    low, high = ({**columns, "quiz/f1": scores + shift} for shift in (0.0, 0.3))
    assert paired_standard_error("quiz/f1", low, high) == math.inf
    broken = {**others, "nats": np.where(others["row_id"] == 14, np.inf, others["nats"])}
    assert math.isnan(paired_standard_error("nats_per_token", rows, broken))
    nothing = {**others, "num_blocks": np.zeros(30)}
    assert math.isnan(paired_standard_error("acceptance_length_mean", rows, nothing))
    fewer = {name: column[3:] for name, column in others.items()}
    with pytest.raises(InputError, match=r"have 30 and 27 rows, of which 27 are the same"):
        paired_standard_error("nats_per_token", rows, fewer)
    other_ids = {**others, "row_id": others["row_id"] + 7}
    with pytest.raises(InputError, match=r"have 30 and 30 rows, of which 29 are the same"):
        paired_standard_error("nats_per_token", rows, other_ids)


def test_each_task_has_a_file_of_its_documents(tmp_path: Path) -> None:
    for task, value in (("quiz", 0.25), ("riddle", 0.75)):
        (tmp_path / "documents").mkdir(exist_ok=True)
        columns = {"row_id": np.arange(3), "count": np.ones(3), f"{task}/acc": np.full(3, value)}
        write_rows(tmp_path / documents_file(task), columns)
        assert (tmp_path / "documents" / f"{task}.parquet").is_file()
    commit(tmp_path, kind="evaluation")
    for metric, value in (("quiz/acc", 0.25), ("riddle/acc", 0.75)):
        found = read_rows(tmp_path, metric)
        assert found is not None
        assert found[metric].tolist() == [value] * 3
    for metric in ("quiz/f1", "puzzle/acc"):
        assert read_rows(tmp_path, metric) is None


def test_each_figure_is_read_from_the_file_that_has_its_rows(tmp_path: Path) -> None:
    rows, _ = made_up(3)
    sampled = ("num_accepted", "num_blocks", "num_new_tokens", "num_model_calls")
    of_samples = {name: rows[name] + 1.0 for name in sampled}
    write_rows(tmp_path / "sampled_rows.parquet", {"row_id": rows["row_id"], **of_samples})
    of_rows = {name: column for name, column in rows.items() if name not in sampled[2:]}
    write_rows(tmp_path / "rows.parquet", of_rows)
    commit(tmp_path, kind="evaluation")
    for metric in PAIRED_METRICS:
        found = read_rows(tmp_path, metric)
        assert found is not None
        is_of_samples = metric in ("acceptance_length_mean", "tokens_per_target_forward")
        expected = of_samples if is_of_samples else of_rows
        for name in found.keys() - {"row_id"}:
            assert found[name].tolist() == expected[name].tolist()


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "row_id": np.array([3, 2**40]),
        "nats": np.array([0.1, math.inf]),
        "num_tokens": np.array([5, 6]),
    }
    write_rows(tmp_path / "rows.parquet", columns)
    commit(tmp_path, kind="evaluation")
    found = read_rows(tmp_path, "perplexity")
    assert found is not None
    assert found.keys() == columns.keys()
    assert all(np.array_equal(found[name], columns[name]) for name in columns)
    # What is not in it: another column, another file, a metric that nothing is kept of.
    for metric in ("bits_per_byte", "acceptance_length_mean", "distinct_1"):
        assert read_rows(tmp_path, metric) is None
    path = tmp_path / "rows.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"something")
    with pytest.raises(CorruptFileError, match=r"rows.parquet does not match its MANIFEST"):
        read_rows(tmp_path, "perplexity")
