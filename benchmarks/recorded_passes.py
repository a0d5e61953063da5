"""CUDA graphs where there is no card: the operations of a pass, run again one by one.

As on a card, a recorded pass is the operations that ran, on the memory that they ran on: what
Python decided while it was recorded stays decided, and a number that is asked for cannot be had.
So whatever goes wrong in a replay because it was not handed over goes wrong here too. What a card
has beside, its streams and its memory, is not there.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from benchmarks.device_reads import asks_for_a_value, mapped, tensors_in
from tokendiff.models.cuda_graphs import Recorder, Replay


class OperationRecorder(Recorder):
    """
    Attributes:
        num_replayed: passes so far.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.num_replayed = 0

    def record(self, run: Replay) -> Replay:
        # transformers asks whether a stream is being recorded, and goes other ways then.
        with (
            mock.patch.object(import_utils, "is_cuda_stream_capturing", return_value=True),
            _Operations() as recorded,
        ):
            results = run()

        def replay() -> list[Tensor]:
            self.num_replayed += 1
            return recorded.run_again(results)

        return replay


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if asks_for_a_value(func, args, kwargs):
            raise RuntimeError(f"{func} asks the device for a value while a pass is recorded")
        found = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, found))
        return found

    def run_again(self, results: list[Tensor]) -> list[Tensor]:
        """The results, of what now stands in the tensors that no operation made, in the same memory
        as the last time.
        """
        made: dict[int, Any] = {}

        def now(value: Any) -> Any:
            return made.get(id(value), value)

        for func, args, kwargs, found in self._calls:
            named = {name: mapped(now, value) for name, value in kwargs.items()}
            again = func(*mapped(now, args), **named)
            for old, new in zip(tensors_in([found]), tensors_in([again]), strict=True):
                made[id(old)] = new
        return [result.copy_(now(result)) for result in results]
