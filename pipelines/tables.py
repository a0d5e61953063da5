"""What a pipeline prints: the plan, its status, and the tables at the end of a run."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.comparison import PAGE_NAME, comparison_table
from pipelines.record import RESULT_NAME, RunRecord, StageRecord
from pipelines.retention import Item
from pipelines.runner import Plan, store_command
from pipelines.schedule import Step
from tokendiff.artifacts.locations import Location, location
from tokendiff.artifacts.manifest import verify
from tokendiff.config.evaluate import is_task_metric
from tokendiff.config.pipeline import Config
from tokendiff.data.samples import KIND, first_records
from tokendiff.evaluation.tasks.suite import STANDARD_ERROR
from tokendiff.verification.certificate import Check, failure, read_certificate

_SHOWN_SAMPLES = 2
_SHOWN_CHARACTERS = 400
_MERMAID_COLOURS = {
    "done": "#d5f0d5",
    "run": "#cfe2ff",
    "resume": "#ffe8c2",
    "check": "#fff6c2",
    "skip": "#e8e8e8",
}

Line = tuple[str, str]


def print_plan(plan: Plan, folder: Location) -> None:
    """Each stage, what would become of it, and why.

    Args:
        folder: the pipeline's own.
    """
    steps = plan.steps
    rows = [(s.stage.title, s.stage.kind, s.stage.key, s.state, s.why) for s in steps]
    print("\n".join(_columns([("stage", "kind", "key", "state", "why"), *rows])))
    for step in steps:
        if shown := _preview(step):
            print(f"\n{step.stage.title}")
            _print_lines([(f"  {label}", text) for label, text in shown.items()])
    print(f"\nfolders  {folder}/STAGE-KEY")
    for note in plan.notes:
        print(f"note     {note}")


def plan_as_json(plan: Plan) -> dict[str, Any]:
    return {
        "notes": plan.notes,
        "stages": [
            {**_plan_row(step), **({"preview": shown} if (shown := _preview(step)) else {})}
            for step in plan.steps
        ],
    }


def _preview(step: Step) -> Mapping[str, str]:
    return {} if step.state == "skip" else step.stage.preview(step.stage)


def print_cleaned(items: Sequence[Item], *, is_dry_run: bool) -> None:
    """What was deleted, or would be, what is kept and why, and the bytes of both."""
    verb = "would be deleted" if is_dry_run else "deleted"
    rows = [
        (
            item.path.name,
            f"{item.num_bytes / 1e6:,.1f} MB",
            f"kept: {item.why}" if item.why else verb,
        )
        for item in items
    ]
    print("\n".join(_columns([("folder", "size", "what becomes of it"), *rows])))
    freed = sum(item.num_bytes for item in items if not item.why)
    kept = sum(item.num_bytes for item in items if item.why)
    print(f"\n{verb} {freed / 1e6:,.1f} MB, kept {kept / 1e6:,.1f} MB")


def cleaned_as_json(items: Sequence[Item]) -> dict[str, Any]:
    """As `print_cleaned`, for programs."""
    rows = [
        {"path": str(item.path), "num_bytes": item.num_bytes, "kept_for": item.why or None}
        for item in items
    ]
    return {"folders": rows, "freed_bytes": sum(i.num_bytes for i in items if not i.why)}


def mermaid(steps: Sequence[Step]) -> list[str]:
    """The stages as a Mermaid graph, coloured by what would become of them."""
    ids = {step.stage.title: f"s{number}" for number, step in enumerate(steps)}
    lines = ["graph LR"]
    for step in steps:
        stage = step.stage
        label = f"{stage.title}<br/>{stage.key}<br/>{step.state}: {step.why}"
        lines.append(f'  {ids[stage.title]}["{_quoted(label)}"]:::{step.state}')
    for step in steps:
        for role, source in step.stage.inputs.items():
            lines.append(f"  {ids[source.title]} -->|{role}| {ids[step.stage.title]}")
    states = dict.fromkeys(step.state for step in steps)
    return [*lines, *(f"  classDef {state} fill:{_MERMAID_COLOURS[state]}" for state in states)]


def _quoted(label: str) -> str:
    return label.replace("&", "#amp;").replace('"', "#quot;").replace("->", "#rarr;")


def _plan_row(step: Step) -> dict[str, Any]:
    stage = step.stage
    return {
        "stage": stage.title,
        "kind": stage.kind,
        "key": stage.key,
        "state": step.state,
        "why": step.why,
        "folder": str(stage.output),
        "inputs": {role: source.title for role, source in stage.inputs.items()},
    }


def print_record(record: RunRecord, config: Config, root: Location) -> None:
    """What ran and what did not, the figures that matter, and where everything is."""
    print()
    print("\n".join(stage_lines(record.stages)))
    print()
    if record.comparison:
        print("\n".join([*comparison_table(record.comparison, record.axes), ""]))
    page = [("comparison", str(record.folder / PAGE_NAME))]
    lines = page if record.comparison else figure_lines(record.stages)
    if config.tracking.enabled:
        lines.append(("MLflow", store_command(config, root)))
    lines.append(("result", str(record.folder / RESULT_NAME)))
    _print_lines(lines)


def print_runs(runs: Sequence[RunRecord]) -> None:
    """The last runs, and the stages of the newest."""
    for number, run in enumerate(runs):
        took = "" if run.seconds is None else f", {_duration(run.seconds)}"
        print(f"{run.started}  {run.state}{took}  {run.folder.name}")
        if run.error:
            print("  " + run.error.split("\n")[0])
        if number == 0:
            print("\n".join(f"  {line}" for line in stage_lines(run.stages)))
    if not runs:
        print("no run yet")
    print(flush=True)


def print_status(runs: Sequence[RunRecord], plan: Plan, config: Config, root: Location) -> None:
    """How the stages stand that the file describes now."""
    steps = _as_they_stand(plan.steps, runs)
    results = _results(steps)
    records = [
        StageRecord(
            stage=s.stage.title,
            kind=s.stage.kind,
            key=s.stage.key,
            folder="",
            state="done",
            result=results[s.stage.title],
        )
        for s in steps
        if s.stage.title in results
    ]
    lines = figure_lines(records)
    if waiting := [f"{s.stage.title} ({s.why})" for s in steps if s.state in ("run", "resume")]:
        lines.append(("still to run", ", ".join(waiting)))
    lines += [("note", note) for note in plan.notes]
    if config.tracking.enabled:
        lines.append(("MLflow", store_command(config, root)))
    _print_lines(lines or [(config.name, "no stage is done yet")])


def status_as_json(runs: Sequence[RunRecord], plan: Plan) -> dict[str, Any]:
    results = _results(plan.steps)
    steps = _as_they_stand(plan.steps, runs)
    stages = [{**_plan_row(s), "result": results.get(s.stage.title, {})} for s in steps]
    return {"runs": [run.as_json() for run in runs], "stages": stages, "notes": plan.notes}


def _as_they_stand(steps: Sequence[Step], runs: Sequence[RunRecord]) -> list[Step]:
    """What the newest run is at is not told as interrupted, as a plan has it."""
    running = {
        stage.stage
        for run in runs[:1]
        for stage in run.stages
        if run.state == stage.state == "running"
    }
    return [
        replace(step, why="it is running")
        if step.state == "resume" and step.stage.title in running
        else step
        for step in steps
    ]


def _results(steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
    """By title, of the stages that are done, but for one whose result is to be made anew."""
    done = [step.stage for step in steps if step.stage.is_done and step.state != "run"]
    return {stage.title: stage.result(stage) for stage in done}


def stage_lines(stages: Sequence[StageRecord]) -> list[str]:
    """A line per stage: its state, its time, why, and its folder."""
    rows = [
        (
            stage.stage,
            stage.state + (f" (attempt {stage.attempts})" if stage.attempts > 1 else ""),
            "" if stage.seconds is None else _duration(stage.seconds),
            Path(stage.folder).name if stage.state in ("done", "ran", "failed") else "",
            stage.why,
        )
        for stage in stages
    ]
    return _columns([("stage", "state", "time", "folder", "why"), *rows])


def figure_lines(stages: Sequence[StageRecord]) -> list[Line]:
    """The figures that matter of every stage that has some, with its name where it is not alone."""
    lines: list[Line] = []
    for kind, describe in _FIGURES.items():
        alike = [stage for stage in stages if stage.kind == kind and stage.result]
        for stage in alike:
            title = f" ({stage.stage})" if len(alike) > 1 else ""
            found = describe(stage.result)
            if kind == "promote" and stage.state == "done" and found:
                # A rollback or another promotion may have moved the alias since.
                found[-1] = (found[-1][0], f"{found[-1][1]}, as an earlier run left it")
            lines += [(f"{label}{title}", text) for label, text in found]
    return lines


def _print_lines(lines: Sequence[Line]) -> None:
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:<{width}}  " + text.replace("\n", "\n" + " " * (width + 2)))


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


def _data_lines(data: Mapping[str, Any]) -> list[Line]:
    text = (
        f"{data['train_tokens']:,} training tokens in {data['train_rows']:,} rows, "
        f"{data['heldout_tokens']:,} held out, {100 * data['padded_fraction']:.2f} % padding"
    )
    lines = [("data", text)]
    if data.get("errors"):
        lines.append(("left out", f"{data['errors']:,} bad rows, named in {data['errors_dir']}"))
    return lines


def _states_lines(states: Mapping[str, Any]) -> list[Line]:
    size = f"{states['bytes'] / 1e6:,.1f} MB"
    layers = ", ".join(map(str, states["layers"]))
    text = f"of {states['tokens']:,} training tokens, layers {layers}: {size}"
    return [("hidden states", text)]


def _training_lines(train: Mapping[str, Any]) -> list[Line]:
    speed, best = train["tokens_per_second"], train.get("best_step")
    steps = f"{train['step']} steps" + (f", the weights of step {best}" if best else "")
    return [
        ("training", steps + (f", {speed:,.0f} tokens/s" if speed else "")),
        ("checkpoint", train["checkpoint"]),
    ]


def _sampling_lines(samples: Mapping[str, Any]) -> list[Line]:
    lines = []
    if samples["tokens_per_second"]:
        forward = samples.get("tokens_per_forward")
        speed = f"{samples['tokens_per_second']:,.0f} tokens/s"
        per_pass = f", {forward:.2f} tokens per forward pass" if forward else ""
        lines.append(("sampling", f"{samples['rows']} samples, {speed}{per_pass}"))
    folder = location(samples["output_dir"])
    verify(folder, kind=KIND, hashes=isinstance(folder, Path))  # two are shown, not all fetched
    records = first_records(folder, _SHOWN_SAMPLES)
    return [*lines, *((f"sample {r['id']}", _shortened(to_read(r))) for r in records)]


def _bound_lines(figures: Mapping[str, Any]) -> list[Line]:
    lines = [("verified", line) for line in verified_lines(_checks(figures))]
    lines.append(("report", figures["report"]))
    if "expected_acceptance_length" in figures:
        error = figures["expected_acceptance_length_standard_error"]
        length = f"{figures['expected_acceptance_length']:.3f} ± {error:.3f}"
        return [("acceptance", f"{length} tokens a block expected on held-out text"), *lines]
    bound, unigram = figures["nats_per_token"], figures["unigram_entropy_nats"]
    name = "likelihood" if "is_exact" in figures else "bound"
    shown = [
        (
            name,
            f"{bound:.3f} ± {figures['standard_error']:.3f} nats per held-out token",
        ),
        *_next_token_lines(figures),
        ("unigram", f"{unigram:.3f} nats is the entropy of single tokens"),
        ("learnt", f"the {name} is {_apart(bound, unigram)}"),
    ]
    if figures["bits_per_byte"] is not None:
        unigram_bits = unigram * figures["num_tokens"] / figures["num_bytes"] / math.log(2.0)
        bits = f"{figures['bits_per_byte']:.3f}, against {unigram_bits:.3f} at the unigram entropy"
        shown.append(("bits/byte", bits))
    return [*shown, *_task_lines(figures), *lines]


def _task_lines(figures: Mapping[str, Any]) -> list[Line]:
    shown = []
    for name in filter(is_task_metric, figures):
        if not name.endswith(STANDARD_ERROR):
            error = figures.get(name + STANDARD_ERROR)
            chance = "" if error is None else f" ± {error:.2g}"
            shown.append(("task", f"{name} {figures[name]:.4g}{chance}"))
    if unserved := figures.get("unserved_requests"):
        shown.append(("not served", f"{unserved:,} requests of tasks, which tasks.json names"))
    return shown


def _next_token_lines(figures: Mapping[str, Any]) -> list[Line]:
    """Of a model that decodes token by token too."""
    if "ar_nats_per_token" not in figures:
        return []
    value = f"{figures['ar_nats_per_token']:.3f} ± {figures['ar_standard_error']:.3f}"
    return [("by token", f"{value} nats per held-out token, read from left to right")]


def _promotion_lines(result: Mapping[str, Any]) -> list[Line]:
    return [("gate", line) for line in result["gate"]] + [(result["decision"], result["summary"])]


def _frontier_lines(result: Mapping[str, Any]) -> list[Line]:
    point = result["operating_point"]
    fields = " ".join(f"{name}={value}" for name, value in point.items() if name != "name")
    return [
        ("operating point", f"{point['name']} {fields}".strip()),
        ("front", f"{result['num_on_front']} of {result['num_points']} settings, {result['plot']}"),
    ]


_FIGURES = {
    "preprocess": _data_lines,
    "cache_target_states": _states_lines,
    "train": _training_lines,
    "regenerate": _sampling_lines,
    "generate": _sampling_lines,
    "evaluate": _bound_lines,
    "frontier": _frontier_lines,
    "promote": _promotion_lines,
}


def failure_of(results: Iterable[Mapping[str, Any]]) -> str | None:
    """What makes results of stages bad that are done; None where nothing does."""
    found = list(results)
    problems = [failure([check for result in found for check in _checks(result)])]
    problems += [
        f"{result['set_aside']} rows were set aside, as the actor that sampled them died each "
        f"time; all others are sampled: {result['output_dir']}/set_aside names them"
        for result in found
        if result.get("set_aside")
    ]
    return "\n".join(problem for problem in problems if problem) or None


def _checks(result: Mapping[str, Any]) -> list[Check]:
    certificate = result.get("certificate")
    return read_certificate(location(certificate).parent) if certificate else []


def verified_lines(checks: Sequence[Check]) -> list[str]:
    """A line per subject: how many of its checks passed."""
    subjects = list(dict.fromkeys(check.subject for check in checks))
    width = max(map(len, subjects), default=0)
    lines = []
    for subject in subjects:
        passed = [check.passed for check in checks if check.subject == subject]
        lines.append(f"{subject:<{width}}  {sum(passed)} of {len(passed)} checks passed")
    return lines


def table_lines(tables: Sequence[tuple[str, list[str], list[list[Any]]]]) -> list[str]:
    """Tables (title, columns, rows) as lines for a terminal, in columns."""
    lines = []
    for title, columns, rows in tables:
        cells = [columns, *([str(value) for value in row] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines.append(f"{title}:")
        for row in cells:
            padded = (value.rjust(width) for value, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(padded))
    return lines


def _apart(bound: float, unigram: float) -> str:
    share = 100 * (1 - bound / unigram) if unigram else 0.0
    if share < 0:
        return f"{-share:.0f} % above that entropy: no use of context is shown yet"
    return f"{share:.0f} % below that entropy"


def _shortened(text: str) -> str:
    text = printable(text).strip()
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."


def to_read(record: Mapping[str, Any]) -> str:
    """The text of a sample; of a question in a chat, what was asked and answered.

    Without the special tokens that it is made of, a chat template reads like words of the chat.
    """
    text, prompt = str(record["text"]), record["prompt"] or ""
    is_chat = prompt in text and not text.lstrip().startswith(prompt.strip())
    if record["gaps"] or not is_chat or "completion" not in record:
        return text
    return f"{prompt}\n-> {record['completion']}"


def printable(text: str) -> str:
    """The text without control characters: a sample must not be able to drive the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text)
