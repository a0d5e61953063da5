"""Brute force in plain Python and numpy; imports nothing that it judges.

A process is told by the fields of its scheduler_config.json, and a language of L tokens over V ids
is its joint table [V] * L.
"""

import itertools
import math
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# Languages.


_LEAST_TIME = 1e-12  # where a bound's integral begins


def toy_language(
    vocab_size: int, length: int, mask_token_id: int, seed: int, *, concentration: float = 0.4
) -> np.ndarray:
    """A random joint table [V] * L that is 0 wherever the mask id occurs; the higher the
    concentration, the more alike its entries.
    """
    rng = np.random.default_rng(seed)
    table = rng.gamma(concentration, size=(vocab_size,) * length)
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


def total_variation(counts: Mapping[tuple[int, ...], int], table: np.ndarray) -> float:
    drawn = sum(counts.values())
    rows = itertools.product(*[range(size) for size in table.shape])
    return 0.5 * sum(abs(counts.get(row, 0) / drawn - table[row]) for row in rows)


def chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """The statistic divided by its degrees of freedom: about 1 where the expectation is right."""
    return float(((observed - expected) ** 2 / expected).sum() / (len(expected) - 1))


# Noise.


def alpha(process: Mapping[str, Any], t: float) -> float:
    """Probability that a token is untouched at t."""
    if process["forward_process"] == "hybrid":
        return (1.0 - t) / (1.0 + _uniform_odds(process, t))
    eps = process["eps"]
    return {
        "log_linear": lambda: 1.0 - (1.0 - eps) * t,
        "linear": lambda: (1.0 - 2.0 * eps) * (1.0 - t) + eps,
        "cosine": lambda: (1.0 - 2.0 * eps) * (1.0 - math.cos(math.pi / 2 * (1.0 - t))) + eps,
        "geometric": lambda: math.exp(
            -(process["sigma_min"] ** (1.0 - t)) * process["sigma_max"] ** t
        ),
    }[process["alpha_schedule"]]()


def noise(process: Mapping[str, Any], t: float) -> tuple[float, float]:
    """b_t at the mask, and at each single other id."""
    share, vocab_size = 1.0 - alpha(process, t), process["vocab_size"]
    if process["forward_process"] == "absorbing":
        return share, 0.0
    if process["forward_process"] == "uniform":
        if process["exclude_mask_from_uniform"]:
            return 0.0, share / (vocab_size - 1)
        return share / vocab_size, share / vocab_size
    c = _uniform_odds(process, t)
    return t / (1.0 + c), c / (1.0 + c) / (vocab_size - 1)


def _uniform_odds(process: Mapping[str, Any], t: float) -> float:
    p_uniform, gamma = process["p_uniform"], process["gamma"]
    return 2.0**gamma * p_uniform / (1.0 - p_uniform) * (t * (1.0 - t)) ** (gamma / 2.0)


def forward_matrix(
    process: Mapping[str, Any], t: float, ids: Sequence[int] | None = None
) -> np.ndarray:
    """[V, V]: row x is q_t(. | x).

    Args:
        ids: some ids, the mask among them: all others are then one state, the last. Noise treats
            them alike, so this is a Markov chain too.
    """
    vocab_size, mask = process["vocab_size"], process["mask_token_id"]
    at_mask, at_token = noise(process, t)
    states = range(vocab_size) if ids is None else ids
    b = [at_mask if token == mask else at_token for token in states]
    if ids is not None:
        b.append((vocab_size - len(ids)) * at_token)
    return alpha(process, t) * np.eye(len(b)) + np.array(b)


def transition_matrix(
    process: Mapping[str, Any], s: float, t: float, ids: Sequence[int] | None = None
) -> np.ndarray:
    """q_{t|s}, row y: the one that takes q_s to q_t. At s = 0 a token counts as clean."""
    q_t = forward_matrix(process, t, ids)
    return q_t if s == 0.0 else np.linalg.solve(forward_matrix(process, s, ids), q_t)


def bayes_reverse(
    process: Mapping[str, Any],
    belief: np.ndarray,
    s: float,
    t: float,
    ids: Sequence[int] | None = None,
) -> np.ndarray:
    """[V, V]: row z is p(x_s | x_t = z), x_0 being drawn from the belief [V]; zeros for a z that
    cannot occur. Of the states of `ids` alone, where given.
    """
    at_s = belief if s == 0.0 else belief @ forward_matrix(process, s, ids)
    joint = at_s[:, None] * transition_matrix(process, s, t, ids)
    total = joint.sum(0)
    return np.divide(joint, total, out=np.zeros_like(joint), where=total > 0).T


# Languages under noise.


def leave_one_out(table: np.ndarray, q: np.ndarray, noisy: object) -> np.ndarray:
    """p(x_0^i = v | all of a noisy sequence but position i), by summing the joint table.

    Args:
        table: [V] * L, the language.
        q: [V, V], row x the distribution of the noisy token given the clean one; or one for each
            sequence, [..., V, V].
        noisy: [..., L] noisy sequences.

    Returns:
        [..., L, V]; zeros where the other tokens cannot occur.
    """
    noisy = np.asarray(noisy)
    # By position and clean token, how likely the noisy token is: [..., L, V].
    likely = np.take_along_axis(
        np.broadcast_to(q, (*noisy.shape[:-1], *q.shape[-2:])), noisy[..., None, :], axis=-1
    ).swapaxes(-1, -2)
    axes = string.ascii_lowercase[: table.ndim]
    beliefs = []
    for position, here in enumerate(axes):
        others = [other for other in range(table.ndim) if other != position]
        factors = "".join(f",...{axes[other]}" for other in others)
        belief = np.einsum(
            f"{axes}{factors}->...{here}", table, *[likely[..., other, :] for other in others]
        )
        beliefs.append(belief)
    result = np.stack(beliefs, axis=-2)
    total = result.sum(-1, keepdims=True)
    return np.divide(result, total, out=np.zeros_like(result), where=total > 0)


def belief_given(
    table: np.ndarray, q: np.ndarray, position: int, evidence: Iterable[tuple[int, int, bool]]
) -> np.ndarray:
    """p(x_0 at a position = v | what is seen of other positions), by summing the joint table.

    Args:
        q: as in `leave_one_out`.
        evidence: position, token, and whether that is the noisy token or the clean one.
    """
    clean = np.eye(len(q))
    for axis, token, is_noisy in evidence:
        shape = [-1 if other == axis else 1 for other in range(table.ndim)]
        table = table * (q if is_noisy else clean)[:, token].reshape(shape)
    belief: np.ndarray = np.moveaxis(table, position, 0).reshape(len(q), -1).sum(1)
    return belief / belief.sum()


def _noised(table: np.ndarray, q: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    for axis in axes:
        table = np.moveaxis(np.tensordot(table, q, axes=([axis], [0])), -1, axis)
    return table


def least_bound(table: np.ndarray, process: Mapping[str, Any]) -> float:
    """The bound under the exact leave-one-out denoiser.

    The entropy; and, for a schedule that does not reach 0 and 1, what the model's prior and its
    last step, which takes every position by itself, cost beyond it. For an absorbing process, whose
    bound goes all the way, the entropy alone.
    """
    if process["forward_process"] == "absorbing":
        return entropy(table)
    return entropy(table) + _prior_cost(table, process) + _last_step_cost(table, process)


def _prior_cost(table: np.ndarray, process: Mapping[str, Any]) -> float:
    """KL(q_1 || noise) of whole sequences."""
    q, share = forward_matrix(process, 1.0), 1.0 - alpha(process, 1.0)
    single = (q[0] - alpha(process, 1.0) * np.eye(len(q))[0]) / share
    prior = np.ones(())
    for _ in range(table.ndim):
        prior = np.multiply.outer(prior, single)
    noised = _noised(table, q, axes=range(table.ndim))
    possible = noised > 0
    return float((noised[possible] * np.log(noised[possible] / prior[possible])).sum())


def _last_step_cost(table: np.ndarray, process: Mapping[str, Any]) -> float:
    """E ln p(x_0 | x_t) / product of p(x_0^i | x_t), at the least time."""
    q = forward_matrix(process, _LEAST_TIME)
    noised = _noised(table, q, axes=range(table.ndim))
    cost = 0.0
    for z in itertools.product(*[range(size) for size in table.shape]):
        belief = leave_one_out(table, q, z) * q[:, z].T
        belief /= np.maximum(belief.sum(-1, keepdims=True), np.finfo(float).tiny)
        for x in itertools.product(*[range(size) for size in table.shape]):
            joint = table[x] * math.prod(q[a, b] for a, b in zip(x, z, strict=True))
            if joint > 0:
                product = math.prod(belief[i, token] for i, token in enumerate(x))
                cost += joint * math.log(joint / noised[z] / product)
    return cost
