"""Training on a device, which is emulated: a step waits for nothing, and what it came to is read
when the next one is queued.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.device_reads import count_waits, emulated_device
from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.training.test_training import LENGTH, config
from tokendiff.artifacts.checkpoint import newest_sound_checkpoint
from tokendiff.data.rows import TokenData
from tokendiff.training.run import TrainingRun, step_batches, step_plan
from tokendiff.training.world import World

Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    rows = random_rows(40, LENGTH)
    rows[-1] = rows[-1][:5]
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[rows],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
    )
    return TokenData.open(folder, split="train")


class Trained:
    """A run on a device, and how often the CPU waited in its steps."""

    def __init__(self, data: TokenData, folder: Path, device: torch.device, **changes: Any) -> None:
        self.events: Events = []
        self.saved: list[int] = []
        cfg = config(**{"logging_steps": 4, "checkpointing_steps": 100, **changes})
        world = World(rank=0, size=1, device=device)
        self.run = TrainingRun.build(
            cfg, data, folder, world=world, on_event=lambda e, **f: self.events.append((e, f))
        )
        plan = step_plan(cfg, data, rank=0, world_size=1)
        self.batches = step_batches(data, plan, 0, cfg.max_train_steps)

    def train(self, **options: Any) -> None:
        self.run.trainer.run(
            self.batches,
            last_good=lambda: None,
            save=lambda: self.saved.append(self.run.trainer.step),
            **options,
        )

    def metrics(self) -> list[dict[str, float]]:
        names = ("step", "loss", "elbo", "grad_norm", "lr")
        told = [fields for event, fields in self.events if event == "metrics"]
        return [{name: each[name] for name in names if name in each} for each in told]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "muon", "per_device_train_batch_size": 3}],
    ids=["adamw", "muon, accumulated"],
)
def test_steps_wait_for_nothing_and_are_those_of_the_cpu(
    data: TokenData, tmp_path: Path, changes: dict[str, Any]
) -> None:
    here = Trained(data, tmp_path / "here", torch.device("cpu"), **changes)
    here.train()
    device = emulated_device()
    with count_waits() as waits:
        there = Trained(data, tmp_path / "there", device, **changes)
        waits.sent.clear()
        there.train()
    assert not waits.places()
    assert there.saved == here.saved == [6]
    for one, other in zip(there.metrics(), here.metrics(), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert [each["step"] for each in there.metrics()] == [4, 6]


@pytest.mark.parametrize(("broken", "at"), [("loss", 3), ("gradient", 4)])
def test_a_number_that_is_not_finite_is_found_a_step_later_or_before_that_step_is_saved(
    data: TokenData, tmp_path: Path, broken: str, at: int
) -> None:
    device = emulated_device()
    with count_waits():
        run = Trained(data, tmp_path, device, checkpointing_steps=4, logging_steps=100)
        trainer = run.run.trainer
        objective = trainer.objective

        class Breaking:
            """Breaks in one step."""

            def loss(self, *args: Any) -> Any:
                output = objective.loss(*args)
                if trainer.step == at - 1:
                    weight = next(trainer.denoiser.model.parameters())
                    off = (weight.sum() * 0.0).sqrt() * 0.0  # NaN in the gradient alone
                    off = off * torch.inf if broken == "loss" else off
                    object.__setattr__(output, "loss_sum", output.loss_sum + off)
                return output

        trainer.objective = Breaking()
        with pytest.raises(FloatingPointError, match=rf"step {at}: {broken}.* before anything was"):
            run.train()
        assert trainer.step == 4, "the step that is saved is the last"
    assert run.saved == []
    assert newest_sound_checkpoint(tmp_path, warn=lambda message: None) is None


def test_one_worker_that_is_told_to_stop_ends_after_that_step(
    data: TokenData, tmp_path: Path
) -> None:
    device = emulated_device()
    with count_waits():
        run = Trained(data, tmp_path, device, logging_steps=100)
        asked = iter([False, False, True])
        run.train(should_stop=lambda: next(asked))
    assert run.saved == [3]
