"""Bytes flipped, files cut, emptied and deleted."""

import random
import re
import shutil
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.faults.moments import Moments
from benchmarks.faults.signals import send
from benchmarks.faults.subject import CONFIG, Subject, check_said
from benchmarks.faults.table import Broken, Case

PROMISE = (
    "No result is made of it: either an earlier checkpoint is gone on from, or one message names "
    "the folder to delete; then all is as without the fault."
)


def flip(path: Path, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, chance: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: chance.randrange(1, len(data))])


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


DAMAGES: Mapping[str, Callable[[Path, random.Random], None]] = {
    "flipped": flip,
    "truncated": truncate,
    "emptied": empty,
    "deleted": delete,
}
# Of a training run that was killed after its second checkpoint, and of a finished pipeline whose
# samples are drawn anew.
UNFINISHED = {
    "checkpoint-weights": "train-*/checkpoint-4/model.safetensors",
    "checkpoint-optimizer": "train-*/checkpoint-4/optimizer.safetensors",
    "checkpoint-manifest": "train-*/checkpoint-4/MANIFEST.json",
    "stage-record": "train-*/run/stage.json",
    "shard": "preprocess-*/train/part-00000.parquet",
    "shard-manifest": "preprocess-*/MANIFEST.json",
}
FINISHED = {
    "final-weights": "train-*/final/model.safetensors",
    "final-manifest": "train-*/final/MANIFEST.json",
}


def killed_in_training(subject: Subject) -> Path:
    """A pipeline that was killed when it had its second checkpoint; made once, to be copied."""
    folder = subject.scratch / "killed-in-training"
    if not folder.exists():
        names = [m for m in subject.moments("pipeline") if "/train-" in m]
        at = 1 + max(n for n, m in enumerate(names) if "checkpoint-4" in m)
        action = {at + 1: send(signal.SIGKILL)}
        moments = Moments(root=folder / "out", actions=action, only="/train-")
        subject.run("pipeline", folder, moments.install)
        assert list(folder.rglob("checkpoint-4/MANIFEST.json"))
    return folder / "out"


def damaged(
    subject: Subject,
    chance: random.Random,
    folder: Path,
    *,
    pattern: str,
    is_finished: bool,
    damage: Callable[[Path, random.Random], None],
) -> str:
    before = subject.undisturbed("pipeline") if is_finished else killed_in_training(subject)
    shutil.copytree(before, folder / "out")
    (path,) = (folder / "out" / CONFIG["name"]).glob(pattern)
    sound = path.read_bytes()
    damage(path, chance)
    arguments = subject.arguments("pipeline", folder)
    if is_finished:
        arguments += ["--force", "generate"]
    ended = subject.run("pipeline", folder, arguments=arguments)
    check_said(ended, codes=(0, 1, 2))
    if ended.code == 0:
        if pattern == UNFINISHED["shard"] and path.is_file():
            # A bit that no row is read from: pages have checksums of their own, and shards are not
            # made again. What was made of it must be the same all the same.
            path.write_bytes(sound)
        subject.check_same("pipeline", folder, is_killed=True)
        return "gone on, with the same result"
    named = re.findall(rf"{re.escape(str(folder))}/[\w./-]+", " ".join(ended.err.split()))
    if not named:
        raise Broken(f"the message names no file: {ended.message}")
    tops = {Path(name).relative_to(folder / "out" / CONFIG["name"]).parts[0] for name in named}
    for top in tops:
        shutil.rmtree(folder / "out" / CONFIG["name"] / top)
    subject.check_goes_on("pipeline", folder, is_killed=True)
    return "refused by name, made again once the folder was deleted"


CASES = tuple(
    Case(
        name=f"{what}-{how}",
        promise=PROMISE,
        done=f"{pattern.replace('*', 'KEY')} {how}"
        + (", then samples drawn anew" if is_finished else " of a run that was killed in training"),
        trial=partial(damaged, pattern=pattern, is_finished=is_finished, damage=damage),
    )
    for targets, is_finished in ((UNFINISHED, False), (FINISHED, True))
    for what, pattern in targets.items()
    for how, damage in DAMAGES.items()
)
