"""Quality against speed: which settings no other beats in both, and the one that a rule chooses."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from tokendiff.errors import InputError
from tokendiff.evaluation.report import Report, Table

ENTROPY = "unigram_entropy_sample_nats"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A setting that was tried.

    Attributes:
        sampler: the fields of its section.
        figures: what was measured.
    """

    sampler: Mapping[str, Any]
    figures: Mapping[str, float]

    @property
    def label(self) -> str:
        fields = [f"{name}={value}" for name, value in self.sampler.items() if name != "name"]
        return " ".join([str(self.sampler["name"]), *fields])


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The fastest point whose quality is nearly the best.

    Attributes:
        quality, speed: names of figures; more speed is better.
        is_lower_better: of quality.
        within: share of the best quality that the chosen one may be worse by.
        limit: quality that it must reach, where given.
        min_entropy_nats: of its samples.
    """

    quality: str
    speed: str
    is_lower_better: bool
    within: float = 0.0
    limit: float | None = None
    min_entropy_nats: float = 0.0

    def loss(self, point: Point) -> float:
        """The point's quality, turned so that lower is better; infinite if it was not measured."""
        value = point.figures.get(self.quality, math.nan)
        if not math.isfinite(value):
            return math.inf
        return value if self.is_lower_better else -value

    def is_eligible(self, point: Point) -> bool:
        """Whether quality and speed were measured, and its samples do not repeat themselves."""
        return (
            self.loss(point) < math.inf
            and self._speed(point) > -math.inf
            and point.figures.get(ENTROPY, math.inf) >= self.min_entropy_nats
        )

    def describe(self) -> str:
        """The rule in words."""
        better = "lower" if self.is_lower_better else "higher"
        words = [
            f"the most {self.speed} of the settings whose {self.quality} ({better} is better) is "
            f"worse than the best by at most {self.within:.3g} of it"
        ]
        if self.limit is not None:
            words.append(f"{'at most' if self.is_lower_better else 'at least'} {self.limit:g}")
        if self.min_entropy_nats:
            words.append(f"of samples with {ENTROPY} of at least {self.min_entropy_nats:g}")
        return ", ".join(words)

    def choose(self, points: Sequence[Point]) -> int:
        """The place of the operating point; of equally fast ones the better, then the first.

        Raises:
            InputError: no point satisfies the rule.
        """
        sound = [at for at, point in enumerate(points) if self.is_eligible(point)]
        if not sound:
            most = max((p.figures.get(ENTROPY, math.nan) for p in points), default=math.nan)
            raise InputError(
                f"frontier: none of the {len(points)} settings has a finite {self.quality}, a "
                f"figure {self.speed}, and samples of at least min_entropy_nats "
                f"{self.min_entropy_nats:g} (the highest entropy is {most:.3g}); lower "
                "min_entropy_nats, or try other settings"
            )
        best = min(self.loss(points[at]) for at in sound)
        worst = best + self.within * abs(best)
        if self.limit is not None:
            worst = min(worst, self.limit if self.is_lower_better else -self.limit)
        allowed = [at for at in sound if self.loss(points[at]) <= worst]
        if not allowed:
            reached = best if self.is_lower_better else -best
            raise InputError(
                f"frontier: no point reaches the limit {self.limit:g} of {self.quality}; the best "
                f"reaches {reached:.6g}; change limit, or try other samplers"
            )
        return min(allowed, key=lambda at: (-self._speed(points[at]), self.loss(points[at]), at))

    def front(self, points: Sequence[Point]) -> list[int]:
        """Places of the eligible points that no other eligible one is better than in one of quality
        and speed without being worse in the other, by rising speed.
        """
        values = {
            at: (self._speed(point), -self.loss(point))
            for at, point in enumerate(points)
            if self.is_eligible(point)
        }
        best = (
            at
            for at, mine in values.items()
            if not any(_beats(value, mine) for value in values.values())
        )
        return sorted(best, key=lambda at: values[at])

    def _speed(self, point: Point) -> float:
        return float(point.figures.get(self.speed, -math.inf))


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def frontier_report(
    title: str, points: Sequence[Point], rule: Rule, chosen: int, *, config_yaml: str
) -> Report:
    """The points as a table, those of the front first and numbered; above it the chosen one."""
    front = rule.front(points)
    names = list(dict.fromkeys([rule.quality, rule.speed, ENTROPY, *_names(points)]))
    order = [*front, *(at for at in range(len(points)) if at not in front)]
    rows = [
        [str(number) if at in front else "", points[at].label, *_cells(points[at], names)]
        for number, at in enumerate(order, start=1)
    ]
    table: Table = ("Points", ["front", "sampler", *names], rows)
    figures = points[chosen].figures
    return Report(
        title=title,
        subtitle=f"{len(points)} settings, {rule.quality} against {rule.speed}",
        explanation=(
            f"Of {len(points)} ways to sample this model, the chosen one is the fastest that is "
            f"good enough: {points[chosen].label}."
        ),
        summary=[
            (
                "Operating point",
                points[chosen].label,
                f"{rule.quality} {figures[rule.quality]:.4g}, {rule.speed} "
                f"{figures.get(rule.speed, math.nan):.4g}: {rule.describe()}",
            )
        ],
        tables=[table],
        config_yaml=config_yaml,
    )


def draw(points: Sequence[Point], rule: Rule, chosen: int) -> bytes:
    """A PNG: every point, the front as a line, and the operating point. The front's points have the
    numbers that `frontier_report` gives them.
    """
    import matplotlib
    from matplotlib.figure import Figure

    known = [at for at in range(len(points)) if rule.loss(points[at]) < math.inf]
    front = rule.front(points)
    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        title = "points of the front are numbered as in the report"
        axes = figure.add_subplot(title=title, xlabel=rule.speed, ylabel=rule.quality)

        def places(chosen: Sequence[int]) -> tuple[list[float], list[float]]:
            of = [points[at].figures for at in chosen]
            return [f.get(rule.speed, 0.0) for f in of], [f[rule.quality] for f in of]

        axes.scatter(*places(known), color="tab:gray", label="tried")
        axes.plot(*places(front), color="tab:blue", marker="o", label="front")
        axes.scatter(
            *places([chosen]), color="tab:red", s=120, marker="*", zorder=3, label="chosen"
        )
        numbers: dict[tuple[float, float], list[str]] = {}
        for number, place in enumerate(zip(*places(front), strict=True), start=1):
            numbers.setdefault(place, []).append(str(number))
        offset = (6, -12) if rule.is_lower_better else (6, 6)  # beside the line, not on it
        for place, found in numbers.items():
            axes.annotate(", ".join(found), place, xytext=offset, textcoords="offset points")
        axes.margins(x=0.1, y=0.1)  # room for the numbers of the outermost points
        axes.grid(alpha=0.3)
        axes.legend()
        png = BytesIO()
        figure.savefig(png, format="png")
    return png.getvalue()


def _names(points: Sequence[Point]) -> list[str]:
    return [name for point in points for name in point.figures]


def _cells(point: Point, names: Sequence[str]) -> list[str]:
    values = [point.figures.get(name) for name in names]
    return ["" if value is None else f"{value:.4g}" for value in values]
