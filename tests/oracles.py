"""The brute force that tests judge by: that of `jobs.evaluate --verify`, so that there is one."""

from tokendiff.verification.oracles import (
    chi_square,
    conditional,
    entropy,
    least_bound,
    leave_one_out,
    order_mean_nll,
    total_variation,
    toy_language,
)

__all__ = [
    "chi_square",
    "conditional",
    "entropy",
    "least_bound",
    "leave_one_out",
    "order_mean_nll",
    "total_variation",
    "toy_language",
]
