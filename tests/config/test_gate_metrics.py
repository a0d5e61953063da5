"""The names that a gate takes: every figure that an evaluation writes, and no other."""

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokendiff.cluster import evaluate
from tokendiff.config.evaluate import METRICS, NUMBERED_METRICS, PAIRED_METRICS, is_metric
from tokendiff.config.loader import load_config
from tokendiff.config.promote import PromoteConfig
from tokendiff.errors import InputError
from tokendiff.evaluation import (
    acceptance,
    bound,
    draft_acceptance,
    generation_metrics,
    pass_times,
    reference,
)
from tokendiff.verification import certificate

# What makes the figures of an evaluation, besides `evaluate` itself.
_SOURCES: list[Callable[..., Any]] = [
    evaluate.evaluate,
    evaluate.sample_metrics,
    acceptance.acceptance_metrics,
    acceptance.speedup_metrics,
    certificate.counts,
    draft_acceptance.acceptance_figures,
    draft_acceptance.accuracy_figures,
    generation_metrics.cost_metrics,
    reference.generative_perplexity,
]
_NO_FIGURES = {  # other mappings that those functions write
    *("metrics", "checkpoint", "rows", "tasks", "sampled", "tokendiff", "process"),
}


def written(source: Callable[..., Any]) -> Iterator[str]:
    """Keys of mappings in a function's code; numbers stand where f-strings put something in."""
    for node in ast.walk(ast.parse(inspect.getsource(source))):
        keys: list[ast.expr | None] = []
        if isinstance(node, ast.Dict):
            keys = list(node.keys)
        elif isinstance(node, ast.DictComp):
            keys = [node.key]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            keys = [node.slice]
        for key in keys:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value
            elif isinstance(key, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "4"
                    for part in key.values
                )


def figures() -> set[str]:
    names = {name for source in _SOURCES for name in written(source)} - _NO_FIGURES
    names |= {field.name for field in fields(bound.Bound)}
    names |= {pass_times._name(16, 33)}
    # As they come out, where they can be had without a model.
    blocks = np.ones((3, 12))
    names |= set(generation_metrics.generation_metrics([[1, 2, 3, 4, 5]]))
    names |= set(draft_acceptance.acceptance_figures(blocks))
    names |= set(draft_acceptance.accuracy_figures(blocks[:, 1:], blocks))
    return names


def test_every_figure_that_an_evaluation_writes_may_be_gated_on() -> None:
    found = figures()
    assert len(found) > 60
    assert [name for name in sorted(found) if not is_metric(name)] == []
    assert is_metric("arc_easy/acc")
    assert set(PAIRED_METRICS) <= set(METRICS)
    # And nothing is listed that nothing writes.
    assert sorted(set(METRICS) - found) == []
    numbered = {name.format(4, 4) for name in NUMBERED_METRICS} | {
        "pass_seconds_batch_16_tokens_33"
    }
    assert numbered - found == {"pass_seconds_batch_4_tokens_4"}


@pytest.mark.parametrize(
    ("metric", "remedy"),
    [
        ("nats_per_tokn", "did you mean 'nats_per_token'?"),
        ("draft_acuracy_3", "did you mean 'draft_accuracy_N'?"),
        ("expected_acceptance_at_", "did you mean 'expected_acceptance_at_N'?"),
        ("quality", "it has nats_per_token, "),
    ],
)
def test_a_mistyped_figure_is_refused_with_its_place(
    metric: str, remedy: str, tmp_path: Path
) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(f"promote:\n  gate:\n    - {{metric: {metric}, direction: lower}}\n")
    with pytest.raises(InputError) as error:
        load_config(path)
    assert f":3: promote.gate[0].metric: no evaluation has a figure '{metric}'" in str(error.value)
    assert remedy in str(error.value)


def test_the_default_gate_is_taken() -> None:
    (line,) = PromoteConfig().gate
    assert is_metric(line.metric)
