"""Tensors that are computed on the CPU and used where the model is.

In training, the CPU computes what a loss needs to know of its rows: which positions are noised, how
much each counts, how many there are. There a size costs nothing. On an accelerator, asking for a
size makes the CPU wait for all work that was queued before.
"""

from typing import Any

import torch
from torch import Tensor

# Smaller ones are staged by the driver, which is quicker than to pin memory for them.
_PINNED_BYTES = 2**16


def device_of(model: Any, *, like: Tensor) -> torch.device:
    """Where a model computes; one that does not say computes where its rows are."""
    device: torch.device = getattr(model, "device", like.device)
    return device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. A copy that leaves the CPU is not waited for."""
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor.to(device)
    if device.type == "cuda" and tensor.nbytes >= _PINNED_BYTES:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def sent_at(at: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Indices on a device."""
    return tuple(sent(index, device) for index in at)
