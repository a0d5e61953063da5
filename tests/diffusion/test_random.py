import numpy as np
import torch
from torch import Tensor

from benchmarks.device_reads import count_waits, emulated_device
from tokendiff.data.order import permutation
from tokendiff.diffusion.random import RowGenerator, strata_of
from tokendiff.diffusion.splitmix import key_from, mix
from tokendiff.verification.oracles import chi_square


def split_mix_64(seed: int, count: int) -> list[int]:
    """The published sequential generator, in Python integers."""
    wrap, state, out = 2**64, seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % wrap
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % wrap
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % wrap
        out.append(z ^ (z >> 31))
    return out


def test_uniform_is_split_mix_64_read_at_an_index() -> None:
    # The first outputs for seed 1234567 are published test vectors of SplitMix64.
    expected = split_mix_64(1234567, 5)
    assert expected[:2] == [6457827717110365317, 3203168211198807973]
    draws = RowGenerator(keys=torch.tensor([1234567])).uniform(5)[0]
    assert [int(u * 2**52) for u in draws.tolist()] == [value >> 12 for value in expected]


def test_every_device_gives_the_same_numbers() -> None:
    """On a CPU NumPy computes them."""
    keys = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1234567])
    rows = torch.tensor([3, -3, 2**62, 0, 7])

    def numbers(keys: Tensor, rows: Tensor) -> list[Tensor]:
        generator = RowGenerator(keys=keys)
        folded = [generator.fold_in(data) for data in (0, -7, 2**63 - 1, rows, rows[0])]
        folded += [RowGenerator.for_rows(-(2**63), rows), generator.select(rows == 0)]
        return [each.cpu() for one in folded for each in (one.keys, one.uniform(2, 3))]

    device, expected = emulated_device(), numbers(keys, rows)
    with count_waits():
        found = numbers(keys.to(device), rows.to(device))
    for here, there in zip(expected, found, strict=True):
        assert here.dtype == there.dtype
        assert torch.equal(here, there)


def test_mix_is_a_bijection_on_a_sample() -> None:
    values = mix(torch.arange(-50_000, 50_000))
    assert values.unique().numel() == 100_000


def test_uniform_is_uniform_and_rows_and_purposes_are_independent() -> None:
    generator = RowGenerator.for_rows(key_from(3, "test"), torch.arange(400))
    draws = generator.uniform(500)
    assert draws.dtype == torch.float64
    assert float(draws.min()) > 0.0
    assert float(draws.max()) < 1.0
    histogram = np.histogram(draws.numpy(), bins=1000, range=(0, 1))[0]
    assert 0.8 < chi_square(histogram, np.full(1000, draws.numel() / 1000)) < 1.2
    others = [generator.fold_in(1), generator.fold_in(2), RowGenerator(keys=generator.keys + 1)]
    for other in [draws.roll(1, 0), draws.roll(1, 1), *(g.uniform(500) for g in others)]:
        correlation = np.corrcoef(draws.flatten().numpy(), other.flatten().numpy())[0, 1]
        assert abs(correlation) < 5 / draws.numel() ** 0.5


def test_a_row_draws_the_same_in_any_batch() -> None:
    ids = torch.tensor([5, 900, -3, 7])
    whole = RowGenerator.for_rows(11, ids).fold_in(2).uniform(3, 4)
    for row in range(4):
        alone = RowGenerator.for_rows(11, ids[row : row + 1]).fold_in(2).uniform(3, 4)
        assert torch.equal(alone[0], whole[row])
    chosen = RowGenerator.for_rows(11, ids).select(torch.tensor([3, 0])).fold_in(2).uniform(3, 4)
    assert torch.equal(chosen, whole[[3, 0]])


def test_order_of_folding_matters() -> None:
    generator = RowGenerator.for_rows(0, torch.arange(10))
    forth, back = generator.fold_in(1).fold_in(2), generator.fold_in(2).fold_in(1)
    assert not bool((forth.keys == back.keys).any())


def test_strata_cover_the_interval_evenly_and_move_with_the_key() -> None:
    size = 64
    strata = strata_of(key_from(0, 1), torch.arange(size), size)
    cells = (strata * size).long()
    assert sorted(cells.tolist()) == list(range(size))
    assert not torch.equal(strata, strata_of(key_from(0, 2), torch.arange(size), size))
    # A worker that holds every third row has the same strata for them.
    assert torch.equal(strata_of(key_from(0, 1), torch.arange(0, size, 3), size), strata[::3])


def test_permutation_is_the_order_of_the_generators_numbers() -> None:
    for key, n in ((-5, 1000), (2**63 - 1, 77), (key_from(0), 1)):
        numbers = split_mix_64(key % 2**64, n)
        signed = [number - 2**64 * (number >= 2**63) for number in numbers]
        assert permutation(key, n).tolist() == sorted(range(n), key=signed.__getitem__)


def test_permutation_visits_everything_and_every_place_equally() -> None:
    first = [int(permutation(key_from("p", seed), 7)[0]) for seed in range(2100)]
    assert sorted(permutation(5, 1000).tolist()) == list(range(1000))
    observed = np.bincount(first, minlength=7)
    assert chi_square(observed, np.full(7, 300.0)) < 3.7  # 0.1 % point of chi-square with 6 dof / 6
