"""Schedules, kernels and random numbers against brute force in plain Python; losses and gradients
in float32 and bfloat16 against float64 on the CPU.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.models import (
    EOS,
    MASK,
    PROVEN,
    batch_of,
    causal_denoiser,
    causal_lm,
    new_draft,
    whole_row_denoiser,
)
from benchmarks.gpu.report import Case, Finding, within
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel, HybridKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import SCHEDULES, Cosine, LogLinear, NoiseSchedule, make_schedule
from tokendiff.models.dflash.trainee import DraftTrainee
from tokendiff.objectives.autoregressive import Autoregressive
from tokendiff.objectives.block_diffusion import BlockDiffusion
from tokendiff.objectives.block_refinement import BlockRefinement
from tokendiff.objectives.chunked import without_mask
from tokendiff.objectives.dflash import DFlash
from tokendiff.objectives.mdlm import MDLM
from tokendiff.objectives.token_noise import TokenNoiseDiffusion
from tokendiff.verification import oracles
from tokendiff.verification.installed_code import closed_form_loss, loss_distance
from tokendiff.verification.toys import MASK as TOY_MASK
from tokendiff.verification.toys import TOYS, VOCAB_SIZE, ToyLanguage

_ROUNDING = 1e-9  # of float64, where the numbers are of the order of 1
_FLOAT32, _BFLOAT16 = 1e-4, 5e-2  # of a loss and of its gradient, relative to their size
_NUM_ROWS, _LENGTH = 4, 32
_STEPS = ((0.2, 0.5), (0.05, 0.95), (0.0, 0.3))  # s, t
_BELIEF = np.array([0.5, 0.2, 0.0, 0.3])
_WORD = 2**64


def cases(machine: Machine) -> Iterator[Case]:
    device = machine.device
    for name in SCHEDULES:
        yield _proof(f"schedule {name}", "its formula; autograd", _schedule, name, device)
    yield _proof("random numbers", "SplitMix64 in Python", _random_numbers, device)
    for name, toy in TOYS.items():
        yield _proof(f"noise {name}", "its definition, V x V", _forward, toy, device)
        yield _proof(f"reverse step {name}", "Bayes, V x V", _reverse, toy, device)
        yield _proof(f"loss {name}", "general formula", _closed_form, toy, device)
    for name in OBJECTIVES:
        for kind in ("fp32", "bf16"):
            against = "float64 on the CPU; gradient too"
            yield _proof(f"objective {name}, {kind}", against, _objective, name, kind, device)


def _proof(name: str, compared: str, run: Any, *arguments: Any) -> Case:
    return Case(name=name, compared=compared, run=partial(run, *arguments), is_proof=True)


def _schedule(name: str, device: torch.device) -> Finding:
    fields = {"eps": 1e-3, "sigma_min": 1e-4, "sigma_max": 20.0}
    schedule: NoiseSchedule = make_schedule(name, **fields)
    process = {"forward_process": "absorbing", "alpha_schedule": name, **fields}
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, device=device, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    at = t.detach()
    by_hand = [oracles.alpha(process, float(x)) for x in at.cpu()]
    scale = 1.0 + float(slope.abs().max())
    return within(
        max(
            distance(alpha, by_hand),
            distance(schedule.alpha_prime(at), slope) / scale,
            distance(schedule.time(alpha.detach()), at),
        ),
        _ROUNDING,
    )


def _random_numbers(device: torch.device) -> Finding:
    keys = torch.tensor([1, -5, 2**62 + 3], device=device)
    ours = RowGenerator(keys=keys).uniform(64).cpu()
    wrong = sum(
        float(ours[row, index]) != _uniform(int(key), index + 1)
        for row, key in enumerate(keys.tolist())
        for index in range(ours.shape[1])
    )
    return within(float(wrong), 0.0)


def _uniform(key: int, index: int) -> float:
    """The number at an index of SplitMix64, from the paper, in integers of any size."""
    z = (key + index * 0x9E3779B97F4A7C15) % _WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _WORD
    z ^= z >> 31
    return ((z >> 12) + 0.5) / 2.0**52


def _forward(toy: ToyLanguage, device: torch.device) -> Finding:
    one_hot = torch.eye(VOCAB_SIZE, dtype=torch.float64, device=device)[None]
    worst = 0.0
    for t in (0.0, 0.1, 0.5, 0.9, 1.0):
        ours = toy.kernel.marginal(one_hot, _times(t, device))[0]
        worst = max(worst, distance(ours, oracles.forward_matrix(toy.fields, t)))
    return within(worst, _ROUNDING)


def _reverse(toy: ToyLanguage, device: torch.device) -> Finding:
    belief = torch.from_numpy(_BELIEF).to(device)
    worst = 0.0
    for s, t in _STEPS:
        expected = oracles.bayes_reverse(toy.fields, _BELIEF, s, t)
        x_t = torch.from_numpy(np.flatnonzero(expected.sum(1))).to(device)
        at = {"s": _times(s, device), "t": _times(t, device)}
        rows = toy.kernel.reverse(belief.expand(1, len(x_t), -1), x_t[None], **at)[0]
        worst = max(worst, distance(rows, expected[x_t.cpu()]))
        # The same step as samplers take it.
        to_clean, to_noise = toy.kernel.move_probability(x_t, belief[x_t], **at)
        stay = torch.nn.functional.one_hot(x_t, VOCAB_SIZE) * (1.0 - to_clean - to_noise)[:, None]
        at_mask, at_token = oracles.noise(toy.fields, s)
        of_noise = torch.full((VOCAB_SIZE,), at_token, dtype=torch.float64, device=device)
        of_noise[TOY_MASK] = at_mask
        share = 1.0 - oracles.alpha(toy.fields, s)
        of_noise /= share if share > 0.0 else 1.0
        moved = to_clean[:, None] * belief + to_noise[:, None] * of_noise + stay
        worst = max(worst, distance(moved, expected[x_t.cpu()]))
    return within(worst, _ROUNDING)


def _closed_form(toy: ToyLanguage, device: torch.device) -> Finding:
    num_rows, length = 32, 2
    generator = RowGenerator.for_rows(0, torch.arange(num_rows, device=device))
    x_0 = toy.clean.to(device)[torch.arange(num_rows, device=device) % len(toy.clean)]
    t = (torch.arange(num_rows, device=device) + 0.5).double() / num_rows
    every = torch.ones_like(x_0).bool()
    x_t = toy.kernel.corrupt(x_0, t, uniform=generator.uniform(length), is_noisable=every)
    logits = generator.fold_in(1).uniform(length, VOCAB_SIZE).mul(4.0).requires_grad_()
    batch = TokenBatch(tokens=x_0, is_valid=every)
    ours = closed_form_loss(_Logits(logits), toy.kernel, batch, x_t, t).loss_sum
    general = toy.kernel.nelbo(without_mask(logits, TOY_MASK).softmax(-1), x_0, x_t, t).sum()
    return within(loss_distance(ours, general, [logits]), 1e-8)


class _Logits:
    """Logits [B, L, V] that stand for a model."""

    is_time_conditioned = False

    def __init__(self, logits: Tensor) -> None:
        self._logits, self.device = logits, logits.device

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        return self._logits

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def kernel_of(kind: str) -> Any:
    """Of the noise of an objective: `hybrid`, `udlm`, or of masks."""
    if kind == "hybrid":
        return HybridKernel(vocab_size=PROVEN.vocab_size, mask_token_id=MASK, p_uniform=0.2)
    if kind == "udlm":
        return UniformKernel(schedule=LogLinear(), vocab_size=PROVEN.vocab_size, mask_token_id=MASK)
    return AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK)


_BLOCKS: dict[str, Any] = {"block_length": 8, "eos_token_id": EOS}
# Name -> (kind of model, objective).
OBJECTIVES: dict[str, tuple[str, Any]] = {
    "mdlm": ("whole", MDLM(kernel=kernel_of("mdlm"), lambda_conf=0.5)),
    "udlm": ("whole", TokenNoiseDiffusion(kernel=kernel_of("udlm"))),
    "hybrid": ("whole", TokenNoiseDiffusion(kernel=kernel_of("hybrid"))),
    "ar": ("causal", Autoregressive()),
    "block_diffusion": ("causal", BlockDiffusion(kernel=kernel_of("mdlm"), **_BLOCKS)),
    "block_diffusion beside ar": (
        "causal",
        BlockDiffusion(kernel=kernel_of("mdlm"), ar_loss_weight=0.5, **_BLOCKS),
    ),
    "block_refinement": (
        "causal",
        BlockRefinement(mask_token_id=MASK, attention_mask_mode="4d", **_BLOCKS),
    ),
    "dflash": ("draft", DFlash(block_size=8, mask_token_id=MASK, num_anchors=6)),
}


def model_for(kind: str, device: Any, dtype: torch.dtype) -> Any:
    """What an objective trains, with the same weights on every device."""
    if kind == "whole":
        return whole_row_denoiser(PROVEN, device, dtype)
    if kind == "causal":
        return causal_denoiser(PROVEN, device, dtype)
    draft = new_draft(PROVEN, device, dtype, block_size=8)
    return DraftTrainee(draft, causal_lm(PROVEN, device, dtype))


def loss_and_gradient(
    model: Any, objective: Any, batch: TokenBatch, *, is_bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """The mean loss, and its gradient as one vector; float64 on the CPU."""
    model.zero_grad()
    ids = torch.arange(len(batch.tokens), device=batch.tokens.device)
    generator = RowGenerator.for_rows(11, ids)
    with torch.autocast(batch.tokens.device.type, dtype=torch.bfloat16, enabled=is_bf16):
        output = objective.loss(model, batch, generator)
    output.loss_sum.backward()
    count = float(output.num_tokens)
    trained = [p for p in model.model.parameters() if p.requires_grad]
    gradient = torch.cat([_gradient_of(p).double().cpu().flatten() for p in trained])
    return output.loss_sum.detach().double().cpu() / count, gradient / count


def _gradient_of(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _objective(name: str, kind: str, device: torch.device) -> Finding:
    model_kind, objective = OBJECTIVES[name]
    sizes = (_NUM_ROWS, _LENGTH, PROVEN.vocab_size)
    exact = loss_and_gradient(
        model_for(model_kind, "cpu", torch.float64), objective, batch_of(*sizes, is_packed=True)
    )
    ours = loss_and_gradient(
        model_for(model_kind, device, torch.float32),
        objective,
        batch_of(*sizes, is_packed=True, device=device),
        is_bf16=kind == "bf16",
    )
    errors = [relative(a, b) for a, b in zip(ours, exact, strict=True)]
    limit = _BFLOAT16 if kind == "bf16" else _FLOAT32
    return within(max(errors), limit, loss=errors[0], gradient=errors[1])


def relative(ours: Tensor, exact: Tensor) -> float:
    """The length of the difference over that of what is exact."""
    a, b = (x.detach().double().cpu() for x in (ours, exact))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def distance(ours: Tensor, expected: Any) -> float:
    """The largest difference."""
    other = torch.as_tensor(expected, dtype=torch.float64).detach().cpu()
    return float((ours.detach().double().cpu() - other).abs().max())


def _times(t: float, device: torch.device) -> Tensor:
    return torch.tensor([t], dtype=torch.float64, device=device)
