"""What the leave-one-out corrector does to the error of few steps, computed and not drawn.

    python -m benchmarks.corrector [--steps 4 8 16]

A language of four tokens over three ids has so few rows that a step of the sampler is a matrix.
Their product is the distribution of the samples under the exact model; printed is its total
variation to the language: without the corrector, with sweeps that draw one position again, and with
as many steps as the passes of those sweeps would buy. Half a minute.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, reduce
from itertools import pairwise
from typing import Any

import numpy as np

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.samplers.corrector import SELECTIONS
from tokendiff.verification import oracles

V, LENGTH, MASK = 4, 4, 2
TABLE = oracles.toy_language(V, LENGTH, MASK, seed=3)
ROWS = np.argwhere(TABLE >= 0)  # [V^L, L] every row that there is
PROCESSES: dict[str, dict[str, Any]] = {
    "uniform": {"alpha_schedule": "linear", "eps": 1e-3},
    "hybrid": {"p_uniform": 0.3, "gamma": 1.0},
}


class Chain:
    """The sampler of one process as matrices [V^L, V^L], row: the tokens before."""

    def __init__(self, process: Mapping[str, Any]) -> None:
        self._process = process
        self._step, self._sweep = cache(self._new_step), cache(self._new_sweep)

    def error(self, steps: int, *, sweeps: int = 0, selection: str = "random") -> float:
        """Total variation between the samples and the language."""
        q_1, clean = oracles.forward_matrix(self._process, 1.0), oracles.alpha(self._process, 1.0)
        noise = (q_1[0] - clean * np.eye(V)[0]) / (1.0 - clean)
        p = noise[ROWS].prod(1)
        times = np.linspace(1.0, 0.0, steps + 1).tolist()
        for t, s in pairwise(times):
            p = p @ self._step(s, t)
            for _ in range(sweeps if s > 0.0 else 0):
                p = p @ self._sweep(s, selection)
        return 0.5 * float(np.abs(p - TABLE.ravel()).sum())

    def _beliefs(self, t: float) -> np.ndarray:
        return oracles.leave_one_out(TABLE, oracles.forward_matrix(self._process, t), ROWS)

    def _new_step(self, s: float, t: float) -> np.ndarray:
        beliefs = self._beliefs(t)
        found = np.empty((len(ROWS), len(ROWS)))
        for index, row in enumerate(ROWS):
            by_position = [
                oracles.bayes_reverse(self._process, beliefs[index, i], s, t)[row[i]]
                for i in range(LENGTH)
            ]
            found[index] = reduce(np.multiply.outer, by_position).ravel()
        return found

    def _new_sweep(self, s: float, selection: str) -> np.ndarray:
        chances = self._beliefs(s) @ oracles.forward_matrix(self._process, s)
        found = np.zeros((len(ROWS), len(ROWS)))
        for index, row in enumerate(ROWS):
            weights = _weights(chances[index], row, selection)
            for i, token in np.ndindex(LENGTH, V):
                to = index + (token - row[i]) * V ** (LENGTH - 1 - i)
                found[index, to] += weights[i] * chances[index, i, token]
        return found


def _weights(chances: np.ndarray, row: np.ndarray, selection: str) -> np.ndarray:
    """[L] how likely each position of a row is to be drawn again, from p(token | the others)."""
    current = chances[np.arange(LENGTH), row]
    if current.min() <= 0.0:  # a row that does not occur, with a mask under uniform noise
        return np.full(LENGTH, 1.0 / LENGTH)
    others = chances.copy()
    others[np.arange(LENGTH), row] = 0.0
    weights = {
        "random": np.ones(LENGTH),
        "lowest_current_prob": 1.0 / current,
        "lowest_maxprob": 1.0 / chances.max(1),
        "lowest_log_margin": others.max(1) / current,
    }[selection]
    return weights / weights.sum()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.corrector", description=__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 16])
    options = parser.parse_args(argv)
    for name, fields in PROCESSES.items():
        process = NoiseProcess(
            forward_process=name, vocab_size=V, mask_token_id=MASK, max_length=LENGTH, **fields
        )
        chain = Chain(asdict(process))
        for steps in options.steps:
            plain, more = chain.error(steps), chain.error(2 * steps - 1)
            print(f"{name}, {steps} steps: {plain:.3f}; {2 * steps - 1} steps: {more:.3f}")
            for selection in SELECTIONS:
                errors = [
                    chain.error(steps, sweeps=sweeps, selection=selection) for sweeps in (1, 4)
                ]
                print(f"    {selection:<20} 1 sweep {errors[0]:.3f}, 4 sweeps {errors[1]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
