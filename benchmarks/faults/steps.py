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
_MEMORY = (("training", "step, worker and rows", "step"), ("sampling", "the rows", "row"))


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


def _at_row(row: int, act: Callable[[], object]) -> None:
    """In this process that happens when the row is about to be sampled."""
    sample = SamplingModel.sample

    def changed(model: SamplingModel, rows: list[Any], **kwargs: Any) -> list[dict[str, Any]]:
        if any(each.id == row for each in rows):
            act()
        return sample(model, rows, **kwargs)

    SamplingModel.sample = changed  # type: ignore[assignment, method-assign]


def out_of_memory(
    subject: Subject, chance: random.Random, folder: Path, *, stage: str, is_killed: bool
) -> str:
    """Python is refused the memory; or the kernel kills the process, as its out-of-memory killer
    does, and the next start says what that was at.
    """
    step, row = chance.randint(1, _STEPS), chance.randrange(_SAMPLES)
    kill, is_training = send(signal.SIGKILL), stage == "training"
    if is_training:
        before = partial(_at_step, step, (lambda loss_sum: kill()) if is_killed else _too_much)
    else:
        before = partial(_at_row, row, kill if is_killed else partial(torch.empty, _TOO_MUCH))
    ended = subject.run("pipeline", folder, before)
    first = row - row % CONFIG["generate"]["batch_size"]
    place = f"step {step}, worker 0: 4 rows" if is_training else f"rows {first}, {first + 1} (2"
    codes = (-signal.SIGKILL,) if is_killed else (1,)
    check_said(ended, codes=codes, says="" if is_killed else "memory ran out")
    again = subject.check_goes_on("pipeline", folder, is_killed=is_killed)
    says = f"an earlier attempt was killed at {place}" if is_killed else place
    if says not in (again.out + again.err if is_killed else ended.err):
        raise Broken(f"nothing says {says!r}: {(again if is_killed else ended).message}")
    what = "its step and rows" if is_training else "its rows"
    return f"killed, {what} named by the next start" if is_killed else f"exit code 1, {what} named"


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
            trial=partial(out_of_memory, stage=stage, is_killed=False),
        )
        for stage, what, which in _MEMORY
    ),
    *(
        Case(
            name=f"killed-for-memory-{stage}",
            promise=f"{GOES_ON} It says at which {what.removeprefix('the ')} the first was killed.",
            done=f"SIGKILL in a random {which}, as the kernel sends where memory is exhausted",
            trial=partial(out_of_memory, stage=stage, is_killed=True),
        )
        for stage, what, which in _MEMORY
    ),
)
