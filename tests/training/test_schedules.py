import pytest
import torch

from tokendiff.training.schedules import lr_factor

NAMES = [
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(0, 7), (3, 10), (1, 100), (5, 6)])
def test_the_rates_are_those_of_transformers(
    name: str, warmup_steps: int, total_steps: int
) -> None:
    from transformers import get_scheduler

    rate = 3e-4
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps
    )
    for step in range(total_steps + 3):
        factor = lr_factor(
            name, step, warmup_steps=warmup_steps, total_steps=total_steps, rate=rate
        )
        assert rate * factor == schedule.get_last_lr()[0], step
        optimizer.step()
        schedule.step()
