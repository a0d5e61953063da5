"""Tasks on the cluster: actors answer, and the driver asks and judges.

Requests are sorted and cut into parts by what they are alone; an actor commits the answers of a
part by a rename. A restarted job skips the parts that are there, and finds the same answers with
any number of actors, bit by bit.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokendiff.artifacts.identity import checkpoint_identity
from tokendiff.artifacts.locations import Location, files_under, folders_in, remove
from tokendiff.artifacts.manifest import fetch, fingerprint, write_atomically
from tokendiff.cluster.actors import Crew, Item
from tokendiff.cluster.progress import JobProgress, Reporter
from tokendiff.cluster.session import set_up_torch
from tokendiff.evaluation.inputs import task_setup
from tokendiff.evaluation.tasks.answering import TaskModel
from tokendiff.evaluation.tasks.quality import cut_short
from tokendiff.evaluation.tasks.requests import Answer, TaskRequest
from tokendiff.evaluation.tasks.setup import TaskSetup
from tokendiff.evaluation.tasks.suite import SuiteResult, ask_tasks, load_tasks

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig
    from tokendiff.config.evaluate import EvaluateConfig

ANSWERS = "answers"
_MAX_PARTS = 4096
_MAX_BATCHES_PER_PART = 64


class _AnsweringActor:
    """Answers the requests of a part, and writes them to its file."""

    def __init__(
        self,
        checkpoint: Location,
        config: "EvaluateConfig",
        cluster: "ClusterConfig",
        folder: Location,
        reporter: Reporter,
        use_gpu: bool,
        num_actors: int,
    ) -> None:
        device = set_up_torch(cluster, use_gpu=use_gpu, num_processes=num_actors)
        setup = task_setup(config, fetch(checkpoint))
        self._folder, self._reporter = folder, reporter
        self._model = TaskModel(setup, num_mask_samples=config.num_mask_samples, device=device)

    def __call__(self, items: Item) -> Iterator[Item]:
        for part, text in zip(items["part"], items["requests"], strict=True):
            requests = [TaskRequest(**fields) for fields in json.loads(text)]
            answers = self._model.answers(requests, on_progress=self._reporter.of(int(part)))
            lines = [json.dumps(answer) + "\n" for answer in answers]
            write_atomically(self._folder / _file(int(part)), "".join(lines).encode())
            yield {"part": [int(part)], "requests": [len(requests)]}


class Answerers:
    """Answers requests on the cluster: what an `AnsweredModel` of the driver asks.

    Args:
        output_dir: where answers are kept, below `answers`.
    """

    def __init__(
        self,
        config: "EvaluateConfig",
        cluster: "ClusterConfig",
        *,
        checkpoint: Location,
        setup: TaskSetup,
        output_dir: Location,
        progress: JobProgress,
    ) -> None:
        self._config, self._cluster, self._setup = config, cluster, setup
        self._checkpoint, self._progress = checkpoint, progress
        self._answers = output_dir / ANSWERS
        self._asked: set[str] = set()

    def __call__(self, requests: list[TaskRequest]) -> list[tuple[str, Answer]]:
        """The harness asks once for each kind of request."""
        self._setup.check_kinds({request.kind for request in requests})
        unique = {request.digest: request for request in requests}
        ordered = sorted(unique.values(), key=lambda r: (r.settings != {}, r.length, r.digest))
        return list(zip((r.digest for r in ordered), self._answered(ordered), strict=True))

    def remove_others(self) -> None:
        """Delete answers to what was not asked: those of another config."""
        for folder in folders_in(self._answers) if self._answers.is_dir() else ():
            if folder.name not in self._asked:
                remove(folder)

    def _answered(self, requests: list[TaskRequest]) -> list[Answer]:
        folder = self._answers / self._identity(requests)
        self._asked.add(folder.name)
        folder.mkdir(parents=True, exist_ok=True)
        parts = _parts(requests, self._config.batch_size)
        there = files_under(folder)
        missing = [part for part in range(len(parts)) if _file(part) not in there]
        num_done = sum(len(part) for at, part in enumerate(parts) if at not in set(missing))
        self._progress.begin("requests of tasks", total=len(requests), done=num_done)
        if missing:
            for part, count in self._run(parts, missing, folder):
                self._progress.finish(part, (count, 0))
        lines = [(folder / _file(at)).read_bytes().splitlines() for at in range(len(parts))]
        return [json.loads(line) for part in lines for line in part]

    def _run(
        self, parts: list[list[TaskRequest]], missing: list[int], folder: Location
    ) -> Iterator[tuple[int, int]]:
        cluster = self._cluster
        num_actors = min(cluster.num_actors, len(missing))
        crew = Crew(
            cluster=cluster,
            what="answering actor",
            least=num_actors,
            most=num_actors,
            writes_to=folder,
        )
        items = [
            {"part": part, "requests": json.dumps([vars(request) for request in parts[part]])}
            for part in missing
        ]
        answers = crew.answers(
            _AnsweringActor,
            lambda use_gpu: (
                *(self._checkpoint, self._config, cluster, folder),
                *(self._progress.reporter, use_gpu, num_actors),
            ),
            items,
            on_event=self._progress.on_event,
        )
        for answer in answers:
            yield answer["part"], answer["requests"]

    def _identity(self, requests: Sequence[TaskRequest]) -> str:
        """A fingerprint of everything that decides the answers."""
        answering = self._setup.config.result_fields()
        asked = [request.digest for request in requests]
        files = checkpoint_identity(self._checkpoint)
        return fingerprint([answering, self._config.num_mask_samples, files, asked])[:16]


def run_tasks(
    config: "EvaluateConfig",
    cluster: "ClusterConfig",
    *,
    checkpoint: Location,
    output_dir: Location,
    progress: JobProgress,
) -> SuiteResult:
    """Let the checkpoint answer the config's tasks, on the connected Ray cluster.

    Answers are kept below `output_dir`, so that running it again goes on where it stopped. A
    request that cannot be served counts as wrong, and stands in the result with the reason.

    Raises:
        InputError: there is no such task, or the sampler does not go with checkpoint or task.
    """
    from tokendiff.evaluation.tasks.harness import AnsweredModel

    progress.on_event("doing", what="reading tasks")
    loaded = load_tasks(config.tasks, tasks_path=config.tasks_path, num_fewshot=config.num_fewshot)
    setup = task_setup(config, fetch(checkpoint))
    unshown = [name for name, t in loaded["tasks"].items() if t.get_config("num_fewshot") == 0]
    if config.num_fewshot and unshown:
        progress.on_event(
            "warning",
            message=f"num_fewshot {config.num_fewshot} has no effect on {', '.join(unshown)}: the "
            "task's file says 0, since it has no solved examples to show",
        )
    for message in cut_short(loaded, setup.config.sampler):
        progress.on_event("warning", message=message)
    answerers = Answerers(
        config,
        cluster,
        checkpoint=checkpoint,
        setup=setup,
        output_dir=output_dir,
        progress=progress,
    )
    result = ask_tasks(
        loaded,
        AnsweredModel(answerers, tokenizer=setup.tokenizer),
        max_documents=config.max_task_documents,
        apply_chat_template=config.apply_chat_template,
        # The default goes with the checkpoint; two of different kinds can be compared under it.
        answered_with=config.sampler and setup.config.sampler.result_fields(),
    )
    answerers.remove_others()
    if result.unserved:
        request, why = next(iter(result.unserved.items()))
        progress.on_event(
            "warning",
            message=f"{len(result.unserved):,} requests of tasks could not be served, and count as "
            f"wrong (tasks.json names them); the first: {request}: {why}",
        )
    return result


def copy_answers(output_dir: Location, folder: Path) -> None:
    """Put what was answered beside the result, where that is built in another folder."""
    if folder == output_dir:
        return
    for name in files_under(output_dir / ANSWERS):
        copy = folder / ANSWERS / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((output_dir / ANSWERS / name).read_bytes())


def _parts(requests: list[TaskRequest], batch_size: int) -> list[list[TaskRequest]]:
    """In batches, or a few where there are very many of them."""
    num_batches = -(-len(requests) // batch_size)
    size = batch_size * min(_MAX_BATCHES_PER_PART, -(-num_batches // _MAX_PARTS) or 1)
    return [requests[at : at + size] for at in range(0, len(requests), size)]


def _file(part: int) -> str:
    return f"part-{part:05d}.jsonl"
