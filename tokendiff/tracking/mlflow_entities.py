"""What MLflow stores of our configs and events: params, tags and metrics within its limits."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokendiff.secrets import is_secret_name, without_credentials

# The limits of MLflow's stores (mlflow.utils.validation); a tag's was 5,000 in older servers.
MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000
MAX_DIGEST_LENGTH = 36

Metric = tuple[str, float, int, int]
"""Name, value, milliseconds since the epoch, step."""


def clean_name(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name)[:MAX_NAME_LENGTH]


def clean_value(value: Any, limit: int) -> str:
    text = str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)
    text = without_credentials(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {clean_name(name): clean_value(value, MAX_TAG_LENGTH) for name, value in tags.items()}


def flatten_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by their dotted names, as text; those named like a secret are left out."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if is_secret_name(name):
            continue
        if isinstance(value, Mapping):
            flat |= flatten_params(value, f"{name}.")
        else:
            flat[clean_name(name)] = clean_value(value, MAX_PARAM_LENGTH)
    return flat


def metrics_and_tags(
    events: Iterable[dict[str, Any]], folder: Path
) -> tuple[list[Metric], dict[str, str]]:
    """The metrics and tags that MLflow gets for the events of a log.

    Every number of a "metrics" or "heldout" event is a metric at the event's step and time. An
    infinite one becomes a tag: the stores would turn it into 1.8e308. Tags are also the newest
    checkpoint, as a URI (`folder` is what its path is relative to), the last error, and the facts
    of "start": a later attempt may change them, and a param can never be changed.
    """
    metrics: list[Metric] = []
    tags: dict[str, str] = {}
    for event in events:
        fields = {key: value for key, value in event.items() if key not in ("time", "event")}
        match event["event"]:
            case "metrics" | "heldout":
                step = fields.pop("step")
                numbers = {key: value for key, value in fields.items() if _is_number(value)}
                for key, value in numbers.items():
                    if math.isinf(value):
                        tags[f"infinite.{key}"] = f"{value} at step {step}"
                    else:
                        metrics.append((clean_name(key), value, round(event["time"] * 1000), step))
            case "checkpoint":
                path = str(fields["path"])
                tags["checkpoint"] = path if "://" in path else (folder / path).as_uri()
                tags["checkpoint.step"] = str(fields["step"])
            case "start":
                tags |= {f"start.{key}": value for key, value in flatten_params(fields).items()}
            case "error":
                tags["error"] = str(fields["message"])
    return metrics, clean_tags(tags)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
