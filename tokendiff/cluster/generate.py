"""Batch offline generation with Ray Data actors, of any number of prompts.

Rows are numbered, and cut into parts by their numbers alone (`tokendiff.data.prompt_index`): the
driver hands out numbers of parts, an actor reads the prompts of its part, samples them and commits
the part's file by a rename. A restarted job skips the parts that are there. A row's randomness is
keyed by (seed, id) and its batch does not depend on the actors, so the files are the same, byte by
byte, with any number of actors and after any number of restarts; how long things took is in the
run's log, not in them.

A prompt that cannot be used stands in `errors/part-NNNNN.jsonl`, with its place and the reason;
that file is there before the part's own. A row at which its actor dies each time stands in
`set_aside/part-NNNNN.jsonl` (`tokendiff.data.row_failures`).
"""

import json
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.checkpoint import find_checkpoint
from tokendiff.artifacts.identity import checkpoint_identity, model_identity
from tokendiff.artifacts.last_notes import LastNote, take_note, take_notes, without_notes
from tokendiff.artifacts.locations import Location, files_under, remove
from tokendiff.artifacts.manifest import (
    COMMITS,
    Manifest,
    claim_folder,
    commit,
    fetch,
    fingerprint,
    is_committed,
    load_manifest,
    noted_in_claim,
    sha256_of,
    write_atomically,
)
from tokendiff.artifacts.model_folders import hub_commits
from tokendiff.cluster.actors import Crew, Item
from tokendiff.cluster.progress import JobProgress, Reporter
from tokendiff.cluster.session import set_up_torch
from tokendiff.data.bad_rows import ERRORS, ErrorCount, error_line, errors_file
from tokendiff.data.prompt_index import IndexedRow, PromptIndex, error_record
from tokendiff.data.prompts import GenerationRow, prompt_text
from tokendiff.data.row_failures import ATTEMPTS, SET_ASIDE, RowFailures, groups_to_sample
from tokendiff.data.samples import KIND, num_new_tokens, read_part, write_part
from tokendiff.errors import InputError, naming_memory
from tokendiff.evaluation.acceptance import acceptance_metrics, speedup_metrics
from tokendiff.models.completion import CompletionModel
from tokendiff.models.pretrained import commits_of
from tokendiff.models.requests import RowCheck, blank_note, check_given, check_source, make_check
from tokendiff.models.sampling import PromptCheck, SamplingModel

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig
    from tokendiff.config.generate import GenerateConfig
    from tokendiff.training.trainer import OnEvent

_MAX_PARTS = 256
_MAX_BATCHES_PER_PART = 64
_NAMED_ROWS = 8
_HUB_FIELDS = ("model_id", "target_model_id", "draft_model_id")
_MEMORY_REMEDY = "lower batch_size, ask for fewer tokens, or give more memory; what is done is kept"


class _Parts:
    """The rows of each part, and its files; a function of the rows' number and the batch size."""

    def __init__(self, num_rows: int, config: "GenerateConfig") -> None:
        num_batches = math.ceil(num_rows / config.batch_size)
        batches = min(_MAX_BATCHES_PER_PART, math.ceil(num_batches / _MAX_PARTS))
        self._num_rows, self._size = num_rows, batches * config.batch_size
        self._suffix = config.output_format
        self._digits = max(5, len(str(len(self) - 1)))  # sorted by name is sorted by number

    def __len__(self) -> int:
        return math.ceil(self._num_rows / self._size)

    def rows(self, part: int) -> tuple[int, int]:
        return part * self._size, min((part + 1) * self._size, self._num_rows)

    def num_rows(self, part: int) -> int:
        first, stop = self.rows(part)
        return stop - first

    def file(self, part: int) -> str:
        return f"part-{part:0{self._digits}}.{self._suffix}"

    def errors_file(self, part: int) -> str:
        return errors_file(part, digits=self._digits)

    def set_aside_file(self, part: int) -> str:
        return f"{SET_ASIDE}/part-{part:0{self._digits}}.jsonl"

    def attempts_file(self, part: int) -> str:
        return f"{ATTEMPTS}/part-{part:0{self._digits}}.json"


class _PartSampler:
    """The actor: samples the rows of a part, writes its files, returns counts."""

    def __init__(
        self,
        checkpoint: Location | None,
        config: "GenerateConfig",
        cluster: "ClusterConfig",
        index: PromptIndex,
        output_dir: Location,
        job: str,
        commits: Mapping[str, str],
        reporter: Reporter,
        use_gpu: bool,
        num_actors: int,
    ) -> None:
        device = set_up_torch(cluster, use_gpu=use_gpu, num_processes=num_actors)
        folder = None if checkpoint is None else fetch(checkpoint)
        self._index, self._output_dir, self._reporter = index, output_dir, reporter
        self._parts = _Parts(index.num_rows, config)
        self._job, self._config = job, config
        self._measures = config.measure_speedup
        self._model: SamplingModel | CompletionModel
        with hub_commits(commits):
            self._check = make_check(folder, config)
            if config.is_open_ended:
                self._model = CompletionModel(config, checkpoint=folder, device=device)
            else:
                self._model = SamplingModel(folder, config, device=device)

    def __call__(self, items: Item) -> Iterator[Item]:
        for number in items["item"]:
            yield {name: [value] for name, value in self._sample(int(number)).items()}

    def _sample(self, part: int) -> dict[str, Any]:
        start = time.perf_counter()
        rows, errors = usable_rows(self._index, *self._parts.rows(part), check=self._check)
        failures = RowFailures(
            path=self._output_dir / self._parts.attempts_file(part), job=self._job
        )
        failures.read()
        died_at = take_note(self._output_dir, f"part-{part}")
        with LastNote(self._output_dir, f"part-{part}") as last:
            self._note = last.write
            records, measured, set_aside = self._survivors(rows, part, failures)
        records.sort(key=lambda record: record["id"])
        for record in records:
            del record["seconds"]  # the same row takes another time in another run
        name, errors_name = self._parts.file(part), self._parts.errors_file(part)
        self._write_lines(errors_name, errors)
        self._write_lines(self._parts.set_aside_file(part), set_aside)
        write_part(self._output_dir / name, records)
        failures.forget()
        return {
            "part": part,
            "sha256": sha256_of(self._output_dir / name),
            "rows": self._parts.num_rows(part),
            "errors": len(errors),
            "first_error": f"{errors[0]['place']}: {errors[0]['reason']}" if errors else "",
            "died_at": died_at,
            "set_aside": json.dumps([f"{e['place']}: {e['reason']}" for e in set_aside]),
            "new_tokens": sum(map(num_new_tokens, records)),
            "model_calls": sum(record["num_model_calls"] for record in records),
            "seconds": time.perf_counter() - start,
            "measured": json.dumps(measured),
        }

    def _write_lines(self, name: str, records: list[dict[str, Any]]) -> None:
        if records:
            path = self._output_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, b"".join(map(error_line, records)))

    def _survivors(
        self, rows: list[GenerationRow], part: int, failures: RowFailures
    ) -> tuple[list[dict[str, Any]], Counter[str], list[dict[str, Any]]]:
        """Records of the rows that can be sampled, what was measured, and lines that name the rows
        that are set aside.
        """
        by_id = {row.id: row for row in rows}
        groups, set_aside = groups_to_sample(
            list(by_id),
            failures.failures,
            batch_size=self._config.batch_size,
            most=self._config.max_row_failures,
        )
        records: list[dict[str, Any]] = []
        measured: Counter[str] = Counter()
        for group in groups:
            failures.note(group)
            sampled, figures = self._samples([by_id[row] for row in group], part)
            records += sampled
            measured.update(figures)
        lines = [
            failures.record(
                row,
                place=f"row {row}" + (f" ({by_id[row].source})" if by_id[row].source else ""),
                prompt=prompt_text(by_id[row].prompt),
            )
            for row in set_aside
        ]
        return records, measured, lines

    def _samples(
        self, rows: list[GenerationRow], part: int
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        on_progress = self._reporter.of(part)
        records: list[dict[str, Any]] = []

        def place() -> str:
            # Records come in the order of the rows.
            ids = [row.id for row in rows[len(records) :][: self._config.batch_size]]
            return f"rows {', '.join(map(str, ids[:_NAMED_ROWS]))} ({len(ids)} at a time)"

        self._note(place())
        with naming_memory(place, _MEMORY_REMEDY):
            if not self._measures:
                for record in self._model.samples(rows, on_progress=on_progress):
                    records.append(record)
                    if len(records) % self._config.batch_size == 0:
                        self._note(place() if len(records) < len(rows) else "")
                return records, {}
            assert isinstance(self._model, CompletionModel)
            is_target_first = part % 2 == 0
            return self._model.measured(
                rows, is_target_first=is_target_first, on_progress=on_progress
            )


def generate(
    config: "GenerateConfig",
    cluster: "ClusterConfig",
    *,
    checkpoint_path: str | None,
    output_dir: Location,
    on_event: "OnEvent",
) -> Manifest:
    """Sample every row into part files under `output_dir`, on the connected Ray cluster, and commit
    the folder.

    Running it again goes on where it stopped, or returns at once where it is finished.

    Args:
        checkpoint_path: None where the config gives a model_id.
        output_dir: a URI, or a folder that every node sees under the same path.

    Raises:
        InputError: no such checkpoint, model or prompt file; a prompt of the command line does not
            fit; more than `max_errors` of the files' do not; or output_dir holds other samples.
    """
    check_source(config, checkpoint_path)
    found = None if checkpoint_path is None else find_checkpoint(checkpoint_path)
    checkpoint = None if found is None else fetch(found)
    names = {name: getattr(config, name) for name in _HUB_FIELDS}
    with hub_commits(_commits_begun_with(output_dir)):
        check = make_check(checkpoint, config)
        commits = commits_of(names)
    held = {names[field]: commit for field, commit in commits.items()}
    index = PromptIndex.of(config)
    check_given(index.given, check)
    source, source_files = _source(checkpoint, config)
    rows = index.identity()
    target = config.target_model_id and model_identity(config.target_model_id, by_manifest=False)
    identity = fingerprint(
        {
            "config": config.result_fields(),
            "rows": rows,
            "checkpoint": source_files,
            "target": target,
        }
    )
    if is_committed(output_dir):
        manifest = load_manifest(output_dir, kind=KIND)
        _check_identity(manifest.metadata["identity"], identity, output_dir)
        return manifest
    if isinstance(check, PromptCheck):
        for note in check.notes:
            on_event("warning", message=note)
    if (blank := blank_note(index.first_prompts(), check)) is not None:
        on_event("advice", message=blank)
    mark = _claim(output_dir, identity, held)
    if notes := take_notes(output_dir):
        on_event(
            "warning",
            message=f"an earlier attempt was killed at {'; '.join(notes[:2])}; if its memory ran "
            f"out, {_MEMORY_REMEDY}",
        )
    parts = _Parts(index.num_rows, config)
    totals = _Totals(parts, config.max_errors, output_dir, on_event)
    missing, done = totals.count_finished()
    arguments = (found, config, cluster, index, output_dir, uuid.uuid4().hex, held)
    with JobProgress(on_event) as progress, without_notes(output_dir):
        progress.begin("rows", total=index.num_rows, done=done, errors=totals.errors.num_rows)
        for counts in _sample_parts(missing, arguments, cluster, output_dir, on_event, progress):
            totals.add(counts)
            figures = (counts["rows"], counts["new_tokens"])
            progress.finish(counts["part"], figures, errors=totals.errors.num_rows)
    num_errors = totals.errors.num_rows
    if num_errors * config.num_samples >= index.num_rows:
        raise InputError(f"none of the prompts can be used; the first: {totals.errors.first}")
    if totals.num_set_aside + num_errors * config.num_samples >= index.num_rows:
        raise RuntimeError(
            f"no row could be sampled: {totals.num_set_aside} are set aside, see "
            f"{output_dir / SET_ASIDE}; the actors may lack memory for any of them: lower "
            "batch_size or the length of samples, and choose another output_dir"
        )
    remove(output_dir / ATTEMPTS)
    metadata = {
        "identity": identity,
        "conditions": _conditions(config, rows, target),
        "config": config.result_fields(),
        "checkpoint": source if found is None else str(found),
        "checkpoint_files": source_files,
        **({COMMITS: commits} if commits else {}),
        "rows": index.num_rows - num_errors * config.num_samples - totals.num_set_aside,
        "seq_len": check.seq_len if isinstance(check, PromptCheck) else None,
        "errors": num_errors,
        **({"set_aside": totals.num_set_aside} if totals.num_set_aside else {}),
        **totals.figures(),
        **_draft_figures(config, [output_dir / parts.file(n) for n in range(len(parts))], totals),
    }
    manifest = commit(output_dir, kind=KIND, metadata=metadata, known_sha256=totals.sha256)
    mark.unlink()
    return manifest


def _conditions(config: "GenerateConfig", rows: Any, target: Any) -> str:
    """Equal where samples can be compared: two models, or drafts of one target, were asked for the
    same rows in the same way.
    """
    names = ("sampler", "num_samples", "seq_len", "seed", "mixed_precision")
    chat = ("use_chat_template", "add_generation_prompt")
    fields = config.result_fields()
    return fingerprint([rows, target, {name: fields[name] for name in (*names, *chat)}])


def _source(checkpoint: Path | None, config: "GenerateConfig") -> tuple[str, Any]:
    """The model that these samples are to be judged with, and the identity of its files."""
    if checkpoint is not None:
        return str(checkpoint), checkpoint_identity(checkpoint)
    name = config.draft_model_id or config.model_id
    assert name is not None, "CompletionSetup sees to it"
    return name, model_identity(name)  # of a draft that we trained, that of its checkpoint


def _draft_figures(
    config: "GenerateConfig", files: list[Location], totals: "_Totals"
) -> dict[str, Any]:
    """What a draft gained; of the measured parts, those that this run made."""
    if not config.is_speculative:
        return {}
    records = (record for file in files for record in read_part(file))
    return {"speculation": {**acceptance_metrics(records), **speedup_metrics(totals.measured)}}


class _Totals:
    """What is done, told as it goes on; raises once too many prompts could not be used."""

    def __init__(
        self, parts: _Parts, max_errors: int, output_dir: Location, on_event: "OnEvent"
    ) -> None:
        self._parts, self._output_dir = parts, output_dir
        self._on_event = on_event
        self._sums = dict.fromkeys(("new_tokens", "model_calls", "seconds"), 0.0)
        self.measured: Counter[str] = Counter()
        self.errors = ErrorCount(
            max_errors,
            what="prompts",
            folder=output_dir / ERRORS,
            remedy="what was sampled is kept: raise max_errors to go on, or mend the prompts and "
            "choose another output_dir",
        )
        self.sha256: dict[str, str] = {}
        self._earlier: list[Location] = []
        self.num_set_aside = 0

    def count_finished(self) -> tuple[list[int], int]:
        """Count what an earlier attempt left.

        Returns:
            the parts that are still to be made, and the rows of the others.
        """
        names = files_under(self._output_dir) if self._output_dir.is_dir() else {}
        missing, num_rows = [], 0
        for part in range(len(self._parts)):
            if self._parts.file(part) not in names:
                missing.append(part)
                continue
            self._earlier.append(self._output_dir / self._parts.file(part))
            num_rows += self._parts.num_rows(part)
            if (errors := self._parts.errors_file(part)) in names:
                lines = (self._output_dir / errors).read_bytes().splitlines()
                first = json.loads(lines[0])
                self._count_errors(part, len(lines), f"{first['place']}: {first['reason']}")
            if (set_aside := self._parts.set_aside_file(part)) in names:
                self.num_set_aside += len((self._output_dir / set_aside).read_bytes().splitlines())
        return missing, num_rows

    def add(self, counts: Item) -> None:
        for name in self._sums:
            self._sums[name] += counts[name]
        self.measured.update(json.loads(counts["measured"]))
        self.sha256[self._parts.file(counts["part"])] = counts["sha256"]
        names = ("rows", "errors", *self._sums)
        self._on_event("part", part=counts["part"], **{name: counts[name] for name in names})
        if counts["errors"]:
            self._count_errors(counts["part"], counts["errors"], counts["first_error"])
        if counts["died_at"] and counts["set_aside"] == "[]":
            self._on_event(
                "warning",
                message=f"an actor died at {counts['died_at']}, which were sampled again; if its "
                f"memory ran out, {_MEMORY_REMEDY}",
            )
        for row in json.loads(counts["set_aside"]):
            self.num_set_aside += 1
            self._on_event(
                "warning", message=f"set aside, see {self._output_dir / SET_ASIDE}: {row}"
            )

    def _count_errors(self, part: int, count: int, first: str) -> None:
        if not self.errors.num_rows:
            self._on_event(
                "warning", message=f"not sampled, see {self._output_dir / ERRORS}: {first}"
            )
        self.errors.add(part, count, [first])

    def figures(self) -> dict[str, Any]:
        """The figures of all parts. The speed is of those that this run made: how long the others
        took is not in their files.
        """
        tokens, calls, seconds = (
            self._sums[name] for name in ("new_tokens", "model_calls", "seconds")
        )
        tokens_per_second = tokens / seconds if seconds else None
        for file in self._earlier:
            for record in read_part(file):
                tokens += num_new_tokens(record)
                calls += record["num_model_calls"]
        return {
            "num_model_calls": int(calls) or None,
            "tokens_per_forward": tokens / calls if calls else None,
            "tokens_per_second": tokens_per_second,
        }


def usable_rows(
    index: PromptIndex, first: int, stop: int, *, check: RowCheck
) -> tuple[list[GenerationRow], list[dict[str, Any]]]:
    """Rows first..stop-1 that can be sampled, and a record of each prompt that cannot, once for all
    its rows.
    """
    rows: list[GenerationRow] = []
    errors: list[dict[str, Any]] = []
    for item in index.rows(first, stop):
        error = item.error or _problem_of(item, check)
        if error is None:
            rows.append(item.row)
        elif item.row.id % index.num_samples == 0:
            errors.append(error_record(item, error, num_samples=index.num_samples))
    return rows, errors


def _problem_of(item: IndexedRow, check: RowCheck) -> InputError | None:
    try:
        check.request(item.row)
    except InputError as error:
        return error
    return None


def _claim(output_dir: Location, identity: str, commits: Mapping[str, str]) -> Location:
    """Note what is being sampled, so that parts of another job are never taken for this one's; on a
    second line with which commits of hub models, by name.
    """
    mark = claim_folder(output_dir, kind=KIND)
    if there := mark.read_text():
        _check_identity(there.split("\n")[0], identity, output_dir)
    lines = [identity, *([json.dumps(commits)] if commits else [])]
    write_atomically(mark, "\n".join(lines).encode())
    return mark


def _commits_begun_with(output_dir: Location) -> dict[str, str]:
    """By name, the commits of hub models that an earlier attempt sampled with: parts of another
    commit would be samples of another model.
    """
    _, _, line = noted_in_claim(output_dir, kind=KIND).partition("\n")
    commits: dict[str, str] = json.loads(line) if line else {}
    return commits


def _check_identity(there: str, here: str, output_dir: Location) -> None:
    if there != here:
        raise InputError(
            f"output_dir {output_dir} holds samples of another checkpoint, config or prompts; "
            "choose another output_dir, or delete that one"
        )


def _sample_parts(
    parts: list[int],
    arguments: tuple[Any, ...],
    cluster: "ClusterConfig",
    output_dir: Location,
    on_event: "OnEvent",
    progress: JobProgress,
) -> Iterator[Item]:
    most = min(cluster.num_actors, len(parts))
    crew = Crew(
        cluster=cluster,
        what="sampling actor",
        least=min(cluster.min_actors or cluster.num_actors, most),
        most=most,
        writes_to=output_dir,
        gpus_per_actor=cluster.gpus_per_actor,
    )
    return crew.answers(
        _PartSampler,
        lambda use_gpu: (*arguments, progress.reporter, use_gpu, most),
        [{"item": part} for part in parts],
        on_event=on_event,
    )
