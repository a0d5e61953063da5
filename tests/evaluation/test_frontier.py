"""The front and the operating point, against looking at every pair of points."""

import math

import numpy as np
import pytest

from tokendiff.errors import InputError
from tokendiff.evaluation.frontier import ENTROPY, Point, Rule, draw, frontier_report

RULE = Rule(quality="perplexity", speed="tokens_per_forward", is_lower_better=True)


def point(quality: float, speed: float, entropy: float = 3.0, **fields: float) -> Point:
    figures = {"perplexity": quality, "tokens_per_forward": speed, ENTROPY: entropy}
    return Point(sampler={"name": "sdar", **fields}, figures=figures)


@pytest.mark.parametrize("is_lower_better", [True, False])
def test_the_front_is_what_no_other_point_beats(is_lower_better: bool) -> None:
    chance = np.random.default_rng(0)
    rule = Rule(quality="perplexity", speed="tokens_per_forward", is_lower_better=is_lower_better)
    for _ in range(20):
        values = chance.integers(1, 6, size=(12, 2)).astype(float)
        points = [point(quality, speed) for quality, speed in values]
        expected = set()
        for at, (quality, speed) in enumerate(values):
            gain = (quality - values[:, 0]) * (1 if is_lower_better else -1)
            faster = values[:, 1] - speed
            if not ((gain >= 0) & (faster >= 0) & ((gain > 0) | (faster > 0))).any():
                expected.add(at)
        front = rule.front(points)
        assert set(front) == expected
        speeds = [values[at, 1] for at in front]
        assert speeds == sorted(speeds)


def test_the_front_is_of_points_that_the_rule_allows() -> None:
    rule = Rule(**{**vars(RULE), "min_entropy_nats": 2.0, "within": 9.0})
    points = [
        point(20.0, 1.0),
        point(5.0, 9.0, entropy=1.0),  # beats all, with samples that repeat themselves
        point(30.0, 2.0),
        point(math.nan, 99.0),  # no quality
        point(40.0, 1.5),
    ]
    for lacking in ("tokens_per_forward", "perplexity"):
        figures = {**point(1.0, 99.0).figures}
        del figures[lacking]
        points.append(Point(sampler={"name": "sdar"}, figures=figures))
    assert rule.front(points) == [0, 2]
    assert rule.choose(points) == 2
    assert draw(points, rule, 2).startswith(b"\x89PNG")
    ((_, header, rows),) = frontier_report("toy", points, rule, 2, config_yaml="").tables
    assert {len(row) for row in rows} == {len(header)}
    assert dict(zip(header, rows[-1], strict=True))["perplexity"] == ""
    higher = Rule(**{**vars(rule), "is_lower_better": False})
    assert higher.choose([point(2.0, 1.0), point(math.inf, 9.0)]) == 0  # not a figure


def test_the_report_states_the_rule() -> None:
    fields = {"within": 0.25, "limit": 0.5, "min_entropy_nats": 2.0, "is_lower_better": False}
    rule = Rule(**{**vars(RULE), **fields})
    report = frontier_report("toy", [point(0.9, 1.0)], rule, 0, config_yaml="")
    for part in (
        "higher is better",
        "at most 0.25 of it",
        "at least 0.5",
        f"{ENTROPY} of at least 2",
    ):
        assert part in report.summary[0][2]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, 0),  # the best
        ({"within": 0.01}, 1),
        ({"within": 0.2}, 2),
        ({"within": 9.0}, 3),
        ({"within": 9.0, "min_entropy_nats": 2.5}, 2),
        ({"within": 9.0, "limit": 20.1}, 1),
    ],
)
def test_the_operating_point_is_the_fastest_that_is_good_enough(rule: dict, expected: int) -> None:
    points = [point(20.0, 1.0), point(20.1, 2.0), point(23.0, 3.0), point(60.0, 9.0, entropy=1.0)]
    points.append(point(math.nan, 99.0))
    chosen = Rule(**{**vars(RULE), **rule})
    assert chosen.choose(points) == expected
    turned = [
        Point(sampler=p.sampler, figures={**p.figures, "perplexity": -p.figures["perplexity"]})
        for p in points
    ]
    higher = {**rule, "is_lower_better": False}
    if "limit" in rule:
        higher["limit"] = -rule["limit"]
    assert Rule(**{**vars(RULE), **higher}).choose(turned) == expected


def test_of_equally_fast_points_the_better_one_is_chosen() -> None:
    points = [point(21.0, 2.0), point(20.5, 2.0), point(20.5, 2.0), point(20.0, 1.0)]
    assert Rule(**{**vars(RULE), "within": 0.1}).choose(points) == 1


@pytest.mark.parametrize(("within", "expected"), [(0.0, 0), (0.05, 1), (0.5, 2)])
def test_an_accuracy_may_fall_by_a_share_of_the_best(within: float, expected: int) -> None:
    points = [point(0.8, 1.0), point(0.77, 2.0), point(0.41, 3.0), point(0.39, 4.0)]
    rule = Rule(**{**vars(RULE), "is_lower_better": False, "within": within})
    assert rule.choose(points) == expected


def test_a_rule_that_no_point_satisfies() -> None:
    points = [point(20.0, 1.0), point(30.0, 2.0)]
    with pytest.raises(InputError, match=r"no point reaches the limit 10 .*the best reaches 20;"):
        Rule(**{**vars(RULE), "limit": 10.0}).choose(points)
    higher = {"limit": 40.0, "is_lower_better": False}
    with pytest.raises(InputError, match=r"no point reaches the limit 40 .*the best reaches 30;"):
        Rule(**{**vars(RULE), **higher}).choose(points)
    with pytest.raises(InputError, match=r"min_entropy_nats 4 \(the highest entropy is 3\)"):
        Rule(**{**vars(RULE), "min_entropy_nats": 4.0}).choose(points)


def test_the_report_names_the_points() -> None:
    points = [point(20.0, 1.0, steps=8), point(30.0, 2.0, steps=4), point(40.0, 1.5, steps=2)]
    report = frontier_report("toy", points, RULE, 0, config_yaml="")
    ((_, header, rows),) = report.tables
    assert header[:4] == ["front", "sampler", "perplexity", "tokens_per_forward"]
    assert [row[:2] for row in rows] == [
        ["1", "sdar steps=8"],
        ["2", "sdar steps=4"],
        ["", "sdar steps=2"],
    ]
    assert report.summary[0][1] == "sdar steps=8"
    assert draw(points, RULE, 0).startswith(b"\x89PNG")
