"""Noise schedules: alpha(t), the probability that a token is still untouched at time t, and its
derivative.

t = 0 is clean and t = 1 is noise; alpha falls from about 1 to about 0. Sources: MDLM (arXiv
2406.07524, App. E), MD4 (arXiv 2406.04329, Table 4), SEDD (arXiv 2310.16834).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class NoiseSchedule(Protocol):
    def alpha(self, t: Tensor) -> Tensor:
        """alpha(t), of the shape of `t`."""
        ...

    def alpha_prime(self, t: Tensor) -> Tensor:
        """d alpha / dt, negative, of the shape of `t`."""
        ...

    def time(self, alpha: Tensor) -> Tensor:
        """The time at which alpha(t) is `alpha`; beyond what the schedule reaches, its end."""
        ...


def _check_eps(eps: float) -> None:
    if not 0.0 < eps < 0.5:
        raise ValueError(f"eps must lie strictly between 0 and 0.5, got {eps}")


@dataclass(frozen=True, kw_only=True)
class LogLinear:
    """alpha(t) = 1 - (1 - eps) t; -ln alpha grows linearly in -ln(1 - t)."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - (1.0 - self.eps) * t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1.0 - self.eps))

    def time(self, alpha: Tensor) -> Tensor:
        return ((1.0 - alpha) / (1.0 - self.eps)).clamp(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Linear:
    """alpha(t) = (1 - 2 eps)(1 - t) + eps."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - 2.0 * self.eps) * (1.0 - t) + self.eps

    def alpha_prime(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1.0 - 2.0 * self.eps))

    def time(self, alpha: Tensor) -> Tensor:
        return (1.0 - (alpha - self.eps) / (1.0 - 2.0 * self.eps)).clamp(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """alpha(t) = (1 - 2 eps)(1 - cos(pi/2 (1 - t))) + eps."""

    eps: float = 1e-3

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - 2.0 * self.eps) * (1.0 - torch.cos(0.5 * math.pi * (1.0 - t))) + self.eps

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -(1.0 - 2.0 * self.eps) * 0.5 * math.pi * torch.sin(0.5 * math.pi * (1.0 - t))

    def time(self, alpha: Tensor) -> Tensor:
        base = ((alpha - self.eps) / (1.0 - 2.0 * self.eps)).clamp(0.0, 1.0)
        return 1.0 - 2.0 / math.pi * torch.arccos(1.0 - base)


@dataclass(frozen=True, kw_only=True)
class Geometric:
    """alpha(t) = exp(-sigma_min^(1-t) sigma_max^t)."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        # Beyond these 1 - alpha_0 and alpha_1 have no digits left.
        if not 1e-8 <= self.sigma_min < self.sigma_max <= 100.0:
            raise ValueError(
                "need 1e-8 <= sigma_min < sigma_max <= 100, got "
                f"{self.sigma_min} and {self.sigma_max}"
            )

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min ** (1.0 - t) * self.sigma_max**t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._sigma(t))

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self._sigma(t) * math.log(self.sigma_max / self.sigma_min)

    def time(self, alpha: Tensor) -> Tensor:
        sigma = (-alpha.clamp(min=torch.finfo(alpha.dtype).tiny).log()).clamp(min=self.sigma_min)
        ratio = (sigma / self.sigma_min).log() / math.log(self.sigma_max / self.sigma_min)
        return ratio.clamp(0.0, 1.0)


SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "log_linear": LogLinear,
    "linear": Linear,
    "cosine": Cosine,
    "geometric": Geometric,
}


def make_schedule(name: str, *, eps: float, sigma_min: float, sigma_max: float) -> NoiseSchedule:
    """The schedule that `alpha_schedule` names, with those of the parameters that it has."""
    if name not in SCHEDULES:
        raise ValueError(f"alpha_schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if name == "geometric":
        return Geometric(sigma_min=sigma_min, sigma_max=sigma_max)
    return SCHEDULES[name](eps=eps)
