"""A language that is small enough to be enumerated, under every kind of noise."""

import itertools
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.attention_masks import MaskRule, dense
from tokendiff.diffusion.kernels import ForwardKernel, UniformKernel
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


@dataclass(frozen=True)
class BlockLanguage:
    """Two blocks of two tokens over three ids and a mask, under noise of other tokens."""

    process: NoiseProcess

    @cached_property
    def kernel(self) -> UniformKernel:
        kernel = self.process.kernel()
        assert isinstance(kernel, UniformKernel)
        return kernel

    @cached_property
    def table(self) -> np.ndarray:
        return oracles.toy_language(VOCAB_SIZE, 2 * LENGTH, MASK, seed=2)


# So near to the ends of time that what they cost is far below the tolerance.
BLOCKS = BlockLanguage(
    NoiseProcess(
        forward_process="uniform",
        alpha_schedule="cosine",
        eps=1e-9,
        vocab_size=VOCAB_SIZE,
        mask_token_id=MASK,
        max_length=2 * LENGTH,
        block_length=LENGTH,
        attention_mask_mode="4d",
    )
)


class ExactBlockDenoiser:
    """The exact leave-one-out belief about each noisy token of rows `[x_t ; x_0]`, from what a rule
    lets it see of them but itself, all blocks being at one time; hidden states are its logarithm.
    """

    def __init__(self, language: BlockLanguage, t: float) -> None:
        self._table, self._q = language.table, oracles.forward_matrix(asdict(language.process), t)
        self._known: dict[tuple[int, frozenset[tuple[int, int, bool]]], Tensor] = {}

    def encode(self, tokens: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
        rows, width = len(tokens), tokens.shape[1]
        seen = dense(rule, rows, width, width)[:, 0] & ~torch.eye(width, dtype=torch.bool)
        is_noisy = [key < width // 2 for key in range(width)]
        states = torch.zeros(rows, width, VOCAB_SIZE, dtype=torch.float64)
        for row, (places, row_tokens) in enumerate(
            zip(positions.tolist(), tokens.tolist(), strict=True)
        ):
            facts = list(zip(places, row_tokens, is_noisy, strict=True))
            for query, is_seen in enumerate(seen[row, : width // 2].tolist()):
                known = places[query], frozenset(itertools.compress(facts, is_seen))
                if known not in self._known:
                    belief = oracles.belief_given(self._table, self._q, *known)
                    self._known[known] = torch.from_numpy(belief).log()
                states[row, query] = self._known[known]
        return states

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


class ExactDenoiser:
    """The exact leave-one-out x_theta of a toy language; hidden states are its logarithm."""

    is_time_conditioned = True

    def __init__(self, toy: ToyLanguage) -> None:
        self._toy = toy

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        times, which = time.unique(return_inverse=True)
        q = np.stack([oracles.forward_matrix(self._toy.fields, t) for t in times.tolist()])
        exact = oracles.leave_one_out(self._toy.table, q[which.numpy()], tokens.numpy())
        return torch.from_numpy(exact).log()

    def head(self, hidden: Tensor) -> Tensor:
        return hidden
