"""Evaluation on the cluster: the bound with Ray Data actors, and what needs a model beside it with
tasks.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

import tokendiff
from tokendiff.artifacts.locations import Location, location, remove
from tokendiff.artifacts.manifest import (
    MANIFEST_NAME,
    Manifest,
    built_for,
    claim_folder,
    commit,
    fetch,
    fingerprint,
    load_manifest,
    write_atomically,
)
from tokendiff.artifacts.model_folders import is_draft_folder
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.cluster.actors import Crew, Item
from tokendiff.cluster.progress import JobProgress, Reporter
from tokendiff.cluster.session import (
    memory_given_back,
    naming_node,
    need_ray,
    set_up_torch,
    wants_gpu,
    works_here,
)
from tokendiff.cluster.tasks import ANSWERS, copy_answers, run_tasks
from tokendiff.data.rows import TokenData
from tokendiff.data.samples import given_text, num_new_tokens, read_samples
from tokendiff.diffusion.interfaces import OnProgress
from tokendiff.errors import CorruptFileError, InputError, naming_memory
from tokendiff.evaluation.acceptance import accepted_by_row
from tokendiff.evaluation.bound import Bound, summarize
from tokendiff.evaluation.draft_acceptance import (
    DraftEvaluator,
    acceptance_figures,
    accuracy_figures,
)
from tokendiff.evaluation.evaluator import Evaluator, evaluation_rows
from tokendiff.evaluation.generation_metrics import (
    cost_metrics,
    generation_metrics,
    unigram_entropy_nats,
)
from tokendiff.evaluation.inputs import KIND, EvaluationInputs
from tokendiff.evaluation.paired import DOCUMENTS, ROW_ID, ROWS, SAMPLED_ROWS, write_rows
from tokendiff.evaluation.pass_times import num_passes, outlook_tables, pass_seconds
from tokendiff.evaluation.report import write_report
from tokendiff.evaluation.summary import make_report
from tokendiff.evaluation.tasks.suite import TASKS, SuiteResult, write_suite
from tokendiff.models.cuda_graphs import Recorder
from tokendiff.models.decoding import open_causal
from tokendiff.models.tracing import TRACE_STEPS, can_be_traced, trace_sample
from tokendiff.verification.certificate import CERTIFICATE, Check, counts, tables, write_certificate

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig
    from tokendiff.config.evaluate import EvaluateConfig
    from tokendiff.training.trainer import OnEvent

_ROWS_PER_TASK = 256
_NAMED_ROWS = 8
_MEMORY_REMEDY = "lower evaluate.batch_size, or give more memory"


class _JudgingActor:
    """Judges rows: by the bound, or a draft by what of its blocks is accepted."""

    def __init__(
        self,
        checkpoint: Location,
        data: TokenData,
        config: "EvaluateConfig",
        cluster: "ClusterConfig",
        reporter: Reporter,
        use_gpu: bool,
        num_actors: int,
    ) -> None:
        device = set_up_torch(cluster, use_gpu=use_gpu, num_processes=num_actors)
        self._data, self._reporter = data, reporter
        folder = fetch(checkpoint)
        self._judge: Callable[..., dict[str, np.ndarray]]
        if is_draft_folder(folder):
            self._judge = DraftEvaluator(folder, config, device=device).acceptance
        else:
            self._judge = Evaluator(folder, config, device=device).bounds

    def __call__(self, items: Item) -> Iterator[Item]:
        for unit, text in zip(items["unit"], items["rows"], strict=True):
            places = np.asarray(json.loads(text))
            rows = self._data.read(places[:, 0], places[:, 1])
            with naming_memory(partial(_place_of, rows.row_ids), _MEMORY_REMEDY):
                judged = self._judge(rows, on_progress=self._reporter.of(int(unit)))
            figures = {ROW_ID: rows.row_ids, "tokens": rows.lengths, **judged}
            yield {
                "figures": [json.dumps({name: array.tolist() for name, array in figures.items()})]
            }


def _place_of(row_ids: np.ndarray) -> str:
    some = ", ".join(map(str, row_ids[:_NAMED_ROWS].tolist()))
    return f"held-out rows, {len(row_ids)} to judge (the first row_ids: {some})"


def evaluate_bound(
    config: "EvaluateConfig",
    cluster: "ClusterConfig",
    *,
    checkpoint: Location,
    data: TokenData,
    progress: JobProgress,
) -> tuple[Bound, dict[str, np.ndarray], np.ndarray]:
    """The bound over the chosen rows, what it is by row, and how often each token id occurs in them
    ([V] int64).
    """
    rows = judge_rows(config, cluster, checkpoint=checkpoint, data=data, progress=progress)
    token_counts = rows.pop("token_counts")[0]
    return summarize(rows["nats"], rows["num_tokens"], rows["num_bytes"]), rows, token_counts


def judge_rows(
    config: "EvaluateConfig",
    cluster: "ClusterConfig",
    *,
    checkpoint: Location,
    data: TokenData,
    progress: JobProgress,
) -> dict[str, np.ndarray]:
    """What the evaluator of such a checkpoint says of the chosen rows, by row, and row_id [rows];
    token_counts [1, V], where it has them, are those of all rows.

    A row's noise is keyed by its id, so the figures do not depend on the number of actors.
    """
    groups, rows = evaluation_rows(data, seed=config.seed, max_rows=config.max_eval_rows)
    places = np.stack([groups, rows], axis=1)
    items = [
        places[at : at + _ROWS_PER_TASK].tolist() for at in range(0, len(places), _ROWS_PER_TASK)
    ]
    num_actors = min(cluster.num_actors, len(items))
    crew = Crew(cluster=cluster, what="evaluation actor", least=num_actors, most=num_actors)
    # Arrays, and one sum of the counts: of a million rows, tens of megabytes.
    columns: dict[str, list[np.ndarray]] = {}
    progress.begin("rows", total=len(places))
    judged = crew.answers(
        _JudgingActor,
        lambda use_gpu: (
            *(checkpoint, data, config, cluster),
            *(progress.reporter, use_gpu, num_actors),
        ),
        [{"unit": unit, "rows": json.dumps(item)} for unit, item in enumerate(items)],
        on_event=progress.on_event,
        in_order=True,
    )
    for unit, row in enumerate(judged):
        part = {name: np.asarray(value) for name, value in json.loads(row["figures"]).items()}
        lengths = part.pop("tokens")
        for name, value in part.items():
            if name == "token_counts" and name in columns:
                columns[name][0] += value
            else:
                columns.setdefault(name, []).append(value)
        progress.finish(unit, (len(part[ROW_ID]), int(lengths.sum())))
    return {name: np.concatenate(values) for name, values in columns.items()}


def traced(
    config: "EvaluateConfig",
    cluster: "ClusterConfig",
    *,
    checkpoint: Location,
    data: TokenData,
    progress: JobProgress,
) -> dict[str, Any]:
    """One sample being denoised; the fields of a `Trace`."""

    def work(device: str, on_progress: OnProgress) -> dict[str, Any]:
        row = data.read(*evaluation_rows(data, seed=config.seed, max_rows=1))
        num_before_answer = int(row.is_target[0].argmax())  # 0 of a plain text
        trace = trace_sample(
            fetch(checkpoint),
            row=row.tokens[0].tolist(),
            seed=config.seed,
            num_given=num_before_answer or None,
            device=device,
            on_progress=on_progress,
        )
        return trace.as_dict()

    # Frames are what the sample begins with and what each step makes of it.
    progress.begin("frames of a sample", total=TRACE_STEPS + 1)
    return _run_task(work, cluster, progress, use_gpu=wants_gpu(cluster))


def score_with_reference(
    config: "EvaluateConfig",
    cluster: "ClusterConfig",
    *,
    samples: Sequence[Mapping[str, Any]],
    max_length: int,
    progress: JobProgress,
) -> dict[str, Any]:
    """Generative perplexity of the samples' own tokens under the reference model."""
    reference = config.reference_model_name_or_path
    assert reference is not None

    def work(device: str, on_progress: OnProgress) -> dict[str, Any]:
        from tokendiff.evaluation.reference import generative_perplexity

        return generative_perplexity(
            [record["text"] for record in samples],
            reference,
            given=[given_text(record) for record in samples],
            batch_size=config.batch_size,
            max_length=max_length,
            device=device,
            on_progress=on_progress,
        )

    progress.begin("samples read by the reference", total=len(samples))
    return _run_task(work, cluster, progress, use_gpu=wants_gpu(cluster))


def verify(
    cluster: "ClusterConfig",
    *,
    checkpoint: Location,
    data: TokenData,
    process: NoiseProcess,
    progress: JobProgress,
) -> list[Check]:
    """The installed code and the checkpoint, held against the oracles."""
    from tokendiff.verification.checkpoints import (
        NUM_ROWS,
        num_checkpoint_checks,
        verify_checkpoint,
    )
    from tokendiff.verification.installed_code import num_code_checks, verify_code

    def work(device: str, on_progress: OnProgress) -> list[Check]:
        places = evaluation_rows(data, seed=0, max_rows=NUM_ROWS)
        rows = data.read(*places)
        checks: list[Check] = []
        of_checkpoint = verify_checkpoint(fetch(checkpoint), rows.tokens, rows.lengths)
        for check in chain(verify_code(), of_checkpoint):
            checks.append(check)
            on_progress(lambda: (len(checks), 0))
        return checks

    progress.begin("checks", total=num_code_checks() + num_checkpoint_checks(process))
    return _run_task(work, cluster, progress, use_gpu=False)  # float64 matters here, not speed


def timed_passes(
    config: "EvaluateConfig",
    cluster: "ClusterConfig",
    *,
    checkpoint: Location,
    progress: JobProgress,
) -> dict[str, float]:
    """What decoding passes of a causal model take on a worker of its own."""

    def work(device: str, on_progress: OnProgress) -> dict[str, float]:
        import torch

        dtype = torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32
        model, _ = open_causal(str(fetch(checkpoint)), field="checkpoint_path", dtype=dtype)
        model.replay_by(Recorder.on(torch.device(device)))  # as where it generates
        done: list[int] = []

        def note() -> None:
            done.append(1)
            on_progress(lambda: (len(done), 0))

        found: dict[str, float] = pass_seconds(model.to(device), on_pass=note)
        return found

    progress.begin("passes", total=num_passes())
    answer: dict[str, float] = _run_task(work, cluster, progress, use_gpu=wants_gpu(cluster))
    return answer


def rows_identity(config: "EvaluateConfig", data: TokenData) -> str:
    """Equal where bounds can be compared: they were taken on the same rows, with the same noise."""
    fields = [config.split, config.seed, config.max_eval_rows, config.num_mask_samples]
    return fingerprint([data.fingerprint, *fields])


def _generated(record: Mapping[str, Any]) -> list[int]:
    """The tokens that the model chose: in the gaps of the prompt, and behind it."""
    tokens = record["tokens"]
    in_gaps = [tokens[at] for at in record.get("gaps") or []]
    return [*in_gaps, *tokens[record["num_prompt_tokens"] :]]


def _accepted_of(samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """What was accepted of the drafts of each sample, and what passes gave."""
    blocks = np.array([record["blocks_by_gain"] for record in samples])
    return {
        ROW_ID: np.array([record["id"] for record in samples]),
        **accepted_by_row(blocks),
        "num_new_tokens": np.array([num_new_tokens(record) for record in samples]),
        "num_model_calls": np.array([record["num_model_calls"] for record in samples]),
    }


def sample_metrics(samples: Sequence[Mapping[str, Any]], made: Mapping[str, Any]) -> dict[str, Any]:
    """What samples are like and what they cost.

    Args:
        made: the metadata of their manifest.
    """
    metrics = generation_metrics([_generated(record) for record in samples])
    metrics |= cost_metrics(
        [num_new_tokens(record) for record in samples],
        [record["num_model_calls"] for record in samples],
        [record.get("finish_reason", "length") for record in samples],
    )
    if (speed := made["tokens_per_second"]) is not None:  # where parts were made, not found
        metrics["sampled_tokens_per_second"] = speed
    return {**metrics, **made.get("speculation", {})}  # of sampler dflash


def _run_task(
    work: Callable[[str, OnProgress], Any],
    cluster: "ClusterConfig",
    progress: JobProgress,
    *,
    use_gpu: bool,
) -> Any:
    """What `work(device, on_progress)` returns: here, or on some worker."""
    if works_here(1):
        with memory_given_back(is_needed=use_gpu):
            answer = work(set_up_torch(cluster, use_gpu=use_gpu), progress.reporter.of(0))
        progress.end()
        return answer
    need_ray()
    import ray

    driver = ray.util.get_node_ip_address()

    def on_worker(reporter: Reporter) -> Any:
        with naming_node(driver):
            return work(set_up_torch(cluster, use_gpu=use_gpu), reporter.of(0))

    task = ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=1 if use_gpu else 0)(on_worker)
    try:
        answer = ray.get(task.remote(progress.reporter))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError | CorruptFileError):
            raise error.cause from None
        raise
    progress.end()
    return answer


def evaluate(
    config: "EvaluateConfig",
    cluster: "ClusterConfig",
    *,
    title: str,
    checkpoint_path: str,
    data_path: str | Location | None,
    samples_path: str | Location | None,
    training_log: Sequence[Mapping[str, Any]],
    config_yaml: str,
    output_dir: Location,
    on_event: "OnEvent",
) -> Manifest:
    """Write `metrics.json`, what it is made of by row (`evaluation.paired`), `report/index.html`
    and, with `config.verify`, `certificate.json` under `output_dir`, and commit it.

    A check that fails does not raise: the certificate says so, and `verify_failed` in the metrics.

    Args:
        data_path: token shards; None takes those that the checkpoint was trained on.
        samples_path: a samples folder, or None to leave the generation metrics out.
        training_log: the "metrics" and "heldout" events of the training run, for the curves.

    Raises:
        InputError: a path does not hold what it should, or the data has another tokenizer.
    """
    inputs = EvaluationInputs.open(
        config, checkpoint_path=checkpoint_path, data_path=data_path, samples_path=samples_path
    )
    source, process, data = inputs.source, inputs.process, inputs.data
    samples = [] if samples_path is None else read_samples(location(samples_path))
    mark = claim_folder(output_dir, kind=KIND)
    for left_over in (MANIFEST_NAME, CERTIFICATE, SAMPLED_ROWS, TASKS):  # of an earlier evaluation
        (output_dir / left_over).unlink(missing_ok=True)
    for left_over in (DOCUMENTS, *(() if config.tasks else (ANSWERS,))):
        if (output_dir / left_over).is_dir():
            remove(output_dir / left_over)

    bound: Bound | None = None
    with JobProgress(on_event) as progress:
        if inputs.is_draft:
            judged = judge_rows(config, cluster, checkpoint=source, data=data, progress=progress)
            blocks = judged["blocks"]
            rows = {ROW_ID: judged[ROW_ID], **accepted_by_row(blocks)}
            metrics: dict[str, Any] = acceptance_figures(blocks)
            metrics |= accuracy_figures(judged["right"], blocks)
            kind, about_noise = "DFlash draft", "It is a DFlash draft."
        else:
            bound, rows, token_counts = evaluate_bound(
                config, cluster, checkpoint=source, data=data, progress=progress
            )
            metrics = {**asdict(bound), "unigram_entropy_nats": unigram_entropy_nats(token_counts)}
            kind = "autoregressive" if process is None else process.describe()
            about_noise = f"Noise: {kind}." if process else "It writes one token after the other."
            metrics |= {"is_exact": 1} if process is None else {}
            if "ar_nats" in rows:
                ar = summarize(rows["ar_nats"], rows["ar_tokens"], rows["num_bytes"])
                metrics["ar_nats_per_token"] = ar.nats_per_token
                metrics["ar_standard_error"] = ar.standard_error
        made: dict[str, Any] = {}  # what the samples' manifest says
        if samples:
            assert samples_path is not None
            made = load_manifest(location(samples_path)).metadata
            metrics |= sample_metrics(samples, made)
            if config.reference_model_name_or_path is not None:
                metrics |= score_with_reference(
                    config, cluster, samples=samples, max_length=data.max_length, progress=progress
                )
        trace: dict[str, Any] | None = None
        if process is not None and can_be_traced(process):
            trace = traced(config, cluster, checkpoint=source, data=data, progress=progress)
        if config.time_passes:
            metrics |= timed_passes(config, cluster, checkpoint=source, progress=progress)
        checks: list[Check] = []
        if config.verify:
            assert process is not None, "EvaluationInputs sees to it"
            checks = verify(
                cluster, checkpoint=source, data=data, process=process, progress=progress
            )
        suite: SuiteResult | None = None
        if config.tasks:
            suite = run_tasks(
                config, cluster, checkpoint=source, output_dir=output_dir, progress=progress
            )
            metrics |= suite.metrics
            metrics["unserved_requests"] = len(suite.unserved)
    metrics |= counts(checks) if checks else {}
    report = make_report(
        title=title,
        subtitle=f"Checkpoint {source.parent.name}/{source.name}. {about_noise}",
        split=config.split,
        bound=bound,
        more_tables=[
            *(suite.tables if suite else []),
            *outlook_tables(metrics),
            *tables(checks),
        ],
        metrics=metrics,
        samples=samples,
        training_log=training_log,
        trace=trace,
        config_yaml=config_yaml,
    )
    metadata = {
        "metrics": metrics,
        "checkpoint": str(source),
        "rows": rows_identity(config, data),
        **({} if suite is None else {"tasks": suite.identities}),
        "sampled": made.get("conditions"),
    }
    with built_for(output_dir) as folder:
        if checks:
            about = {"tokendiff": tokendiff.__version__, "checkpoint": str(source)}
            write_certificate(folder, checks, about={**about, "process": kind})
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1).encode())
        write_rows(folder / ROWS, rows)
        if suite is not None:
            write_suite(folder, suite)
            copy_answers(output_dir, folder)
        if "speculation" in made:
            write_rows(folder / SAMPLED_ROWS, _accepted_of(samples))
        write_report(folder / "report", report)
        manifest = commit(folder, kind=KIND, metadata=metadata)
    mark.unlink()
    return manifest
