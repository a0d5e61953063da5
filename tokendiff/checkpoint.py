"""A checkpoint is a folder that other tools can open, and that counts only once its MANIFEST.json
is written.

    checkpoint-400/
        config.json model.safetensors        transformers' from_pretrained opens it
        tokenizer.json tokenizer_config.json
        scheduler_config.json                the noise process, in the diffusers form
        ema.safetensors                      averaged weights, where the run keeps them
        optimizer.safetensors trainer_state.json
        MANIFEST.json                        size and sha256 of every file, written last

`final/` is the same without the training state; its weights are the averaged ones where the run
keeps them.
"""

import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokendiff.errors import CorruptFileError, InputError
from tokendiff.kernels import AbsorbingKernel
from tokendiff.manifest import MANIFEST_NAME, commit, is_committed, verify
from tokendiff.schedules import make_schedule

KIND = "checkpoint"
FINAL = "final"
SCHEDULER_CONFIG = "scheduler_config.json"
MODEL_WEIGHTS, EMA_WEIGHTS = "model.safetensors", "ema.safetensors"
_PREFIX = "checkpoint-"


@dataclass(frozen=True, kw_only=True)
class NoiseProcess:
    """The forward process that a model was trained under, and what its output means.

    Attributes:
        prediction: "loo", the leave-one-out posterior that the reverse step is built on, or
            "posterior".
        max_length: length of the training rows.
    """

    objective: str
    vocab_size: int
    mask_token_id: int
    alpha_schedule: str
    eps: float
    sigma_min: float
    sigma_max: float
    max_length: int
    forward_process: str = "absorbing"
    prediction: str = "loo"

    def kernel(self) -> AbsorbingKernel:
        schedule = make_schedule(
            self.alpha_schedule, eps=self.eps, sigma_min=self.sigma_min, sigma_max=self.sigma_max
        )
        return AbsorbingKernel(schedule=schedule, mask_token_id=self.mask_token_id)

    def save(self, folder: Path) -> None:
        fields = {
            "_class_name": "TokenDiffusionScheduler",
            "num_train_timesteps": 1000,
            **asdict(self),
        }
        (folder / SCHEDULER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "NoiseProcess":
        """Read `scheduler_config.json`.

        Raises:
            InputError: it is missing, or describes a process that this version does not have.
        """
        path = folder / SCHEDULER_CONFIG
        if not path.is_file():
            raise InputError(
                f"{folder}: no {SCHEDULER_CONFIG}; checkpoint_path must be a checkpoint-N or final "
                "folder"
            )
        fields = json.loads(path.read_text())
        if fields.get("forward_process") != "absorbing" or fields.get("prediction") != "loo":
            raise InputError(
                f"{path}: forward_process {fields.get('forward_process')!r} with prediction "
                f"{fields.get('prediction')!r} is not supported; this version knows 'absorbing' "
                "with 'loo'"
            )
        try:
            return cls(**{name: fields[name] for name in cls.__dataclass_fields__})
        except KeyError as error:
            raise InputError(f"{path}: field {error} is missing") from error


def save_checkpoint(
    output_dir: Path, name: str, write: Callable[[Path], None], *, metadata: dict[str, Any]
) -> Path:
    """Commit one checkpoint: `write` fills a temporary folder, which then takes its place.

    A folder of that name that is already there (left by a run that was cut off, or damaged) is
    replaced.
    """
    target = output_dir / name
    temporary = output_dir / f".{name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        commit(temporary, kind=KIND, metadata=metadata)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def checkpoint_name(step: int) -> str:
    return f"{_PREFIX}{step}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def committed_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-N folders with a manifest, oldest first."""
    found = [
        path
        for path in output_dir.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdigit() and is_committed(path)
    ]
    return sorted(found, key=step_of)


def newest_sound_checkpoint(output_dir: Path, *, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose every file matches its manifest; `warn` hears of those passed
    over.
    """
    passed_over: CorruptFileError | None = None
    for folder in reversed(committed_checkpoints(output_dir)):
        try:
            verify(folder, kind=KIND)
        except CorruptFileError as error:
            warn(f"checkpoint {error}; using the previous checkpoint")
            passed_over = error
            continue
        return folder
    if passed_over is not None:
        warn(f"no sound checkpoint is left under {output_dir}; starting from step 0")
    return None


def remove_old_checkpoints(output_dir: Path, *, newest: int, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints up to step `newest`, which was just saved.

    Later ones are damaged (or the run would have gone on from them), and are deleted too, as are
    temporary folders that a killed run left.
    """
    folders = committed_checkpoints(output_dir)
    sound = [folder for folder in folders if step_of(folder) <= newest][-keep:]
    for folder in folders:
        if folder not in sound:
            # Without its manifest the folder no longer counts, however far the deletion gets.
            (folder / MANIFEST_NAME).unlink()
            shutil.rmtree(folder)
    for leftover in output_dir.glob(".*.tmp"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)


def open_checkpoint(checkpoint_path: str | Path) -> Path:
    """The verified folder behind `checkpoint_path`: a checkpoint, or an output_dir (its final/ or
    newest one).

    Raises:
        InputError: nothing is there.
        CorruptFileError: a file does not match the manifest.
    """
    folder = Path(checkpoint_path).expanduser().resolve()
    if not folder.is_dir():
        raise InputError(f"checkpoint_path {checkpoint_path}: no such folder")
    if not is_committed(folder):
        inner = [
            path for path in [*committed_checkpoints(folder), folder / FINAL] if is_committed(path)
        ]
        if not inner:
            raise InputError(
                f"checkpoint_path {checkpoint_path}: no committed checkpoint there (no "
                "MANIFEST.json)"
            )
        folder = inner[-1]
    verify(folder, kind=KIND)
    return folder


def load_for_inference(checkpoint_path: str | Path) -> tuple[Any, Any, NoiseProcess]:
    """Open a checkpoint for sampling or evaluation, with its averaged weights where it has them.

    Returns:
        (denoiser on the CPU in float32 and eval mode, tokenizer, noise process).
    """
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    from tokendiff.models.loading import load_denoiser

    folder = open_checkpoint(checkpoint_path)
    process = NoiseProcess.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    denoiser = load_denoiser(
        str(folder), tokenizer=tokenizer, max_length=process.max_length, dropout=0.0
    )
    if (folder / EMA_WEIGHTS).is_file():
        averaged = load_file(folder / EMA_WEIGHTS)
        parameters = dict(denoiser.model.named_parameters())
        for name, value in averaged.items():
            parameters[name].data.copy_(value)
    return denoiser.eval(), tokenizer, process
