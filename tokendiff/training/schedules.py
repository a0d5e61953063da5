"""The learning rate of each step, as a share of the highest."""

import math

_POLYNOMIAL_END = 1e-7  # a rate, where `polynomial` ends


def lr_factor(name: str, step: int, *, warmup_steps: int, total_steps: int, rate: float) -> float:
    """What `rate` is multiplied by in a step, 0 the first.

    As `transformers.get_scheduler` of that name, to the bit. Its import takes two seconds, for
    what has nothing to do with schedules, which is long beside a short training.

    Args:
        name: `linear`, `cosine`, `cosine_with_restarts` (one cycle), `polynomial` (of power 1),
            `constant` or `constant_with_warmup`.
        warmup_steps: over which it rises from 0 in a line; `constant` has none.
        rate: the highest.
    """
    if name == "constant":
        return 1.0
    if step < warmup_steps:
        return step / warmup_steps
    if name == "constant_with_warmup":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if name == "linear":
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
    if name == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
    if name == "cosine_with_restarts":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress))) if progress < 1.0 else 0.0
    assert name == "polynomial"
    if step > total_steps:
        return _POLYNOMIAL_END / rate
    return ((rate - _POLYNOMIAL_END) * (1 - progress) + _POLYNOMIAL_END) / rate
