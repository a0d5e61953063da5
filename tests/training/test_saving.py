"""Checkpoints of weights on a device, which is emulated: they are waited for once, and what
training does to the weights meanwhile does not show in them.
"""

import errno
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.device_reads import NAME, count_waits, emulated_device
from tokendiff.artifacts.checkpoint import KIND
from tokendiff.artifacts.locations import Location, RemotePath, files_under
from tokendiff.artifacts.manifest import is_committed, verify
from tokendiff.training import saving
from tokendiff.training.saving import CheckpointSaver, Contents
from tokendiff.training.world import World

SHAPES: dict[str, tuple[int, ...]] = {"a": (3, 4), "b": (5,), "c": (2, 2, 2), "d": (), "e": (0, 3)}


class _Late(TorchDispatchMode):
    """As a GPU: a copy to the host that nobody waits for is of what its source holds by then, and
    is there once the device is waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_waits = 0
        self._under_way: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_copy = func.overloadpacket is torch.ops.aten.copy_
        if is_copy and len(args) > 2 and args[2] and args[1].device.type == NAME:
            target, source = args[:2]
            self._under_way.append((target, source.held.clone()))
            return target.fill_(77)
        return func(*args, **(kwargs or {}))

    def wait(self, device: torch.device) -> None:
        assert device == emulated_device()
        self.num_waits += 1
        for target, value in self._under_way:
            target.copy_(value)
        self._under_way.clear()


def weights_of(number: float, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found = {name: (number + each).to(device) for name, each in drawn.items()}
    return {**found, "turned": found["a"].T, "step": torch.tensor(number)}


def saved(folder: Path, device: torch.device, meanwhile: Any = lambda weights: None) -> list[Any]:
    """What three checkpoints hold, written one after the other by the same saver."""
    saver, found = CheckpointSaver(folder, World(rank=0, size=1, device=device)), []
    for number in range(3):
        weights = weights_of(float(number), device)
        contents = Contents(
            tensors={"model": weights.items(), "twice": ((n, 2 * w) for n, w in weights.items())}
        )
        saver.save(f"checkpoint-{number}", lambda contents=contents: contents)  # type: ignore[misc]
        meanwhile(weights)
        saver.wait()
        place = folder / f"checkpoint-{number}"
        found.append([load_file(place / f"{stem}.safetensors") for stem in ("model", "twice")])
    return found


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> _Late:
    made = _Late()
    monkeypatch.setattr(saving, "_is_on_gpu", lambda tensor: tensor.device.type == NAME)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    return made


def test_a_checkpoint_is_waited_for_once_and_is_that_of_the_cpu(
    late: _Late, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(tmp_path / "here", torch.device("cpu"))
    assert late.num_waits == 0
    asked: list[bool] = []

    def locked_memory(like: Tensor) -> Tensor:
        asked.append(like.device.type == NAME)
        return torch.empty(like.shape, dtype=like.dtype)

    def go_on(weights: dict[str, Tensor]) -> None:
        for each in weights.values():
            each.fill_(-1)

    monkeypatch.setattr(saving, "_locked_memory", locked_memory)
    device = emulated_device()
    with count_waits() as waits, late:
        found = saved(tmp_path / "there", device, meanwhile=go_on)
    assert not waits.reads, waits.places()
    assert late.num_waits == 3, "once a checkpoint"
    assert asked == [True] * 2 * (len(SHAPES) + 1), "what is on the device, once: memory is kept"
    assert_same(found, expected)


def test_without_locked_memory_a_checkpoint_is_the_same(
    late: _Late, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """There is none on a machine without a GPU."""
    expected = saved(tmp_path / "here", torch.device("cpu"))
    device = emulated_device()
    with caplog.at_level(logging.WARNING), count_waits(), late:
        found = saved(tmp_path / "there", device)
    assert_same(found, expected)
    (said,) = caplog.messages
    assert "no more memory can be locked for copies of checkpoints" in said


@pytest.mark.parametrize("place", ["here", "behind a URI"])
def test_what_fails_as_it_is_written_does_not_count_and_hinders_nothing(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written anew where a run began again behind a damaged one."""
    root: Location = tmp_path if place == "here" else RemotePath(f"memory://{tmp_path.name}")
    saver = CheckpointSaver(root, World(rank=0, size=1, device=torch.device("cpu")))
    checkpoint = root / "checkpoint-1"

    def save(number: float) -> None:
        tensors = {"model": weights_of(number, torch.device("cpu")).items()}
        saver.save("checkpoint-1", lambda: Contents(tensors=tensors, files={"a.json": "{}"}))
        saver.wait()

    def fail(*args: Any, **fields: Any) -> None:
        raise OSError(errno.ENOSPC, "a disk is full")

    save(1.0)
    (checkpoint / "left-over.safetensors").write_bytes(b"")
    (checkpoint / "run").mkdir(parents=True, exist_ok=True)
    (checkpoint / "run" / "log.jsonl").write_bytes(b"kept")
    with monkeypatch.context() as patch:
        patch.setattr(saving, "to_disk" if place == "here" else "upload", fail)
        with pytest.raises(OSError, match="a disk is full"):
            save(2.0)
    # Here the one before is still whole; behind a URI it was written over.
    assert is_committed(checkpoint) == (place == "here")
    assert not list(tmp_path.glob(".*.tmp"))
    save(3.0)
    verify(checkpoint, kind=KIND)
    found = load((checkpoint / "model.safetensors").read_bytes())
    assert_same([[found]], [[weights_of(3.0, torch.device("cpu"))]])
    assert "left-over.safetensors" not in files_under(checkpoint)
    assert (checkpoint / "run" / "log.jsonl").is_file() == (place != "here")


def test_a_kill_while_a_checkpoint_is_replaced_leaves_a_whole_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = CheckpointSaver(tmp_path, World(rank=0, size=1, device=torch.device("cpu")))
    checkpoint = tmp_path / "final"

    def save() -> None:
        saver.save("final", lambda: Contents(tensors={}, files={"a.json": "{}", "b.json": "{}"}))
        saver.wait()

    def cut_off(folder: Path, **options: Any) -> None:
        monkeypatch.undo()
        (folder / "a.json").unlink()
        raise KeyboardInterrupt

    save()
    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save()
    if is_committed(checkpoint):
        verify(checkpoint, kind=KIND)
    save()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_checkpoint_is_made_once_the_last_one_is_written(tmp_path: Path) -> None:
    saver = CheckpointSaver(tmp_path, World(rank=0, size=1, device=torch.device("cpu")))
    told: list[str] = []

    def save(name: str) -> None:
        def make() -> Contents:
            told.append(f"{name} is made")
            return Contents(tensors={"model": [("a", torch.ones(2))]})

        saver.save(name, make, then=lambda: told.append(f"{name} is written"))

    save("checkpoint-1")
    save("checkpoint-2")
    saver.wait()
    steps = ("is made", "is written")
    assert told == [f"checkpoint-{number} {step}" for number in (1, 2) for step in steps]


def test_a_tensor_of_another_shape_or_dtype_under_the_same_name_is_written_as_it_is(
    tmp_path: Path,
) -> None:
    saver = CheckpointSaver(tmp_path, World(rank=0, size=1, device=torch.device("cpu")))
    for tensor in (torch.ones(2), torch.ones(2, dtype=torch.bfloat16), torch.ones(3)):
        contents = Contents(tensors={"model": [("a", tensor)]})
        saver.save("final", lambda contents=contents: contents)  # type: ignore[misc]
        saver.wait()
        found = load_file(tmp_path / "final" / "model.safetensors")["a"]
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
