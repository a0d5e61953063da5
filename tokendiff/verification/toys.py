"""A language that is small enough to be enumerated, under every kind of noise."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.kernels import ForwardKernel
from tokendiff.verification import oracles

VOCAB_SIZE, LENGTH, MASK = 4, 2, 2


@dataclass(frozen=True)
class ToyLanguage:
    """Two tokens over three ids and a mask, and the process that noises them."""

    process: NoiseProcess

    @cached_property
    def kernel(self) -> ForwardKernel:
        return self.process.kernel()

    @cached_property
    def fields(self) -> dict[str, Any]:
        return asdict(self.process)

    @cached_property
    def table(self) -> np.ndarray:
        return oracles.toy_language(VOCAB_SIZE, LENGTH, MASK, seed=1)

    @cached_property
    def clean(self) -> Tensor:
        """[N, L] every sequence of the language."""
        return torch.from_numpy(np.argwhere(self.table > 0))

    @cached_property
    def noisy(self) -> Tensor:
        """[V^L, L] every sequence."""
        return torch.from_numpy(np.argwhere(self.table >= 0))

    @cached_property
    def probability(self) -> Tensor:
        """[N] of the clean sequences."""
        return torch.from_numpy(self.table[self.table > 0])


def _toy(forward_process: str, **fields: Any) -> ToyLanguage:
    return ToyLanguage(
        NoiseProcess(
            forward_process=forward_process,
            vocab_size=VOCAB_SIZE,
            mask_token_id=MASK,
            max_length=LENGTH,
            **fields,
        )
    )


# With the eps of 0.02 the two ends of time are a part of the bound that cannot be overlooked. An
# absorbing process has no bound there, and comes as near to the ends as matters.
TOYS = {
    "absorbing_log_linear": _toy("absorbing", alpha_schedule="log_linear", eps=1e-7),
    "absorbing_cosine": _toy("absorbing", alpha_schedule="cosine", eps=1e-7),
    "uniform": _toy("uniform", alpha_schedule="linear", eps=0.02),
    "uniform_with_mask": _toy(
        "uniform", alpha_schedule="geometric", exclude_mask_from_uniform=False
    ),
    "hybrid": _toy("hybrid", p_uniform=0.2, gamma=1.0),
    "hybrid_early_noise": _toy("hybrid", p_uniform=0.05, gamma=0.5),
}


class ExactDenoiser:
    """The exact leave-one-out x_theta of a toy language; hidden states are its logarithm."""

    is_time_conditioned = True

    def __init__(self, toy: ToyLanguage) -> None:
        self._toy = toy

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        hidden = torch.empty(*tokens.shape, VOCAB_SIZE, dtype=torch.float64)
        times, which = time.unique(return_inverse=True)
        for index, t in enumerate(times.tolist()):
            rows = (which == index).nonzero()[:, 0]
            q = oracles.forward_matrix(self._toy.fields, t)
            exact = oracles.leave_one_out(self._toy.table, q, tokens[rows].numpy())
            hidden[rows] = torch.from_numpy(exact).log()
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        return hidden
