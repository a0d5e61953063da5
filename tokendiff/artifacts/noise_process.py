"""The noise process of a checkpoint: `scheduler_config.json`, in the diffusers form, beside the
weights.
"""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, get_args

from tokendiff.artifacts.manifest import is_committed, load_manifest
from tokendiff.artifacts.model_folders import (
    SCHEDULER_CONFIG,
    is_plain_causal,
    longest_row,
    read_config,
)
from tokendiff.diffusion.kernels import AbsorbingKernel, ForwardKernel, HybridKernel, UniformKernel
from tokendiff.diffusion.schedules import make_schedule
from tokendiff.errors import InputError

_NO_CONFIG = f"no {SCHEDULER_CONFIG}; checkpoint_path must be a checkpoint-N or final folder"
_WITHOUT_NOISE: dict[str | None, str] = {
    "ar": "a checkpoint of objective 'ar' has no noise to take away; sample it with sampler 'ar'",
    "dflash": "a DFlash draft is sampled beside its target: give it as draft_model_id, with "
    "target_model_id, to sampler 'dflash'",
}
_SCHEDULER_CLASSES = {
    "absorbing": "TokenDiffusionScheduler",
    "uniform": "TokenDiffusionScheduler",
    "hybrid": "HybridTokenDiffusionScheduler",
}
# What the published block samplers read; of its fields only block_length is the model's.
_BLOCK_SCHEDULER_CLASS = "BlockRefinementScheduler"
_BLOCK_FIELDS = (
    "block_length",
    "attention_mask_mode",
    "clean_context",
    "prompt_length",
    "eos_token_id",
)
_SCHEDULE_FIELDS = ("alpha_schedule", "eps", "sigma_min", "sigma_max")
# The fields that the published class of each process reads beside vocab_size and mask_token_id.
_PROCESS_FIELDS = {
    "absorbing": ("forward_process", *_SCHEDULE_FIELDS),
    "uniform": ("forward_process", "exclude_mask_from_uniform", *_SCHEDULE_FIELDS),
    "hybrid": ("p_uniform", "gamma"),
}


@dataclass(frozen=True, kw_only=True)
class NoiseProcess:
    """The forward process that a model was trained under, and what its output means.

    Attributes:
        objective: what trained it; None in a checkpoint that is not ours.
        prediction: "loo", the leave-one-out posterior that bound and reverse step are built on, or
            "posterior", p(x_0 | x_t), which they convert.
        max_length: length of the training rows, or the most that the model takes.
        predict: "own", a position's state tells its own token, or "next", the one behind it.
        block_length: of an objective that decodes block by block; None for others, which then have
            none of the fields that follow.
        attention_mask_mode: "2d", a position sees up to itself, or "4d", also the rest of its
            block.
        clean_context: whether the blocks before a noisy one were clean in training.
        prompt_length: tokens at the start of a row that were never masked.
        eos_token_id: what a document ends with, and its last block is filled up with.
        context_attention: "block", finished blocks see themselves whole, or "causal", each token of
            them sees only up to itself, as in a model that decodes token by token too.
        keeps_base: True, the weights are those of a causal model that was not trained, and adapters
            beside them fill blocks; False, the weights themselves were trained.
        block_start: where blocks start anew: at each "answer" of a chat, at its "last_answer"
            alone, or, None, at the first token of a document only.

    Raises:
        InputError: a value that no kernel can have.
    """

    forward_process: str
    vocab_size: int
    mask_token_id: int
    max_length: int
    objective: str | None = None
    prediction: str = "loo"
    alpha_schedule: str = "log_linear"
    eps: float = 1e-3
    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    exclude_mask_from_uniform: bool = True
    p_uniform: float = 0.0
    gamma: float = 1.0
    block_length: int | None = None
    attention_mask_mode: str | None = None
    clean_context: bool | None = None
    prompt_length: int = 0
    eos_token_id: int | None = None
    block_start: str | None = None
    context_attention: str = "block"
    predict: str = "own"
    keeps_base: bool = False

    def __post_init__(self) -> None:
        if self.forward_process not in _SCHEDULER_CLASSES:
            raise InputError(
                f"forward_process {self.forward_process!r} is not supported; there are "
                f"{', '.join(_SCHEDULER_CLASSES)}"
            )
        if self.prediction not in ("loo", "posterior"):
            raise InputError(f"prediction must be 'loo' or 'posterior', got {self.prediction!r}")
        if self.max_length < 1:
            raise InputError(f"max_length must be at least 1, got {self.max_length}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise InputError(
                f"mask_token_id {self.mask_token_id} is not an id of the vocabulary of "
                f"{self.vocab_size} tokens"
            )
        if self.block_length is not None:
            if self.block_length < 1:
                raise InputError(f"block_length must be at least 1, got {self.block_length}")
            if self.attention_mask_mode not in ("2d", "4d"):
                raise InputError(
                    f"attention_mask_mode must be '2d' or '4d', got {self.attention_mask_mode!r}"
                )
            if self.block_start not in (None, "answer", "last_answer"):
                raise InputError(
                    f"block_start must be 'answer' or 'last_answer', got {self.block_start!r}"
                )
            if self.context_attention not in ("block", "causal"):
                raise InputError(
                    f"context_attention must be 'block' or 'causal', got {self.context_attention!r}"
                )
            if self.context_attention == "causal" or self.predict == "next":
                self._check_sight()
            if self.forward_process != "absorbing" and (
                self.attention_mask_mode == "2d" or self.forward_process == "hybrid"
            ):
                raise InputError(
                    f"block_length {self.block_length} with forward_process "
                    f"{self.forward_process!r} and attention_mask_mode "
                    f"{self.attention_mask_mode!r}: the noise of blocks is masks, or with "
                    "attention_mask_mode '4d' uniform"
                )
        if self.keeps_base and self.forward_process != "absorbing":
            raise InputError("keeps_base needs forward_process 'absorbing': it drafts from masks")
        if self.keeps_base and (self.block_length is None or self.context_attention != "causal"):
            raise InputError(
                "keeps_base needs a block_length, and context_attention 'causal' as in its base"
            )
        if self.predict not in ("own", "next"):
            raise InputError(f"predict must be 'own' or 'next', got {self.predict!r}")
        try:
            self.kernel()
        except ValueError as error:
            raise InputError(str(error)) from error

    def _check_sight(self) -> None:
        if self.attention_mask_mode != "4d" or self.clean_context is False:
            raise InputError(
                f"context_attention {self.context_attention!r} and predict {self.predict!r} go "
                "with attention_mask_mode '4d' and a clean context, got "
                f"{self.attention_mask_mode!r} and clean_context {self.clean_context}"
            )

    def kernel(self) -> ForwardKernel:
        if self.forward_process == "hybrid":
            return HybridKernel(
                vocab_size=self.vocab_size,
                mask_token_id=self.mask_token_id,
                p_uniform=self.p_uniform,
                gamma=self.gamma,
            )
        schedule = make_schedule(
            self.alpha_schedule, eps=self.eps, sigma_min=self.sigma_min, sigma_max=self.sigma_max
        )
        if self.forward_process == "uniform":
            return UniformKernel(
                schedule=schedule,
                vocab_size=self.vocab_size,
                mask_token_id=self.mask_token_id,
                exclude_mask=self.exclude_mask_from_uniform,
            )
        return AbsorbingKernel(schedule=schedule, mask_token_id=self.mask_token_id)

    def describe(self) -> str:
        """The process in a few words."""
        shape = ("sigma_min", "sigma_max") if self.alpha_schedule == "geometric" else ("eps",)
        names = {
            "absorbing": ("alpha_schedule", *shape),
            "uniform": ("alpha_schedule", *shape, "exclude_mask_from_uniform"),
            "hybrid": ("p_uniform", "gamma"),
        }[self.forward_process]
        if self.block_length is not None:
            own = names if self.forward_process == "uniform" else ()
            names = (*own, "block_length", "attention_mask_mode", "clean_context")
        names = (*names, *self._set_later)
        values = ", ".join(f"{name} {getattr(self, name)}" for name in names)
        return f"{self.forward_process} ({values})"

    @property
    def decodes_by_token(self) -> bool:
        """Whether the model was trained to tell the next token of clean text too."""
        return self.block_length is not None and self.context_attention == "causal"

    @property
    def _set_later(self) -> tuple[str, ...]:
        """Fields that came later, where they are not what they were before."""
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        names = ("block_start", "context_attention", "predict", "keeps_base")
        return tuple(name for name in names if getattr(self, name) != defaults[name])

    @property
    def _class_name(self) -> str:
        if self.block_length is not None:
            return _BLOCK_SCHEDULER_CLASS
        return _SCHEDULER_CLASSES[self.forward_process]

    def save(self, folder: Path) -> None:
        """Write `scheduler_config.json` in the diffusers form.

        The published class of the process reads the fields that its own constructor has, and warns
        of the others.
        """
        names, class_name = _PROCESS_FIELDS[self.forward_process], self._class_name
        if self.block_length is not None:
            names = (*names, *_BLOCK_FIELDS)
        names = (*names, *self._set_later)
        fields = {
            "_class_name": class_name,
            "vocab_size": self.vocab_size,
            "mask_token_id": self.mask_token_id,
            "num_train_timesteps": 1000,
            **{name: getattr(self, name) for name in names},
            "objective": self.objective,
            "prediction": self.prediction,
            "max_length": self.max_length,
        }
        (folder / SCHEDULER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "NoiseProcess":
        """Read `scheduler_config.json`, ours or one that the published classes saved.

        What those do not record is what their training scripts did: the hybrid one trained with
        cross-entropy (prediction "posterior"), the others with a bound ("loo").

        Raises:
            InputError: it is missing, or describes a process that this version does not have.
        """
        path = folder / SCHEDULER_CONFIG
        if not path.is_file():
            raise InputError(f"{folder}: {_WITHOUT_NOISE.get(objective_of(folder), _NO_CONFIG)}")
        try:
            fields = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        class_name = fields.get("_class_name") if isinstance(fields, dict) else None
        there = {*_SCHEDULER_CLASSES.values(), _BLOCK_SCHEDULER_CLASS}
        if not isinstance(class_name, str) or class_name not in there:
            raise InputError(
                f"{path}: _class_name {class_name!r} is not supported; there are "
                f"{', '.join(sorted(there))}"
            )
        if class_name == _SCHEDULER_CLASSES["hybrid"]:
            fields = {"prediction": "posterior", **fields, "forward_process": "hybrid"}
        known: dict[str, Any] = {"forward_process": "absorbing"}  # the published default
        known |= {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        try:
            if "max_length" not in known:
                known["max_length"] = _longest_row(folder)
            _check_types(known)
            return cls(**known)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error


def _check_types(fields: dict[str, Any]) -> None:
    """Raise InputError where a field of a scheduler_config.json is missing or not of its type."""
    for name, field in NoiseProcess.__dataclass_fields__.items():
        if name not in fields:
            if field.default is MISSING:
                raise InputError(f"{name} is missing")
            continue
        value, (wanted, *_) = fields[name], get_args(field.type) or (field.type,)
        is_optional = value is None and field.default is None
        if not (type(value) is wanted or is_optional or (type(value), wanted) == (int, float)):
            raise InputError(f"{name} must be of type {wanted.__name__}, got {value!r}")


def _longest_row(folder: Path) -> int:
    """The most tokens that the model in a folder takes."""
    longest = longest_row(read_config(folder))
    if longest is None:
        raise InputError(
            "max_length is missing, and config.json has no max_position_embeddings; add max_length"
        )
    return longest


def objective_of(folder: Path) -> str | None:
    """What trained an opened checkpoint; None where it does not say. Causal language models of
    others are taken for what "ar" trains.
    """
    if is_plain_causal(folder):
        return "ar"
    if not is_committed(folder):
        return None
    objective = load_manifest(folder).metadata.get("run", {}).get("objective", {})
    return objective.get("name")
