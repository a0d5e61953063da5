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
from collections.abc import Iterator
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
from tokendiff.data.samples import KIND, num_new_tokens, write_part
from tokendiff.errors import InputError
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
            records = sorted(self._model.samples(rows), key=lambda record: record["id"])
            write_part(Path(part["path"]), records)
            new = [num_new_tokens(record) for record in records]
            yield {
                "rows": [len(rows)],
                "new_tokens": [sum(new)],
                "model_calls": [sum(record["num_model_calls"] for record in records)],
                "seconds": [time.perf_counter() - start],
            }


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
    if (checkpoint_path is None) == (config.model_id is None):
        raise InputError("give either a checkpoint_path or a model_id to sample from")
    checkpoint = None if checkpoint_path is None else open_checkpoint(checkpoint_path)
    rows = generation_rows(config)
    seq_len = _check_prompts(checkpoint, config, rows)
    source = config.model_id if checkpoint is None else str(checkpoint)
    source_files = (
        causal_identity(str(source)) if checkpoint is None else checkpoint_identity(checkpoint)
    )
    identity = fingerprint(
        {
            "config": config.result_fields(),
            "rows": [dataclasses.asdict(row) for row in rows],
            "checkpoint": source_files,
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
    total = dict.fromkeys(("new_tokens", "model_calls", "seconds"), 0)
    on_event("progress", done=done, total=len(rows))
    for counts in _sample_parts(missing, checkpoint, config, cluster, on_event):
        total = {name: value + counts[name] for name, value in total.items()}
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
    }
    manifest = commit(output_dir, kind=KIND, metadata=metadata)
    mark.unlink()
    return manifest


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
