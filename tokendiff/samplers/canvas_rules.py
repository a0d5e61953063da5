"""How a canvas of random tokens becomes text: the step of each rule, as pure functions, and when a
canvas is finished early.

`tokens` are those that a step starts from, `candidates` are drawn from the model's belief about the
clean tokens. Sources: D3PM (arXiv 2107.03006), EB-Sampler (arXiv 2505.24857),
the uniform mode of diffusers' BlockRefinementScheduler.
"""

import torch
from torch import Tensor

from tokendiff.diffusion.kernels import ForwardKernel
from tokendiff.samplers.commit_rules import commit_confident, commit_entropy_bounded


def annealed_temperature(step: Tensor, num_steps: int, *, t_max: float, t_min: float) -> Tensor:
    """[n] float64: the temperature of steps [n], counted from 0, falls along a line from `t_max`.

    The line reaches `t_min` one step after the last, as in the released code; descriptions say that
    the last step has it.
    """
    left = (num_steps - step).double() / num_steps
    return t_min + (t_max - t_min) * left


def keep_certain(
    candidates: Tensor, entropy: Tensor, noise: Tensor, is_open: Tensor, *, bound: float
) -> Tensor:
    """[n, K] the candidates of least entropy, as many as have a summed entropy of at most `bound`,
    the largest of them not counted; `noise` everywhere else.

    Args:
        entropy: [n, K] nats, of the distribution that candidates are drawn from.
        noise: [n, K] random tokens.
        is_open: [n, K]; what is returned elsewhere means nothing.
    """
    return torch.where(commit_entropy_bounded(entropy, is_open, bound=bound), candidates, noise)


def commit_by_quota(
    confidence: Tensor,
    is_committed: Tensor,
    is_open: Tensor,
    *,
    step: Tensor,
    num_steps: int,
    threshold: float,
) -> Tensor:
    """[n, K] bool: open positions that a step commits anew. By its end so many are committed as are
    its share of all, rounded up: the most confident come first, and those of more confidence than
    `threshold` come at once.

    Args:
        step: [n], counted from 0.
    """
    share = (step + 1) * is_open.sum(1)
    owed = -(-share // num_steps) - (is_committed & is_open).sum(1)
    return commit_confident(
        confidence, is_open & ~is_committed, owed.clamp(min=0), threshold=threshold
    )


def move_to(
    tokens: Tensor,
    candidates: Tensor,
    noise: Tensor,
    uniform: Tensor,
    chances: tuple[Tensor, Tensor],
) -> Tensor:
    """[n, K] where `uniform` lies below the first chance the candidate, below both together the
    noise, else the token as it is.
    """
    to_clean, to_noise = chances
    moved = torch.where(uniform < to_clean + to_noise, noise, tokens)
    return torch.where(uniform < to_clean, candidates, moved)


def posterior_chances(
    kernel: ForwardKernel, tokens: Tensor, candidates: Tensor, *, s: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """The chances of `move_to` under q(x_s | x_t, x_0), with the candidate for x_0:

        q(y | z, x) ~ (alpha_{t|s} 1[y = z] + b_{t|s}) (alpha_s 1[y = x] + b_s),

    of which alpha_s (b_{t|s} + alpha_{t|s} 1[x = z]) is the candidate, (1 - alpha_s) b_{t|s} noise,
    and alpha_{t|s} b_s the token as it is. With candidates from p(x_0 | x_t) the step is the exact
    reverse one: the mean over x_0 of q(x_s | x_t, x_0).

    Args:
        tokens: [n, K] x_t, none of them the mask.
        s, t: [n], s < t.

    Returns:
        [n, K] float64 each.
    """
    alpha_s, noise_s = kernel.cleaner_end(s)
    alpha_ts, noise_ts = kernel.transition(s, t)
    alpha_s, b_s, alpha_ts, b_ts = (
        value[:, None] for value in (alpha_s, noise_s.token, alpha_ts, noise_ts.token)
    )
    to_clean = alpha_s * (b_ts + alpha_ts * (tokens == candidates))
    to_noise = ((1.0 - alpha_s) * b_ts).expand_as(to_clean)
    total = to_clean + to_noise + alpha_ts * b_s
    return to_clean / total, to_noise / total


def unchanged_steps(likeliest: Tensor, before: Tensor, count: Tensor, step: Tensor) -> Tensor:
    """[n] int64: for how many steps in a row the likeliest tokens [n, K] are what they were before.

    Args:
        before, count: [n, K] and [n], of the step before.
        step: [n], counted from 0; nothing stands before the first.
    """
    is_same = (step > 0) & (likeliest == before).all(1)
    return torch.where(is_same, count + 1, 0)


def is_settled(
    unchanged: Tensor,
    entropy: Tensor,
    is_open: Tensor,
    *,
    stability_threshold: int,
    confidence_threshold: float,
) -> Tensor:
    """[n] bool: canvases whose likeliest tokens did not change in `stability_threshold` steps, and
    whose mean entropy at open positions is below `confidence_threshold` nats.
    """
    mean = (entropy * is_open).sum(1) / is_open.sum(1).clamp(min=1)
    return (unchanged >= stability_threshold) & (mean < confidence_threshold)
