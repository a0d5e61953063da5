"""What the closed forms, chunking and lazy logits save, against the published formulation.

    python -m benchmarks.speed [--rounds 3] [--only udlm_loss] [--threads N]

The published formulation is written here from its formulas, dense, as the published schedulers and
training scripts compute it: logits at every position, one-hot tensors, Gumbel noise over the
vocabulary at every position in float32, a forward pass at every step. Every pair is first checked
to agree (losses and gradients to 1e-4; samples by their exact distributions on a small vocabulary):
the exit status is 1 where it does not. Then both sides run in turn. Peak memory is that of one call
in a process of its own, above what the process held before. Nothing else should be running on the
machine.

Sources: MDLM (arXiv 2406.07524), UDLM (arXiv 2412.10193), GIDD (arXiv 2503.04482).
"""

import argparse
import copy
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tokendiff.diffusion.interfaces import Denoiser, StepCallback, TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel, ForwardKernel, HybridKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.models.denoiser import TransformersDenoiser
from tokendiff.objectives.mdlm import MDLM
from tokendiff.objectives.token_noise import TokenNoiseDiffusion
from tokendiff.samplers.ancestral import AncestralSampler

VOCAB_SIZE, MASK, WIDTH = 30_522, 103, 256  # BERT's vocabulary and mask
ROWS, LENGTH, GRID = 8, 128, 64
EPS, P_UNIFORM, GAMMA = 1e-3, 0.1, 1.0
_MIB = 2**20


# The published formulation.


def published_noise(process: str, t: Tensor, vocab_size: int, mask: int) -> tuple[Tensor, Tensor]:
    """alpha_t [B, 1, 1] and b_t [B, 1, V], float32; alpha = 1 and b = 0 at t = 0, where the last
    step removes all noise.
    """
    t = t.float()[:, None, None]
    is_mask = torch.zeros(vocab_size)
    is_mask[mask] = 1.0
    spread = (1.0 - is_mask) / (vocab_size - 1)
    if process == "hybrid":
        c = P_UNIFORM / (1.0 - P_UNIFORM) * (4.0 * t * (1.0 - t)) ** (GAMMA / 2.0)
        return (1.0 - t) / (1.0 + c), (t * is_mask + c * spread) / (1.0 + c)
    alpha = torch.where(t > 0.0, 1.0 - (1.0 - EPS) * t, 1.0)
    return alpha, (1.0 - alpha) * (is_mask if process == "absorbing" else spread)


def published_corrupt(process: str, x_0: Tensor, t: Tensor, vocab_size: int, mask: int) -> Tensor:
    """A draw from q_t(. | x_0): a coin and a token for each position; for the hybrid process, of
    the whole distribution.
    """
    if process != "hybrid":
        replaced = torch.rand(x_0.shape) < ((1.0 - EPS) * t.float())[:, None]
        if process == "absorbing":
            return torch.where(replaced, mask, x_0)
        token = torch.randint(0, vocab_size - 1, x_0.shape)
        return torch.where(replaced, token + (token >= mask), x_0)
    alpha, noise = published_noise(process, t, vocab_size, mask)
    q = alpha * functional.one_hot(x_0, vocab_size).float() + noise
    return torch.multinomial(q.flatten(0, 1), 1).view_as(x_0)


def gumbel_argmax(logits: Tensor) -> Tensor:
    gumbel = -torch.log(-torch.log(torch.rand_like(logits).clamp_(min=1e-30)))
    return (logits + gumbel).argmax(-1)


def published_step(process: str, logits: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """x_s [B, L] from logits [B, L, V] and x_t, at times [B]; the logits may be written to."""
    mask = _mask_of(logits.shape[-1])
    logits = logits if process == "absorbing" else logits.clone()
    logits[..., mask] = torch.finfo(logits.dtype).min
    if process == "absorbing":
        alpha_t, alpha_s = (
            published_noise(process, at, logits.shape[-1], mask)[0][..., 0] for at in (t, s)
        )
        is_revealed = torch.rand(x_t.shape) < (alpha_s - alpha_t) / (1.0 - alpha_t)
        return torch.where((x_t == mask) & is_revealed, gumbel_argmax(logits), x_t)
    return gumbel_argmax(published_reverse(process, logits, x_t, s, t).log())


def published_reverse(process: str, logits: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """[B, L, V]: q_{t|s}(x_t | .) q_s(. | x_theta), normalised."""
    size = logits.shape[-1]
    belief = logits.softmax(-1)
    alpha_t, noise_t = published_noise(process, t, size, _mask_of(size))
    alpha_s, noise_s = published_noise(process, s, size, _mask_of(size))
    noise_ts = (noise_t - alpha_t / alpha_s * noise_s).clamp(min=0.0)
    at_z = noise_ts.expand(-1, x_t.shape[1], -1).gather(-1, x_t[..., None])
    joint = alpha_t / alpha_s * functional.one_hot(x_t, size) + at_z
    joint = joint * (alpha_s * belief + noise_s)
    joint = joint.clamp(min=torch.finfo(joint.dtype).tiny)
    return joint / joint.sum(-1, keepdim=True)


def published_udlm_nats(logits: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """[B, L]: UDLM's eq. 18, over the K = V - 1 ids that are not the mask.

    alpha'/(K alpha) [ K/xbar(z) - K/xbar_theta(z)
                       - sum_j xbar(j)/xbar(z) ln(xbar_theta(z) xbar(j) / (xbar_theta(j) xbar(z))) ]
    """
    size, mask = logits.shape[-1], _mask_of(logits.shape[-1])
    logits = logits.clone()
    logits[..., mask] = torch.finfo(logits.dtype).min
    belief, one_hot = logits.softmax(-1), functional.one_hot(x_0, size)
    alpha = (1.0 - (1.0 - EPS) * t)[:, None, None].to(logits.dtype)
    num_ids = size - 1
    bar = num_ids * alpha * one_hot + (1.0 - alpha)
    bar_theta = num_ids * alpha * belief + (1.0 - alpha)
    bar_z, theta_z = (values.gather(-1, x_t[..., None]) for values in (bar, bar_theta))
    terms = bar / bar_z * ((theta_z * bar) / (bar_theta * bar_z)).log()
    is_id = torch.arange(size) != mask
    bracket = num_ids / bar_z - num_ids / theta_z - (terms * is_id).sum(-1, keepdim=True)
    return (-(1.0 - EPS) / (num_ids * alpha) * bracket)[..., 0]


def published_hybrid_nats(logits: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """[B, L]: GIDD's eq. 9, r_t(z)/q_t(z | x_0) [KL(q_t(. | x_0) || q_t(. | x_theta)) + rho - ln
    rho - 1], with the rate r_t = (1[m] / (1 - t) + (c_t' + c_t / (1 - t)) u) / C_t.
    """
    size, mask = logits.shape[-1], _mask_of(logits.shape[-1])
    logits = logits.clone()
    logits[..., mask] = torch.finfo(logits.dtype).min
    alpha, noise = (value.to(logits.dtype) for value in published_noise("hybrid", t, size, mask))
    q = alpha * functional.one_hot(x_0, size) + noise
    q_theta = alpha * logits.softmax(-1) + noise
    divergence = (q * (q.log() - q_theta.log())).sum(-1)
    q_z, theta_z = (values.gather(-1, x_t[..., None])[..., 0] for values in (q, q_theta))
    time = t[:, None].to(logits.dtype)
    c = P_UNIFORM / (1.0 - P_UNIFORM) * (4.0 * time * (1.0 - time)) ** (GAMMA / 2.0)
    c_prime = GAMMA / 2.0 * c * (1.0 - 2.0 * time) / (time * (1.0 - time))
    rate = torch.where(x_t == mask, 1.0 / (1.0 - time), (c_prime + c / (1.0 - time)) / (size - 1))
    rho = q_z / theta_z
    return rate / (1.0 + c) / q_z * (divergence + rho - rho.log() - 1.0)


def _mask_of(vocab_size: int) -> int:
    return MASK if vocab_size == VOCAB_SIZE else 1


# What is compared.


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two sides of a comparison: functions that return the seconds of each line of the table.

    Attributes:
        rows: names of these lines, and the ratio wanted, where there is one.
        check: raises AssertionError where the two do not agree.
        memory_target: ratio of peak memory that is wanted; 0 prints it without one; None leaves
            memory out.
    """

    rows: dict[str, float | None]
    published: Callable[[], list[float]]
    ours: Callable[[], list[float]]
    check: Callable[[], None]
    memory_target: float | None = None


def timed(call: Callable[[], Any], *, times: int = 1) -> list[float]:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return [(time.perf_counter() - start) / times]


def make_kernel(process: str, vocab_size: int = VOCAB_SIZE) -> ForwardKernel:
    mask = _mask_of(vocab_size)
    if process == "hybrid":
        return HybridKernel(
            vocab_size=vocab_size, mask_token_id=mask, p_uniform=P_UNIFORM, gamma=GAMMA
        )
    schedule = LogLinear(eps=EPS)
    if process == "uniform":
        return UniformKernel(schedule=schedule, vocab_size=vocab_size, mask_token_id=mask)
    return AbsorbingKernel(schedule=schedule, mask_token_id=mask)


def generator_of(rows: int, key: int = 0) -> RowGenerator:
    strata = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    return RowGenerator.for_rows(key, torch.arange(rows), strata=strata)


def clean_tokens(rows: int) -> Tensor:
    return torch.randint(MASK + 1, VOCAB_SIZE, (rows, LENGTH))


@dataclass
class _GivenHidden:
    """A denoiser of which the encoder is left out."""

    hidden: Tensor
    head: nn.Linear
    is_time_conditioned: bool = False

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        return self.hidden


def loss_pair(process: str, rows: int, time_target: float | None, memory_target: float) -> Pair:
    """Hidden states and a linear head to the loss, and the gradients of both."""
    torch.manual_seed(0)
    objective = TokenNoiseDiffusion(kernel=make_kernel(process))
    published_nats = published_udlm_nats if process == "uniform" else published_hybrid_nats
    x_0, draws = clean_tokens(rows), generator_of(rows)
    t, slope = objective.kernel.warped_time(draws.stratified(), min_time=objective.min_time)
    batch = TokenBatch(tokens=x_0, is_valid=torch.ones_like(x_0, dtype=torch.bool))
    x_t = objective.kernel.corrupt(
        x_0, t, uniform=draws.uniform(LENGTH), is_noisable=batch.is_valid
    )
    hidden = torch.randn(rows, LENGTH, WIDTH, requires_grad=True)
    head = nn.Linear(WIDTH, VOCAB_SIZE)
    model = _GivenHidden(hidden, head)

    def gradients(loss: Tensor) -> list[Tensor]:
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, head.weight, head.bias])]

    def published() -> list[Tensor]:
        nats = published_nats(head(hidden), x_0, x_t, t)
        return gradients((slope[:, None].float() * nats).sum() / x_0.numel())

    def ours() -> list[Tensor]:
        output = objective.loss_at(model, batch, x_t, t, slope)
        return gradients(output.loss_sum / output.num_tokens)

    name = {"uniform": "udlm", "hybrid": "hybrid"}[process]
    return Pair(
        rows={f"{name} loss": time_target},
        published=lambda: timed(published),
        ours=lambda: timed(ours),
        check=lambda: assert_close(published(), ours()),
        memory_target=memory_target,
    )


def make_bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config)


def mdlm_pair(rows: int) -> Pair:
    """A whole training step: forward, backward, AdamW."""
    bert = make_bert()
    twin = copy.deepcopy(bert)
    model = TransformersDenoiser(twin, vocab_size=VOCAB_SIZE)
    kernel = AbsorbingKernel(schedule=LogLinear(eps=EPS), mask_token_id=MASK)
    objective = MDLM(kernel=kernel)
    x_0, draws = clean_tokens(rows), generator_of(rows)
    is_valid = torch.ones_like(x_0, dtype=torch.bool)
    batch = TokenBatch(tokens=x_0, is_valid=is_valid)
    span = 1.0 - objective.min_time
    t = objective.min_time + span * draws.stratified()
    x_t = kernel.corrupt(x_0, t, uniform=draws.uniform(LENGTH), is_noisable=is_valid)

    def published_loss() -> Tensor:
        logits = bert(input_ids=x_t).logits
        logits = logits.index_fill(-1, torch.tensor([MASK]), torch.finfo(logits.dtype).min)
        nll = functional.cross_entropy(logits.transpose(1, 2), x_0, reduction="none")
        weight = (span * (1.0 - EPS) / ((1.0 - EPS) * t)).float()[:, None] * (x_t == MASK)
        return (weight * nll).sum() / x_0.numel()

    def our_loss() -> Tensor:
        output = objective.loss_at(model, batch, x_t, t)
        return output.loss_sum / output.num_tokens

    def step(loss_of: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    def check() -> None:
        sides = []
        for loss_of, module in ((published_loss, bert), (our_loss, twin)):
            loss = loss_of()
            loss.backward()
            # As one vector: of some parameters (attention's key bias) the gradient is zero but for
            # rounding.
            gradients = torch.cat([p.grad.flatten() for p in module.parameters()])
            sides.append([loss.detach(), gradients])
        assert_close(*sides)

    published_optimizer, our_optimizer = (torch.optim.AdamW(m.parameters()) for m in (bert, twin))
    return Pair(
        rows={"mdlm step": 1.8},
        published=lambda: timed(lambda: step(published_loss, published_optimizer)),
        ours=lambda: timed(lambda: step(our_loss, our_optimizer)),
        check=check,
        memory_target=0,
    )


def corrupt_pair(process: str, rows: int, target: float | None) -> Pair:
    torch.manual_seed(0)
    kernel, x_0 = make_kernel(process), clean_tokens(rows)
    t = generator_of(rows).stratified()
    is_noisable = torch.ones_like(x_0, dtype=torch.bool)

    def ours(kernel: ForwardKernel, x_0: Tensor, t: Tensor, is_noisable: Tensor) -> Tensor:
        uniform = generator_of(len(x_0)).uniform(x_0.shape[1])
        return kernel.corrupt(x_0, t, uniform=uniform, is_noisable=is_noisable)

    def check() -> None:
        size, small = 12, torch.full((20_000, 4), 5)
        t = torch.full((len(small),), 0.4, dtype=torch.float64)
        alpha, noise = published_noise(process, t[:1], size, _mask_of(size))
        exact = alpha[0, 0] * functional.one_hot(torch.tensor(5), size) + noise[0, 0]
        assert_frequencies(published_corrupt(process, small, t, size, _mask_of(size)), exact)
        assert_frequencies(ours(make_kernel(process, size), small, t, small == 5), exact)

    published = partial(published_corrupt, process, x_0, t, VOCAB_SIZE, MASK)
    return Pair(
        rows={f"{process} corrupt": target},
        published=lambda: timed(published, times=1 if process == "hybrid" else 20),
        ours=lambda: timed(lambda: ours(kernel, x_0, t, is_noisable), times=20),
        check=check,
    )


@dataclass
class _GivenLogits:
    """A denoiser whose logits [L, V] are there already, and depend on the position alone."""

    logits: Tensor
    is_time_conditioned: bool = False

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        return torch.arange(tokens.shape[1]).expand(len(tokens), -1)[..., None]

    def head(self, hidden: Tensor) -> Tensor:
        return self.logits[hidden[:, 0]]


def sample_ours(
    process: str,
    model: Denoiser,
    shape: tuple[int, int],
    *,
    steps: int,
    vocab_size: int = VOCAB_SIZE,
    on_step: StepCallback | None = None,
) -> Tensor:
    sampler = AncestralSampler(kernel=make_kernel(process, vocab_size), num_inference_steps=steps)
    empty = torch.zeros(shape, dtype=torch.int64)
    return sampler.sample(
        model, empty, empty.bool(), generator_of(shape[0]), on_step=on_step
    ).tokens


@torch.no_grad()
def sample_published(
    process: str,
    logits_of: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    *,
    steps: int,
    vocab_size: int = VOCAB_SIZE,
    on_step: StepCallback = lambda time, x_t: None,
) -> Tensor:
    """The published loop: all logits and a dense step, at every step of the grid."""
    mask = _mask_of(vocab_size)
    x_t = torch.full(shape, mask)
    if process == "uniform":
        x_t = torch.randint(0, vocab_size - 1, shape)
        x_t = x_t + (x_t >= mask)
    on_step(1.0, x_t)
    times = torch.linspace(1.0, 0.0, steps + 1)
    for t, s in times.unfold(0, 2, 1):
        x_t = published_step(process, logits_of(x_t), x_t, s.expand(shape[0]), t.expand(shape[0]))
        on_step(float(s), x_t)
    return x_t


def check_sampling(process: str) -> None:
    """Both loops against the exact distribution after every step, with one belief throughout."""
    size, steps, shape = 12, 8, (20_000, 2)
    torch.manual_seed(0)
    logits = torch.randn(size)
    without_mask = logits.index_fill(0, torch.tensor([_mask_of(size)]), -torch.inf)
    published_steps: list[Tensor] = []
    our_steps: list[Tensor] = []
    sample_published(
        process,
        lambda x_t: logits.repeat(*x_t.shape, 1),
        shape,
        steps=steps,
        vocab_size=size,
        on_step=lambda time, x_t: published_steps.append(x_t),
    )
    sample_ours(
        process,
        _GivenLogits(logits.expand(shape[1], size)),
        shape,
        steps=steps,
        vocab_size=size,
        on_step=lambda time, x_t: our_steps.append(x_t),
    )
    one = torch.ones(1)
    alpha, noise = published_noise(process, one, size, _mask_of(size))
    exact = noise[0, 0] / (1.0 - alpha[0, 0])
    every_id = torch.arange(size)[None]
    wide = without_mask.expand(1, size, size)
    times = torch.linspace(1.0, 0.0, steps + 1)
    for index, (t, s) in enumerate(times.unfold(0, 2, 1)):
        step = published_reverse(process, wide, every_id, s[None], t[None])[0]
        exact = exact @ step
        assert_frequencies(published_steps[index + 1], exact)
        assert_frequencies(our_steps[index + 1], exact)


def step_pair(process: str, rows: int, target: float) -> Pair:
    """One reverse step of a grid of 64, the model left out: what the dense one takes does not
    depend on the time, what ours takes does.
    """
    torch.manual_seed(0)
    logits = torch.randn(LENGTH, VOCAB_SIZE)
    wide = logits.expand(rows, -1, -1).contiguous()
    kernel, x_0 = make_kernel(process), clean_tokens(rows)
    t = torch.full((rows,), 0.5, dtype=torch.float64)
    uniform = generator_of(rows).uniform(LENGTH)
    x_t = kernel.corrupt(x_0, t, uniform=uniform, is_noisable=torch.ones_like(x_0).bool())

    def published() -> list[float]:
        return timed(lambda: published_step(process, wide, x_t, t - 1.0 / GRID, t)) * 2

    def ours() -> list[float]:
        marks: list[float] = []
        sample_ours(
            process,
            _GivenLogits(logits),
            (rows, LENGTH),
            steps=GRID,
            on_step=lambda time_reached, x_t: marks.append(time.perf_counter()),
        )
        half = GRID // 2
        return [marks[half + 1] - marks[half], (marks[-1] - marks[0]) / GRID]

    return Pair(
        rows={f"{process} step, t = 1/2": target, f"{process} step, mean of {GRID}": target},
        published=published,
        ours=ours,
        check=lambda: check_sampling(process),
        memory_target=0,
    )


def run_pair(process: str, rows: int, steps: int, target: float) -> Pair:
    """A whole sampling run with a BERT."""
    bert = make_bert().eval()
    model, shape = TransformersDenoiser(bert, vocab_size=VOCAB_SIZE), (rows, LENGTH)
    return Pair(
        rows={f"{process} run, {rows} x {LENGTH}, {steps} steps": target},
        published=lambda: timed(
            lambda: sample_published(
                process, lambda x_t: bert(input_ids=x_t).logits, shape, steps=steps
            )
        ),
        ours=lambda: timed(lambda: sample_ours(process, model, shape, steps=steps)),
        check=lambda: check_sampling(process),
    )


# How it is compared.


def assert_close(published: list[Tensor], ours: list[Tensor]) -> None:
    """Each tensor to 1e-4 of its largest entry."""
    for expected, value in zip(published, ours, strict=True):
        error = float((value - expected).abs().max() / expected.abs().max())
        assert error < 1e-4, f"values or gradients differ by {error:.1e} of the largest"


def assert_frequencies(tokens: Tensor, exact: Tensor) -> None:
    """Tokens, all of them independent, within 5 standard errors of their distribution [V]."""
    counts = tokens.flatten().bincount(minlength=len(exact)).double()
    share, exact = counts / counts.sum(), exact.double()
    error = (exact * (1.0 - exact).clamp(min=0.0) / counts.sum()).sqrt()
    # The dense one is float32, and keeps a tiny probability where there is none.
    is_off = (share - exact).abs() > 5.0 * error + 1e-6
    assert not bool(is_off.any()), f"frequencies {share.tolist()}, exact {exact.tolist()}"


PAIRS: dict[str, Callable[[int], Pair]] = {
    "udlm_loss": partial(loss_pair, "uniform", time_target=3.0, memory_target=10.0),
    "hybrid_loss": partial(loss_pair, "hybrid", time_target=None, memory_target=0.0),
    "mdlm_step": mdlm_pair,
    # The published forms of these two have no tensor over the vocabulary either; what ours takes is
    # drawing each row's randomness from the row's own key.
    "absorbing_corrupt": partial(corrupt_pair, "absorbing", target=None),
    "uniform_corrupt": partial(corrupt_pair, "uniform", target=None),
    "hybrid_corrupt": partial(corrupt_pair, "hybrid", target=8.0),
    "absorbing_step": partial(step_pair, "absorbing", target=100.0),
    "uniform_step": partial(step_pair, "uniform", target=8.0),
    "hybrid_step": partial(step_pair, "hybrid", target=8.0),
    "absorbing_run": lambda rows: run_pair("absorbing", 4, 64, target=6.0),
    "uniform_run": lambda rows: run_pair("uniform", 2, 24, target=2.5),
    "hybrid_run": lambda rows: run_pair("hybrid", 2, 24, target=2.5),
}


def peak_memory(name: str, side: str, threads: int) -> int:
    """Bytes that one call takes at most, beyond what is held before it."""
    # glibc gives every tensor back as soon as it is freed, and what is resident is what is in use.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(_MIB)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure_peak, args=(name, side, threads, queue))
    process.start()
    peak: int = queue.get()
    process.join()
    return peak


def _measure_peak(name: str, side: str, threads: int, queue: Any) -> None:
    torch.set_num_threads(threads)
    getattr(PAIRS[name](1), side)()  # loads what libraries load at their first call
    pair = PAIRS[name](ROWS)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = _status_bytes("VmRSS")
    getattr(pair, side)()
    queue.put(_status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "see proc(5)"
    return 1024 * int(found[1])


def _line(name: str, published: str, ours: str, ratio: str, target: float | None) -> str:
    wanted = f">= {target:g}" if target else "-"
    return f"{name:34}{published:>24}{ours:>24}{ratio:>24}{wanted:>9}"


def _spread(values: list[float]) -> str:
    middle, low, high = (
        f"{value:.0f}" if value >= 100.0 else f"{value:.3g}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low}..{high})"


def compare(name: str, rounds: int, threads: int) -> list[str]:
    """Lines of the table: one per row of the pair, and one for memory where it is measured."""
    pair = PAIRS[name](ROWS)
    seconds = []
    for _ in range(rounds):
        seconds.append((pair.published(), pair.ours()))
    lines = []
    for index, (row, target) in enumerate(pair.rows.items()):
        published, ours = (
            [1e3 * side[index] for side in sides] for sides in zip(*seconds, strict=True)
        )
        ratios = [a / b for a, b in zip(published, ours, strict=True)]
        lines.append(_line(row, _spread(published), _spread(ours), _spread(ratios), target))
    if pair.memory_target is not None and Path("/proc/self/clear_refs").exists():
        peaks = [peak_memory(name, side, threads) for side in ("published", "ours")]
        before, after = (f"{peak / _MIB:.0f} MiB" for peak in peaks)
        ratio = f"{peaks[0] / max(peaks[1], 1):.1f}"
        lines.append(_line("  peak memory", before, after, ratio, pair.memory_target))
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"V = {VOCAB_SIZE:,}, {ROWS} x {LENGTH} tokens, {args.threads} torch threads")
    lines = [
        f"{'median (min..max)':34}{'published, ms':>24}{'ours, ms':>24}{'ratio':>24}{'target':>9}"
    ]
    broken = []
    for name in args.only:
        try:
            PAIRS[name](ROWS).check()
        except AssertionError as error:
            broken.append(f"{name}: the two sides do not agree: {error}")
            print(broken[-1], flush=True)
            continue
        new = compare(name, args.rounds, args.threads)
        print("\n".join(new), flush=True)
        lines += new
    print("", *lines, *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
