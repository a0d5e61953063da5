"""Brute force in plain Python and numpy; imports nothing that it judges."""

import itertools
import math

import numpy as np


def toy_language(vocab_size: int, length: int, mask_token_id: int, seed: int) -> np.ndarray:
    """A random joint table [V] * L that is 0 wherever the mask id occurs."""
    rng = np.random.default_rng(seed)
    table = rng.gamma(0.4, size=(vocab_size,) * length)
    for axis in range(length):
        np.moveaxis(table, axis, 0)[mask_token_id] = 0.0
    return table / table.sum()


def entropy(table: np.ndarray) -> float:
    p = table[table > 0]
    return float(-(p * np.log(p)).sum())


def conditional(table: np.ndarray, known: dict[int, int], position: int, value: int) -> float:
    """p(x_position = value | the known positions), by summing the table."""
    top = bottom = 0.0
    for row in itertools.product(*[range(size) for size in table.shape]):
        if all(row[at] == token for at, token in known.items()):
            bottom += table[row]
            if row[position] == value:
                top += table[row]
    return top / bottom


def order_mean_nll(table: np.ndarray, row: tuple[int, ...]) -> float:
    """The mean over all L! orders of a row's negative log-likelihood, token after token."""
    orders = list(itertools.permutations(range(len(row))))
    total = 0.0
    for order in orders:
        known: dict[int, int] = {}
        for position in order:
            total -= math.log(conditional(table, known, position, row[position]))
            known[position] = row[position]
    return total / len(orders)


def total_variation(counts: dict[tuple[int, ...], int], table: np.ndarray) -> float:
    drawn = sum(counts.values())
    rows = itertools.product(*[range(size) for size in table.shape])
    return 0.5 * sum(abs(counts.get(row, 0) / drawn - table[row]) for row in rows)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """The statistic divided by its degrees of freedom: about 1 where the expectation is right."""
    return float(((observed - expected) ** 2 / expected).sum() / (len(expected) - 1))
