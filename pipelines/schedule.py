"""Which stages of a pipeline are to run, and why."""

import difflib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import tokendiff
from pipelines.stage import Stage
from tokendiff.artifacts.locations import Location, changed_ns, folders_in
from tokendiff.artifacts.manifest import (
    RECORD_FOLDER,
    fingerprint,
    load_manifest,
    verify,
    write_atomically,
)
from tokendiff.errors import CorruptFileError, InputError

State = Literal["done", "run", "resume", "check", "skip"]
FACTS_NAME = "stage.json"
_MAX_REASONS = 3


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a person asks for: names of stages, or their titles where a matrix made several.

    Attributes:
        start: these and whatever is made from them.
        end: these and whatever they are made from.
        only: these alone.
        force: these even if they are done, whatever else is selected.
    """

    start: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    force: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """A stage, and what is to become of it.

    Attributes:
        state: "resume" goes on with what is in the folder; "check" runs it only if what it is made
            from comes out different.
    """

    stage: Stage
    state: State
    why: str


def plan_steps(stages: Sequence[Stage], selection: Selection) -> list[Step]:
    """A step for each stage, in their order.

    Raises:
        InputError: a name is that of no stage, or something is needed that is neither done nor
            selected.
        CorruptFileError: a stage that is done lacks a file.
    """
    chosen, forced = _selected(stages, selection), _named(stages, selection.force, "--force")
    steps: dict[str, Step] = {}
    for stage in stages:
        inputs = [steps[source.title] for source in stage.inputs.values()]
        if stage.title in forced and not _reason_to_skip(stage, inputs):
            step = Step(stage=stage, state="run", why="asked for with --force")
        else:
            step = _step(stage, inputs)
        if step.state not in ("done", "skip") and stage.title not in chosen | forced:
            step = replace(step, state="skip", why="not selected")
        missing = [i.stage.title for i in inputs if i.why == "not selected" and not i.stage.is_done]
        if step.state in ("run", "resume") and missing:
            raise InputError(
                f"{stage.title} needs {', '.join(missing)}, which is neither done nor selected; "
                "select it too, or leave the selection out"
            )
        steps[stage.title] = step
    return list(steps.values())


def recheck(step: Step, ran: Iterable[str]) -> Step:
    """The step again, now that what it is made from is there.

    Args:
        ran: titles of the stages that this run has made.
    """
    if step.state == "check":
        stage = step.stage
        if changed := _changed_inputs(stage):
            return replace(step, state="run", why=f"{_clause(changed, 'came')} out different")
        if lost := stage.lost(stage):
            return replace(step, state="run", why=lost)
        inputs = [source.title for source in stage.inputs.values()]
        made = [title for title in inputs if title in ran] or inputs
        return replace(step, state="done", why=f"{_clause(made, 'came')} out the same")
    return step


def _step(stage: Stage, inputs: list[Step]) -> Step:
    if reason := _reason_to_skip(stage, inputs):
        return Step(stage=stage, state="skip", why=reason)
    running = [step.stage.title for step in inputs if step.state not in ("done", "skip")]
    if is_sound(stage):
        if running:
            why = f"only if {_clause(running, 'comes', 'come')} out different"
            return Step(stage=stage, state="check", why=why)
        if changed := _changed_inputs(stage):
            why = f"{_clause(changed, 'was', 'were')} made again"
            return Step(stage=stage, state="run", why=why)
        if lost := stage.lost(stage):
            return Step(stage=stage, state="run", why=lost)
        return Step(stage=stage, state="done", why="made by an earlier run")
    if read_facts(stage).get("key") == stage.key and not _changed_inputs(stage):
        return Step(stage=stage, state="resume", why="it was interrupted")
    return Step(stage=stage, state="run", why=_what_is_new(stage))


def _reason_to_skip(stage: Stage, inputs: list[Step]) -> str:
    if stage.skip:
        return stage.skip
    left_out = [
        step.stage.title
        for role, step in zip(stage.inputs, inputs, strict=True)
        if step.state == "skip" and step.why != "not selected" and role not in stage.optional
    ]
    return f"{_clause(left_out, 'is', 'are')} skipped" if left_out else ""


def _selected(stages: Sequence[Stage], selection: Selection) -> set[str]:
    chosen = {stage.title for stage in stages}
    if selection.start:
        later = _named(stages, selection.start, "--from")
        for stage in stages:
            if any(source.title in later for source in stage.inputs.values()):
                later.add(stage.title)
        chosen &= later
    if selection.end:
        earlier = _named(stages, selection.end, "--to")
        for stage in reversed(stages):
            if stage.title in earlier:
                earlier |= {source.title for source in stage.inputs.values()}
        chosen &= earlier
    if selection.only:
        chosen &= _named(stages, selection.only, "--only")
    return chosen


def _named(stages: Sequence[Stage], names: Sequence[str], flag: str) -> set[str]:
    found: set[str] = set()
    for name in names:
        titles = {stage.title for stage in stages if name in (stage.name, stage.title)}
        if not titles:
            known = list(dict.fromkeys(stage.name for stage in stages))
            close = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise InputError(f"{flag} {name}: no such stage; {remedy}")
        found |= titles
    return found


# What a stage knows of how it was made: `run/stage.json` in its folder, written when it starts.


def write_facts(stage: Stage) -> dict[str, Any]:
    """Note what the stage is made from; `attempt` counts how often that was begun."""
    before = read_facts(stage)
    facts = {
        "name": stage.name,
        "kind": stage.kind,
        "key": stage.key,
        "settings": stage.settings,
        "inputs": {role: source.key for role, source in stage.inputs.items()},
        "made_from": _digests(stage),
        "code": [tokendiff.__version__, stage.version],
        "attempt": before.get("attempt", 0) + 1,
        "time": time.time(),
    }
    stage.kept_record.mkdir(parents=True, exist_ok=True)
    write_atomically(stage.kept_record / FACTS_NAME, json.dumps(facts, indent=1).encode())
    return facts


def read_facts(stage: Stage) -> dict[str, Any]:
    return _facts_in(stage.output)


def _facts_in(folder: Location) -> dict[str, Any]:
    path = folder / RECORD_FOLDER / FACTS_NAME
    try:
        facts = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # but not for a store that does not answer
        return {}
    if not isinstance(facts, dict):
        return {}
    if "time" not in facts:  # of an earlier version
        facts["time"] = changed_ns(path) / 1e9
    return facts


def is_sound(stage: Stage) -> bool:
    """Whether the stage is done; its files must then still be there, by presence and size."""
    if not stage.is_done:
        return False
    try:
        verify(stage.result_folder, hashes=False)
    except CorruptFileError as error:
        raise CorruptFileError(f"{error}; delete {stage.output} to make it again") from error
    return True


def _digests(stage: Stage) -> dict[str, str]:
    """The content of the inputs that are there."""
    return {
        role: fingerprint(load_manifest(source.result_folder).files)
        for role, source in stage.inputs.items()
        if source.is_done
    }


def _changed_inputs(stage: Stage) -> list[str]:
    """Inputs whose content is not what the stage was made from."""
    before, now = read_facts(stage).get("made_from", {}), _digests(stage)
    return [
        stage.inputs[role].title
        for role, digest in now.items()
        if before.get(role, digest) != digest
    ]


def _what_is_new(stage: Stage) -> str:
    """How the stage differs from the one of its name that was made last."""
    others = [
        facts
        for folder in folders_in(stage.base)
        if folder.name.startswith(f"{stage.name}-")
        and folder.name.removeprefix(f"{stage.name}-").isalnum()
        and (facts := _facts_in(folder))
    ]
    if not others:
        return "no earlier result"
    before = max(others, key=lambda facts: facts["time"])
    reasons = _differences(before.get("settings", {}), stage.settings)
    for role, source in stage.inputs.items():
        if before.get("inputs", {}).get(role) != source.key:
            reasons.append(f"the input {role!r} changed")
    if before.get("code") != [tokendiff.__version__, stage.version]:
        reasons.append("the version of tokendiff changed")
    if not reasons:
        return "no earlier result with these settings"
    shown = reasons[:_MAX_REASONS]
    more = len(reasons) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*now, *(name for name in before if name not in now)]
        return [
            text
            for name in names
            for text in _differences(before.get(name), now.get(name), f"{prefix}{name}.")
        ]
    if before == now:
        return []
    name = prefix.removesuffix(".")
    if name == "inputs" or isinstance(before, dict | list) or isinstance(now, dict | list):
        return [f"{'the files that it reads' if name == 'inputs' else name} changed"]
    return [f"{name} changed from {json.dumps(before)} to {json.dumps(now)}"]


def _clause(titles: Sequence[str], one: str, many: str | None = None) -> str:
    """The titles, and the verb that goes with one of them or with many."""
    *others, last = titles
    names = f"{', '.join(others)} and {last}" if others else last
    return f"{names} {many or one if others else one}"
