"""What each drafted token of a block counts in the loss of a draft.

Both ways count an early token more, since the later ones are thrown away where it is refused.
Fixed weights say by how much beforehand; those of D-PACE follow from what the draft knows by now.
"""

import torch
from torch import Tensor


def decay_gamma_of(block_size: int) -> float:
    """The published gamma, 7, 5 and 4 for blocks of 16, 10 and 8, and between them a straight
    line; half the block size below.
    """
    return block_size / 2 if block_size <= 10 else 5 + (block_size - 10) / 3


def decay_weights(block_size: int, gamma: float | None = None) -> Tensor:
    """exp(-(k - 1) / gamma) of the tokens k = 1..K-1 of a block: [K - 1] float64, falling from 1.

    Args:
        gamma: None takes `decay_gamma_of(block_size)`.

    Source: DFlash (arXiv 2602.06036), eq. 4.
    """
    gamma = gamma or decay_gamma_of(block_size)
    return torch.exp(-torch.arange(block_size - 1, dtype=torch.float64) / gamma)


@torch.no_grad()
def dpace_weights(nll: Tensor, is_target: Tensor, *, alpha: float) -> Tensor:
    """What each token of a block does for the length of its accepted prefix.

    If the token at place i is accepted with probability q_i, the number of drafted tokens that are
    accepted has the mean S = sum over m of q_1 ... q_m, and the derivative of S by ln q_j is the
    sum of those products that q_j is in:

        w_j = sum over m >= j of q~_1 ... q~_m,    q~_i = (1 - alpha) q_i + alpha.

    So the gradient of -sum of w_j ln q_j, the w_j taken as constants, is that of -S where alpha is
    0. A new draft has q near 0, and then no token behind the first would ever count: alpha keeps
    the weights of later tokens up. Where it is 1 the weights are fixed, K - 1, K - 2, ..., 1.

    Args:
        nll: [..., K - 1] -ln q_i of the token that the text has; anything where there is none.
        is_target: [..., K - 1] which places the block's text reaches, a prefix of them.
        alpha: from 0 to 1.

    Returns:
        [..., K - 1] of the dtype of `nll`, without gradient, falling along a block; 0 where there
        is no target.

    Source: D-PACE (arXiv 2605.18810), eqs. 7 to 9 and algorithm 1.
    """
    smoothed = (1.0 - alpha) * torch.exp(-nll) + alpha
    prefix = smoothed.masked_fill(~is_target, 0.0).cumprod(-1)
    return prefix.flip(-1).cumsum(-1).flip(-1)
