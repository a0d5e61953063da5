"""What a report is made of."""

from typing import Any

import numpy as np
import pytest

from tokendiff.evaluation.bound import summarize
from tokendiff.evaluation.report import Report
from tokendiff.evaluation.summary import make_report


@pytest.mark.parametrize("is_joint", [False, True])
def test_the_curve_beside_the_entropy_is_of_the_same_kind(is_joint: bool) -> None:
    """A sum of two losses would stand above the entropy, whatever was learnt."""
    event: dict[str, Any] = {"event": "metrics", "step": 1, "loss": 6.0, "elbo": 3.5}
    if is_joint:
        event["ar_nll"] = 2.5
    report = make_report(
        title="t",
        subtitle="",
        split="heldout",
        bound=None,
        metrics={},
        samples=[],
        training_log=[event],
        trace=None,
        config_yaml="",
    )
    assert report.loss_curve == [(1, 3.5 if is_joint else 6.0)]
    assert ("blocks" in report.loss_label) is is_joint
    both = {"next-token loss, nats per token": [(1, 2.5)], "both losses, weighted": [(1, 6.0)]}
    assert {name: report.curves.get(name) for name in both} == (
        both if is_joint else dict.fromkeys(both)
    )


@pytest.mark.parametrize(
    ("split", "said", "unsaid"),
    [("heldout", "held-out", "training"), ("train", "training", "held-out")],
)
def test_the_report_says_which_rows_it_is_of(split: str, said: str, unsaid: str) -> None:
    bound = summarize(np.array([9.0, 8.0]), np.array([3, 2]), np.array([9, 8]))
    acceptance = {
        "expected_acceptance_length": 1.5,
        "expected_acceptance_length_standard_error": 0.1,
        "num_blocks": 3,
    }
    reports = [
        make_report(
            title="t",
            subtitle="",
            split=split,
            bound=of,
            metrics=metrics,
            samples=[],
            training_log=[],
            trace=None,
            config_yaml="",
        )
        for of, metrics in ((bound, {"unigram_entropy_nats": 2.0}), (None, acceptance))
    ]

    assert all(said in report.explanation for report in reports)
    assert all(unsaid not in report.explanation for report in reports)
    assert reports[0].summary[0][2].endswith(f"of 5 {said} tokens")


def report_of(metrics: dict[str, Any], **fields: Any) -> Report:
    given: dict[str, Any] = {
        "title": "t",
        "subtitle": "",
        "split": "heldout",
        "bound": None,
        "samples": [],
        "training_log": [],
        "trace": None,
        "config_yaml": "",
    }
    return make_report(metrics=metrics, **{**given, **fields})


@pytest.mark.parametrize("is_exact", [False, True])
def test_the_headline_says_what_a_figure_is(is_exact: bool) -> None:
    bound = summarize(np.array([9.0, 8.0]), np.array([3, 2]), np.array([9, 8]))
    metrics = {
        "unigram_entropy_nats": 2.0,
        "tokens_per_forward": 1.5,
        "num_model_calls": 8.0,
        "generative_perplexity": 12.34,
        "lacking": None,
        **({"is_exact": True} if is_exact else {}),
    }
    speeds = [{"step": step, "tokens_per_second": speed} for step, speed in ((1, 9), (2, 5e3))]
    log = [*speeds, {"step": 3, "tokens_per_second": 30.0}, {"step": 3, "loss": 2.0}]
    samples = [{"id": number} for number in range(20)]
    report = report_of(metrics, bound=bound, training_log=log, samples=samples)
    shown = {label: (value, note) for label, value, note in report.summary}
    name = "Likelihood" if is_exact else "Bound"
    assert shown[name][0].startswith("3.400 ± ")
    assert ("upper bound" in shown[name][1]) is not is_exact
    assert shown["Perplexity"][0] == ("30.0" if is_exact else "at most 30.0")
    # 17 nats in 17 bytes, and 5 tokens of 2 nats.
    assert shown["Bits per byte"][0] == "1.443"
    assert "0.849 at the unigram entropy" in shown["Bits per byte"][1]
    assert shown["Training speed"][0] == "30 tokens/s"
    assert shown["Tokens per forward pass"][0] == "1.50"
    assert shown["Generative perplexity"][0] == "12.3"
    assert [record["id"] for record in report.samples] == list(range(16))
    assert report.metrics.keys() == metrics.keys() - {"lacking"}


def test_a_draft_is_shown_place_by_place() -> None:
    metrics: dict[str, Any] = {
        "expected_acceptance_length": 1.875,
        "expected_acceptance_length_standard_error": 0.05,
        "num_blocks": 8,
    }
    at, right = (0.5, 0.25, 0.125), (0.5, 0.4, 0.3)
    for place in (1, 2, 3):
        metrics[f"expected_acceptance_at_{place}"] = at[place - 1]
        metrics[f"draft_accuracy_{place}"] = right[place - 1]
    report = report_of(metrics)
    (length, value, note), (_, first, _) = report.summary
    assert (length, value) == ("Expected acceptance length", "1.875 ± 0.050 tokens a block")
    assert "of at most 4:" in note
    assert first == "50.0%, 25.0%, 12.5%"
    ((_, _, rows),) = report.tables
    assert rows == [[1, 0.5, 0.5], [2, 0.4, 0.25], [3, 0.3, 0.125]]
