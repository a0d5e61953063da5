"""What a report is made of."""

from typing import Any

import pytest

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
