"""What a report is made of."""

from typing import Any

import numpy as np
import pytest

from tokendiff.evaluation.bound import summarize
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
