"""The language that `benchmarks.caches` judges samples by, against sums over all of its rows."""

import itertools

import numpy as np
import pytest

from benchmarks import caches
from benchmarks.caches import LAG, NUM_STATES, Language, compare, new_denoiser, report, triples


def test_rows_have_the_probabilities_that_the_language_says() -> None:
    language = Language.random(seed=1)
    every = np.array(list(itertools.product(range(NUM_STATES), repeat=3)))
    p = np.exp(-language.nats(every).sum(1))
    assert p.sum() == pytest.approx(1.0)
    drawn = language.rows(20_000, seed=4, length=3)
    shares = np.bincount(drawn @ [NUM_STATES**2, NUM_STATES, 1], minlength=len(p)) / len(drawn)
    assert np.abs(shares - p).max() < 0.015
    # A token may depend on the one LAG before it: the same neighbour, another chance.
    rows = np.zeros((NUM_STATES, LAG + 1), dtype=np.int64)
    rows[:, 0] = np.arange(NUM_STATES)
    assert np.allclose(language.nats(rows)[:, -1], -np.log(language.table[:, 0, 0]))


def test_triples_are_counted_by_hand() -> None:
    row = [1, 2, 3, 4, 5, 0]
    shares = triples(np.array([row])).reshape((NUM_STATES,) * 3)
    assert shares[1, 4, 5] == shares[2, 5, 0] == 0.5


@pytest.mark.slow
def test_each_cache_reads_less_and_writes_what_none_writes_before_any_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new model hardly looks at other tokens: what is kept of them makes no difference."""
    monkeypatch.setattr(caches, "LENGTH", 36)
    monkeypatch.setattr(caches, "RULES", (("sequential", 12),))
    found = compare(new_denoiser(), num_rows=2, batch=2)
    plain, *others = found
    assert plain.num_read == 2 * 36**2
    for other in others:
        assert other.num_read < 0.7 * plain.num_read
        assert (other.rows == plain.rows).mean() > 0.8
    assert report(Language.random(seed=1), found).count("\n") == 1 + len(found)
