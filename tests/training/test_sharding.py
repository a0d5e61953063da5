"""Models that lie in parts on several workers: the losses, weights and checkpoints of one process
that holds them whole, and what a kill leaves while checkpoints are written.
"""

import errno
import json
import os
import shutil
import signal
import warnings
import weakref
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from tests.builders import letter_tokenizer, random_rows, tiny_causal, token_folder
from tests.models.diffusion_gemma import diffusion_gemma
from tests.models.test_models import tiny_denoiser
from tests.training.distributed import Job, Losses, one_of, run_distributed
from tokendiff.artifacts.checkpoint import newest_sound_checkpoint, open_checkpoint
from tokendiff.artifacts.locations import RemotePath, files_under
from tokendiff.artifacts.manifest import fetch, load_manifest, verify
from tokendiff.artifacts.tensor_files import TensorFiles
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData, step_batches, step_plan
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.models.checkpoints import load_for_inference
from tokendiff.models.layers import find_layers
from tokendiff.models.opening import load_causal_denoiser
from tokendiff.training import saving
from tokendiff.training.run import TrainingRun
from tokendiff.training.sharding import SpreadModel, _mesh
from tokendiff.training.world import World

LENGTH = 16
_OF_CANVASES = {
    "name": "block_diffusion",
    "noise": "uniform",
    "ar_loss_weight": 1.0,
    "block_length": 4,
}
# Every objective, and between them adapters, averages, recomputed activations, micro-batches that
# the workers have different numbers of, and both precisions.
RUNS: dict[str, dict[str, Any]] = {
    "mdlm": {"model_name_or_path": "builtin:bert-tiny", "objective": "mdlm", "ema_decay": 0.9},
    "udlm": {"model_name_or_path": "builtin:dit-tiny", "objective": "udlm", "global_batch_size": 7},
    "hybrid": {
        "model_name_or_path": "builtin:bert-tiny",
        "objective": "hybrid",
        "gradient_checkpointing": True,
        "optimizer": "muon",
    },
    "block_diffusion": {
        "model_name_or_path": "builtin:qwen3-tiny",
        "objective": "block_diffusion",
        "lora_rank": 2,
        "ema_decay": 0.9,
    },
    "block_diffusion beside a base model": {
        "objective": {"name": "block_diffusion", "predict": "next"},
        "lora_rank": 2,
        "keep_base": True,
    },
    "block_refinement": {
        "model_name_or_path": "builtin:qwen3-tiny",
        "objective": {"name": "block_refinement", "lambda_conf": 0.5},
        "per_device_train_batch_size": 2,
        "global_batch_size": 7,
    },
    "ar": {
        "model_name_or_path": "builtin:qwen3-tiny",
        "objective": "ar",
        "mixed_precision": "bf16",
    },
    "diffusion_gemma": {
        "objective": _OF_CANVASES,
        "ema_decay": 0.9,
        "gradient_checkpointing": True,
    },
    # Workers of one row each, some of which are told what a first pass found.
    "diffusion_gemma with adapters": {
        "objective": _OF_CANVASES,
        "lora_rank": 2,
        "per_device_train_batch_size": 1,
        "global_batch_size": 4,
    },
    "dflash": {
        "objective": {"name": "dflash", "num_anchors": 3, "block_size": 4, "draft_num_layers": 2},
        "ema_decay": 0.9,
    },
}
# bfloat16 in the model, or in Muon's iterations, which raise what a gradient has little of.
ROUGH = ("ar", "hybrid")
WAYS = {"gradients on 2": (2, 2), "full on 2": (2, 2), "hybrid on 4": (4, 2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("sharding")
    token_folder(
        folder / "data",
        files=[random_rows(12, LENGTH) for _ in range(3)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(7, LENGTH, seed=1),
    )
    tiny_causal(vocab_size=20, num_hidden_layers=5).save_pretrained(folder / "target")
    letter_tokenizer().save_pretrained(folder / "target")
    tiny_causal(vocab_size=20, num_hidden_layers=3).float().save_pretrained(folder / "base")
    letter_tokenizer().save_pretrained(folder / "base")
    diffusion_gemma(folder / "gemma")  # in bfloat16
    letter_tokenizer().save_pretrained(folder / "gemma")
    return folder


@pytest.fixture(scope="module")
def data(folder: Path) -> TokenData:
    return TokenData.open(folder / "data", split="train")


def config(name: str, folder: Path, **changes: Any) -> TrainConfig:
    fields = {
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "seed": 1,
        **RUNS[name],
        **changes,
    }
    if name == "dflash":
        fields["target_model_id"] = str(folder / "target")
    elif fields.get("keep_base"):
        fields["model_name_or_path"] = str(folder / "base")
    elif fields["objective"] == _OF_CANVASES:
        fields["model_name_or_path"] = str(folder / "gemma")
    return TrainConfig.model_validate(fields)


@pytest.fixture(scope="module")
def whole(folder: Path, data: TokenData) -> dict[str, Losses]:
    """Losses of one process; its checkpoints are in whole/NAME."""
    jobs: list[Job] = [(config(name, folder), folder / "whole" / name) for name in RUNS]
    return dict(zip(RUNS, run_distributed(jobs, data, 1), strict=True))


def weights_of(checkpoint: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    with TensorFiles(checkpoint, stem) as files:
        return {name: files.read(name) for name in files.names}


def assert_close(checkpoint: Path, expected: Path, *, is_rough: bool) -> None:
    tolerance = 5e-3 if is_rough else 1e-5
    for path in expected.glob("*.safetensors"):
        stem = path.name.removesuffix(".safetensors")
        there = load_file(path)
        here = weights_of(checkpoint, stem)
        assert here.keys() == there.keys(), stem
        for name, value in here.items():
            torch.testing.assert_close(
                value, there[name], rtol=1e-2 if is_rough else 1e-3, atol=tolerance
            )


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_objective_is_trained_as_in_one_process(
    way: str, folder: Path, data: TokenData, whole: dict[str, Losses]
) -> None:
    size, local_size = WAYS[way]
    out = folder / way.replace(" ", "-")
    sharding = way.partition(" ")[0]
    changes: dict[str, Any] = {"sharding": sharding, "checkpointing_steps": 4}
    jobs: list[Job] = [(config(n, folder, **changes), out / n) for n in RUNS]
    found = run_distributed(jobs, data, size, local_size=local_size)
    for name, losses in zip(RUNS, found, strict=True):
        is_rough = name in ROUGH
        assert losses == pytest.approx(whole[name], rel=1e-3 if is_rough else 1e-5), name
        for at in ("checkpoint-4", "final"):
            there = out / name / at
            verify(there)
            assert len(list(there.glob("model-*-of-*.safetensors"))) == size
            assert_close(there, folder / "whole" / name / at, is_rough=is_rough)
    assert not list(out.glob("*/.*"))


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_workers(
    folder: Path, data: TokenData, whole: dict[str, Losses], tmp_path: Path
) -> None:
    """From 2 that share the model to 1, to 4, and to 2 that do not share it; and from 1 to 2."""
    names = ("hybrid", "block_diffusion")
    first: list[Job] = [
        (config(n, folder, sharding="full"), tmp_path / "shared" / n) for n in names
    ]
    run_distributed(first, data, 2)
    for size, sharding, start in (
        (1, "none", tmp_path / "shared"),
        (4, "full", tmp_path / "shared"),
        (2, "none", tmp_path / "shared"),
        (2, "full", folder / "whole"),
    ):
        out, jobs = tmp_path / f"{size}-{sharding}-{start.name}", []
        for name in names:
            shutil.copytree(start / name / "checkpoint-2", out / name / "checkpoint-2")
            jobs.append((config(name, folder, sharding=sharding), out / name))
        for name, losses in zip(names, run_distributed(jobs, data, size), strict=True):
            is_rough = name in ROUGH
            expected = {step: loss for step, loss in whole[name].items() if step > 2}
            tolerance = 1e-3 if is_rough else 1e-5
            assert losses == pytest.approx(expected, rel=tolerance), (size, sharding)
            there = folder / "whole" / name / "final"
            assert_close(out / name / "final", there, is_rough=is_rough)


@pytest.mark.slow
def test_what_sharding_workers_wrote_opens_as_any_checkpoint_does(
    folder: Path, data: TokenData, whole: dict[str, Losses], tmp_path: Path
) -> None:
    tokens = torch.tensor(random_rows(3, LENGTH, seed=2))
    for name in ("mdlm", "block_diffusion"):
        out = tmp_path / name
        run_distributed([(config(name, folder, sharding="full"), out)], data, 2)
        opened = AutoModelForMaskedLM if name == "mdlm" else AutoModelForCausalLM
        with torch.no_grad():
            here, there = (
                opened.from_pretrained(base / "final").eval()(input_ids=tokens).logits
                for base in (out, folder / "whole" / name)
            )
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)
        # Of a checkpoint the averaged weights are taken, which stand beside the others.
        ours, theirs = (
            load_for_inference(base / "checkpoint-4")[0].model.state_dict()
            for base in (out, folder / "whole" / name)
        )
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-5)
        index = json.loads((out / "final" / "model.safetensors.index.json").read_text())
        sizes = [t.nbytes for t in weights_of(out / "final").values()]
        assert index["metadata"]["total_size"] == sum(sizes)
        shares = [p.stat().st_size for p in (out / "final").glob("model-*.safetensors")]
        assert max(shares) < 0.75 * sum(shares), "the workers share the writing"
    missing = out / "final" / "model-00002-of-00002.safetensors"
    missing.unlink()
    with pytest.raises(CorruptFileError, match=r"model-00002-of-00002.safetensors is missing"):
        open_checkpoint(out / "final")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}])
def test_weights_in_files_of_less_precision_are_trained_as_in_one_process(
    changes: dict[str, Any], folder: Path, data: TokenData, tmp_path: Path
) -> None:
    """Weights stay in their files until a layer is taken apart."""
    source = tmp_path / "bf16"
    tiny_causal(vocab_size=24, num_hidden_layers=3).bfloat16().save_pretrained(source)
    letter_tokenizer().save_pretrained(source)
    fields: dict[str, Any] = {"model_name_or_path": str(source), "lora_rank": None, **changes}
    losses = []
    for size, sharding in ((1, "none"), (2, "full")):
        cfg = config("block_diffusion", folder, sharding=sharding, ema_decay=0.0, **fields)
        losses += run_distributed([(cfg, tmp_path / sharding)], data, size)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert_close(tmp_path / "full" / "final", tmp_path / "none" / "final", is_rough=False)
    for name in ("config.json", "tokenizer.json", "scheduler_config.json"):
        here, there = (tmp_path / sharding / "final" / name for sharding in ("full", "none"))
        assert here.read_bytes() == there.read_bytes()


def test_weights_that_files_lack_are_the_same_however_they_are_opened(tmp_path: Path) -> None:
    """New ones are drawn; opening the files first must not move what is drawn."""
    model = tiny_causal(vocab_size=24, tie_word_embeddings=False).bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    letter_tokenizer().save_pretrained(tmp_path)
    notes: list[str] = []
    whole, on_disk = (
        load_causal_denoiser(
            str(tmp_path),
            tokenizer=letter_tokenizer(),
            max_length=LENGTH,
            is_on_disk=is_on_disk,
            warn=notes.append,
        ).state_dict()
        for is_on_disk in (False, True)
    )
    assert "up_proj" in notes[0]
    for name, value in whole.items():
        assert torch.equal(value, on_disk[name]), name


@pytest.mark.slow
def test_watched_runs_decide_alike(folder: Path, data: TokenData, tmp_path: Path) -> None:
    """7 held-out rows in batches of 2: the workers have different numbers of them."""
    fields: dict[str, Any] = {
        "eval_steps": 1,
        "keep": "best",
        "max_eval_rows": 7,
        "per_device_train_batch_size": 2,
    }
    cfg, cut = (
        config("mdlm", folder, sharding=sharding, **fields) for sharding in ("none", "full")
    )
    run_distributed([(cfg, tmp_path / "one")], data, 1)
    run_distributed([(cut, tmp_path / "two")], data, 2)
    states = [
        json.loads((tmp_path / name / "checkpoint-4" / "heldout.json").read_text())
        for name in ("one", "two")
    ]
    assert states[0]["best_step"] == states[1]["best_step"]
    assert states[0]["best"]["nats"] == pytest.approx(states[1]["best"]["nats"], rel=1e-5)
    for name in ("one", "two"):
        best = load_manifest(tmp_path / name / "final").metadata["best_step"]
        assert best == states[0]["best_step"]
    assert_close(tmp_path / "two" / "final", tmp_path / "one" / "final", is_rough=False)


# What a kill leaves.


def _die_while(moment: str, rank: int) -> None:
    """Make this process end by SIGKILL at a moment of its second checkpoint."""
    real_whole, real_write, real_commit = saving.whole, saving.write_tensors, saving.commit
    real_save, seen = saving.CheckpointSaver.save, []

    def die() -> None:
        if CALLS["save"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    def whole_or_die(tensor: Any) -> Any:
        seen.append(tensor)
        if len(seen) % 3 == 0:  # not at the first tensor of all
            die()
        return real_whole(tensor)

    def write_or_die(path: Path, *args: Any, **kwargs: Any) -> str:
        if CALLS["save"] == 2:
            path.write_bytes(b"half")
        die()
        return real_write(path, *args, **kwargs)

    def commit_or_die(*args: Any, **kwargs: Any) -> Any:
        die()
        return real_commit(*args, **kwargs)

    def save(self: Any, *args: Any, **kwargs: Any) -> None:
        self.wait()
        CALLS["save"] += 1
        real_save(self, *args, **kwargs)

    name, killer = {
        "staging": ("whole", whole_or_die),
        "writing": ("write_tensors", write_or_die),
        "before the manifest": ("commit", commit_or_die),
    }[moment]
    patch.object(saving, name, killer).start()
    patch.object(saving.CheckpointSaver, "save", save).start()


CALLS = {"save": 0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "rank"),
    [("staging", 1), ("writing", 1), ("writing", 0), ("before the manifest", 0)],
)
def test_a_kill_at_any_moment_leaves_the_checkpoint_before(
    moment: str,
    rank: int,
    folder: Path,
    data: TokenData,
    whole: dict[str, Losses],
    tmp_path: Path,
) -> None:
    cfg = config("mdlm", folder, sharding="full")
    out = tmp_path / "out"
    killed = run_distributed([(cfg, out)], data, 2, killed=(rank, _die_while, moment))
    assert killed == []
    warnings: list[str] = []
    assert newest_sound_checkpoint(out, warn=warnings.append) == out / "checkpoint-2"
    assert not warnings
    (losses,) = run_distributed([(cfg, out)], data, 2)
    expected = {step: loss for step, loss in whole["mdlm"].items() if step > 2}
    assert losses == pytest.approx(expected, rel=1e-5)
    assert not list(out.glob(".*")), "what the killed one left is gone"


@pytest.mark.slow
def test_workers_write_their_shares_to_a_uri(
    folder: Path, data: TokenData, whole: dict[str, Losses], s3: str
) -> None:
    """One of them is killed while it writes; both go on, and then one alone."""
    cfg = config("mdlm", folder, sharding="full")
    out = RemotePath(f"{s3}/sharded")
    assert run_distributed([(cfg, out)], data, 2, killed=(1, _die_while, "writing")) == []
    assert newest_sound_checkpoint(out, warn=pytest.fail) == out / "checkpoint-2"
    (losses,) = run_distributed([(cfg, out)], data, 2)
    expected = {step: loss for step, loss in whole["mdlm"].items() if step > 2}
    assert losses == pytest.approx(expected, rel=1e-5)
    for name in ("checkpoint-4", "final"):
        shares = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
        assert {*shares, "model.safetensors.index.json"} < verify(out / name).files.keys()
    assert_close(fetch(out / "final"), folder / "whole/mdlm/final", is_rough=False)
    longer = config("mdlm", folder, max_train_steps=6)
    (there,) = run_distributed([(longer, out)], data, 1)
    shutil.copytree(folder / "whole/mdlm/checkpoint-4", folder / "longer/checkpoint-4")
    (here,) = run_distributed([(longer, folder / "longer")], data, 1)
    assert there == pytest.approx(here, rel=1e-5)
    assert sorted(there) == [5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_share_that_cannot_be_written_ends_the_run_and_says_so(
    rank: int, folder: Path, data: TokenData, tmp_path: Path
) -> None:
    cfg = config("mdlm", folder, sharding="full")
    out = tmp_path / "out"
    with pytest.raises(OSError, match="No space left"):
        run_distributed([(cfg, out)], data, 2, killed=(rank, _fill_the_disk, "raises"))
    assert not list(out.glob("checkpoint-*"))
    run_distributed([(cfg, out)], data, 2)
    assert not list(out.glob(".*")), "what it left is gone"


def _fill_the_disk(moment: str, rank: int) -> None:
    patch.object(saving, "write_tensors", side_effect=OSError("No space left")).start()


def test_what_a_failed_write_leaves_is_removed(tmp_path: Path) -> None:
    saver = saving.CheckpointSaver(tmp_path, World.current())
    contents = saving.Contents(tensors={"model": [("a", torch.ones(2))]})
    with patch.object(saving, "write_tensors", side_effect=OSError("No space left")):
        saver.save("checkpoint-1", lambda: contents)
        with pytest.raises(OSError, match="No space left"):
            saver.wait()
    assert not list(tmp_path.iterdir())
    saver.save("checkpoint-1", lambda: contents)
    saver.close()  # as where something else ends the run
    verify(tmp_path / "checkpoint-1")


def test_all_of_a_checkpoint_is_on_the_disk_before_its_manifest_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut would leave a manifest of empty files, and older checkpoints are removed then."""
    synced: list[int] = []

    def fsync(file: int) -> None:
        synced.append(os.fstat(file).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "tokenizer" / "deep").mkdir(parents=True)
    for name in ("vocab.txt", "deep/merges.txt"):
        (tmp_path / "tokenizer" / name).write_text("a")
    saver = saving.CheckpointSaver(tmp_path, World.current())
    contents = saving.Contents(
        tensors={"model": [("a", torch.ones(2))]},
        files={"config.json": "{}"},
        beside=tmp_path / "tokenizer",
    )
    saver.save("checkpoint-1", lambda: contents)
    saver.wait()
    written = files_under(tmp_path / "checkpoint-1")
    names = {(tmp_path / "checkpoint-1" / name).stat().st_ino: name for name in written}
    assert "deep/merges.txt" in written
    assert names[synced[-1]] == "MANIFEST.json"
    assert sorted(names[inode] for inode in synced) == sorted(names.values())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk without any room")
def test_a_full_disk_is_told_with_the_file_that_was_written(tmp_path: Path) -> None:
    full = os.strerror(errno.ENOSPC)
    with pytest.raises(OSError, match=f"{full}: '/dev/full'$"):
        saving.write_tensors(Path("/dev/full"), {"a": torch.ones(2)})
    saver = saving.CheckpointSaver(tmp_path, World.current())
    contents = saving.Contents(tensors={"model": [("a", torch.ones(2))]})
    with patch.object(saving, "to_disk", side_effect=OSError(errno.ENOSPC, full)):
        saver.save("checkpoint-1", lambda: contents)
        with pytest.raises(OSError, match=f"{full}: '{tmp_path}/checkpoint-1'$"):
            saver.wait()
    # And by another worker than the main one, as that one tells it.
    saving._announce(tmp_path, "key", 1, {"error": f"worker 1: {full}", "errno": errno.ENOSPC})
    with pytest.raises(OSError, match=f"could not be written: worker 1: {full}: ") as error:
        saving._await(tmp_path, "key", 1)
    assert error.value.errno == errno.ENOSPC


# What is in memory.


class _Casts(TorchDispatchMode):
    """Knows of every tensor that was made bfloat16, and how many of those are still there."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self._made.append(weakref.ref(out.untyped_storage()))
        return out

    def num_left(self) -> int:
        assert self._made
        return sum(made() is not None for made in self._made)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "gradients", "full"])
def test_weights_in_bfloat16_do_not_outlive_their_layer(
    sharding: str, folder: Path, data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast would keep them until the pass is over: a copy of the whole model."""
    cfg = config("ar", folder, gradient_checkpointing=True, sharding=sharding)
    monkeypatch.setattr(saving.Replica, "of", lambda world, size: None)
    world = World(rank=0, size=1 if sharding == "none" else 2, device=torch.device("cpu"))
    left = []
    with one_of(world.size):
        trainer = TrainingRun.build(cfg, data, folder / "nowhere", world=world).trainer
        model: Any = trainer.denoiser
        encode = model.encode

        def counted(*args: Any) -> torch.Tensor:
            with _Casts() as casts:
                hidden: torch.Tensor = encode(*args)
                left.append(casts.num_left())
            return hidden

        monkeypatch.setattr(model, "encode", counted)
        plan = step_plan(cfg, data, rank=0, world_size=world.size)
        columns = next(iter(step_batches(data, plan, 0, 1)))
        with suppress(FloatingPointError):  # what the other worker holds is not there
            trainer._take_step(columns, lambda: None, lambda: None, False)
        with trainer.as_a_checkpoint() as judge:
            ((batch, generator),) = trainer._micro_batches(columns)
            judge(lambda model: trainer.objective.loss(model, batch, generator).loss_sum)
    assert left == [0, 0]


@pytest.mark.slow
def test_layers_that_lie_in_parts_may_be_compiled_as_often_as_whole_ones() -> None:
    model: Any = tiny_denoiser("modernbert")
    with one_of(2), torch._dynamo.config.patch(recompile_limit=8):
        world = World(rank=0, size=2, device=torch.device("cpu"))
        SpreadModel(model, world, sharding="full", is_compiled=True)
        assert torch._dynamo.config.recompile_limit > 8


# What cannot be.


def test_nodes_of_different_numbers_of_workers_have_no_replicas() -> None:
    world: Any = SimpleNamespace(
        size=5, device=torch.device("cpu"), sizes_of_nodes=lambda: [3, 2], local_size=3
    )
    with pytest.raises(
        InputError, match=r"hybrid: the 5 workers do not divide .* which have 3, 2;"
    ):
        _mesh(world, "hybrid")


def test_a_checkpoint_without_a_tensor_or_with_another_one_is_refused(
    folder: Path, data: TokenData, whole: dict[str, Losses], tmp_path: Path
) -> None:
    cfg = config("mdlm", folder)
    for name, change in (
        ("misses", lambda tensors: tensors.popitem()),
        ("differs", lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3, 1)})),
    ):
        at = tmp_path / name / "checkpoint-2"
        shutil.copytree(folder / "whole" / "mdlm" / "checkpoint-2", at)
        tensors = load_file(at / "model.safetensors")
        change(tensors)
        save_file(tensors, at / "model.safetensors")
        run = TrainingRun.build(cfg, data, tmp_path / name, world=World.current())
        says = "has no tensor" if name == "misses" else r"has the shape \[3, 1\], where"
        with pytest.raises(CorruptFileError, match=says):
            run.state.load(at)


def test_a_model_whose_layers_are_not_known_is_refused() -> None:
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    albert = AutoModelForMaskedLM.from_config(AutoConfig.for_model("albert", **small))
    with pytest.raises(InputError, match=r"sharding: .* 'albert' model are its layers; leave s"):
        find_layers(albert, field="sharding")
    causal = tiny_causal(vocab_size=20, num_hidden_layers=3)
    assert len(find_layers(causal, field="sharding")) == 3


def test_workers_begin_without_a_warning() -> None:
    with one_of(2), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        spread = SpreadModel(
            tiny_denoiser("bert"), World(rank=0, size=2, device=torch.device("cpu"))
        )
    module: Any = spread._module
    synced = getattr(module, "forward_sync_buffers", None) or getattr(
        module, "broadcast_buffers", None
    )
    assert not synced


def test_alone_there_is_nothing_to_take_apart() -> None:
    albert: Any = torch.nn.Linear(2, 2)
    spread = SpreadModel(albert, World.current(), sharding="full")
    assert not spread.is_sharded
    assert isinstance(spread.judge(lambda model: model.weight), torch.Tensor)
