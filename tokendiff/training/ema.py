"""An exponential moving average of the weights, the copy that is sampled from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """ema <- d ema + (1 - d) weights after each step; d = min(decay, (1 + step) / (10 + step)).

    The rising d lets a young average forget the initial weights (as in TensorFlow's
    ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._decay = decay
        self.tensors: dict[str, Tensor] = {
            name: p.detach().clone() for name, p in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(
            list(self.tensors.values()), list(self._parameters.values()), 1.0 - decay
        )

    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, value in tensors.items():
            self.tensors[name].copy_(value)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """The model holds the averaged weights inside this block, and `tensors` holds the weights.

        They change places one by one, so that memory is needed for one more tensor and not for all.
        """
        swapped: list[str] = []
        try:
            for name in self._parameters:
                self._swap(name)
                swapped.append(name)
            yield
        finally:
            for name in swapped:
                self._swap(name)

    @torch.no_grad()
    def _swap(self, name: str) -> None:
        parameter, average = self._parameters[name], self.tensors[name]
        kept = parameter.detach().clone()
        parameter.copy_(average)
        average.copy_(kept)
