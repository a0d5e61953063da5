"""The loop: averaged weights, a run that is resumed, a step in several passes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.mathematics import OBJECTIVES, distance, model_for
from benchmarks.gpu.models import MASK, PROVEN
from benchmarks.gpu.report import Case, Finding, within
from tokendiff.training.trainer import Trainer
from tokendiff.training.world import World

_NUM_STEPS, _LENGTH = 6, 24
# Of losses in float32. A card adds gradients up in an order that it chooses; a CPU does not.
_CARD, _CPU = 1e-4, 0.0
_ROUNDING = 1e-5


@dataclass(kw_only=True)
class Settings:
    """The fields of `tokendiff.config.train.TrainConfig` that the loop reads, which needs pydantic.
    Names and defaults are the same.
    """

    max_train_steps: int = 1000
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    muon_learning_rate: float = 0.02
    muon_momentum: float = 0.95
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    on_spike: str | None = None
    ema_decay: float = 0.0
    dropout: float = 0.0
    lora_dropout: float = 0.0
    mixed_precision: str = "no"
    sharding: str = "none"
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    checkpointing_steps: int = 500
    logging_steps: int = 10

    @property
    def rows_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def cases(machine: Machine) -> Iterator[Case]:
    for name, compared, run in (
        ("averaged weights", "the formula, in Python floats", _average),
        ("a resumed run", "one that was not interrupted; losses", _resumed),
        ("4 passes of 2 rows", "one pass of 8; losses", _accumulated),
    ):
        yield Case(name=name, compared=compared, run=partial(run, machine), is_proof=True)


def batches(
    settings: Settings, *, length: int, vocab_size: int, first_step: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows as the loop is given them, columns on the CPU: of one document each, and anew in each
    step.
    """
    step, count = first_step, settings.rows_per_step
    while True:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(MASK + 1, vocab_size, (count, length), generator=generator)
        is_start = torch.zeros(count, length, dtype=torch.bool)
        is_start[:, 0] = True
        yield {
            "tokens": tokens,
            "length": torch.full((count,), length),
            "is_start": is_start,
            "is_target": torch.ones_like(is_start),
            "row_id": torch.arange(count) + step * count,
            "epoch": torch.zeros(count, dtype=torch.int64),
        }
        step += 1


def new_trainer(
    model: Any, objective: Any, settings: Settings, device: torch.device, **options: Any
) -> Trainer:
    config: Any = settings
    return Trainer(model, objective, config, World.current(device), **options)


def run_to(trainer: Trainer, rows: Iterator[dict[str, Any]], step: int) -> None:
    """Train up to a step; nothing is saved."""
    config: Any = trainer.config
    config.max_train_steps = step
    trainer.run(rows, last_good=lambda: None, save=lambda: None)


def _losses(
    machine: Machine, settings: Settings, *, stop: int = _NUM_STEPS, resumed: bool = False
) -> tuple[list[float], Trainer]:
    """Of each step; with `resumed`, of a model and an optimiser that took over after `stop`."""
    kind, objective = OBJECTIVES["mdlm"]
    losses: list[float] = []

    def keep(event: str, **fields: Any) -> None:
        if event == "metrics":
            losses.append(fields["loss"])

    def fresh() -> Trainer:
        model = model_for(kind, "cpu", torch.float32)
        return new_trainer(model, objective, replace(settings), machine.device, on_event=keep)

    sizes = {"length": _LENGTH, "vocab_size": PROVEN.vocab_size}
    trainer = fresh()
    run_to(trainer, batches(settings, **sizes), stop)
    if resumed:
        other = fresh()
        other.denoiser.model.load_state_dict(trainer.denoiser.model.state_dict())
        stored = {name: tensor.clone() for name, tensor in trainer.state_tensors().items()}
        other.load_state(trainer.state(), _Stored(stored))
        run_to(other, batches(settings, first_step=stop, **sizes), _NUM_STEPS)
        trainer = other
    return losses, trainer


class _Stored(dict[str, Tensor]):
    def fill(self, name: str, tensor: Tensor) -> None:
        tensor.copy_(self[name])


def _settings(**changes: Any) -> Settings:
    fields: dict[str, Any] = {"learning_rate": 3e-3, "lr_scheduler": "constant", "logging_steps": 1}
    return Settings(**{**fields, **changes})


def _resumed(machine: Machine) -> Finding:
    whole, _ = _losses(machine, _settings())
    parts, _ = _losses(machine, _settings(), stop=_NUM_STEPS // 2, resumed=True)
    return within(_largest(parts, whole), _CARD if machine.is_cuda else _CPU)


def _accumulated(machine: Machine) -> Finding:
    whole, _ = _losses(machine, _settings())
    passes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    parts, _ = _losses(machine, _settings(**passes))
    return within(_largest(parts, whole), _CARD)


def _average(machine: Machine) -> Finding:
    """The average of a run, and what its weights were after each step."""
    decay, seen = 0.9, []
    kind, objective = OBJECTIVES["mdlm"]
    model = model_for(kind, "cpu", torch.float32)
    settings = _settings(ema_decay=decay)
    trainer = new_trainer(model, objective, settings, machine.device)
    rows = batches(settings, length=_LENGTH, vocab_size=PROVEN.vocab_size)
    name, weight = next(iter(model.model.named_parameters()))
    expected = weight.detach().double().cpu().flatten().tolist()
    for step in range(1, _NUM_STEPS + 1):
        run_to(trainer, rows, step)
        d = min(decay, (1 + step) / (10 + step))
        now = weight.detach().double().cpu().flatten().tolist()
        expected = [d * old + (1.0 - d) * new for old, new in zip(expected, now, strict=True)]
        seen.append(now)
    assert trainer.average is not None
    ours = trainer.average.tensors[name].flatten()
    moved = max(abs(a - b) for a, b in zip(seen[0], seen[-1], strict=True))
    # Weights that stood still would prove nothing.
    return within(distance(ours, expected) if moved > 1e-3 else float("inf"), _ROUNDING)


def _largest(ours: list[float], expected: list[float]) -> float:
    """The largest difference, relative to the first loss."""
    pairs = zip(ours, expected, strict=True)
    return max(abs(a - b) for a, b in pairs) / abs(expected[0])
