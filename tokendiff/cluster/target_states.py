"""Hidden states of a draft's target for all training rows, shard by shard, by Ray Data actors that
write them beside one another; or in this process where one actor is asked for and no cluster.
"""

import json
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tokendiff.artifacts.locations import Location, location, upload_file
from tokendiff.artifacts.manifest import (
    COMMITS,
    Manifest,
    claim_folder,
    commit,
    is_committed,
    noted_in_claim,
    sha256_of,
    verify,
    write_atomically,
)
from tokendiff.artifacts.model_folders import hub_commits
from tokendiff.cluster.actors import Crew, Item
from tokendiff.cluster.progress import JobProgress, Reporter
from tokendiff.cluster.session import set_up_torch
from tokendiff.data.rows import TokenData, TokenRows
from tokendiff.data.target_states import (
    KIND,
    StatesOf,
    check_states,
    is_of,
    name_of_dtype,
    write_states,
)
from tokendiff.data.tokenizers import open_tokenizer
from tokendiff.diffusion.interfaces import Figures, OnProgress
from tokendiff.errors import InputError
from tokendiff.models.dflash.planning import DraftPlan, plan_draft
from tokendiff.models.dflash.target_states import TargetReader, states_wanted
from tokendiff.models.pretrained import commits_of
from tokendiff.training.commits import models_of
from tokendiff.training.inputs import check_inputs

if TYPE_CHECKING:
    from tokendiff.config.cluster import ClusterConfig
    from tokendiff.config.train import TrainConfig
    from tokendiff.training.trainer import OnEvent


def cache_target_states(
    config: "TrainConfig",
    cluster: "ClusterConfig",
    *,
    data_path: str | Location,
    output_dir: str | Location,
    on_event: "OnEvent" = lambda event, **fields: None,
) -> Manifest:
    """Read every training row with the target of a draft, and keep what the draft is to see.

    A folder that was already made is returned as it is. Of one that was cut off, files that are
    whole are kept.

    Args:
        config: of the run that is to read the states.
        output_dir: a URI, or a folder that every node sees under the same path.

    Raises:
        InputError: the config trains no draft, or does not go with the rows; or the folder holds
            something else.
        CorruptFileError: a shard of the rows is damaged.
    """
    check_objective(config)
    data, output_dir = TokenData.open(data_path, split="train"), location(output_dir)
    if isinstance(output_dir, Path):
        output_dir = output_dir.absolute()
    models, begun_with = models_of(config), _commits_begun_with(output_dir)
    with hub_commits(begun_with):
        check_inputs(config, data)
        tokenizer = open_tokenizer(data.tokenizer_path, field="data_path")
        plan = plan_draft(config, tokenizer=tokenizer, max_length=data.max_length)
        commits = commits_of(models)
    of = states_wanted(config, plan, data)
    if is_committed(output_dir):
        manifest = verify(output_dir, kind=KIND, hashes=False)
        check_states(output_dir, manifest, of)
        return manifest
    mark = claim_folder(output_dir, kind=KIND)
    held = begun_with | {models[field]: sha for field, sha in commits.items()}
    write_atomically(mark, json.dumps(held).encode())
    shards = [{"shard": shard, "path": name} for shard, name in enumerate(_names(data)) if name]
    num_actors = min(cluster.num_actors, len(shards))
    crew = Crew(
        cluster=cluster,
        what="actor that reads the target",
        least=num_actors,
        most=num_actors,
        writes_to=output_dir,
    )
    written = []
    with JobProgress(on_event) as progress:
        progress.begin("rows", total=data.num_rows)
        answers = crew.answers(
            _Reader,
            lambda use_gpu: (
                *(config, plan, data, of, output_dir, cluster, held),
                *(progress.reporter, use_gpu, num_actors),
            ),
            shards,
            on_event=on_event,
            in_order=True,
        )
        for answer in answers:
            written.append(json.loads(answer["written"]))
            figures = written[-1]["rows"], written[-1]["tokens"]
            progress.finish(int(answer["shard"]), figures)
    _check_arrived(output_dir, [file["path"] for file in written])
    metadata = {
        "of": vars(of),
        **({COMMITS: commits} if commits else {}),
        "dtype": written[0]["dtype"],
        "width": written[0]["width"],
        "rows": sum(file["rows"] for file in written),
        "tokens": sum(file["tokens"] for file in written),
        "files": [
            {name: file[name] for name in ("path", "rows", "tokens", "first_row_id")}
            for file in sorted(written, key=lambda file: file["first_row_id"])
        ],
    }
    known_sha256 = {file["path"]: file["sha256"] for file in written}
    manifest = commit(output_dir, kind=KIND, metadata=metadata, known_sha256=known_sha256)
    mark.unlink()
    return manifest


def _commits_begun_with(output_dir: Location) -> dict[str, str]:
    """By name, the commits of hub models that earlier attempts read with."""
    text = noted_in_claim(output_dir, kind=KIND)
    commits: dict[str, str] = json.loads(text) if text else {}
    return commits


def check_objective(config: "TrainConfig") -> None:
    """Raise InputError where what is trained reads no target."""
    if config.objective.name != "dflash":
        raise InputError(
            f"cache_target_states: objective {config.objective.name!r} reads no target; set "
            "train.objective to dflash and train.target_model_id to the model that the draft is for"
        )
    if config.target_states_path is not None:
        raise InputError(
            f"target_states_path {config.target_states_path} is what training reads; this stage "
            "computes the states anew: remove it here"
        )


def _names(data: TokenData) -> list[str]:
    """Of each shard the file of its states; empty where the shard has no rows."""
    shards = data.shards[data.split]
    found = []
    for shard, name in enumerate(shards.names):
        groups = _groups(data, shard)
        has_rows = bool(data.row_group_sizes[groups.start : groups.stop].sum())
        found.append(str(Path(name).with_suffix(".safetensors")) if has_rows else "")
    return found


def _groups(data: TokenData, shard: int) -> range:
    stops = data.shards[data.split].group_stops
    return range(int(stops[shard - 1]) if shard else 0, int(stops[shard]))


def _check_arrived(output_dir: Location, names: list[str]) -> None:
    if missing := [name for name in names if not (output_dir / name).is_file()]:
        raise InputError(
            f"output_dir {output_dir} is not the same on every node ({missing[0]} is not there); "
            "choose a folder on shared storage"
        )


class _Reader:
    """An actor that holds the target."""

    def __init__(
        self,
        config: "TrainConfig",
        plan: DraftPlan,
        data: TokenData,
        of: StatesOf,
        output_dir: Location,
        cluster: "ClusterConfig",
        commits: Mapping[str, str],
        reporter: Reporter,
        use_gpu: bool,
        num_actors: int,
    ) -> None:
        device = set_up_torch(cluster, use_gpu=use_gpu, num_processes=num_actors)
        with hub_commits(commits):
            self._target = TargetReader(config, plan, device=device)
        self._data, self._of, self._output_dir = data, of, output_dir
        self._reporter = reporter

    def __call__(self, items: Item) -> Iterator[Item]:
        for shard, name in zip(items["shard"], items["path"], strict=True):
            written = self._write(int(shard), str(name))
            yield {"shard": [int(shard)], "written": [json.dumps(written)]}

    def _write(self, shard: int, name: str) -> dict[str, Any]:
        """Read a shard's rows; what an earlier attempt wrote of them is left."""
        lengths, first_row_id = self._rows_of(shard)
        kind: dict[str, Any] = {"width": self._target.width, "dtype": self._target.dtype}
        fields = {"num_rows": len(lengths), "num_tokens": int(lengths.sum()), **kind}
        path = self._output_dir / name
        if path.is_file() and is_of(path, self._of, **kind):
            digest = sha256_of(path)
        elif isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                digest = write_states(unfinished, self._parts(shard), of=self._of, **fields)
                unfinished.replace(path)
            finally:
                unfinished.unlink(missing_ok=True)
        else:
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / path.name
                digest = write_states(local, self._parts(shard), of=self._of, **fields)
                upload_file(local, path)
        return {
            "path": name,
            "sha256": digest,
            "rows": fields["num_rows"],
            "tokens": fields["num_tokens"],
            "width": fields["width"],
            "dtype": name_of_dtype(self._target.dtype),
            "first_row_id": first_row_id,
        }

    def _rows_of(self, shard: int) -> tuple[np.ndarray, int]:
        """How long each row is, known before the first is written, and the id of the first."""
        groups = [self._data.read_group(group) for group in _groups(self._data, shard)]
        lengths = np.concatenate([group.lengths for group in groups])
        return lengths, int(next(group.row_ids[0] for group in groups if len(group)))

    def _parts(self, shard: int) -> Iterator[tuple[np.ndarray, np.ndarray, Any]]:
        tell: OnProgress = self._reporter.of(shard)
        num_rows = num_tokens = 0
        for group in _groups(self._data, shard):
            rows = self._data.read_group(group)
            for at in range(0, len(rows), self._target.rows_per_pass):
                part: TokenRows = rows.take(slice(at, at + self._target.rows_per_pass))
                yield part.row_ids, part.lengths, self._target.read(part)
                num_rows += len(part)
                num_tokens += int(part.lengths.sum())
                tell(partial(_both, num_rows, num_tokens))


def _both(num_rows: int, num_tokens: int) -> Figures:
    return num_rows, num_tokens
