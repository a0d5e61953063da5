"""The counter of waits itself: known operations on a device that is emulated."""

import pytest
import torch

from benchmarks.device_reads import count_waits, emulated_device


def test_values_that_are_asked_for_are_counted_and_equal_those_of_the_cpu() -> None:
    device = emulated_device()
    plain = torch.arange(6).view(2, 3)
    with count_waits() as waits:
        there = torch.arange(6, device=device).view(2, 3)
        mask = there > 2
        free = (there * 2).cumsum(1).masked_fill(mask, 0)
        free[mask] = 7  # a masked_fill
        assert there.device == device
        assert waits.reads == waits.sends == 0, waits
        asked = [
            bool(mask.any()),
            int(there.sum()),
            there.tolist(),
            there[mask].cpu(),
            mask.nonzero().shape,
            torch.equal(there, there),
            there.cpu(),
            there.repeat_interleave(torch.tensor([1, 2], device=device), dim=0).shape,
        ]
    assert waits.reads == 9, waits.places()  # there[mask].cpu() waits twice
    assert waits.sends == 1, waits.places()
    assert asked[:3] == [True, 15, plain.tolist()]
    assert isinstance(asked[3], torch.Tensor)
    assert asked[3].tolist() == plain[plain > 2].tolist()
    assert all("test_device_reads.py" in place for place in waits.places())


def test_copies_that_are_not_waited_for_are_not_counted() -> None:
    device = emulated_device()
    with count_waits() as waits:
        torch.ones(3).to(device, non_blocking=True)
        torch.zeros(3, device=device).copy_(torch.ones(3), non_blocking=True)
        torch.zeros(3, device=device).to("cpu", non_blocking=True)
        assert waits.sends == waits.reads == 0
        torch.ones(3).to(device)
        torch.tensor([1.0], device=device)
        torch.as_tensor([1.0], device=device)
        assert waits.sends == 3


def test_tensors_of_both_devices_do_not_mix_and_training_there_is_training_here() -> None:
    device = emulated_device()

    def trained(where: torch.device) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 4).to(where)
        optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
        for _ in range(3):
            layer(torch.arange(6.0).view(2, 3).to(where)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight.detach().to("cpu")

    with count_waits():
        there = trained(device)
        with pytest.raises(RuntimeError, match="tensors on the CPU and on emulated"):
            torch.ones(3, device=device) + torch.ones(3)
    assert torch.equal(there, trained(torch.device("cpu")))
    assert not torch.accelerator.is_available()
