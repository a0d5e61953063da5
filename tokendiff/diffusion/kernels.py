"""One family of forward processes: how clean tokens become noise, the steps back, and the bound.

Per position and independent across positions,

    q_t(z | x) = alpha_t 1[z = x] + b_t(z),      sum_z b_t(z) = 1 - alpha_t,

where b_t has one value at the mask and one at every other id. alpha and these two values, with
their derivatives, determine all that follows; a kernel is nothing more than them:

    absorbing   b_t(m) = 1 - alpha_t              MDLM (arXiv 2406.07524), MD4 (arXiv 2406.04329)
    uniform     b_t(z) = (1 - alpha_t) / K        UDLM (arXiv 2412.10193)
    hybrid      a mixture that changes with t     GIDD (arXiv 2503.04482)

The belief x_theta gives the mask probability 0: it never occurs in clean text.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokendiff.diffusion.schedules import NoiseSchedule

# Next to 0 and 1 rates may be infinite, and nearer than this 1 - t has no digits left.
LEAST_TIME = 1e-12


class Noise(NamedTuple):
    """b_t, or its derivative: the value at the mask, and at each single other id; shape of t."""

    mask: Tensor
    token: Tensor

    def at(self, is_mask: Tensor) -> Tensor:
        """b_t(z) for z that are the mask or not; shapes broadcast."""
        return torch.where(is_mask, self.mask, self.token)


class ForwardKernel(ABC):
    """What every kernel shares. Times are float64; the ends of time are 0 (clean) and 1 (noise)."""

    mask_token_id: int

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is still untouched at t, of the shape of `t`."""

    @abstractmethod
    def alpha_prime(self, t: Tensor) -> Tensor:
        """d alpha / dt, of the shape of `t`."""

    @abstractmethod
    def noise(self, t: Tensor) -> Noise:
        """b_t."""

    @abstractmethod
    def noise_prime(self, t: Tensor) -> Noise:
        """d b_t / dt."""

    # Forward.

    def corrupt(self, x_0: Tensor, t: Tensor, *, uniform: Tensor, is_noisable: Tensor) -> Tensor:
        """A sample of q_t(. | x_0), in O(B L).

        Args:
            x_0: [B, L] clean tokens.
            t: [B] times, or [B, L], one for each position.
            uniform: [B, L] draws from (0, 1): below 1 - alpha_t the token becomes noise.
            is_noisable: [B, L]; elsewhere (padding, prompt) the clean token stays.

        Returns:
            [B, L] noisy tokens; `x_0` is not written to.
        """
        t = t[:, None] if t.dim() == 1 else t
        share = 1.0 - self.alpha(t)
        is_noise = is_noisable & (uniform < share)
        return torch.where(is_noise, self.draw_noise(t, uniform / share), x_0)

    def draw_noise(self, t: Tensor, uniform: Tensor) -> Tensor:
        """Token ids drawn from b_t / (1 - alpha_t), by inverting its cumulative sum.

        Args:
            t: times, broadcast against `uniform`.
            uniform: draws from (0, 1), any shape.
        """
        noise = self.noise(t)
        rest = uniform * (1.0 - self.alpha(t)) - noise.mask
        # The ids other than the mask, in their order: those above it stand one place lower.
        index = (rest / noise.token.clamp(min=torch.finfo(rest.dtype).tiny)).long()
        index = index.clamp(0, self.num_noise_tokens - 1)
        token = index + (index >= self.mask_token_id)
        return torch.where((rest < 0.0) | (noise.token <= 0.0), self.mask_token_id, token)

    @property
    @abstractmethod
    def num_noise_tokens(self) -> int:
        """Ids other than the mask that noise may put in (at least 1 for arithmetic's sake)."""

    def marginal(self, x_theta: Tensor, t: Tensor) -> Tensor:
        """q_t(. | x_theta) = alpha_t x_theta + b_t.

        Args:
            x_theta: [B, L, V] distributions over the clean token.
            t: [B].

        Returns:
            [B, L, V]; rows sum to 1.
        """
        return self.alpha(t)[:, None, None] * x_theta + self._dense(self.noise(t), x_theta)

    def transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Noise]:
        """alpha_{t|s} and b_{t|s} of q_{t|s}(z | y) = alpha_{t|s} 1[z = y] + b_{t|s}(z), s < t."""
        alpha_s, noise_s = self.cleaner_end(s)
        alpha_ts = self.alpha(t) / alpha_s
        noise_t = self.noise(t)
        return alpha_ts, Noise(
            (noise_t.mask - alpha_ts * noise_s.mask).clamp(min=0.0),
            (noise_t.token - alpha_ts * noise_s.token).clamp(min=0.0),
        )

    # Backward.

    def reverse(self, x_theta: Tensor, x_t: Tensor, *, s: Tensor, t: Tensor) -> Tensor:
        """Distribution of the token at the earlier time s, given x_t and a belief about x_0.

        Args:
            x_theta: [B, L, V] belief about the clean token; rows sum to 1, the mask has 0.
            x_t: [B, L] noisy tokens.
            s, t: [B] times in [0, 1], s < t in every row. s = 0 is clean: the last step removes all
                noise, also where the schedule leaves alpha_0 a little below 1.

        Returns:
            [B, L, V]; rows sum to 1.

        Raises:
            ValueError: if s >= t anywhere, or a time lies outside [0, 1].

        Source: D3PM (arXiv 2107.03006), eq. 3, with x_theta in place of the one-hot x_0.
        """
        check_times(s, t)
        alpha_ts, noise_ts = self.transition(s, t)
        alpha_s, noise_s = self.cleaner_end(s)
        q_s = alpha_s[:, None, None] * x_theta + self._dense(noise_s, x_theta)
        one_hot = torch.nn.functional.one_hot(x_t, x_theta.shape[-1]).to(x_theta.dtype)
        from_noise = Noise(*(value[:, None] for value in noise_ts)).at(x_t == self.mask_token_id)
        joint = q_s * (alpha_ts[:, None, None] * one_hot + from_noise[..., None])
        return joint / joint.sum(-1, keepdim=True)

    def move_probability(
        self, x_t: Tensor, belief: Tensor, *, s: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The reverse step as a mixture: with these probabilities the token at s is a draw from
        x_theta, or a draw from b_s / (1 - alpha_s); else it stays x_t.

        Both fall as x_theta(x_t) rises, so what they are at belief 0 bounds them for any model.

        Args:
            x_t: noisy tokens, any shape.
            belief: x_theta(x_t), of the same shape; 0 where x_t is the mask.
            s, t: times, broadcast against x_t, s < t.

        Returns:
            (to a clean token, to noise), each float64 of the shape of x_t.
        """
        alpha_s, _ = self.cleaner_end(s)
        _, noise_ts = self.transition(s, t)
        is_mask = x_t == self.mask_token_id
        q_t = self.alpha(t) * belief.double() + self.noise(t).at(is_mask)
        # Where q_t is 0 the token cannot occur at t, unless it was given: it stays.
        share = torch.where(q_t > 0.0, noise_ts.at(is_mask) / q_t, torch.zeros_like(q_t))
        return share * alpha_s, share * (1.0 - alpha_s)

    def loo_logits(self, logits: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits of the leave-one-out posterior p(x_0 | x_t without this position), from those of
        p(x_0 | x_t): divided by q_t(x_t | v).

        Args:
            logits: [N, V]; not written to.
            x_t: [N] noisy tokens.
            t: [N].
        """
        return logits.scatter_add(-1, x_t[:, None], -self._own_odds(x_t, t).to(logits.dtype))

    def posterior_logits(self, logits: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The inverse of `loo_logits`: those of p(x_0 | x_t) from the leave-one-out posterior's."""
        return logits.scatter_add(-1, x_t[:, None], self._own_odds(x_t, t).to(logits.dtype))

    def _own_odds(self, x_t: Tensor, t: Tensor) -> Tensor:
        """[N, 1]: ln q_t(x_t | x_t) - ln q_t(x_t | v), for any other v."""
        noise = self.noise(t).at(x_t == self.mask_token_id)
        odds = torch.log1p(self.alpha(t) / noise.clamp(min=torch.finfo(noise.dtype).tiny))
        return odds[:, None]

    # The bound.

    # Noise of probability t^p has the weight 1/t near 0: p is 1 for uniform noise, gamma/2 for
    # hybrid noise. For a single token times of density t^(p/2 - 1) make the least variance, for the
    # mean over many those of density t^(p - 1): powers 2/p and 1/p.
    warp_power: float = 2.0

    def warped_time(self, u: Tensor, *, min_time: float = LEAST_TIME) -> tuple[Tensor, Tensor]:
        """A time for each u in [0, 1], and dt/du: t / (1 - t) = (u / (1 - u))^a with a the
        `warp_power`, moved to [min_time, 1 - LEAST_TIME].

        With t drawn uniformly a loss weighted by 1/t has no finite variance.
        """
        low = max(min_time, LEAST_TIME)
        span, a = 1.0 - LEAST_TIME - low, self.warp_power
        u = u.clamp(LEAST_TIME, 1.0 - LEAST_TIME)
        share = torch.sigmoid(a * torch.logit(u))
        return low + span * share, span * a * share * (1.0 - share) / (u * (1.0 - u))

    def loss_weight(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """r_t(x_t) / q_t(x_t | x_0), with the jump rate r_t = b_t' - (alpha_t' / alpha_t) b_t.

        Args:
            x_0, x_t: tokens, any shape.
            t: broadcast against them.
        """
        is_mask = x_t == self.mask_token_id
        noise = self.noise(t).at(is_mask)
        alpha = self.alpha(t)
        rate = self.noise_prime(t).at(is_mask) - self.alpha_prime(t) / alpha * noise
        # The rate is never negative; next to t = 0 and t = 1 rounding can make it so.
        return rate.clamp(min=0.0) / (noise + alpha * (x_t == x_0))

    def nelbo(self, x_theta: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The continuous-time bound's integrand at time t, per position.

            r_t(z) / q_t(z | x_0) * [ KL(q_t(. | x_0) || q_t(. | x_theta)) + rho - ln rho - 1 ],
            rho = q_t(z | x_0) / q_t(z | x_theta),   z = x_t.

        Its mean over t ~ U(0, 1) and x_t ~ q_t(. | x_0), with the terms of the two ends
        (`prior_nats`, `reconstruction_nats`), bounds -ln p(x_0). This is the general formula over
        the whole vocabulary; training and evaluation use the closed forms of
        `tokendiff.objectives`.

        Args:
            x_theta: [B, L, V] belief about the clean token; rows sum to 1, the mask has 0.
            x_0, x_t: [B, L].
            t: [B], strictly between 0 and 1.

        Returns:
            [B, L] nats.
        """
        one_hot = torch.nn.functional.one_hot(x_0, x_theta.shape[-1]).to(x_theta.dtype)
        q, q_theta = self.marginal(one_hot, t), self.marginal(x_theta, t)
        # xlogy gives 0 where q is 0; there q_theta may be 0 too, and only the first counts.
        divergence = (
            torch.special.xlogy(q, q) - torch.special.xlogy(q, q_theta.where(q > 0.0, q_theta + 1))
        ).sum(-1)
        q_z = q.gather(-1, x_t[..., None])[..., 0]
        log_rho = q_z.log() - q_theta.gather(-1, x_t[..., None])[..., 0].log()
        weight = self.loss_weight(x_0, x_t, t[:, None])
        bracket = divergence + log_rho.exp() - log_rho - 1.0
        return torch.where(weight > 0.0, weight * bracket, torch.zeros_like(bracket))

    def prior_nats(self) -> float:
        """KL(q_1(. | x_0) || noise) per token: what the bound has beyond its integral at t = 1.

        0 where alpha ends at 0. Infinite for an absorbing kernel with alpha_1 > 0, whose prior
        holds no clean token; its bound is estimated from alpha = 1 to alpha = 0 instead.
        """
        one = torch.ones(1, dtype=torch.float64)
        alpha, noise = self.alpha(one), self.noise(one).token
        if float(alpha) <= 0.0:
            return 0.0
        # Of alpha 1[x_0] + b from b / (1 - alpha): every id but x_0 has the ratio 1 - alpha.
        q, share = alpha + noise, 1.0 - alpha
        return float(q * (q * share / noise).log() + (1.0 - q) * share.log())

    def reconstruction_nats(
        self, belief_x_0: Tensor, belief_x_t: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """-ln p(x_0 | x_t) of the last reverse step, from a small t: what the bound has beyond its
        integral over [t, 1].

        Args:
            belief_x_0, belief_x_t: x_theta(x_0) and x_theta(x_t) at t, any shape.
            x_0, x_t: of that shape.
            t: broadcast against them.
        """
        alpha, noise = self.alpha(t), self.noise(t).at(x_t == self.mask_token_id)
        q_z = noise + alpha * (x_t == x_0)
        return -(q_z * belief_x_0 / (alpha * belief_x_t + noise)).log()

    # Helpers.

    def cleaner_end(self, s: Tensor) -> tuple[Tensor, Noise]:
        """alpha_s and b_s, where s = 0 counts as wholly clean."""
        is_clean, zero = s == 0.0, torch.zeros_like(s)
        noise = self.noise(s)
        return (
            torch.where(is_clean, torch.ones_like(s), self.alpha(s)),
            Noise(*(torch.where(is_clean, zero, value) for value in noise)),
        )

    def _dense(self, noise: Noise, like: Tensor) -> Tensor:
        """[B, 1, V] values of noise whose fields are [B]."""
        ids = torch.arange(like.shape[-1], device=like.device)
        per_row = Noise(*(value[:, None, None] for value in noise))
        return per_row.at(ids == self.mask_token_id).to(like.dtype)


def check_times(s: Tensor, t: Tensor) -> None:
    """Raise ValueError unless 0 <= s < t <= 1 everywhere."""
    if not bool(((s >= 0) & (s < t) & (t <= 1)).all()):
        raise ValueError(f"need 0 <= s < t <= 1, got s = {s.tolist()}, t = {t.tolist()}")


def _check_vocabulary(mask_token_id: int, vocab_size: int) -> None:
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"mask_token_id must be an id of the vocabulary of {vocab_size}, got {mask_token_id}"
        )


@dataclass(frozen=True, kw_only=True)
class AbsorbingKernel(ForwardKernel):
    """A token becomes the mask and stays it."""

    schedule: NoiseSchedule
    mask_token_id: int

    def __post_init__(self) -> None:
        if self.mask_token_id < 0:
            raise ValueError(f"mask_token_id must be a token id, got {self.mask_token_id}")

    num_noise_tokens = 1  # of probability 0

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(t)

    def alpha_prime(self, t: Tensor) -> Tensor:
        return self.schedule.alpha_prime(t)

    def noise(self, t: Tensor) -> Noise:
        return Noise(1.0 - self.alpha(t), torch.zeros_like(t))

    def noise_prime(self, t: Tensor) -> Noise:
        return Noise(-self.alpha_prime(t), torch.zeros_like(t))

    def masked_loss_weight(self, t: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t), of the shape of `t`: what the NLL of a masked token counts.

        For a masked token KL(q_t(. | x_0) || q_t(. | x_theta)) is -alpha_t ln x_theta(x_0), and
        this is alpha_t times `loss_weight`. Source: MDLM eq. 10.
        """
        return -self.alpha_prime(t) / (1.0 - self.alpha(t))


@dataclass(frozen=True, kw_only=True)
class UniformKernel(ForwardKernel):
    """A token becomes any of the K allowed ids: all V, or the V - 1 that are not the mask."""

    schedule: NoiseSchedule
    vocab_size: int
    mask_token_id: int
    exclude_mask: bool = True

    def __post_init__(self) -> None:
        _check_vocabulary(self.mask_token_id, self.vocab_size)

    @property
    def num_noise_tokens(self) -> int:
        return self.vocab_size - 1

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(t)

    def alpha_prime(self, t: Tensor) -> Tensor:
        return self.schedule.alpha_prime(t)

    def noise(self, t: Tensor) -> Noise:
        return self._spread(1.0 - self.alpha(t))

    def noise_prime(self, t: Tensor) -> Noise:
        return self._spread(-self.alpha_prime(t))

    def _spread(self, total: Tensor) -> Noise:
        if self.exclude_mask:
            return Noise(torch.zeros_like(total), total / (self.vocab_size - 1))
        return Noise(total / self.vocab_size, total / self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class HybridKernel(ForwardKernel):
    """Masks and random tokens, in a proportion that changes with time.

        c_t = B (t (1 - t))^(gamma/2),  C_t = 1 + c_t,  alpha_t = (1 - t) / C_t,
        b_t = (t 1[z = m] + c_t u(z)) / C_t,  u uniform over the ids other than the mask,
        B = 2^gamma p_u / (1 - p_u).

    At t = 1/2 a share `p_uniform` of all tokens is uniform noise. Source: GIDD (arXiv 2503.04482).
    """

    vocab_size: int
    mask_token_id: int
    p_uniform: float = 0.1
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _check_vocabulary(self.mask_token_id, self.vocab_size)
        if not 0.0 <= self.p_uniform < 1.0:
            raise ValueError(f"p_uniform must lie in [0, 1), got {self.p_uniform}")
        if not 0.05 <= self.gamma <= 2.0:
            raise ValueError(
                f"gamma must lie in [0.05, 2], got {self.gamma}; above 2 some jump rates are "
                "negative, and far below 1 half the noise comes before any time a float can tell "
                "from 0"
            )

    @property
    def num_noise_tokens(self) -> int:
        return self.vocab_size - 1

    @property
    def warp_power(self) -> float:  # type: ignore[override]
        return max(2.0, 3.0 / self.gamma) if self.p_uniform > 0.0 else 2.0

    def _uniform_part(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_t and its derivative. At the ends of time the derivative is infinite for gamma < 2."""
        scale = 2.0**self.gamma * self.p_uniform / (1.0 - self.p_uniform)
        product = t * (1.0 - t)
        half = 0.5 * self.gamma
        if scale == 0.0:
            return torch.zeros_like(t), torch.zeros_like(t)
        return scale * product**half, scale * half * product ** (half - 1.0) * (1.0 - 2.0 * t)

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - t) / (1.0 + self._uniform_part(t)[0])

    def alpha_prime(self, t: Tensor) -> Tensor:
        c, c_prime = self._uniform_part(t)
        return -(1.0 + c + (1.0 - t) * c_prime) / (1.0 + c) ** 2

    def noise(self, t: Tensor) -> Noise:
        c, _ = self._uniform_part(t)
        return Noise(t / (1.0 + c), c / (1.0 + c) / (self.vocab_size - 1))

    def noise_prime(self, t: Tensor) -> Noise:
        c, c_prime = self._uniform_part(t)
        squared = (1.0 + c) ** 2
        return Noise((1.0 + c - t * c_prime) / squared, c_prime / squared / (self.vocab_size - 1))
