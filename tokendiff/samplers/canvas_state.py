"""What sampler `canvas` holds of canvases in a step, and what it knows of the model's belief."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokendiff.diffusion.random import RowGenerator


@dataclass(frozen=True, kw_only=True)
class CanvasState:
    """The canvases of n rows.

    Attributes:
        tokens: [n, K] at time t.
        is_open: [n, K] bool; elsewhere are tokens of the prompt.
        step: [n] steps that the canvas has had.
        t, s: [n] float64, times before and after the step.
        generator: of n rows, for this step.
    """

    tokens: Tensor
    is_open: Tensor
    step: Tensor
    t: Tensor
    s: Tensor
    generator: RowGenerator

    def moved(self, rows: Tensor, tokens: Tensor) -> "CanvasState":
        """Those of `rows` [m] after the step: with tokens [m, K] at time s."""
        return replace(
            self,
            tokens=tokens,
            is_open=self.is_open[rows],
            step=self.step[rows],
            t=self.s[rows],
            s=self.s[rows],
            generator=self.generator.select(rows),
        )

    def uniform(self, purpose: int) -> Tensor:
        """[n, K]."""
        return self.generator.fold_in(purpose).uniform(self.tokens.shape[1])


@dataclass(frozen=True, kw_only=True)
class CanvasBelief:
    """What a step needs to know of the belief about n canvases, [n, K] each.

    Attributes:
        candidates: drawn.
        likeliest: tokens.
        entropy: nats, at the temperature of rule entropy_bound, else at 1.
        of_token: of rule ancestral, the probability that the clean token is the one that stands
            there.
        confidence: of rule block_refinement, the candidate's probability in what it is drawn from;
            at temperature 0, in the model's belief.
        found: [n, K, D] of a `CanvasDecoder`, what its next pass is told; on its device.
    """

    candidates: Tensor
    likeliest: Tensor
    entropy: Tensor
    of_token: Tensor
    confidence: Tensor
    found: Tensor | None = None

    @classmethod
    def none(cls, like: Tensor, found: Tensor | None = None) -> "CanvasBelief":
        """None yet, for tokens of the shape [n, K] of `like`."""
        zeros = torch.zeros_like(like, dtype=torch.float64)
        tokens = torch.zeros_like(like)
        return cls(
            candidates=tokens,
            likeliest=tokens.clone(),
            entropy=zeros,
            of_token=zeros.clone(),
            confidence=zeros.clone(),
            found=found,
        )
