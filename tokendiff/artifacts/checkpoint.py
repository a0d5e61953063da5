"""A checkpoint is a folder that other tools can open, and that counts only once its MANIFEST.json
is written.

    checkpoint-400/
        config.json model.safetensors        transformers' from_pretrained opens it
        tokenizer.json tokenizer_config.json
        scheduler_config.json                the noise process, in the diffusers form, if any
        ema.safetensors                      averaged weights, where the run keeps them
        adapters.safetensors                 what is trained, where that is adapters, which the
        ema_adapters.safetensors             weights above hold merged; or, where the base model is
        draft_adapters.json                  kept, do not hold: what adapters those are
        optimizer.safetensors trainer_state.json
        heldout.json                         the best evaluation so far, where the run is watched
        MANIFEST.json                        size and sha256 of every file, written last

Where workers shared a model they shared its files too: `model-00001-of-00004.safetensors` and so
on, with an index, for each of the files of tensors.

`final/` is the same without the training state, and with a model card (README.md). What was
trained, weights or adapters beside those of a base model, is averaged there where the run keeps
averages.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tokendiff.artifacts.locations import Location, RemotePath, location, remove
from tokendiff.artifacts.manifest import (
    MANIFEST_NAME,
    fetch,
    is_committed,
    load_manifest,
    verify,
)
from tokendiff.artifacts.model_folders import is_foreign
from tokendiff.errors import CorruptFileError, InputError

KIND = "checkpoint"
FINAL = "final"
# In the metadata, where the best weights are kept: the step that final/ would be of, or is of.
BEST_STEP = "best_step"
STOPPED_EARLY = "stopped_early"  # of a final/ with fewer steps: why it has no more
# Stems of the files of tensors (`tokendiff.artifacts.tensor_files`).
WEIGHTS, EMA_WEIGHTS, OPTIMIZER = "model", "ema", "optimizer"
ADAPTERS, EMA_ADAPTERS = "adapters", "ema_adapters"
DRAFT_ADAPTERS = "draft_adapters.json"
_PREFIX = "checkpoint-"


def checkpoint_name(step: int) -> str:
    return f"{_PREFIX}{step}"


def step_of(folder: Location) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def committed_checkpoints(output_dir: Location) -> list[Location]:
    """The checkpoint-N folders with a manifest, oldest first."""
    if not output_dir.is_dir():
        return []
    found: list[Location] = [
        path
        for path in output_dir.iterdir()
        if re.fullmatch(rf"{_PREFIX}\d+", path.name) and is_committed(path)
    ]
    return sorted(found, key=step_of)


def newest_sound_checkpoint(
    output_dir: Location, *, warn: Callable[[str], None]
) -> Location | None:
    """The newest checkpoint that is whole: its files, and those of the checkpoint that it names as
    its best, match their manifests. `warn` is told of each that is passed over.
    """
    passed_over: CorruptFileError | None = None
    for folder in reversed(committed_checkpoints(output_dir)):
        try:
            _check(folder)
            best = best_step_of(folder)
            if best is not None and best != step_of(folder):
                _check(output_dir / checkpoint_name(best))
        except CorruptFileError as error:
            warn(f"checkpoint {error}; using the previous checkpoint")
            passed_over = error
            continue
        return folder
    if passed_over is not None:
        warn(f"no sound checkpoint is left under {output_dir}; starting from step 0")
    return None


def _check(folder: Location) -> None:
    """Raise CorruptFileError where a file of a checkpoint is not there, or not what it was."""
    if not is_committed(folder):
        raise CorruptFileError(f"{folder}: is gone")
    verify(folder, kind=KIND, hashes=isinstance(folder, Path))
    fetch(folder)  # which checks what it copies


def best_step_of(folder: Location) -> int | None:
    """The step whose weights final/ would hold, as a checkpoint's manifest says; None if it names
    none or cannot be read.
    """
    try:
        best: int | None = load_manifest(folder).metadata.get(BEST_STEP)
    except (CorruptFileError, OSError):
        return None
    return best


def remove_old_checkpoints(
    output_dir: Location, *, newest: int, keep: int, needed: int | None = None
) -> None:
    """Delete all but the `keep` newest checkpoints up to step `newest`, which was just saved, those
    that one of them names as its best (final/ may be made of it), and the one of step `needed`.

    Later ones are damaged (or the run would have gone on from them), and are deleted too, as are
    temporary folders that a killed run left.
    """
    folders = committed_checkpoints(output_dir)
    sound = [folder for folder in folders if step_of(folder) <= newest][-keep:]
    best = {needed, *(best_step_of(folder) for folder in sound)}
    for folder in folders:
        if folder not in sound and step_of(folder) not in best:
            # Without its manifest the folder no longer counts, however far the deletion gets.
            remove(folder, first=MANIFEST_NAME)
    if isinstance(output_dir, Path):
        for leftover in output_dir.glob(".*.tmp"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)


def open_checkpoint(checkpoint_path: str | Location, *, hashes: bool = True) -> Path:
    """The verified folder behind `checkpoint_path`: a checkpoint, or an output_dir (its final/ or
    newest one). A remote one is copied to this machine.

    Args:
        hashes: False verifies presence and size of a local one's files only, not their content.

    Raises:
        InputError: nothing is there.
        CorruptFileError: a file does not match the manifest.
    """
    return fetch(find_checkpoint(checkpoint_path, hashes=hashes))


def find_checkpoint(checkpoint_path: str | Location, *, hashes: bool = True) -> Location:
    """The path of what `open_checkpoint` would open, for another machine to open.

    A local one is verified, a remote one when it is copied.
    """
    folder = location(checkpoint_path)
    if isinstance(folder, Path):
        folder = folder.resolve()
    # A store's listing may be behind, so a remote one is first asked for by name.
    is_there = isinstance(folder, RemotePath) and (
        is_committed(folder) or is_committed(folder / FINAL)
    )
    if not (is_there or folder.is_dir()):
        raise InputError(f"checkpoint_path {checkpoint_path}: no such folder")
    if isinstance(folder, Path) and is_foreign(folder):
        return folder
    if not is_committed(folder):
        inner: list[Location] = [
            path for path in [*committed_checkpoints(folder), folder / FINAL] if is_committed(path)
        ]
        if not inner:
            raise InputError(
                f"checkpoint_path {checkpoint_path}: no committed checkpoint there (no "
                "MANIFEST.json); give a checkpoint-N or final folder that jobs.train wrote"
            )
        folder = inner[-1]
    if isinstance(folder, Path):
        verify(folder, kind=KIND, hashes=hashes)
    else:
        load_manifest(folder, kind=KIND)
    return folder
