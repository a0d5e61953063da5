"""Faults in the numbers of a step and in its memory: spikes, and what does not fit."""

import random
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.moments import Moments
from benchmarks.faults.signals import GOES_ON, drawn, send
from benchmarks.faults.subject import CONFIG, Ended, Subject, check_said, outcome_of
from benchmarks.faults.table import Broken, Case
from tokendiff.models.sampling import SamplingModel
from tokendiff.training.trainer import Trainer

_TOO_MUCH = 1 << 46  # floats
_STEPS = CONFIG["train"]["max_train_steps"]
_SAMPLES = CONFIG["generate"]["num_samples"]


def _at_step(step: int, change: Callable[[Any], Any]) -> None:
    """In this process the loss of a step, counted from 1, is what `change` makes of it."""
    loss = Trainer._loss

    def changed(trainer: Trainer, *args: Any) -> tuple[Any, ...]:
        loss_sum, *rest = loss(trainer, *args)
        return change(loss_sum) if trainer.step == step - 1 else loss_sum, *rest

    Trainer._loss = changed  # type: ignore[assignment, method-assign]


def _too_much(loss_sum: Any) -> Any:
    return loss_sum + torch.empty(_TOO_MUCH).sum()


def _spike(loss_sum: Any) -> Any:
    return loss_sum * float("nan")


def _train(
    subject: Subject, folder: Path, step: int, on_spike: str, moments: Moments | None = None
) -> Ended:
    def before() -> None:
        _at_step(step, _spike)
        if moments is not None:
            moments.install()

    section = {**CONFIG["train"], "on_spike": on_spike}
    arguments = subject.arguments("train", folder, train=section)
    return subject.run("train", folder, before, arguments=arguments)


def _check_same(one: Path, other: Path) -> None:
    if outcome_of(one / "out" / "train") != outcome_of(other / "out" / "train"):
        raise Broken("weights or losses are not those of the run that was left alone")


def passed_over(subject: Subject, chance: random.Random, folder: Path, *, on_spike: str) -> str:
    """A run that meets a spike, and one that is killed besides and goes on."""
    step = chance.randint(2, _STEPS)
    whole, killed = folder / "whole", folder / "killed"
    ended = _train(subject, whole, step, on_spike)
    check_said(ended, codes=(0,))
    if f"step {step}: loss is nan" not in ended.out + ended.err:
        raise Broken(f"nothing says that step {step} is a spike")
    at = drawn(subject, "train", chance)
    moments = Moments(root=killed / "out", actions={at: send(signal.SIGKILL)})
    _train(subject, killed, step, on_spike, moments)
    check_said(_train(subject, killed, step, on_spike), codes=(0,))
    _check_same(whole, killed)
    return f"spike in step {step}, killed before write {at}: the same"


def stopped(subject: Subject, chance: random.Random, folder: Path) -> str:
    """A run that stops at a spike, and then goes on with `skip`."""
    step = chance.randint(2, _STEPS)
    ended = _train(subject, folder / "stopped", step, "stop")
    check_said(ended, codes=(1,), says=f"step {step}: loss is nan")
    check_said(_train(subject, folder / "stopped", step, "skip"), codes=(0,))
    check_said(_train(subject, folder / "skipped", step, "skip"), codes=(0,))
    _check_same(folder / "stopped", folder / "skipped")
    return f"stopped at step {step} with exit code 1; went on with skip, as if it had skipped"


def out_of_memory(subject: Subject, chance: random.Random, folder: Path, *, stage: str) -> str:
    step, row = chance.randint(1, _STEPS), chance.randrange(_SAMPLES)

    def in_sampling() -> None:
        sample = SamplingModel.sample

        def hungry(model: SamplingModel, rows: list[Any], **kwargs: Any) -> list[dict[str, Any]]:
            if any(each.id == row for each in rows):
                torch.empty(_TOO_MUCH)
            return sample(model, rows, **kwargs)

        SamplingModel.sample = hungry  # type: ignore[assignment, method-assign]

    is_training = stage == "training"
    before = partial(_at_step, step, _too_much) if is_training else in_sampling
    ended = subject.run("pipeline", folder, before)
    first = row - row % CONFIG["generate"]["batch_size"]
    says = f"step {step}, worker 0" if is_training else f"rows {first}, "
    check_said(ended, codes=(1,), says="memory ran out")
    if says not in ended.err:
        raise Broken(f"the message does not say {says!r}: {ended.message}")
    subject.check_goes_on("pipeline", folder)
    return f"exit code 1, {'its step and rows' if is_training else 'its rows'} named; went on"


CASES = (
    *(
        Case(
            name=f"spike-{on_spike}",
            promise="Exit code 0, and a warning that names the step. Killed besides, the same "
            "command goes on with the same losses and weights.",
            done=f"a loss that is not finite in a random step, with on_spike {on_spike}; then "
            "SIGKILL before a random write too",
            trial=partial(passed_over, on_spike=on_spike),
        )
        for on_spike in ("skip", "rewind")
    ),
    Case(
        name="spike-stop",
        promise="Exit code 1 and one message that names the step. With on_spike skip it goes on as "
        "if it had skipped from the start.",
        done="a loss that is not finite in a random step, with on_spike stop",
        trial=stopped,
    ),
    *(
        Case(
            name=f"out-of-memory-{stage}",
            promise=f"Exit code 1 and one message that names {what}. {GOES_ON}",
            done=f"a random {which} asks for more memory than there is",
            trial=partial(out_of_memory, stage=stage),
        )
        for stage, what, which in (
            ("training", "step, worker and rows", "step"),
            ("sampling", "the rows", "row"),
        )
    ),
)
