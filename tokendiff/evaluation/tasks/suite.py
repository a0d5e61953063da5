"""Tasks of lm-evaluation-harness by name, asked and judged: what `jobs.evaluate --tasks` measures.

A figure is called TASK/METRIC, arc_easy/acc, or TASK/METRIC/FILTER where a task filters answers. A
metric that is a mean over documents is also kept by document, so that two evaluations can be held
against each other (`tokendiff.evaluation.paired`).
"""

import difflib
import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokendiff.artifacts.identity import identity_of
from tokendiff.artifacts.manifest import fingerprint, write_atomically
from tokendiff.errors import InputError, input_errors, reason_of
from tokendiff.evaluation.paired import DOCUMENTS, documents_file, write_rows
from tokendiff.evaluation.report import Table
from tokendiff.evaluation.tasks.documents import (
    by_document,
    digest_of,
    figure_name,
    num_judged,
    pooled,
)
from tokendiff.evaluation.tasks.requests import Unserved, generation_settings

if TYPE_CHECKING:
    from tokendiff.config.evaluate import EvaluateConfig
    from tokendiff.config.frontier import FrontierConfig

STANDARD_ERROR = "_standard_error"
TASKS = "tasks.json"
BUILTIN = "builtin"  # stands for all tasks of `tokendiff.evaluation.tasks.builtin`

_FEWSHOT_SEED = 1234  # the harness's own default
_BOOTSTRAP_ITERATIONS = 1000  # for standard errors that no formula gives
_SHOWN_UNSERVED = 20


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """The results of tasks.

    Attributes:
        metrics: figures by name, each with its standard error where there is one.
        documents: by task and group, columns [n]: row_id, and the metrics that are means over
            documents.
        num_documents: by task, without those that no metric is of since they could not be served.
        asked: by task, a digest of all that it asked.
        groups: by group, the names of all its tasks.
        unserved: requests that could not be served, and why.
        answered_with: what was set of how answers are made.
    """

    metrics: dict[str, float]
    documents: dict[str, dict[str, np.ndarray]]
    num_documents: dict[str, int]
    asked: dict[str, str]
    groups: dict[str, list[str]]
    unserved: dict[str, str]
    answered_with: Any = None

    @property
    def identities(self) -> dict[str, str]:
        """By task and group: equal where the same was asked in the same words, and answered with
        the same settings.
        """
        found = {
            task: fingerprint([digest, self.answered_with]) for task, digest in self.asked.items()
        }
        of_groups = {
            group: fingerprint([found[task] for task in tasks if task in found])
            for group, tasks in self.groups.items()
        }
        return {**found, **of_groups}

    @property
    def tables(self) -> list[Table]:
        """As the report shows them."""
        names = [name for name in self.metrics if not name.endswith(STANDARD_ERROR)]
        rows = []
        for name in names:
            task, _, metric = name.partition("/")
            error = self.metrics.get(name + STANDARD_ERROR)
            value = f"{self.metrics[name]:.4g}" + ("" if error is None else f" ± {error:.2g}")
            rows.append([task, metric, value, f"{self.num_documents.get(task, 0):,}"])
        tables: list[Table] = [("Tasks", ["task", "metric", "value", "documents"], rows)]
        if self.unserved:
            first = list(self.unserved.items())[:_SHOWN_UNSERVED]
            title = f"Requests that could not be served: {len(self.unserved):,}"
            tables.append((title, ["request", "why"], [list(item) for item in first]))
        return tables


def load_tasks(
    names: Sequence[str], *, tasks_path: str | None = None, num_fewshot: int | None = None
) -> dict[str, Any]:
    """Tasks and groups as the harness has them; their data is read, and downloaded if need be.

    Args:
        names: of tasks, groups or tags of the harness, of those below tasks_path, or `builtin`.
        tasks_path: a folder of task files (YAML), looked through first.
        num_fewshot: solved examples in front of each document, but of tasks that have 0.

    Raises:
        InputError: the harness is not installed; there is no such task; its data cannot be had.
    """
    from tokendiff.evaluation.tasks.builtin import builtin_tasks

    builtin = builtin_tasks()
    manager = _manager(tasks_path, has_harness_own=False)
    is_known = all(name in {BUILTIN, *builtin, *manager.all_tasks} for name in names)
    if not is_known or _has_others(manager):
        manager = _manager(tasks_path, has_harness_own=True)
    specs: list[Any] = []
    for name in dict.fromkeys(names):
        if name == BUILTIN or name in builtin:
            specs += builtin.values() if name == BUILTIN else [builtin[name]]
        elif name in manager.all_tasks:
            specs.append(name)
        else:
            known = [BUILTIN, *builtin, *manager.all_tasks]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            where = "" if tasks_path is None else f", nor below tasks_path {tasks_path}"
            raise InputError(f"tasks: there is no task {name!r} in the harness{where}{hint}")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in specs:
        name = spec if isinstance(spec, str) else spec["task"]
        try:
            with _quiet():
                found = manager.load([spec])
        except Exception as error:  # of any library that reads data, and of a task's own code
            raise InputError(
                f"tasks: {name} cannot be loaded ({reason_of(error)}); without a network only data "
                "that was downloaded before is there: run it once with one, or give tasks of "
                f"local files (tasks_path), or {BUILTIN!r}"
            ) from error
        for part in loaded:
            loaded[part] |= found.get(part, {})
    for task in loaded["tasks"].values():
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _manager(tasks_path: str | None, *, has_harness_own: bool) -> Any:
    """The harness's index of tasks. That of its own, thousands of files, takes seconds."""
    if tasks_path is not None and not Path(tasks_path).is_dir():
        raise InputError(
            f"tasks_path {tasks_path}: no such folder; give one with task files (YAML)"
        )
    if find_spec("lm_eval") is None:
        raise InputError(
            "tasks need lm-evaluation-harness; install it with pip install 'tokendiff[eval]'"
        )
    content = json.dumps(identity_of(tasks_path))
    with _quiet(), input_errors(f"tasks_path {tasks_path}: cannot be read", "mend its task files"):
        return _indexed(tasks_path, has_harness_own, content)


def _has_others(manager: Any) -> bool:
    """Whether a group has members that are in no file here, so that they may be the harness's."""
    index = manager.task_index

    def is_here(member: Any) -> bool:
        if not isinstance(member, dict):
            return member in index
        listed = member.get("task")  # of a group that is written out within another, a list too
        if isinstance(listed, list):
            return all(map(is_here, listed))
        return (member.get("group") if listed is None else listed) in index

    return not all(is_here(index[group].cfg or {}) for group in manager.all_groups)


@lru_cache(maxsize=4)
def _indexed(tasks_path: str | None, has_harness_own: bool, content: str) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=tasks_path, include_defaults=has_harness_own)


def check_tasks(config: "EvaluateConfig | FrontierConfig") -> None:
    """Raise InputError where a config's tasks cannot be loaded, or need what is not done here."""
    loaded = load_tasks(config.tasks, tasks_path=config.tasks_path)
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"tasks: {name} shows images or sounds, or runs code that the model writes, which "
                "is not done here; leave it out"
            )
        if task.get_config("output_type") == "generate_until":
            try:
                generation_settings(task.get_config("generation_kwargs") or {})
            except InputError as error:
                raise InputError(f"tasks: {name}: {error}") from error


def ask_tasks(
    loaded: Mapping[str, Any],
    model: Any,
    *,
    max_documents: int | None = None,
    apply_chat_template: bool = False,
    answered_with: Any = None,
) -> SuiteResult:
    """Let a model answer all tasks, and judge the answers.

    Args:
        loaded: from `load_tasks`; it can be asked once.
        model: a `tokendiff.evaluation.tasks.harness.AnsweredModel`.
        max_documents: of each task, the first ones.
        answered_with: what was set of how answers are made, as plain JSON.

    Raises:
        InputError: a log-likelihood is not a number, or no document of a task could be served.
    """
    from lm_eval.evaluator import evaluate

    random.seed(0)  # tasks may draw from it
    np.random.seed(_FEWSHOT_SEED)
    for task in loaded["tasks"].values():
        _let_unserved_be_wrong(task)
    with _quiet(), np.errstate(all="ignore"):
        found = evaluate(
            lm=model,
            task_dict=dict(loaded),
            limit=max_documents,
            bootstrap_iters=_BOOTSTRAP_ITERATIONS,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
        )
    metrics: dict[str, float] = {}
    for task, figures in sorted({**found["results"], **found.get("groups", {})}.items()):
        metrics |= _figures(task, figures)
    groups = {
        name: sorted(task.task_name for task in group.get_all_tasks())
        for name, group in loaded["groups"].items()
    }
    num_documents = num_judged(found["samples"])
    _check_judged(num_documents, model.unserved)
    documents = {
        task: by_document(task, samples, metrics)
        for task, samples in sorted(found["samples"].items())
    }
    pooled_ones = {
        group: pooled(group, {task: documents[task] for task in tasks}, metrics)
        for group, tasks in groups.items()
    }
    of_groups = {group: sum(num_documents[t] for t in tasks) for group, tasks in groups.items()}
    return SuiteResult(
        metrics=metrics,
        documents={**documents, **pooled_ones},
        num_documents={**num_documents, **of_groups},
        asked={task: digest_of(samples) for task, samples in found["samples"].items()},
        groups=groups,
        unserved=dict(model.unserved),
        answered_with=answered_with,
    )


def _let_unserved_be_wrong(task: Any) -> None:
    """Let a document count as wrong that has a request which could not be served; the harness would
    compare the other choices, and find the first the likeliest where there is none. Metrics of
    which less is better (perplexities) have no such value: they leave the document out.
    """
    judge, is_better = task.process_results, task.higher_is_better()

    def process_results(document: Any, results: Any) -> dict[str, Any]:
        figures: dict[str, Any] = judge(document, results)
        if not any(map(_is_unserved, results)):
            return figures
        kept = {name: value for name, value in figures.items() if is_better.get(name)}
        return {
            name: 0.0 if isinstance(value, int | float | np.number) else value
            for name, value in kept.items()
        }

    task.process_results = process_results


def _is_unserved(result: Any) -> bool:
    return isinstance(result[0] if isinstance(result, tuple) else result, Unserved)


def _check_judged(num_documents: Mapping[str, int], unserved: Mapping[str, str]) -> None:
    """Raise InputError where a task has no figure, since none of its documents could be served."""
    for task, number in num_documents.items():
        if not number:
            request, why = next(iter(unserved.items()), ("none", "it has no documents"))
            raise InputError(
                f"tasks: {task} has no document that could be served, and so no figure; leave it "
                f"out, or give shorter documents; one of its requests: {request}: {why}"
            )


def write_suite(folder: Path, result: SuiteResult) -> None:
    """`tasks.json`, for people and tools, and a file by document for each task."""
    about = {
        "metrics": result.metrics,
        "num_documents": result.num_documents,
        "unserved": result.unserved,
    }
    write_atomically(folder / TASKS, json.dumps(about, indent=1, ensure_ascii=False).encode())
    (folder / DOCUMENTS).mkdir(exist_ok=True)
    for task, columns in result.documents.items():
        write_rows(folder / documents_file(task), columns)


def _figures(task: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """Finite ones. The harness calls them METRIC,FILTER and METRIC_stderr,FILTER."""
    found = {}
    for key, value in sorted(figures.items()):
        metric, comma, filter_name = key.partition(",")
        is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if comma and is_number and math.isfinite(value):
            is_error = metric.endswith("_stderr")
            name = figure_name(task, metric.removesuffix("_stderr"), filter_name)
            found[name + STANDARD_ERROR * is_error] = float(value)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness warns of every default that a task leaves open, and draws a bar for each task
    while it makes its requests, which takes no time.
    """
    import lm_eval.api.task as tasks

    logger, bar = logging.getLogger("lm_eval"), tasks.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    tasks.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        tasks.tqdm = bar
