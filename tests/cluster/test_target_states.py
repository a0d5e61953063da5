"""Hidden states of a draft's target, computed once: written by the stage, read in training."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipelines.graph import pipeline_stages
from pipelines.runner import plan, run_pipeline
from pipelines.tables import plan_as_json
from tests.builders import letter_tokenizer, random_rows, save_ref, tiny_causal, token_folder
from tests.in_this_process import jobs_here
from tests.training.test_dflash_training import DRAFT, LENGTH, config, runs_of
from tests.training.test_training import run
from tokendiff.artifacts.locations import RemotePath
from tokendiff.artifacts.manifest import MANIFEST_NAME, commit, load_manifest
from tokendiff.artifacts.model_folders import held_commits
from tokendiff.cluster.session import works_here
from tokendiff.cluster.target_states import cache_target_states
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.loader import load_config
from tokendiff.config.pipeline import Config
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.data.target_states import REMEDY, StatesOf, TargetStates
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.models.dflash.trainee import DraftTrainee
from tokendiff.training.commits import commits_of_run

V, FILES = 20, (25, 9, 6)


def save_target(folder: Path, *, seed: int = 0) -> str:
    tiny_causal(vocab_size=V, seed=seed, num_hidden_layers=6).float().save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return str(folder)


def save_rows(folder: Path, *, seed: int = 0) -> Path:
    rows = random_rows(sum(FILES), LENGTH, seed=seed)
    rows[-1], rows[3] = rows[-1][:5], rows[3][:2]
    stops = np.cumsum(FILES)
    files = [rows[stop - size : stop] for size, stop in zip(FILES, stops, strict=True)]
    return token_folder(
        folder,
        files=files,
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(4, LENGTH, seed=1),
        runs_of=runs_of,
    )


class Bench:
    """A target and rows of two documents each, and the states of a run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target = folder, save_target(folder / "target")
        self.rows = save_rows(folder / "data")
        self.data = TokenData.open(self.rows, split="train")

    def config(self, **changes: Any) -> TrainConfig:
        return config(DRAFT, **{"target_model_id": self.target, **changes})

    def cache(self, cfg: TrainConfig, name: str, cluster: ClusterConfig | None = None) -> Path:
        out = self.folder / name
        cluster = cluster or ClusterConfig()
        cache_target_states(cfg, cluster, data_path=self.rows, output_dir=out)
        return out


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest) -> Iterator[None]:
    """All but what is of Ray runs in this process, whatever ran in it before."""
    with nullcontext() if request.node.get_closest_marker("ray") else jobs_here():
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def states(bench: Bench) -> Path:
    return bench.cache(bench.config(), "states")


def reading(cfg: TrainConfig, states: Path | str) -> TrainConfig:
    return cfg.model_copy(update={"target_states_path": str(states)})


def opened(bench: Bench, states: Path) -> TargetStates:
    return TargetStates.open(states, StatesOf(**load_manifest(states).metadata["of"]))


@pytest.mark.slow
def test_states_are_those_of_each_document_alone(bench: Bench, states: Path) -> None:
    """As transformers gives them, row by row, and nothing on padding."""
    model: Any = AutoModelForCausalLM.from_pretrained(bench.target, dtype=torch.float32)
    rows = bench.data.read(*np.array([[0, 3], [2, 5], [1, 0], [0, 0]]).T)
    found = opened(bench, states).read(rows.row_ids, rows.lengths, max_length=LENGTH)
    assert found.shape == (4, LENGTH, 2 * model.config.hidden_size)
    for at, (tokens, length) in enumerate(zip(rows.tokens, rows.lengths, strict=True)):
        start = 0
        for size in runs_of(range(length)):
            part = torch.as_tensor(tokens[start : start + size]).long()[None]
            hidden = model(part, output_hidden_states=True).hidden_states
            expected = torch.cat([hidden[2], hidden[4]], dim=-1)[0]
            torch.testing.assert_close(
                found[at, start : start + size], expected, rtol=1e-3, atol=1e-4
            )
            start += size
        assert start == length
        assert not found[at, length:].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 3},  # whose last pass of a step has two rows
        {"mixed_precision": "bf16"},
        {"objective": {**DRAFT, "num_anchors": 500, "loss_type": "dpace"}},
        {"objective": {**DRAFT, "use_target_hidden_states": False}},
        {"objective": {**DRAFT, "draft_layout": "dflash2"}},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_losses_are_those_of_a_target_that_reads_in_every_step(
    bench: Bench,
    changes: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit, over more than an epoch; and the target reads held-out rows alone."""
    fields = {"objective": DRAFT, "max_train_steps": 6, **changes}
    cfg = config(fields.pop("objective"), target_model_id=bench.target, **fields)
    kept = tmp_path / "states"
    reads: list[int] = []
    read = DraftTrainee.read

    def counted(self: DraftTrainee, tokens: Any, positions: Any) -> Any:
        reads.append(len(tokens))
        return read(self, tokens, positions)

    monkeypatch.setattr(DraftTrainee, "read", counted)
    cache_target_states(cfg, ClusterConfig(), data_path=bench.rows, output_dir=kept)
    # The check of the target; passes as those of training, the last of a shard filled up.
    assert set(reads) == {1, cfg.per_device_train_batch_size}
    without, _ = run(cfg, bench.data, tmp_path / "without")
    reads.clear()
    cached, _ = run(reading(cfg, kept), bench.data, tmp_path / "cached")
    assert cached == without
    assert set(reads) == {1, 4}  # the check of the target; the held-out rows
    files = [load_file(tmp_path / n / "final/model.safetensors") for n in ("without", "cached")]
    assert all(torch.equal(value, files[1][name]) for name, value in files[0].items())


@pytest.mark.slow
def test_states_and_the_run_that_reads_them_are_of_one_commit(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, repository = "a" * 40, "b" * 40, tmp_path / "models--some--model"
    for seed, sha in enumerate((old, new)):
        save_target(repository / "snapshots" / sha, seed=seed)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cfg = bench.config(target_model_id="some/model")
    made = {}
    for sha in (old, new):
        save_ref(repository, "main", sha)
        out = tmp_path / sha[0]
        made[sha] = cache_target_states(cfg, ClusterConfig(), data_path=bench.rows, output_dir=out)
        assert made[sha].metadata["commits"] == {"target_model_id": sha}
    assert made[old].files != made[new].files
    # An attempt that began with the old one goes on with it.
    (tmp_path / "c/run").mkdir(parents=True)
    begun = tmp_path / "c/run/target_states.unfinished"
    begun.write_text(json.dumps({"some/model": old, "some/other": "c" * 40}))
    again = cache_target_states(
        cfg, ClusterConfig(), data_path=bench.rows, output_dir=tmp_path / "c"
    )
    assert again.files == made[old].files
    with commits_of_run(reading(cfg, tmp_path / "a"), tmp_path / "run"):
        assert held_commits() == {"some/model": old}
    run = {"target_model_id": "some/model"}
    (tmp_path / "run/checkpoint-1").mkdir(parents=True)
    commit(
        tmp_path / "run/checkpoint-1",
        kind="checkpoint",
        metadata={"run": run, "commits": {"target_model_id": new}},
    )
    with (
        pytest.raises(InputError, match=rf"some/model at commit {old}, .* began with {new}"),
        commits_of_run(reading(cfg, tmp_path / "a"), tmp_path / "run"),
    ):
        pass


@pytest.mark.slow
def test_a_run_goes_on_with_them_or_without(bench: Bench, states: Path, tmp_path: Path) -> None:
    cfg = bench.config()
    whole, _ = run(cfg, bench.data, tmp_path / "whole")
    for name, again in (("cached", reading(cfg, states)), ("plain", cfg)):
        (tmp_path / name).mkdir()
        shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / name / "checkpoint-2")
        resumed, _ = run(again, bench.data, tmp_path / name)
        assert resumed == {step: loss for step, loss in whole.items() if step > 2}


def test_what_an_attempt_left_is_kept_where_it_is_whole(
    bench: Bench, states: Path, tmp_path: Path
) -> None:
    there = Path(shutil.copytree(states, tmp_path / "states"))
    (there / MANIFEST_NAME).unlink()
    (there / "run").mkdir(exist_ok=True)
    (there / "run" / "target_states.unfinished").touch()
    first, second, third = sorted((there / "train").iterdir())
    second.write_bytes(second.read_bytes()[:-1])  # cut short by a kill
    (there / "train" / f".{third.name}.01234567.tmp").write_bytes(b"half")
    os.utime(first, (1, 1))
    found = cache_target_states(
        bench.config(), ClusterConfig(), data_path=bench.rows, output_dir=there
    )
    assert found.files == load_manifest(states).files
    assert first.stat().st_mtime == 1
    assert sorted((there / "train").iterdir()) == [first, second, third]
    assert third.stat().st_mtime != 1
    # Those of another kind of device are not, which holds the target in bfloat16.
    unchanged = first.read_bytes()
    tensors, of = load_file(first), StatesOf(**load_manifest(there).metadata["of"])
    save_file(
        {**tensors, "states": tensors["states"].bfloat16()}, first, metadata={"of": of.digest}
    )
    (there / MANIFEST_NAME).unlink()
    (there / "run" / "target_states.unfinished").touch()
    cache_target_states(bench.config(), ClusterConfig(), data_path=bench.rows, output_dir=there)
    assert first.read_bytes() == unchanged
    # Nor are those of another run: the same rows read otherwise, or with other layers.
    one_layer = config({**DRAFT, "draft_num_layers": 1}, target_model_id=bench.target)
    for other in (bench.config(mixed_precision="bf16"), one_layer):
        os.utime(first, (1, 1))
        (there / MANIFEST_NAME).unlink()
        (there / "run" / "target_states.unfinished").touch()
        found = cache_target_states(other, ClusterConfig(), data_path=bench.rows, output_dir=there)
        assert found.metadata["of"]["mixed_precision"] == other.mixed_precision
        assert first.stat().st_mtime != 1
    assert found.metadata["of"]["layers"] == [3]


@pytest.mark.slow
def test_stale_states_are_refused(bench: Bench, states: Path, tmp_path: Path) -> None:
    other_target = save_target(tmp_path / "other", seed=1)
    other_rows = TokenData.open(save_rows(tmp_path / "rows", seed=5), split="train")
    cases: list[tuple[TrainConfig, TokenData, str]] = [
        (bench.config(target_model_id=other_target), bench.data, "of another target"),
        (
            config({**DRAFT, "draft_num_layers": 1}, target_model_id=bench.target),
            bench.data,
            r"of other layers \(\[1, 3\] there, \[3\] here\)",
        ),
        (bench.config(), other_rows, "of other rows"),
        (
            bench.config(mixed_precision="bf16"),
            bench.data,
            r"of another mixed_precision \(no there, bf16 here\)",
        ),
    ]
    for cfg, data, said in cases:
        with pytest.raises(InputError, match=f"target_states_path .*{said}.*{REMEDY}"):
            run(reading(cfg, states), data, tmp_path / "run")
        with pytest.raises(InputError, match=said):
            cache_target_states(cfg, ClusterConfig(), data_path=data.folder, output_dir=states)
    with pytest.raises(InputError, match=r"no committed hidden states there.*cache_target_states"):
        run(reading(bench.config(), tmp_path / "nowhere"), bench.data, tmp_path / "run")
    with pytest.raises(CorruptFileError, match="holds 'tokens', expected 'target_states'"):
        run(reading(bench.config(), bench.rows), bench.data, tmp_path / "run")
    with pytest.raises(ValueError, match="target_states_path 'states' has no effect"):
        TrainConfig(target_states_path="states")
    with pytest.raises(InputError, match=r"target_states_path .* is what training reads"):
        cache_target_states(
            reading(bench.config(), states),
            ClusterConfig(),
            data_path=bench.rows,
            output_dir=tmp_path / "more",
        )
    with pytest.raises(InputError, match="objective 'ar' reads no target"):
        cache_target_states(
            config("ar"), ClusterConfig(), data_path=bench.rows, output_dir=tmp_path / "more"
        )


def test_a_target_in_another_dtype_is_refused(bench: Bench, states: Path, tmp_path: Path) -> None:
    """States that a GPU computed in bfloat16 are not those of a CPU."""
    there = Path(shutil.copytree(states, tmp_path / "states"))
    for path in (there / "train").iterdir():
        tensors = load_file(path)
        save_file({**tensors, "states": tensors["states"].bfloat16()}, path)
    metadata = {**load_manifest(there).metadata, "dtype": "BF16"}
    commit(there, kind="target_states", metadata=metadata)
    with pytest.raises(InputError, match=r"in bfloat16, and on this device .* held in float32"):
        run(reading(bench.config(), there), bench.data, tmp_path / "run")


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: _flip(path, 3000), "do not match their checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "does not match its MANIFEST"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: _flip(path, 20), "cannot be read"),
    ],
    ids=["states", "short", "gone", "header"],
)
def test_damage_is_noticed(
    bench: Bench, states: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    there = Path(shutil.copytree(states, tmp_path / "states"))
    damage(there / "train" / "part-00000.safetensors")
    with pytest.raises(CorruptFileError, match=said):
        run(reading(bench.config(), there), bench.data, tmp_path / "run")


def test_a_row_that_is_not_there_is_named(bench: Bench, states: Path) -> None:
    found = opened(bench, states)
    with pytest.raises(CorruptFileError, match=r"part-00001.safetensors has no row 4294967999"):
        found.read(np.array([(1 << 32) + 703]), np.array([3]), max_length=LENGTH)
    with pytest.raises(CorruptFileError, match=r"row 3 in .* has states of 2 tokens, and 3 tokens"):
        found.read(np.array([3]), np.array([3]), max_length=LENGTH)


@pytest.mark.slow
def test_behind_a_uri(bench: Bench, states: Path, tmp_path: Path) -> None:
    there = RemotePath(f"memory://{tmp_path.name}/states")
    found = cache_target_states(
        bench.config(), ClusterConfig(), data_path=bench.rows, output_dir=there
    )
    assert found.files == load_manifest(states).files
    local, remote = (
        run(reading(bench.config(), path), bench.data, tmp_path / name)[0]
        for name, path in (("local", str(states)), ("remote", there.uri))
    )
    assert local == remote


@pytest.mark.ray
@pytest.mark.slow
def test_actors_of_ray_data_write_the_same(bench: Bench, states: Path, ray_session: None) -> None:
    assert not works_here(2)
    cluster = ClusterConfig(num_actors=2, cpus_per_worker=0.5, threads_per_worker=1)
    there = bench.cache(bench.config(), "by-ray", cluster)
    assert load_manifest(there).files == load_manifest(states).files
    assert load_manifest(there).metadata == load_manifest(states).metadata


PIPELINE: dict[str, Any] = {
    "name": "toy",
    "preprocess": {
        "dataset_name": "text",
        "tokenizer_name_or_path": "bytes",
        "max_length": LENGTH,
    },
    "train": {
        "objective": {**DRAFT, "draft_num_layers": 1},
        "max_train_steps": 2,
        "logging_steps": 1,
    },
    "stages": {
        "texts": {"kind": "preprocess"},
        "target": {
            "kind": "train",
            "inputs": {"data": "texts"},
            "config": {"objective": "ar", "model_name_or_path": "builtin:qwen3-mini"},
        },
        "states": {
            "kind": "cache_target_states",
            "inputs": {"data": "texts", "target": "target"},
        },
        "draft": {
            "kind": "train",
            "inputs": {"data": "texts", "target": "target", "states": "states"},
        },
    },
    "tracking": {"enabled": False},
}


def written(tmp_path: Path, **stages: Any) -> Path:
    """The pipeline's file, with stages that differ."""
    (tmp_path / "text.txt").write_text("".join(f"line {n} of the text\n" for n in range(60)))
    preprocess = {**PIPELINE["preprocess"], "data_files": [f"{tmp_path}/*.txt"]}
    fields = {**PIPELINE, "preprocess": preprocess, "root": str(tmp_path / "out")}
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump({**fields, "stages": {**PIPELINE["stages"], **stages}}))
    return path


def previews(config: Config) -> dict[str, str]:
    steps = plan_as_json(plan(config, Path(config.root)))["stages"]
    return {step["stage"]: step.get("preview", {}).get("on disk", "") for step in steps}


@pytest.mark.slow
def test_a_pipeline_computes_them_once_and_says_what_they_take(tmp_path: Path) -> None:
    config = load_config(written(tmp_path))
    assert previews(config)["states"] == (
        "512.0 MB for each million training tokens (128 numbers of 4 bytes for each training token)"
    )
    result = run_pipeline(config, Path(config.root))
    assert result.state == "succeeded"
    stages = {stage.name: stage for stage in pipeline_stages(config, Path(config.root) / "toy")}
    found = stages["states"].result(stages["states"])
    size = sum(path.stat().st_size for path in stages["states"].folder.rglob("*.safetensors"))
    assert found["bytes"] == size
    assert size > found["tokens"] * 128 * 4
    assert previews(config)["states"] == f"{size / 1e6:.1f} MB"
    # Another draft of as many layers reads the same states; one of more, others.
    for change, state in (("loss_type=dpace", "done"), ("draft_num_layers=2", "run")):
        other = load_config(tmp_path / "toy.yaml", [f"train.objective.{change}"])
        steps = {step.stage.name: step.state for step in plan(other, Path(other.root)).steps}
        assert steps["states"] == state
        assert steps["draft"] == "run"
    exact = f"{found['tokens'] * 2 * 128 * 4 / 1e6:.1f} MB (256 numbers of 4 bytes for each "
    assert previews(other)["states"] == f"{exact}training token)"


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            {"config": {"mixed_precision": "bf16"}},
            "mixed_precision is 'no', and 'bf16' in 'states'",
        ),
        (
            {"config": {"objective": {"draft_num_layers": 2}}},
            "draft_num_layers is 1, and 2 in 'states', whose hidden states it reads",
        ),
        ({"config": {"objective": "ar"}}, "stages.states: objective 'ar' reads no target"),
        (
            {"inputs": {"data": "texts"}, "config": {"target_model_id": "other"}},
            "stages.draft: target is 'target', and None in 'states'",
        ),
    ],
)
def test_states_of_another_training_are_refused_before_anything_runs(
    tmp_path: Path, stage: dict[str, Any], said: str
) -> None:
    states = {**PIPELINE["stages"]["states"], **stage}
    with pytest.raises(InputError, match=said):
        pipeline_stages(load_config(written(tmp_path, states=states)), tmp_path)
