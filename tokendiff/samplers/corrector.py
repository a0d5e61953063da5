"""The leave-one-out corrector: after a step to time s, tokens are drawn again given all the others.

Given the other tokens of x_s, the token at position i has the distribution

    p(x_s^i = v | the others) = alpha_s x_loo(v) + b_s(v),

x_loo being the leave-one-out posterior. With uniform noise b_s(v) is (1 - alpha_s) / K; with hybrid
noise it has one value at the mask and one at every other id, and the mask is drawn too. Drawing one
position anew from this is a Gibbs step: it leaves the distribution of x_s as it is, and moves a
sample that is not from it towards it. Two things make it an approximation: several positions drawn
in one sweep do not see each other's new tokens, and a selection that looks at the tokens which are
about to be replaced is no Gibbs step, however few positions it takes. Only "random" with k = 1 is
exact.

Masks alone allow no corrector. A model of absorbing noise has not learnt what the other positions
say about a token that it sees.

Source: arXiv 2605.22765. Selections have the names of diffusers' DiscreteDDIMScheduler.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.kernels import ForwardKernel
from tokendiff.diffusion.random import RowGenerator

RANDOM = "random"
_CHOICE, _CLEAN, _TOKEN, _NOISE = 0, 1, 2, 3  # what a row's random numbers of a sweep are for

# From where a belief is needed, [B, L] bool, to (row [n], position [n], logits [n, V] of x_loo) of
# all these places, in chunks; and from logits [n, V] and numbers [n] in (0, 1) to tokens [n].
Beliefs = Callable[[Tensor], Iterator[tuple[Tensor, Tensor, Tensor]]]
Draw = Callable[[Tensor, Tensor], Tensor]


class Chances(NamedTuple):
    """Logarithms of what p(x_s^i | the others) says of a token, [N] float64 each.

    Attributes:
        current: of the token that stands there.
        other: of the likeliest among all other tokens.
    """

    current: Tensor
    other: Tensor


# The closed table behind `corrector_selection`: how much a position asks to be drawn again.
SELECTIONS: dict[str, Callable[[Chances], Tensor]] = {
    RANDOM: lambda chances: torch.zeros_like(chances.current),
    "lowest_current_prob": lambda chances: -chances.current,
    "lowest_maxprob": lambda chances: -torch.maximum(chances.current, chances.other),
    "lowest_log_margin": lambda chances: chances.other - chances.current,
}


@dataclass(frozen=True, kw_only=True)
class Corrector:
    """How often, where and how many tokens are drawn again.

    Attributes:
        steps: sweeps after each step; 0 is off. A sweep takes one forward pass.
        k: positions that a sweep draws again in each row.
        selection: which ones, a name in `SELECTIONS`. See `choose` for what chance has to do with
            it.
    """

    steps: int = 0
    k: int = 1
    selection: str = RANDOM

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"corrector_steps must not be negative, got {self.steps}")
        if self.k < 1:
            raise ValueError(f"corrector_k must be at least 1, got {self.k}")
        if self.selection not in SELECTIONS:
            raise ValueError(
                f"corrector_selection must be one of {', '.join(SELECTIONS)}, got "
                f"{self.selection!r}"
            )

    def sweep(
        self,
        kernel: ForwardKernel,
        x_s: Tensor,
        is_open: Tensor,
        beliefs: Beliefs,
        draw: Draw,
        generator: RowGenerator,
        *,
        s: Tensor,
    ) -> Tensor:
        """One sweep: `k` positions of each row drawn again, the others held as they are.

        Args:
            x_s: [B, L] noisy tokens; not written to.
            is_open: [B, L] bool, positions that may be drawn again. A row with fewer than `k` of
                them has all of them drawn.
            beliefs: the model's belief x_loo about x_s; see above.
            draw: draws clean tokens from it; see above.
            generator: one key per row.
            s: [B] times in (0, 1).

        Returns:
            [B, L].
        """
        choice, clean, token, noise = (
            generator.fold_in(purpose).uniform(x_s.shape[1])
            for purpose in (_CHOICE, _CLEAN, _TOKEN, _NOISE)
        )
        # A draw from alpha_s x_loo + b_s is, with probability alpha_s, one from x_loo, else noise.
        is_clean = clean < kernel.alpha(s)[:, None]
        drawn = kernel.draw_noise(s[:, None], noise)
        score = torch.zeros_like(choice)
        is_chosen = is_needed = is_open
        if self.selection == RANDOM:
            is_chosen = choose(score, is_open, k=self.k, uniform=choice)
            is_needed = is_chosen & is_clean
        for row, position, logits in beliefs(is_needed):
            at, there = (row, position), logits.device
            if self.selection != RANDOM:
                of_tokens = chances(kernel, logits, sent(x_s[at], there), sent(s[row], there))
                score[at] = SELECTIONS[self.selection](of_tokens).to(score.device)
            kept = is_clean[at].nonzero()[:, 0]
            drawn[row[kept], position[kept]] = draw(logits[sent(kept, there)], token[at][kept])
        if self.selection != RANDOM:
            is_chosen = choose(score, is_open, k=self.k, uniform=choice)
        return torch.where(is_chosen, drawn, x_s)


def chances(kernel: ForwardKernel, logits: Tensor, tokens: Tensor, s: Tensor) -> Chances:
    """What alpha_s x_loo + b_s says of some tokens.

    Args:
        logits: [N, V] of x_loo, the mask at -inf; not written to.
        tokens: [N] that stand there.
        s: [N] times in (0, 1).
    """
    is_mask = tokens == kernel.mask_token_id
    noise, alpha = kernel.noise(s), kernel.alpha(s)
    total = logits.logsumexp(-1)
    in_logits = tokens < logits.shape[-1]  # a mask may stand beyond what the model has logits of
    index = torch.where(in_logits, tokens, 0)[:, None]
    of_token = logits.gather(-1, index)[:, 0].where(in_logits, -torch.inf)
    best = logits.scatter(
        -1, index, torch.where(in_logits[:, None], -torch.inf, logits[:, :1])
    ).amax(-1)
    current = alpha * (of_token - total).double().exp() + noise.at(is_mask)
    other = alpha * (best - total).double().exp() + noise.token
    other = torch.where(is_mask, other, torch.maximum(other, noise.mask))
    return Chances(current.log(), other.log())


def choose(score: Tensor, is_open: Tensor, *, k: int, uniform: Tensor) -> Tensor:
    """k open positions of each row, one after the other without putting back, each with a
    probability in proportion to exp(score) (Gumbel-top-k).

    Args:
        score: [B, L] float64; equal scores make a uniform choice.
        is_open: [B, L] bool.
        k: at least 1; a row that has fewer open positions has all of them chosen.
        uniform: [B, L] float64 in (0, 1).

    Returns:
        [B, L] bool.
    """
    key = (score - (-uniform.log()).log()).masked_fill(~is_open, -torch.inf)
    best = key.topk(min(k, key.shape[1]), dim=1).indices
    return torch.zeros_like(is_open).scatter(1, best, True) & is_open


def check_correctable(kernel: ForwardKernel) -> None:
    """Raise ValueError where noise replaces no token by another one."""
    half = torch.tensor(0.5, dtype=torch.float64)
    if float(kernel.noise(half).token) <= 0.0:
        raise ValueError(
            "corrector_steps above 0 needs noise that replaces tokens by others (uniform, or "
            "hybrid with p_uniform above 0): with masks alone a model is never asked about a "
            "token that it sees"
        )
