"""Running a pipeline: every stage that is not done, each behind what it is made from."""

import logging
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from pipelines.comparison import comparison_rows, write_comparison
from pipelines.execution import (
    ChildStage,
    Outcome,
    check_patiently,
    figures_of,
    run_patiently,
    run_stage,
)
from pipelines.graph import Variant, pipeline_stages, pipeline_variants
from pipelines.lock import Hold, alone, alone_on_cluster
from pipelines.paths import output_path
from pipelines.record import (
    EXIT_CODES,
    EXIT_SIGTERM,
    RESULT_NAME,
    RunRecord,
    StageRecord,
    run_facts,
)
from pipelines.registered import Models, PinnedModels
from pipelines.retention import clean_after_run
from pipelines.schedule import Selection, Step, plan_steps, recheck
from pipelines.stage import Stage, discard
from tokendiff.artifacts.locations import Location, mirror_of
from tokendiff.artifacts.manifest import RECORD_FOLDER, is_committed
from tokendiff.cluster.session import (
    DATA_CPUS,
    check_seen_by_all,
    give_back_memory,
    is_shared,
    need_ray,
    num_cpus,
    ray_session,
)
from tokendiff.cluster.stopping import (
    check_stop,
    is_stop_requested,
    sigterm_held,
    sigterm_stops,
    words_of,
)
from tokendiff.config.pipeline import Config, RunnerConfig
from tokendiff.data.rows import check_rows_to_judge
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.tracking.mlflow_mirror import MlflowMirror
from tokendiff.tracking.mlflow_store import open_command, resolve_uri

_POLL_SECONDS = 1.0
logger = logging.getLogger(__name__)


def run_job(stages: Sequence[Stage], config: Config) -> dict[str, Any]:
    """Run the stages of a single job, without a pipeline; returns the last one's result.

    Its tracking store, where none is configured, is that of the pipelines: under `config.root`.
    """
    output = stages[-1].output
    root = output_path(config.root)
    for stage in stages:  # Ray and MLflow take seconds to start, and nothing is left behind
        stage.check(stage)
    with (
        alone(output / RECORD_FOLDER, over=output),
        MlflowMirror.open(config.tracking, root) as mirror,
        ray_session(config.cluster, tell=_say),
    ):
        tags = run_facts(config)
        for stage in stages:
            result = run_stage(stage, mirror, tags=tags)
    tracked = {"MLflow": store_command(config, root)} if config.tracking.enabled else {}
    return {"output_dir": str(output), **result, **tracked}


def _say(message: str) -> None:
    print(message, flush=True)


def store_command(config: Config, root: Location) -> str:
    """The command that opens the tracking store, as it can be typed in this environment."""
    command = open_command(resolve_uri(config.tracking, root))
    beside = Path(sys.executable).with_name("mlflow")
    if command.startswith("mlflow ") and shutil.which("mlflow") is None and beside.exists():
        return f"{beside}{command.removeprefix('mlflow')}"
    return command


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `run_pipeline` would do with each stage, and why.

    Attributes:
        notes: a line for each alias that stands for another model than the one the run would read.
    """

    steps: list[Step]
    notes: list[str]


def plan(config: Config, root: Location, selection: Selection | None = None) -> Plan:
    _check_store(config, root)
    pinned = models_of(config, root)
    stages = pipeline_stages(config, root / config.name, pinned.models, pinned.late)
    return Plan(steps=plan_steps(stages, selection or Selection()), notes=pinned.notes())


def _check_store(config: Config, root: Location) -> None:
    """Raise InputError where the tracking store would be under a root that is behind a URI."""
    if config.tracking.enabled:
        resolve_uri(config.tracking, root)


def models_of(config: Config, root: Location) -> PinnedModels:
    """The registered models that the pipeline's stages name, as they are to be read."""
    keys = [stage.key for stage in pipeline_stages(config, root / config.name)]
    return PinnedModels.read(config, root, keys)


def run_pipeline(config: Config, root: Location, selection: Selection | None = None) -> RunRecord:
    """Run every stage that is selected and not done; those that do not need each other side by
    side, as the cluster has room.

    Args:
        root: absolute folder or URI that the pipeline's own folder is made in.

    Raises:
        InputError: the config or a stage's input cannot be used.
        BlockingIOError: another run of this pipeline is under way.
        Exception: what the first stage raised that failed.
    """
    _check_store(config, root)
    pinned = models_of(config, root)
    variants = pipeline_variants(config, root / config.name, pinned.models, pinned.late)
    return run_variants(config, root, variants, selection or Selection(), pinned)


def run_variants(
    config: Config,
    root: Location,
    variants: Sequence[Variant],
    selection: Selection,
    pinned: PinnedModels | None = None,
) -> RunRecord:
    """`run_pipeline`, once its stages are put together.

    A stage that fails takes those down that are made from it; the others are still run.

    Returns:
        What was done; it also stands in `runs/` in the pipeline's folder. Its `state` is
        "succeeded", or "rejected" where a gate was not passed.
    """
    folder = root / config.name
    stages = list({s.output: s for variant in variants for s in variant.stages}.values())
    with sigterm_stops(), alone(folder) as hold, ExitStack() as stack:
        steps = plan_steps(stages, selection)
        pinned = pinned or PinnedModels(models={}, inputs="", moved={})
        pinned.keep(folder)
        record = RunRecord.begin(config, folder, [_record_of(step) for step in steps])
        with _concluded(record), hold.told():
            _check(steps, record, config.runner)
            mirror = stack.enter_context(_parent_run(config, root, record))
            run = _Run(
                config=config,
                root=root,
                models=pinned.models,
                record=record,
                mirror=mirror,
                stack=stack,
                hold=hold,
            )
            run.work_off(steps)
            record.axes = list(variants[0].values)
            record.comparison = comparison_rows(variants, record)
            for stage in record.stages:
                mirror.log_metrics(figures_of(stage.stage, stage.result))
            for path in write_comparison(record):
                mirror.log_artifacts(path)
            if run.errors:
                raise run.errors[0]
        hold.check()
        clean_after_run(config, root)
    return record


def _check(steps: Sequence[Step], record: RunRecord, runner: RunnerConfig) -> None:
    """Raise InputError where a stage that is to run cannot, as far as that is known by now.

    Models and datasets are looked for at a hub, which is asked again where it does not answer.
    """
    for step in steps:
        if step.state in ("run", "resume"):
            try:
                check_patiently(step.stage, runner)
            except (InputError, CorruptFileError, ConnectionError) as error:
                record.of(step.stage.title).state = "failed"
                record.of(step.stage.title).why = str(error).split("\n")[0]
                raise


class _Run:
    """One run under way: what is pending, what is running, and what became of the rest."""

    def __init__(
        self,
        *,
        config: Config,
        root: Location,
        models: Models,
        record: RunRecord,
        mirror: MlflowMirror,
        stack: ExitStack,
        hold: Hold,
    ) -> None:
        self._config, self._root, self._models = config, root, models
        self._record, self._mirror, self._stack, self._hold = record, mirror, stack, hold
        self._pending: dict[str, Step] = {}
        self._running: dict[str, ChildStage] = {}
        self._lost: set[str] = set()
        self._made: set[str] = set()
        self._room: int | None = None
        self.errors: list[BaseException] = []

    def work_off(self, steps: Sequence[Step]) -> None:
        self._pending = {step.stage.title: step for step in steps}
        made_here = {step.stage.result_folder for step in steps}
        for step in steps:
            if step.stage.judges and step.stage.judges[0] not in made_here:
                _check_judged(step)
        try:
            while self._pending or self._running:
                # Where a library kept the interrupt to itself.
                self._hold.check()
                check_stop()
                ready = self._take_ready()
                here = [step for step in ready if not step.stage.needs_ray]
                is_free = bool(ready) and not here and not self._running
                if is_free and (len(ready) == 1 or self._room_here() == 1):
                    here = ready
                if here:
                    self._run_here(here[0])
                    ready.remove(here[0])
                while ready and not here and len(self._running) < self._room_here():
                    self._start_child(ready.pop(0))
                self._pending = {**{step.stage.title: step for step in ready}, **self._pending}
                self._collect()
        finally:
            with sigterm_held():
                for child in self._running.values():
                    if self._hold.lost is None:
                        child.ask_to_stop()
                    else:  # nothing may be saved any more
                        child.kill()
                for child in self._running.values():
                    child.wait()

    def _take_ready(self) -> list[Step]:
        """Steps that can start now; those with nothing to do are settled on the way."""
        ready: list[Step] = []
        for title, step in list(self._pending.items()):
            inputs = [source.title for source in step.stage.inputs.values()]
            waits_for = {*self._pending, *self._running, *(s.stage.title for s in ready)}
            if any(name in waits_for for name in inputs):
                continue
            del self._pending[title]
            if lost := [name for name in inputs if name in self._lost]:
                self._lost.add(title)
                self._note(title, state="not reached", why=f"{', '.join(lost)} failed")
                continue
            step = recheck(step, self._made)
            if step.state in ("done", "skip"):
                self._settle(step)
            else:
                ready.append(step)
        return ready

    def _settle(self, step: Step) -> None:
        stage = step.stage
        if step.state == "done":
            self._note(stage.title, state="done", why=step.why, result=stage.result(stage))
            print(f"{stage.title}  done ({step.why}, in {stage.output.name})", flush=True)
            self._check_followers(stage)
        else:
            is_done = stage.is_done
            result = stage.result(stage) if is_done else {}
            self._note(stage.title, state="skipped", why=step.why, result=result)
            print(f"{stage.title}  skipped ({step.why})", flush=True)

    def _run_here(self, step: Step) -> None:
        stage = step.stage
        self._begin(step)
        started = time.monotonic()
        try:
            outcome = run_patiently(
                stage, self._mirror, self._config.runner, tags=self._record.facts
            )
        except Exception as error:
            self._fail(stage.title, error, time.monotonic() - started)
        except BaseException:
            self._note(stage.title, state="stopped", seconds=time.monotonic() - started)
            raise
        else:
            self._finish(stage, outcome)

    def _start_child(self, step: Step) -> None:
        self._begin(step)
        need_ray()
        self._running[step.stage.title] = ChildStage(
            step.stage,
            self._config,
            self._root,
            models=self._models,
            parent_run_id=self._mirror.run_id,
            tags=self._record.facts,
        )

    def _collect(self) -> None:
        receivers = {child.receiver: title for title, child in self._running.items()}
        for receiver in wait(list(receivers), timeout=_POLL_SECONDS) if receivers else ():
            title = receivers[receiver]  # type: ignore[index]
            child = self._running.pop(title)
            try:
                self._finish(child.stage, child.outcome())
            except Exception as error:
                self._fail(title, error, None)

    def _begin(self, step: Step) -> None:
        stage = step.stage
        if stage.needs_ray and self._room is None:
            self._connect()
        if step.state == "run":
            discard(stage)
        verb = "goes on" if step.state == "resume" else "will run"
        print(f"{stage.title}  {verb} ({step.why})", flush=True)
        self._note(stage.title, state="running", why=step.why)

    def _connect(self) -> None:
        config = self._config
        is_on_others = is_shared(config.cluster)
        self._stack.enter_context(
            ray_session(config.cluster, side_by_side=config.runner.max_parallel or 1, tell=_say)
        )
        if is_on_others:
            check_seen_by_all(config.cluster, self._root)
            self._stack.enter_context(alone_on_cluster(self._root / config.name))
        self._room = config.runner.max_parallel or _room(config)

    def _room_here(self) -> int:
        """How many stages may run side by side; asks the cluster, the first time."""
        if self._room is None:
            self._connect()
        return self._room or 1

    def _finish(self, stage: Stage, outcome: Outcome) -> None:
        title = stage.title
        self._made.add(title)
        self._note(
            title,
            state="ran",
            seconds=outcome.seconds,
            attempts=outcome.attempts,
            result=outcome.result,
        )
        print(f"{title}  done in {outcome.seconds:.0f} s", flush=True)
        self._check_followers(stage)

    def _check_followers(self, stage: Stage) -> None:
        """Fail the stage, whose result stays, where a later one will not be able to judge it: what
        is made from it, such as a training run of hours, would be made in vain.
        """
        try:
            for step in self._pending.values():
                if step.stage.judges and step.stage.judges[0] == stage.result_folder:
                    _check_judged(step)
        except InputError as error:
            self._fail(stage.title, error, None)

    def _fail(self, title: str, error: Exception, seconds: float | None) -> None:
        self._lost.add(title)
        self.errors.append(error)
        _let_go(error)
        why = (str(error).strip() or type(error).__name__).split("\n")[0]
        self._note(title, state="failed", why=why, seconds=seconds)
        if self._pending or self._running:
            print(f"{title}  failed: {why}", flush=True)

    def _note(self, title: str, **changes: Any) -> None:
        stage = self._record.of(title)
        for name, value in changes.items():
            setattr(stage, name, value)
        _keep(self._record)


def _let_go(error: BaseException | None) -> None:
    """Free what the frames of an error hold, such as a model on a GPU. Errors are kept until the
    run ends, and other stages run until then. Where it was raised can still be printed.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    give_back_memory()


def _check_judged(step: Step) -> None:
    """Raise InputError where a stage that is to run has too few rows to evaluate on."""
    if step.stage.judges is None or step.state in ("done", "skip"):
        return
    folder, split = step.stage.judges
    if is_committed(folder):
        try:
            check_rows_to_judge(folder, split)
        except InputError as error:
            raise InputError(f"{step.stage.title}: {error}") from None


def _keep(record: RunRecord) -> None:
    """Save it if that can be: what is told of a run neither ends it nor hides how it ended."""
    try:
        record.save()
    except OSError as error:
        logger.warning("%s is not as the run stands: %s", record.folder / RESULT_NAME, error)


def _record_of(step: Step) -> StageRecord:
    stage = step.stage
    return StageRecord(
        stage=stage.title,
        kind=stage.kind,
        key=stage.key,
        folder=str(stage.output),
    )


def _room(config: Config) -> int:
    """How many stages the cluster has CPUs for at once; GPUs are shared out by Ray."""
    cluster = config.cluster
    needed = max(cluster.max_workers, cluster.num_actors) * cluster.cpus_per_worker + DATA_CPUS
    return max(1, int(num_cpus(cluster) // needed))


@contextmanager
def _concluded(record: RunRecord) -> Iterator[None]:
    """Write into the record how the run ended, however it does."""
    started = time.monotonic()
    try:
        yield
        record.state = "rejected" if _rejections(record) else "succeeded"
    except BaseException as error:
        if isinstance(error, InputError):
            record.state = "bad input"
        elif isinstance(error, BlockingIOError):
            record.state = "locked"
        else:
            record.state = "failed" if isinstance(error, Exception) else "stopped"
        record.error = words_of(error) or type(error).__name__
        raise
    finally:
        is_sigterm = record.state == "stopped" and is_stop_requested()
        record.exit_code = EXIT_SIGTERM if is_sigterm else EXIT_CODES[record.state]
        record.seconds = round(time.monotonic() - started, 3)
        _keep(record)


def _rejections(record: RunRecord) -> list[StageRecord]:
    return [stage for stage in record.stages if stage.result.get("decision") == "rejected"]


@contextmanager
def _parent_run(config: Config, root: Location, record: RunRecord) -> Iterator[MlflowMirror]:
    tags: Mapping[str, Any] = {"pipeline": config.name, "run": record.folder.name, **record.facts}
    with MlflowMirror.open(
        config.tracking,
        root,
        run_name=config.name,
        tags=tags,
        folder=mirror_of(root / config.name) / ".run",
    ) as mirror:
        yield mirror
