"""The figures of a step (loss, gradient norm, ...) on their way from the device.

Asking a device for a number waits until all work queued before is done; then the device waits until
there is work again. So the figures of a step are copied behind its work, and read once the next
step is queued. On a CPU they are there at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """
    Attributes:
        step: the step that they are of.
        names: of the totals.
        is_learnt: whether the step was taken; one that is a spike may be passed over.
    """

    step: int
    names: Sequence[str]
    numbers: "HostCopy"
    is_learnt: bool = True

    @classmethod
    def of(
        cls, step: int, names: Sequence[str], totals: Tensor, grad_norm: Tensor
    ) -> "StepFigures":
        """Send them off.

        Args:
            totals: [names, 2] float64, sums and counts over all workers.
            grad_norm: scalar.
        """
        numbers = torch.cat([totals.flatten(), grad_norm.detach().double().reshape(1)])
        return cls(step=step, names=names, numbers=HostCopy(numbers))

    def read(self) -> tuple[dict[str, list[float]], float]:
        """Sum and count by name, and the gradient norm; waits until they are there."""
        *totals, grad_norm = self.numbers.read()
        pairs = zip(totals[::2], totals[1::2], strict=True)
        return {name: list(pair) for name, pair in zip(self.names, pairs, strict=True)}, grad_norm


class HostCopy:
    """Numbers that are copied to the CPU once all is done that was queued before."""

    def __init__(self, numbers: Tensor) -> None:
        self._done: Any = None
        if numbers.device.type != "cuda":
            self._here = numbers.to("cpu", non_blocking=True)
            return
        self._here = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._here.copy_(numbers, non_blocking=True)
        self._done = torch.cuda.Event()
        self._done.record()

    def read(self) -> list[float]:
        """The numbers; waits for those of CUDA."""
        if self._done is not None:
            self._done.synchronize()
        found: list[float] = self._here.tolist()
        return found
