"""Batch offline generation with Ray Data actors.

Rows are cut into batches, and batches into parts, by their ids alone. An actor samples a part and
commits its file by a rename; a restarted job skips the parts that are there. A row's randomness is
keyed by (seed, id) and its batch does not depend on the actors, so the output is the same with any
number of them.
"""

import dataclasses
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.data

from tokendiff.checkpoint import checkpoint_identity, open_checkpoint
from tokendiff.cluster.session import (
    data_context,
    set_up_torch,
    wait_for_resources,
    wants_gpu,
)
from tokendiff.data.prompts import GenerationRow, generation_rows
from tokendiff.data.samples import KIND, num_new_tokens, read_part, write_part
from tokendiff.errors import InputError
from tokendiff.evaluation.acceptance import acceptance_metrics, speedup_metrics
from tokendiff.manifest import (
    Manifest,
    claim_folder,
    commit,
    fingerprint,
    is_committed,
    load_manifest,
    write_atomically,
)
from tokendiff.models.causal import causal_identity
from tokendiff.models.completion import CompletionModel, CompletionSetup
from tokendiff.models.sampling import SamplingModel, check_prompts
from tokendiff.storage import Location
from tokendiff.training.trainer import OnEvent

if TYPE_CHECKING:
    from tokendiff.config import ClusterConfig, GenerateConfig

_MAX_PARTS = 256
_MAX_BATCHES_PER_PART = 64


class _PartSampler:
    """The Ray Data actor: samples the rows of a part, writes its file, returns counts."""

    def __init__(
        self,
        checkpoint: Path | None,
        config: "GenerateConfig",
        cluster: "ClusterConfig",
        use_gpu: bool,
        num_actors: int,
    ) -> None:
        device = set_up_torch(cluster, use_gpu=use_gpu, num_processes=num_actors)
        self._measures = config.measure_speedup
        self._model: SamplingModel | CompletionModel
        if config.is_open_ended:
            self._model = CompletionModel(config, checkpoint=checkpoint, device=device)
        else:
            assert checkpoint is not None
            self._model = SamplingModel(checkpoint, config, device=device)

    def __call__(self, items: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for text in items["part"]:
            part = json.loads(text)
            start = time.perf_counter()
            rows = [GenerationRow(**row) for row in part["rows"]]
            records, measured = self._samples(rows, is_target_first=part["index"] % 2 == 0)
            records.sort(key=lambda record: record["id"])
            write_part(Path(part["path"]), records)
            new = [num_new_tokens(record) for record in records]
            yield {
                "rows": [len(rows)],
                "new_tokens": [sum(new)],
                "model_calls": [sum(record["num_model_calls"] for record in records)],
                "seconds": [time.perf_counter() - start],
                "measured": [json.dumps(measured)],
            }

    def _samples(
        self, rows: list[GenerationRow], *, is_target_first: bool
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        if not self._measures:
            return list(self._model.samples(rows)), {}
        assert isinstance(self._model, CompletionModel)
        return self._model.measured(rows, is_target_first=is_target_first)


def generate(
    config: "GenerateConfig",
    cluster: "ClusterConfig",
    *,
    checkpoint_path: str | None,
    output_dir: Path,
    on_event: OnEvent,
) -> Manifest:
    """Sample every row into part files under `output_dir`, on the connected Ray cluster, and commit
    the folder.

    Running it again goes on where it stopped, or returns at once where it is finished.

    Args:
        checkpoint_path: None where the config gives a model_id.

    Raises:
        InputError: no such checkpoint or model, a prompt that does not fit, or output_dir holds
            other samples.
    """
    model_id = config.target_model_id or config.model_id
    if (checkpoint_path is None) == (model_id is None):
        raise InputError("give either a checkpoint_path or a model_id to sample from")
    checkpoint = None if checkpoint_path is None else open_checkpoint(checkpoint_path)
    rows = generation_rows(config)
    seq_len = _check_prompts(checkpoint, config, rows)
    source, source_files = _source(checkpoint, config)
    identity = fingerprint(
        {
            "config": config.result_fields(),
            "rows": [dataclasses.asdict(row) for row in rows],
            "checkpoint": source_files,
            "target": config.target_model_id and causal_identity(config.target_model_id),
        }
    )
    if is_committed(output_dir):
        manifest = load_manifest(output_dir, kind=KIND)
        _check_identity(manifest.metadata["identity"], identity, output_dir)
        return manifest
    mark = _claim(output_dir, identity)
    parts = _parts(rows, config, output_dir)
    missing = [part for part in parts if not Path(part["path"]).is_file()]
    done = sum(len(part["rows"]) for part in parts) - sum(len(part["rows"]) for part in missing)
    total: Counter[str] = Counter()
    measured: Counter[str] = Counter()
    on_event("progress", done=done, total=len(rows))
    for counts in _sample_parts(missing, checkpoint, config, cluster, on_event):
        total.update({name: counts[name] for name in ("new_tokens", "model_calls", "seconds")})
        measured.update(json.loads(counts["measured"]))
        done += counts["rows"]
        on_event("progress", done=done, total=len(rows))
    metadata = {
        "identity": identity,
        "config": config.result_fields(),
        "checkpoint": source,
        "checkpoint_files": source_files,
        "rows": len(rows),
        "seq_len": seq_len,
        # Of the parts that this run made.
        "num_model_calls": total["model_calls"] or None,
        "tokens_per_forward": _ratio(total["new_tokens"], total["model_calls"]),
        "tokens_per_second": _ratio(total["new_tokens"], total["seconds"]),
        **_draft_figures(config, parts, measured),
    }
    manifest = commit(output_dir, kind=KIND, metadata=metadata)
    mark.unlink()
    return manifest


def _source(checkpoint: Path | None, config: "GenerateConfig") -> tuple[str, Any]:
    """The model that these samples are to be judged with, and the identity of its files."""
    if checkpoint is not None:
        return str(checkpoint), checkpoint_identity(checkpoint)
    name = config.draft_model_id or config.model_id
    assert name is not None, "CompletionSetup sees to it"
    folder = Path(name).expanduser()
    is_ours = is_committed(folder)  # a draft that we trained, which jobs.evaluate opens
    return name, checkpoint_identity(folder) if is_ours else causal_identity(name)


def _draft_figures(
    config: "GenerateConfig", parts: list[dict[str, Any]], measured: Mapping[str, float]
) -> dict[str, Any]:
    """What sampler dflash gained; of the measured parts, those that this run made."""
    if config.sampler.name != "dflash":
        return {}
    records = [record for part in parts for record in read_part(Path(part["path"]))]
    return {"speculation": {**acceptance_metrics(records), **speedup_metrics(measured)}}


def _ratio(new_tokens: float, per: float) -> float | None:
    return new_tokens / per if per else None


def _check_prompts(
    checkpoint: Path | None, config: "GenerateConfig", rows: list[GenerationRow]
) -> int | None:
    """The length of a sample (None where each row has its own), after checking that sampler, model
    and every prompt go together.
    """
    if not config.is_open_ended:
        assert checkpoint is not None, "GenerateConfig sees to it"
        return check_prompts(checkpoint, config, rows)
    setup = CompletionSetup.of(config, checkpoint)
    for row in rows[:: config.num_samples]:  # the others repeat these prompts
        setup.request(row)
    return None


def _claim(output_dir: Location, identity: str) -> Location:
    """Note what is being sampled, so that parts of another job are never taken for this one's."""
    mark = claim_folder(output_dir, kind=KIND)
    if there := mark.read_text():
        _check_identity(there, identity, output_dir)
    else:
        write_atomically(mark, identity.encode())
    return mark


def _check_identity(there: str, here: str, output_dir: Location) -> None:
    if there != here:
        raise InputError(
            f"output_dir {output_dir} holds samples of another checkpoint, config or prompts; "
            "choose another output_dir, or delete that one"
        )


def _parts(
    rows: list[GenerationRow], config: "GenerateConfig", output_dir: Path
) -> list[dict[str, Any]]:
    num_batches = math.ceil(len(rows) / config.batch_size)
    batches_per_part = min(_MAX_BATCHES_PER_PART, math.ceil(num_batches / _MAX_PARTS))
    size = batches_per_part * config.batch_size
    return [
        {
            "index": at // size,
            "path": str(output_dir / f"part-{at // size:05d}.{config.output_format}"),
            "rows": [dataclasses.asdict(row) for row in rows[at : at + size]],
        }
        for at in range(0, len(rows), size)
    ]


def _sample_parts(
    parts: list[dict[str, Any]],
    checkpoint: Path | None,
    config: "GenerateConfig",
    cluster: "ClusterConfig",
    on_event: OnEvent,
) -> Iterator[dict[str, Any]]:
    if not parts:
        return
    num_actors = min(cluster.num_actors, len(parts))
    use_gpu = wants_gpu(cluster)
    wait_for_resources(cluster, count=num_actors, what="sampling actors", on_event=on_event)
    with data_context():
        dataset = ray.data.from_items(
            [{"part": json.dumps(part)} for part in parts], override_num_blocks=len(parts)
        ).map_batches(
            _PartSampler,
            fn_constructor_args=(checkpoint, config, cluster, use_gpu, num_actors),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=cluster.cpus_per_worker,
            num_gpus=1 if use_gpu else None,
        )
        yield from dataset.iter_rows()
