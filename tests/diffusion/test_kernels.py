"""Schedules and the kernel family, against brute force over a small vocabulary, in float64."""

import itertools

import numpy as np
import pytest
import torch

from tokendiff.diffusion.kernels import (
    LEAST_TIME,
    AbsorbingKernel,
    ForwardKernel,
    HybridKernel,
    UniformKernel,
)
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import (
    Cosine,
    Geometric,
    Linear,
    LogLinear,
    NoiseSchedule,
    make_schedule,
)
from tokendiff.verification.oracles import chi_square, entropy, leave_one_out, toy_language

V, L, MASK = 4, 3, 2
SCHEDULES: list[NoiseSchedule] = [LogLinear(), Linear(), Cosine(), Geometric()]


def uniform(schedule: NoiseSchedule, *, exclude_mask: bool = True) -> UniformKernel:
    return UniformKernel(
        schedule=schedule, vocab_size=V, mask_token_id=MASK, exclude_mask=exclude_mask
    )


def hybrid(p_uniform: float, gamma: float) -> HybridKernel:
    return HybridKernel(vocab_size=V, mask_token_id=MASK, p_uniform=p_uniform, gamma=gamma)


KERNELS: dict[str, ForwardKernel] = {
    "absorbing": AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK),
    "absorbing-cosine": AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK),
    "uniform": uniform(LogLinear()),
    "uniform-geometric": uniform(Geometric()),
    "uniform-with-mask": uniform(Cosine(), exclude_mask=False),
    "hybrid": hybrid(0.2, 1.0),
    "hybrid-gamma-2": hybrid(0.5, 2.0),
    "hybrid-gamma-half": hybrid(0.1, 0.5),
    "hybrid-early-noise": hybrid(0.9, 0.4),
}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)


def scalar(t: float) -> torch.Tensor:
    return torch.tensor([t], dtype=torch.float64)


def forward_matrix(kernel: ForwardKernel, t: float) -> torch.Tensor:
    """[V, V]: row x is q_t(. | x)."""
    one_hot = torch.eye(V, dtype=torch.float64)[None]
    return kernel.marginal(one_hot, scalar(t))[0]


def transition_matrix(kernel: ForwardKernel, s: float, t: float) -> torch.Tensor:
    """[V, V]: row y is q_{t|s}(. | y)."""
    alpha, noise = kernel.transition(scalar(s), scalar(t))
    row = torch.full((V,), float(noise.token), dtype=torch.float64)
    row[MASK] = noise.mask
    return alpha * torch.eye(V, dtype=torch.float64) + row


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_alpha_prime_is_the_derivative_and_the_ends_are_right(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.alpha_prime(t), derivative, rtol=1e-10, atol=1e-12)
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert 1.0 - 2e-3 <= float(ends[0]) <= 1.0
    assert 0.0 < float(ends[1]) <= 2e-3
    assert bool((schedule.alpha(t).diff() < 0).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_time_inverts_alpha_and_stops_at_the_ends(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0.0, 1.0, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.time(schedule.alpha(t)), t, rtol=0, atol=1e-9)
    beyond = schedule.time(torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(beyond, torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_bad_parameters_are_refused() -> None:
    for make in (
        lambda: LogLinear(eps=0.0),
        lambda: Cosine(eps=0.5),
        lambda: Geometric(sigma_min=2.0, sigma_max=1.0),
        lambda: make_schedule("sigmoid", eps=0.1, sigma_min=0.1, sigma_max=1.0),
        lambda: AbsorbingKernel(schedule=LogLinear(), mask_token_id=-1),
        lambda: UniformKernel(schedule=LogLinear(), vocab_size=V, mask_token_id=V),
        lambda: UniformKernel(schedule=LogLinear(), vocab_size=1, mask_token_id=0),
        lambda: HybridKernel(vocab_size=V, mask_token_id=-1),
        lambda: hybrid(1.0, 1.0),
        lambda: hybrid(-0.1, 1.0),
        lambda: hybrid(0.1, 0.04),
        lambda: Geometric(sigma_min=1e-9, sigma_max=1.0),
        lambda: Geometric(sigma_min=1e-4, sigma_max=101.0),
        lambda: hybrid(0.1, 2.1),
    ):
        with pytest.raises(ValueError, match=r"must|need"):
            make()


@every_kernel
def test_rows_of_q_sum_to_one_and_derivatives_are_derivatives(kernel: ForwardKernel) -> None:
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    for value, prime in (
        (kernel.alpha(t), kernel.alpha_prime(t)),
        *zip(kernel.noise(t), kernel.noise_prime(t), strict=True),
    ):
        (derivative,) = torch.autograd.grad(value.sum() + 0.0 * t.sum(), t, retain_graph=True)
        torch.testing.assert_close(prime, derivative, rtol=1e-9, atol=1e-12)
    for time in (0.0, 0.3, 1.0):
        q = forward_matrix(kernel, time)
        torch.testing.assert_close(q.sum(1), torch.ones(V, dtype=torch.float64))
        assert bool((q >= 0).all())


@every_kernel
def test_transitions_compose(kernel: ForwardKernel) -> None:
    """Chapman-Kolmogorov: from s over u to t is from s to t, and every step is a distribution."""
    for s, u, t in ((0.05, 0.3, 0.5), (0.3, 0.6, 0.95), (0.7, 0.9, 1.0)):
        through = transition_matrix(kernel, s, u) @ transition_matrix(kernel, u, t)
        torch.testing.assert_close(through, transition_matrix(kernel, s, t))
        from_start = forward_matrix(kernel, s) @ transition_matrix(kernel, s, t)
        torch.testing.assert_close(from_start, forward_matrix(kernel, t))
        assert bool((through >= 0).all())


def test_p_uniform_is_the_uniform_share_at_half_time_and_zero_is_absorbing() -> None:
    for gamma in (0.5, 1.0, 2.0):
        q = forward_matrix(hybrid(0.3, gamma), 0.5)
        # Off the diagonal every id but the mask has 0.3 / (V - 1), the kept one the same again.
        assert float(q[0, 1]) == pytest.approx(0.3 / (V - 1), rel=1e-12)
        none = forward_matrix(hybrid(0.0, gamma), 0.3)
        assert none[0].tolist() == pytest.approx([0.7, 0.0, 0.3, 0.0], abs=1e-12)
    assert float(forward_matrix(uniform(Cosine()), 0.5)[0, MASK]) == 0.0
    with_mask = forward_matrix(uniform(Cosine(), exclude_mask=False), 0.5)
    assert float(with_mask[0, MASK]) == float(with_mask[0, 1]) > 0.0


@every_kernel
def test_corrupt_draws_from_q(kernel: ForwardKernel) -> None:
    times, draws = (0.1, 0.5, 0.9), 20_000
    for x in (0, 3):
        for time in times:
            x_0 = torch.full((1, draws), x)
            is_noisable = torch.arange(draws)[None] < draws - 100
            noise = RowGenerator.for_rows(x, torch.arange(1)).uniform(draws)
            x_t = kernel.corrupt(x_0, scalar(time), uniform=noise, is_noisable=is_noisable)
            assert bool((x_t[~is_noisable] == x).all())
            assert bool((x_0 == x).all())
            counts = np.bincount(x_t[is_noisable], minlength=V)
            expected = forward_matrix(kernel, time)[x].numpy() * (draws - 100)
            possible = expected > 0
            assert counts[~possible].sum() == 0
            # The 0.1 % point of chi-square over its degrees of freedom, 1 to 3.
            limit = {1: 10.83, 2: 6.91, 3: 5.42}[int(possible.sum()) - 1]
            assert chi_square(counts[possible], expected[possible]) < limit


def test_noise_reaches_every_id_of_a_large_vocabulary_and_no_other() -> None:
    for mask in (0, 500, 999):
        kernel = UniformKernel(schedule=LogLinear(), vocab_size=1000, mask_token_id=mask)
        u = (torch.arange(999_000, dtype=torch.float64) + 0.5) / 999_000
        counts = torch.bincount(kernel.draw_noise(scalar(0.4), u), minlength=1000)
        assert int(counts[mask]) == 0
        others = counts[torch.arange(1000) != mask]
        assert int(others.min()) >= 999
        assert int(others.max()) <= 1001
        ends = kernel.draw_noise(scalar(1.0), torch.tensor([1e-300, 1.0 - 2.0**-53]))
        assert ends.tolist() == [int(mask == 0), 998 if mask == 999 else 999]


@every_kernel
def test_reverse_is_bayes_rule_over_all_pairs(kernel: ForwardKernel) -> None:
    """With any belief as the prior of x_0: p(y | z) = sum_x p(x) q_s(y|x) q_{t|s}(z|y) / p(z)."""
    belief = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64)
    for s, t in ((0.2, 0.5), (0.6, 0.7), (0.001, 0.999)):
        joint = torch.zeros(V, V, dtype=torch.float64)  # [y, z]
        for x, y, z in itertools.product(range(V), repeat=3):
            joint[y, z] += (
                belief[x] * forward_matrix(kernel, s)[x, y] * transition_matrix(kernel, s, t)[y, z]
            )
        possible = [z for z in range(V) if joint[:, z].sum() > 0]
        x_t = torch.tensor([possible])
        ours = kernel.reverse(belief.expand(1, len(possible), V), x_t, s=scalar(s), t=scalar(t))[0]
        torch.testing.assert_close(ours.sum(-1), torch.ones(len(possible), dtype=torch.float64))
        for row, z in zip(ours, possible, strict=True):
            torch.testing.assert_close(row, joint[:, z] / joint[:, z].sum(), rtol=1e-9, atol=1e-12)


@every_kernel
def test_the_step_as_a_mixture_is_the_reverse_step(kernel: ForwardKernel) -> None:
    belief = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64)
    for s, t in ((0.2, 0.5), (0.0, 0.3), (0.8, 1.0)):
        possible = (belief @ forward_matrix(kernel, t)).nonzero()[:, 0]
        dense = kernel.reverse(
            belief.expand(1, len(possible), V), possible[None], s=scalar(s), t=scalar(t)
        )[0]
        clean, noise = kernel.move_probability(possible, belief[possible], s=scalar(s), t=scalar(t))
        bound_clean, bound_noise = kernel.move_probability(
            possible, torch.zeros(len(possible)), s=scalar(s), t=scalar(t)
        )
        assert bool((clean <= bound_clean).all() and (noise <= bound_noise + 1e-15).all())
        assert bool((bound_clean + bound_noise <= 1.0 + 1e-12).all())
        alpha_s = kernel.alpha(scalar(s))
        first = torch.eye(V, dtype=torch.float64)[0]
        of_noise = (forward_matrix(kernel, s)[0] - alpha_s * first) / (1.0 - alpha_s)
        if s == 0.0:
            assert bool((noise == 0.0).all())
            of_noise = torch.zeros_like(of_noise)
        stay = 1.0 - clean - noise
        mixture = (
            clean[:, None] * belief
            + noise[:, None] * of_noise
            + stay[:, None] * torch.eye(V, dtype=torch.float64)[possible]
        )
        torch.testing.assert_close(mixture, dense, rtol=1e-9, atol=1e-12)


def test_the_last_step_leaves_no_noise_and_times_are_checked() -> None:
    belief = torch.tensor([0.5, 0.2, 0.0, 0.3], dtype=torch.float64)
    for kernel in (KERNELS["absorbing-cosine"], uniform(Linear(), exclude_mask=False)):
        x_t = torch.tensor([[MASK]])
        row = kernel.reverse(belief.expand(1, 1, V), x_t, s=scalar(0.0), t=scalar(0.3))[0, 0]
        torch.testing.assert_close(row, belief)
        for s, t in ((0.3, 0.3), (0.4, 0.3), (-0.1, 0.3), (0.5, 1.1)):
            with pytest.raises(ValueError, match="s < t"):
                kernel.reverse(belief.expand(1, 1, V), x_t, s=scalar(s), t=scalar(t))


@every_kernel
def test_posterior_is_converted_to_leave_one_out(kernel: ForwardKernel) -> None:
    """Both computed from a joint table over sequences, by enumeration."""
    table = toy_language(V, L, MASK, seed=4)
    q = forward_matrix(kernel, 0.4).numpy()
    for z in itertools.product(range(V), repeat=L):
        joint = np.einsum("abc,a,b,c->abc", table, *(q[:, token] for token in z))
        for i in range(L):
            other = tuple(axis for axis in range(L) if axis != i)
            posterior = joint.sum(other)
            if posterior.sum() <= 0 or (float(q[0, z[i]]) == 0.0 and z[i] != 0):
                continue
            expected = leave_one_out(table, q, z)[i]
            with np.errstate(divide="ignore"):
                logits = torch.tensor(np.log(posterior))[None]
            if float(q[(z[i] + 1) % V, z[i]]) == 0.0:
                continue  # absorbing and not masked: the belief does not matter
            ours = kernel.loo_logits(logits, torch.tensor([z[i]]), scalar(0.4)).softmax(-1)[0]
            assert ours.tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)


def nelbo_of_language(kernel: ForwardKernel, table: np.ndarray, num_times: int) -> float:
    """The bound under the exact leave-one-out denoiser: every row, every noisy sequence, and a fine
    grid of times; with both ends. Nothing is drawn.
    """
    clean = torch.tensor([row for row in itertools.product(range(V), repeat=L) if table[row] > 0])
    noisy = torch.tensor(list(itertools.product(range(V), repeat=L)))
    p = torch.tensor([table[tuple(row)] for row in clean.tolist()])
    x_0 = clean.repeat_interleave(len(noisy), 0)
    x_t = noisy.repeat(len(clean), 1)

    def expectation(q: torch.Tensor, nats: torch.Tensor) -> float:
        weight = p.repeat_interleave(len(noisy)) * q[x_0, x_t].prod(1)
        return float((weight * torch.where(weight > 0, nats.sum(1), 0.0)).sum())

    def beliefs(q: torch.Tensor) -> torch.Tensor:
        exact = leave_one_out(table, q.numpy(), noisy.numpy())
        return torch.tensor(exact).repeat(len(clean), 1, 1)

    total = 0.0
    u = (torch.arange(num_times, dtype=torch.float64) + 0.5) / num_times
    for t, slope in zip(*kernel.warped_time(u), strict=True):
        q = forward_matrix(kernel, float(t))
        nats = kernel.nelbo(beliefs(q), x_0, x_t, t.expand(len(x_0)))
        total += expectation(q, nats) * float(slope) / num_times
    if isinstance(kernel, AbsorbingKernel):
        return total
    q = forward_matrix(kernel, LEAST_TIME)
    belief = beliefs(q)
    of_x_0, of_x_t = (belief.gather(-1, x[..., None])[..., 0] for x in (x_0, x_t))
    total += expectation(
        q, kernel.reconstruction_nats(of_x_0, of_x_t, x_0, x_t, scalar(LEAST_TIME))
    )
    return total + L * kernel.prior_nats()


@pytest.mark.parametrize("name", KERNELS)
def test_nelbo_of_the_exact_denoiser_is_the_entropy(name: str) -> None:
    table = toy_language(V, L, MASK, seed=1)
    bound = nelbo_of_language(KERNELS[name], table, 200)
    # What the tolerance covers: the grid, and an absorbing schedule's alpha_1 = eps. With 5 % of
    # noise before the least time, the last step costs a little: it takes each position by itself.
    slack = 1.2e-2 if name == "hybrid-early-noise" else 4e-3
    assert -4e-3 < bound / entropy(table) - 1.0 < slack


@pytest.mark.parametrize("exclude_mask", [True, False])
def test_the_prior_is_a_part_of_the_bound(exclude_mask: bool) -> None:
    """With 0.3 of the signal left at t = 1 it is far from small: against a sum over all ids."""
    kernel = uniform(LogLinear(eps=0.3), exclude_mask=exclude_mask)
    q = forward_matrix(kernel, 1.0)[0]
    noise = (q - 0.3 * torch.eye(V, dtype=torch.float64)[0]) / 0.7
    expected = sum(float(a * (a / b).log()) for a, b in zip(q, noise, strict=True) if a > 0)
    assert expected > 0.05
    assert kernel.prior_nats() == pytest.approx(expected, rel=1e-12)


def test_the_integrand_is_least_at_the_leave_one_out_posterior() -> None:
    table, other = toy_language(V, L, MASK, seed=1), toy_language(V, L, MASK, seed=9)
    for name in ("uniform", "hybrid"):
        kernel = KERNELS[name]
        q = forward_matrix(kernel, 0.5)
        noisy = torch.tensor(list(itertools.product(range(V), repeat=L)))
        right, wrong = (
            torch.tensor(leave_one_out(mix, q.numpy(), noisy.numpy()))
            for mix in (table, 0.5 * table + 0.5 * other)
        )
        clean = [row for row in itertools.product(range(V), repeat=L) if table[row] > 0]
        losses = []
        for belief in (right, wrong):
            total = 0.0
            for row in clean:
                x_0 = torch.tensor(row).expand(len(noisy), L)
                nats = kernel.nelbo(belief, x_0, noisy, scalar(0.5).expand(len(noisy))).sum(1)
                weight = q[x_0, noisy].prod(1)
                total += table[row] * float((weight * torch.where(weight > 0, nats, 0.0)).sum())
            losses.append(total)
        assert losses[0] < losses[1]


def test_warped_time_covers_the_interval_once() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for kernel in (KERNELS["uniform"], KERNELS["hybrid-gamma-half"], hybrid(0.1, 0.05)):
        for min_time in (0.0, 0.1):
            t, slope = kernel.warped_time(u, min_time=min_time)
            assert float(slope.mean()) == pytest.approx(1.0 - min_time, rel=1e-4)
            assert float((slope * t).mean()) == pytest.approx((1.0 - min_time**2) / 2, rel=1e-4)
            assert float(t.min()) >= min_time
            steps = (slope[1:] + slope[:-1]) / 2e5
            torch.testing.assert_close(t.diff(), steps, rtol=1e-3, atol=1e-8)
        ends, _ = kernel.warped_time(torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert 0.0 < float(ends[0]) < float(ends[1]) < 1.0
        assert bool(torch.isfinite(torch.stack([*kernel.noise_prime(ends)])).all())
