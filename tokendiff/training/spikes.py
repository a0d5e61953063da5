"""What a spike is, and how many of them end a run.

The figures of a step are its loss and its gradient norm before clipping, both over the whole
global batch, so that all workers judge alike. A step is a spike where a figure is not finite, or
exceeds

    median + spike_deviations * max(1.4826 * MAD, 0.01 * |median|)

of the same figure over the last `spike_window` steps that were no spikes. MAD is the median
absolute deviation; times 1.4826 it is the standard deviation of normal figures. The second term
keeps figures that hardly vary from making everything a spike. Below 16 such steps only figures that
are not finite are spikes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig

MIN_STEPS = 16  # that must be known before a finite figure can be a spike
MOST_SPIKES = 10  # among the last `spike_window` steps
_SIGMA_OF_MAD = 1.4826
_LEAST_SHARE = 0.01


def spike_limit(figures: Sequence[float], *, deviations: float) -> float:
    """The largest value that is no spike after these; infinite where they are too few."""
    if len(figures) < MIN_STEPS:
        return math.inf
    middle = median(figures)
    deviation = median(abs(figure - middle) for figure in figures)
    return middle + deviations * max(_SIGMA_OF_MAD * deviation, _LEAST_SHARE * abs(middle))


@dataclass(kw_only=True)
class SpikeWatch:
    """Judges steps, and remembers those before; what it remembers is part of a checkpoint.

    Attributes:
        action: what is done about a spike: skip, rewind or stop.
        figures: of the last steps that were no spikes, by name.
        spikes: numbers of the steps among the last `window` that were.
        num_spikes: of the whole run.
    """

    action: str
    window: int
    deviations: float
    figures: dict[str, list[float]] = field(default_factory=dict)
    spikes: list[int] = field(default_factory=list)
    num_spikes: int = 0

    @classmethod
    def build(cls, config: "TrainConfig") -> "SpikeWatch | None":
        """None where the config says nothing of spikes."""
        if config.on_spike is None:
            return None
        return cls(
            action=config.on_spike,
            window=config.spike_window,
            deviations=config.spike_deviations,
        )

    def judge(self, step: int, **figures: float) -> str | None:
        """Why this step is a spike, in words; None where it is none, and is remembered then."""
        for name, value in figures.items():
            known = self.figures.get(name, [])
            limit = spike_limit(known, deviations=self.deviations)
            if not math.isfinite(value):
                return self._count(step, f"{name.replace('_', ' ')} is {value}")
            if value > limit:
                return self._count(
                    step,
                    f"{name.replace('_', ' ')} {value:.6g} exceeds {limit:.6g}, the limit after "
                    f"the last {len(known)} steps (median {median(known):.6g})",
                )
        for name, value in figures.items():
            self.figures[name] = [*self.figures.get(name, []), value][-self.window :]
        return None

    def _count(self, step: int, reason: str) -> str:
        self.spikes = [each for each in self.spikes if each > step - self.window] + [step]
        self.num_spikes += 1
        return reason

    @property
    def is_over(self) -> bool:
        """Whether a spike that was just judged ends the run."""
        return self.action == "stop" or len(self.spikes) > MOST_SPIKES

    def last(self, name: str, *, default: float) -> float:
        """A figure of the last step that was no spike."""
        return self.figures[name][-1] if self.figures.get(name) else default

    def counted(self) -> tuple[list[int], int]:
        return self.spikes, self.num_spikes

    def recount(self, counted: tuple[list[int], int]) -> None:
        """Spikes stay counted where a run goes back to what it was before them."""
        self.spikes, self.num_spikes = counted

    def state(self) -> dict[str, Any]:
        """Plain JSON; floats survive JSON exactly."""
        return {
            "figures": self.figures,
            "spikes": self.spikes,
            "num_spikes": self.num_spikes,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.figures = {name: list(values) for name, values in state["figures"].items()}
        self.spikes, self.num_spikes = list(state["spikes"]), state["num_spikes"]
