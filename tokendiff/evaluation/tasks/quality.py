"""A task's figure as the quality of a frontier: which direction is better, and how text is drawn.

Also says which tasks ask for longer texts than a sampler's section allows.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokendiff.config.evaluate import is_task_metric
from tokendiff.errors import InputError
from tokendiff.evaluation.tasks.documents import figure_name
from tokendiff.evaluation.tasks.requests import generation_settings
from tokendiff.evaluation.tasks.suite import load_tasks

if TYPE_CHECKING:
    from tokendiff.config.frontier import FrontierConfig

_DRAWING = ("temperature", "top_k", "top_p")


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The figure that points of a frontier are compared by.

    Attributes:
        name: of the figure.
        is_lower_better: the direction.
        settings: how the task asks for its text, as `generation_settings` gives it; None of a
            figure for which no text is written.
    """

    name: str
    is_lower_better: bool
    settings: Mapping[str, Any] | None = None


def quality_of(config: "FrontierConfig") -> Quality:
    """The quality that a section names; the tasks are loaded, and nothing is measured.

    Raises:
        InputError: no task has such a figure; the section's direction is not the task's; or the
            tasks of a group ask for texts that are drawn differently.
    """
    if not is_task_metric(config.quality):
        return Quality(name=config.quality, is_lower_better=config.direction != "higher")
    loaded = load_tasks(config.tasks, tasks_path=config.tasks_path)
    is_better = dict(_directions(loaded))
    name = config.quality.partition("/")[0]
    is_higher_better = is_better.get(config.quality)
    if config.quality not in is_better and not _names_its_own(loaded["tasks"].get(name)):
        close = difflib.get_close_matches(config.quality, list(is_better), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(
            f"frontier.quality {config.quality!r}: the tasks have no such figure; they have "
            f"{', '.join(sorted(is_better))}{hint}"
        )
    if is_higher_better is None and config.direction is None:
        raise InputError(
            f"frontier.direction: task {name} does not say which {config.quality} is better; give "
            "lower or higher"
        )
    given = None if config.direction is None else config.direction == "higher"
    if is_higher_better is not None and given is not None and given != is_higher_better:
        raise InputError(
            f"frontier.direction {config.direction!r}: the task says that {config.quality} is "
            f"better when {'higher' if is_higher_better else 'lower'}; leave direction out"
        )
    is_higher = given if is_higher_better is None else is_higher_better
    return Quality(
        name=config.quality,
        is_lower_better=not is_higher,
        settings=_settings(name, loaded),
    )


def cut_short(loaded: Mapping[str, Any], section: Any) -> list[str]:
    """What to say of each task that asks for longer texts than a sampler's section has."""
    found = []
    for field in ("max_new_tokens", "gen_length"):
        length = getattr(section, field, None) if field in section.model_fields_set else None
        for name, task in loaded["tasks"].items():
            if length is None or task.get_config("output_type") != "generate_until":
                continue
            asked = generation_settings(task.get_config("generation_kwargs") or {})["max_gen_toks"]
            if length < asked:
                found.append(
                    f"task {name} asks for up to {asked:,} tokens, and sampler {section.name!r} "
                    f"has {field} {length:,}: longer answers are cut, and may count as wrong"
                )
    return found


def _directions(loaded: Mapping[str, Any]) -> Iterator[tuple[str, bool | None]]:
    """(figure, whether higher is better) of all figures of tasks and groups."""
    for name, task in loaded["tasks"].items():
        for metric, is_higher in task.higher_is_better().items():
            for filter_name in _filters(task):
                yield figure_name(name, metric, filter_name), is_higher
    for name, group in loaded["groups"].items():
        tasks = group.get_all_tasks()
        for pooled in group.aggregate_metric_list or []:
            directions = {task.higher_is_better().get(pooled.metric) for task in tasks}
            is_higher = directions.pop() if len(directions) == 1 else None
            filters = pooled.filter_list or {f for task in tasks for f in _filters(task)}
            for filter_name in filters:
                yield figure_name(name, pooled.metric, filter_name), is_higher


def _filters(task: Any) -> list[str]:
    return [pipeline.name for pipeline in getattr(task, "_filters", [])] or ["none"]


def _names_its_own(task: Any) -> bool:
    """Whether a task's code gives figures that its file does not name."""
    if task is None:
        return False
    listed = task.get_config("metric_list") or []
    return any(callable(entry.get("metric")) for entry in listed)


def _settings(name: str, loaded: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How text is drawn for a task, or for all tasks of a group."""
    group = loaded["groups"].get(name)
    tasks = [loaded["tasks"][name]] if group is None else group.get_all_tasks()
    found = [
        generation_settings(task.get_config("generation_kwargs") or {})
        for task in tasks
        if task.get_config("output_type") == "generate_until"
    ]
    drawn = [{key: settings.get(key) for key in _DRAWING} for settings in found]
    if any(one != drawn[0] for one in drawn):
        raise InputError(
            f"frontier.quality: the tasks of {name} draw their texts at different temperatures, "
            "top_k or top_p, and a model is served with one; take a task of the group as quality"
        )
    return found[0] if found else None
