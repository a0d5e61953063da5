"""The section `promote`: the gate, and the alias that moves when it is passed."""

import difflib
import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tokendiff.config.base import Section
from tokendiff.config.evaluate import (
    METRICS,
    NUMBERED_METRICS,
    PAIRED_METRICS,
    is_metric,
    is_task_metric,
)


class GateConfig(Section):
    """One thing that a candidate must show before it becomes the champion."""

    metric: str = Field(
        min_length=1,
        description="figure that is compared: one of the evaluation (nats_per_token) or of a task "
        "(arc_easy/acc)",
    )
    direction: Literal["lower", "higher"] = Field(
        description="direction in which the figure is better"
    )
    margin: float = Field(
        0.0,
        description="least improvement on the champion; with 0 an equal figure passes, and a "
        "negative margin allows the candidate to be that much worse",
    )
    min_standard_errors: float = Field(
        0.0,
        ge=0.0,
        description="least improvement on the champion, in standard errors of the difference "
        "paired by row (by document of a task); it applies besides margin. With 2, chance alone "
        "passes in one of 44 cases for many rows, one of 26 for 10 rows, one of 7 for 2 rows; 0 "
        "does not test for chance",
    )
    limit: float | None = Field(
        None, description="value that the candidate must reach, whether there is a champion or not"
    )

    @field_validator("metric")
    @classmethod
    def _is_known(cls, metric: str) -> str:
        if is_metric(metric):
            return metric
        numbered = [name.replace("{}", "N") for name in NUMBERED_METRICS]
        close = difflib.get_close_matches(metric, [*METRICS, *numbered], n=1)
        remedy = (
            f"did you mean {close[0]!r}?"
            if close
            else f"it has {', '.join(PAIRED_METRICS)}, figures of tasks (arc_easy/acc), and others "
            "that its metrics.json lists"
        )
        raise ValueError(f"no evaluation has a figure {metric!r}; {remedy}")

    @model_validator(mode="after")
    def _chance_can_be_told(self) -> "GateConfig":
        if not self.min_standard_errors:
            return self
        if self.metric not in PAIRED_METRICS and not is_task_metric(self.metric):
            raise ValueError(
                f"min_standard_errors: an evaluation keeps no figures by row of {self.metric!r}, "
                f"only of {', '.join(PAIRED_METRICS)} and those of tasks (arc_easy/acc); remove "
                "it, or gate on one of these"
            )
        if self.margin < 0.0:
            raise ValueError(
                f"margin {self.margin:g} allows a worse model, and min_standard_errors asks for a "
                "better one; remove either"
            )
        return self

    def result_fields(self) -> dict[str, Any]:
        fields = super().result_fields()
        if not self.min_standard_errors:  # the gate that it was before there was such a field
            del fields["min_standard_errors"]
        return fields


class PromoteConfig(Section):
    """A checkpoint that passes its gate becomes the champion of a registered model."""

    registered_model: str = Field(
        "tokendiff", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="MLflow: the model's name"
    )
    alias: str = Field(
        "champion",
        pattern=r"^[A-Za-z][A-Za-z0-9_-]*$",
        description="MLflow: the alias that is moved to the new champion",
    )
    gate: list[GateConfig] = Field(
        [GateConfig(metric="nats_per_token", direction="lower")],
        min_length=1,
        description="conditions that must all hold, compared with the champion on the same "
        "held-out rows",
    )

    @field_validator("alias")
    @classmethod
    def _is_free(cls, alias: str) -> str:
        if re.fullmatch(r"latest|v[0-9]+", alias, re.IGNORECASE):
            raise ValueError(
                f"{alias!r} is a name that MLflow keeps for itself; give another one, such as "
                "'champion'"
            )
        return alias
