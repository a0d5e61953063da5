"""Losses of a model on a device, whose rows are on the CPU: the same loss and gradient, and the CPU
never waits for a value.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.device_reads import count_waits, emulated_device
from tests.objectives import test_dflash as drafts
from tests.objectives.test_block_objectives import tiny_model
from tests.objectives.test_targets import (
    OBJECTIVES,
    WHOLE_ROWS,
    V,
    chats,
    draws,
    tiny_denoiser,
)
from tokendiff.diffusion.devices import device_of, sent
from tokendiff.objectives.dflash import DFlash

# Those that differ in what they do with tensors.
NAMES = [name for name in OBJECTIVES if "from answers" not in name or "4d" in name]
DRAFTS = ("dflash", "dpace")


def model_and_loss(name: str) -> tuple[Any, Any]:
    if name in DRAFTS:
        objective = DFlash(block_size=drafts.BLOCK, mask_token_id=drafts.MASK, loss_type=name)  # type: ignore[arg-type]
        trainee = drafts.tiny_trainee()
        return trainee, lambda: objective.loss(trainee, drafts.some_batch(), draws(3))
    # On CUDA there is flex in place of tiles, which ask what they are to compute.
    model: Any = tiny_model("dense")
    if name in WHOLE_ROWS:
        model = tiny_denoiser("bert", vocab_size=V)
    model.double()
    return model, lambda: OBJECTIVES[name].loss(model, chats(), draws())


def numbers(output: Any, model: Any) -> list[Tensor]:
    output.loss_sum.backward()
    pairs = [number for name in sorted(output.metrics) for number in output.metrics[name]]
    found = [output.loss_sum.detach(), output.num_tokens, *pairs]
    found += [p.grad for p in model.model.parameters() if p.grad is not None]
    return [number.double() for number in found]


@pytest.mark.parametrize("name", [*NAMES, *DRAFTS])
def test_a_loss_asks_the_device_for_nothing_and_is_that_of_the_cpu(name: str) -> None:
    model, loss = model_and_loss(name)
    expected = numbers(loss(), model)
    model, loss = model_and_loss(name)
    device = emulated_device()
    with count_waits() as waits:
        model.to(device)
        waits.sent.clear()
        found = numbers(loss(), model)
        assert not waits.places()
        assert found[0].device == device
        here = [number.to("cpu") for number in found]
    assert len(here) == len(expected)
    for one, other in zip(here, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_what_is_on_the_device_stays_there_and_a_model_without_one_is_where_its_rows_are() -> None:
    rows = torch.arange(3)
    assert sent(rows, torch.device("cpu")) is rows
    assert device_of(object(), like=rows) == rows.device
    device = emulated_device()
    with count_waits() as waits:
        there = sent(rows, device)
        assert sent(there, device) is there
        assert not waits.places()
        assert sent(there, torch.device("cpu")).tolist() == [0, 1, 2]
        assert waits.reads == 1, "a value that is needed is waited for"
