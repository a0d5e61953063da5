"""What tasks came to by document, from the samples that lm-evaluation-harness logs: one for each
document and filter.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokendiff.evaluation.paired import COUNT, ROW_ID

Samples = Sequence[Mapping[str, Any]]
Columns = dict[str, np.ndarray]


def figure_name(task: str, metric: str, filter_name: str) -> str:
    return f"{task}/{metric}" + ("" if filter_name == "none" else f"/{filter_name}")


def num_judged(samples: Mapping[str, Samples]) -> dict[str, int]:
    """Documents by task, without those that no metric is of."""
    return {
        task: len({_row_id(sample) for sample in found if sample["metrics"]})
        for task, found in samples.items()
    }


def digest_of(samples: Samples) -> str:
    """A digest of all that a task asked: its documents, prompts, choices, settings and targets."""
    asked = sorted(
        {
            json.dumps([s["doc_id"], s["arguments"], s["target"]], sort_keys=True, default=str)
            for s in samples
        }
    )
    return hashlib.blake2b("\n".join(asked).encode(), digest_size=16).hexdigest()


def by_document(task: str, samples: Samples, metrics: Mapping[str, float]) -> Columns:
    """Columns [n]: row_id, and each metric that is the mean over documents, with its counts."""
    values: dict[str, dict[int, float]] = {}
    for sample in samples:
        row_id = _row_id(sample)
        for metric in sample["metrics"]:
            value = sample[metric]
            if isinstance(value, int | float | np.number):
                name = figure_name(task, metric, sample["filter"])
                values.setdefault(name, {})[row_id] = float(value)
    ids = sorted({_row_id(sample) for sample in samples})
    columns: Columns = {ROW_ID: np.array(ids, dtype=np.int64)}
    for name, by_id in sorted(values.items()):
        column = np.array([by_id.get(row_id, math.nan) for row_id in ids])
        if _is_mean(column, metrics.get(name)):
            columns |= {name: column, COUNT: np.ones(len(ids))}
    return columns


def pooled(group: str, by_task: Mapping[str, Columns], metrics: Mapping[str, float]) -> Columns:
    """The documents of a group's tasks together. A metric is left out where the group's figure is
    not the mean over them: the group weighs its tasks alike, or a task lacks the metric.
    """
    ids = [
        _number_of(f"{task} {row_id}")
        for task, columns in sorted(by_task.items())
        for row_id in columns[ROW_ID].tolist()
    ]
    found: Columns = {ROW_ID: np.array(ids, dtype=np.int64)}
    for name in metrics:
        task, _, rest = name.partition("/")
        columns = [by_task[t].get(f"{t}/{rest}") for t in sorted(by_task)] if task == group else []
        kept = [column for column in columns if column is not None]
        if kept and len(kept) == len(columns):
            column = np.concatenate(kept)
            if _is_mean(column, metrics[name]):
                found |= {name: column, COUNT: np.ones(len(ids))}
    return found


def _is_mean(column: np.ndarray, figure: float | None) -> bool:
    """Whether a figure is the mean over documents, which a perplexity is not."""
    return figure is not None and math.isclose(column.mean(), figure, rel_tol=1e-9, abs_tol=1e-12)


def _row_id(sample: Mapping[str, Any]) -> int:
    """Equal for the same document of a task."""
    return _number_of(f"{sample['doc_id']} {sample['doc_hash']}")


def _number_of(text: str) -> int:
    """Below 2^62."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
