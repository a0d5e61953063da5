"""One checkpoint against slow and plain ways to the same: what `jobs.evaluate --verify` certifies
of a model. In float64, where what a batch or a cache does to rounding is far below every tolerance.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.kernels import ForwardKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.models.checkpoints import load_for_inference
from tokendiff.objectives.chunked import (
    negative_log_likelihood,
    reduce_through_head,
    without_mask,
)
from tokendiff.samplers.ancestral import MOVE, NOISE, TOKEN, AncestralSampler
from tokendiff.samplers.base import Predictor
from tokendiff.verification import oracles
from tokendiff.verification.block_checkpoints import LoadedBlockCheckpoint, block_rules
from tokendiff.verification.certificate import CHECKPOINT, Check, Rule, apply, rule
from tokendiff.verification.installed_code import closed_form_loss, loss_distance

NUM_ROWS, MAX_TOKENS = 4, 32  # of the data
_SAMPLED_TOKENS, _SAMPLER_STEPS = 8, 16  # so few tokens that some steps change nothing
_STEPS = ((0.4, 0.5), (0.1, 0.9), (0.0, 0.2))  # s, t
_CHUNK_TOKENS = 3


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """
    Attributes:
        model: a TransformersDenoiser in float64, on the CPU.
        tokens, lengths: [N, L] rows of text, and [N] where their padding begins.
    """

    process: NoiseProcess
    model: Any
    tokens: Tensor
    lengths: Tensor

    @cached_property
    def kernel(self) -> ForwardKernel:
        return self.process.kernel()

    @cached_property
    def fields(self) -> dict[str, Any]:
        return asdict(self.process)

    @cached_property
    def batch(self) -> TokenBatch:
        is_valid = torch.arange(self.tokens.shape[1]) < self.lengths[:, None]
        return TokenBatch(tokens=self.tokens, is_valid=is_valid)

    @cached_property
    def is_target(self) -> Tensor:
        """[N, L]; a literal mask in the text is none."""
        return self.batch.is_valid & (self.tokens != self.kernel.mask_token_id)

    @cached_property
    def generator(self) -> RowGenerator:
        return RowGenerator.for_rows(0, torch.arange(len(self.tokens)))

    def noised(self, t: Tensor) -> Tensor:
        uniform = self.generator.uniform(self.tokens.shape[1])
        return self.kernel.corrupt(self.tokens, t, uniform=uniform, is_noisable=self.is_target)

    def logits(self, x_t: Tensor, t: Tensor) -> Tensor:
        """[B, L, V] of the whole batch at once, the mask excluded, as leave-one-out beliefs."""
        hidden = self.model.encode(x_t, self.batch.is_valid, t)
        logits = without_mask(self.model.head(hidden), self.kernel.mask_token_id)
        if self.process.prediction == "posterior":
            flat = self.kernel.loo_logits(
                logits.flatten(0, 1), x_t.flatten(), t.repeat_interleave(x_t.shape[1])
            )
            logits = flat.view_as(logits)
        return logits

    def samples(self, sampler: AncestralSampler, model: Any, rows: Tensor) -> Tensor:
        """The samples of some rows, the first token of every second row being given."""
        tokens = self.tokens[rows, :_SAMPLED_TOKENS]
        is_given = (rows[:, None] % 2 == 1) & (torch.arange(tokens.shape[1]) == 0)
        return sampler.sample(model, tokens, is_given, self.generator.select(rows)).tokens

    @cached_property
    def sampler_fields(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "prediction": self.process.prediction,
            "num_inference_steps": _SAMPLER_STEPS,
        }

    @cached_property
    def own_samples(self) -> Tensor:
        """[N, L] of all rows in one batch."""
        sampler = AncestralSampler(**self.sampler_fields)
        return self.samples(sampler, self.model, torch.arange(len(self.tokens)))


def num_checkpoint_checks(process: NoiseProcess) -> int:
    return len(RULES if process.block_length is None else block_rules(process))


def verify_checkpoint(checkpoint: Path, tokens: np.ndarray, lengths: np.ndarray) -> Iterator[Check]:
    """Every rule for a checkpoint.

    Args:
        tokens, lengths: [N, L] and [N] rows of the data, padded at the right.
    """
    model, _, process = load_for_inference(checkpoint)
    if any(hasattr(module, "gate_up_proj") for module in model.modules()):
        # Products over groups of tokens are not made in float64; one expert's are.
        model.model.set_experts_implementation("eager")
    length = min(MAX_TOKENS, process.max_length)
    loaded = LoadedCheckpoint(
        process=process,
        model=model.double(),
        tokens=torch.as_tensor(tokens)[:NUM_ROWS, :length].long(),
        lengths=torch.as_tensor(lengths)[:NUM_ROWS].clamp(max=length),
    )
    if process.block_length is not None:
        blocks = LoadedBlockCheckpoint(process=process, model=model, batch=loaded.batch)
        yield from apply(block_rules(process), CHECKPOINT, blocks)
        return
    yield from apply(RULES, CHECKPOINT, loaded)


# What is checked.


@rule(
    claim="scheduler_config.json, written and read again; fields that differ",
    oracle="the process as it was read",
    tolerance=0.0,
)
def scheduler_config(loaded: LoadedCheckpoint) -> float:
    with tempfile.TemporaryDirectory() as folder:
        loaded.process.save(Path(folder))
        again = asdict(NoiseProcess.load(Path(folder)))
    return sum(again[name] != value for name, value in loaded.fields.items())


@rule(
    claim="rows of the reverse step from the model's own x_theta sum to 1",
    oracle="1",
    tolerance=1e-9,
)
@torch.no_grad()
def rows_sum(loaded: LoadedCheckpoint) -> float:
    return max(float((rows.sum(-1) - 1.0).abs().max()) for _, _, rows, *_ in _reverse_steps(loaded))


@rule(
    claim="the reverse step from the model's own x_theta; relative",
    oracle="Bayes on chosen pairs of ids",
    tolerance=1e-7,
)
@torch.no_grad()
def reverse(loaded: LoadedCheckpoint) -> float:
    """At each position, for x_s: the noisy and the clean token, the mask, and a few others."""
    worst = 0.0
    process, mask = loaded.fields, loaded.kernel.mask_token_id
    for s, t, rows, belief, x_t in _reverse_steps(loaded):
        for row, believed, z, x in zip(
            rows, belief, x_t.tolist(), loaded.tokens[loaded.is_target].tolist(), strict=True
        ):
            ids = sorted({z, x, mask, 0, process["vocab_size"] - 1, int(believed.argmax())})
            of_ids = believed[ids].numpy()
            expected = oracles.bayes_reverse(
                process, np.append(of_ids, 1.0 - of_ids.sum()), s, t, ids
            )[ids.index(z), :-1]
            error = (row[ids].numpy() - expected) / np.maximum(expected, 1e-30)
            worst = max(worst, float(np.abs(error).max()))
    return worst


@rule(
    claim="the training loss, value and gradient of every parameter; relative",
    oracle="the general formula over all logits",
    tolerance=1e-7,
)
def loss(loaded: LoadedCheckpoint) -> float:
    t = (torch.arange(len(loaded.tokens)) + 0.5).double() / len(loaded.tokens)
    batch, x_t = loaded.batch, loaded.noised(t)
    ours = closed_form_loss(loaded.model, loaded.kernel, batch, x_t, t).loss_sum
    is_target = loaded.is_target
    hidden = loaded.model.encode(x_t, batch.is_valid, t)[is_target]
    logits = without_mask(loaded.model.head(hidden), loaded.kernel.mask_token_id)
    nats = loaded.kernel.nelbo(
        logits.softmax(-1)[:, None],
        batch.tokens[is_target][:, None],
        x_t[is_target][:, None],
        t[is_target.nonzero()[:, 0]],
    )
    expected = nats.sum()
    return loss_distance(ours, expected, _trained(loaded.model))


@rule(
    claim=f"a loss through the head, {_CHUNK_TOKENS} tokens at a time, with gradients; relative",
    oracle="all logits at once",
    tolerance=1e-9,
)
def chunks(loaded: LoadedCheckpoint) -> float:
    t = torch.full((len(loaded.tokens),), 0.5, dtype=torch.float64)
    targets = loaded.tokens[loaded.is_target]

    def loss_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = without_mask(logits, loaded.kernel.mask_token_id)
        nll = negative_log_likelihood(logits, targets)
        return nll.sum(), nll.detach().sum()[None]

    def hidden() -> Tensor:
        states = loaded.model.encode(loaded.noised(t), loaded.batch.is_valid, t)
        return states[loaded.is_target]

    ours, _ = reduce_through_head(
        loaded.model.head, hidden(), (targets,), loss_of, chunk_tokens=_CHUNK_TOKENS
    )
    whole, _ = loss_of(loaded.model.head(hidden()), targets)
    return loss_distance(ours, whole, _trained(loaded.model))


@rule(
    claim="no sample holds a mask, even of a model that predicts nothing else; masks",
    oracle="counting",
    tolerance=0.0,
)
def mask(loaded: LoadedCheckpoint) -> float:
    """Also of a model that predicts the mask everywhere."""
    insistent = AncestralSampler(**loaded.sampler_fields)
    rows = torch.arange(len(loaded.tokens))
    drawn = loaded.samples(insistent, _MaskLover(loaded.model, loaded.kernel.mask_token_id), rows)
    is_new = torch.ones_like(drawn, dtype=torch.bool)
    is_new[1::2, 0] = False  # given, whatever it is
    found = [
        (samples[is_new] == loaded.kernel.mask_token_id).sum()
        for samples in (drawn, loaded.own_samples)
    ]
    return float(sum(found))


@rule(
    claim="given tokens are kept; tokens that changed",
    oracle="the tokens that were given",
    tolerance=0.0,
)
def given(loaded: LoadedCheckpoint) -> float:
    return float((loaded.own_samples[1::2, 0] != loaded.tokens[1::2, 0]).sum())


@rule(
    claim="logits while sampling, hidden states being reused; largest difference",
    oracle="the same logits, computed anew at every step",
    tolerance=1e-5,  # the sampler's logits are float32
)
def cache(loaded: LoadedCheckpoint) -> float:
    differences: list[float] = []
    watched = _WatchedSampler(model=loaded.model, differences=differences, **loaded.sampler_fields)
    loaded.samples(watched, loaded.model, torch.arange(len(loaded.tokens)))
    return max(differences)


@rule(
    claim="samples with positions and rows skipped; tokens that differ",
    oracle="the same draws, everything computed anew at every step",
    tolerance=0.0,
)
def skipping(loaded: LoadedCheckpoint) -> float:
    plain = _EverythingEveryStep(model=loaded.model, **loaded.sampler_fields)
    samples = loaded.samples(plain, loaded.model, torch.arange(len(loaded.tokens)))
    return float((samples != loaded.own_samples).sum())


@rule(
    claim="hidden states of a row in a padded batch; relative",
    oracle="the row alone, without padding",
    tolerance=1e-9,
)
@torch.no_grad()
def padding(loaded: LoadedCheckpoint) -> float:
    t = torch.full((len(loaded.tokens),), 0.5, dtype=torch.float64)
    x_t = loaded.noised(t)
    # All but one row made shorter, so that there is padding, whatever the rows.
    lengths = loaded.lengths.clone()
    lengths[1:] = (lengths[1:] + 1) // 2
    is_valid = torch.arange(x_t.shape[1]) < lengths[:, None]
    together = loaded.model.encode(x_t, is_valid, t)
    worst = 0.0
    for row, length in enumerate(lengths.tolist()):
        alone = loaded.model.encode(
            x_t[row : row + 1, :length], torch.ones(1, length).bool(), t[row : row + 1]
        )
        distance = (together[row, :length] - alone[0]).abs().max()
        worst = max(worst, float(distance / alone.abs().max()))
    return worst


@rule(
    claim="samples of a row in a batch; tokens that differ",
    oracle="the row alone",
    tolerance=0.0,
)
def alone(loaded: LoadedCheckpoint) -> float:
    sampler = AncestralSampler(**loaded.sampler_fields)
    rows = [
        loaded.samples(sampler, loaded.model, torch.tensor([row]))
        for row in range(len(loaded.tokens))
    ]
    return float((torch.cat(rows) != loaded.own_samples).sum())


RULES: tuple[Rule[LoadedCheckpoint], ...] = (
    scheduler_config,
    rows_sum,
    reverse,
    loss,
    chunks,
    mask,
    given,
    cache,
    skipping,
    padding,
    alone,
)


# Helpers.


def _reverse_steps(
    loaded: LoadedCheckpoint,
) -> Iterator[tuple[float, float, Tensor, Tensor, Tensor]]:
    """(s, t, rows [n, V] of the reverse step, x_theta [n, V], x_t [n]) at the targets."""
    at = loaded.is_target
    for s, t in _STEPS:
        times = torch.full((len(loaded.tokens),), t, dtype=torch.float64)
        x_t = loaded.noised(times)
        x_theta = loaded.logits(x_t, times).softmax(-1)
        rows = loaded.kernel.reverse(x_theta, x_t, s=torch.full_like(times, s), t=times)
        yield s, t, rows[at], x_theta[at], x_t[at]


def _trained(model: Any) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class _WatchedPredictor(Predictor):
    """Computes anew whatever it is asked for, and notes by how much the other differs."""

    def __init__(self, sampler: "_WatchedSampler", watched: Predictor) -> None:
        super().__init__(sampler, sampler.model, watched.is_given)
        self._watched, self._differences = watched, sampler.differences

    def logits(
        self, x_t: Tensor, is_needed: Tensor, time: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        pairs = zip(
            self._watched.logits(x_t, is_needed, time),
            super().logits(x_t, is_needed, time),
            strict=True,
        )
        for watched, anew in pairs:
            # Equal infinities have no difference.
            difference = torch.where(watched[2] == anew[2], 0.0, watched[2] - anew[2])
            self._differences.append(float(difference.abs().max()))
            yield watched


@dataclass(frozen=True, kw_only=True)
class _WatchedSampler(AncestralSampler):
    model: Any
    differences: list[float]

    def _step(
        self,
        x_t: Tensor,
        is_open: Tensor,
        predictor: Predictor,
        generator: RowGenerator,
        *,
        s: Tensor,
        t: Tensor,
    ) -> Tensor:
        watched = _WatchedPredictor(self, predictor)
        return super()._step(x_t, is_open, watched, generator, s=s, t=t)


class _MaskLover:
    """The model, but sure that every token is the mask."""

    def __init__(self, model: Any, mask_token_id: int) -> None:
        self.encode, self._head, self._mask = model.encode, model.head, mask_token_id
        self.is_time_conditioned = model.is_time_conditioned

    def head(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden).clone()
        logits[:, self._mask] = 1e3
        return logits


@dataclass(frozen=True, kw_only=True)
class _EverythingEveryStep(AncestralSampler):
    """The draws of the ancestral sampler, the belief being computed anew at every position."""

    model: Any

    def _step(
        self,
        x_t: Tensor,
        is_open: Tensor,
        predictor: Predictor,
        generator: RowGenerator,
        *,
        s: Tensor,
        t: Tensor,
    ) -> Tensor:
        move, token, noise = (
            generator.fold_in(purpose).uniform(x_t.shape[1]) for purpose in (MOVE, TOKEN, NOISE)
        )
        everywhere = torch.ones_like(is_open)
        fresh = Predictor(self, self.model, predictor.is_given)
        parts = list(fresh.logits(x_t, everywhere, t.expand(len(x_t))))
        logits = torch.cat([part for _, _, part in parts])
        x_theta = logits.double().softmax(-1)
        belief = x_theta.gather(-1, x_t.view(-1, 1)).view(x_t.shape)
        to_clean, to_noise = self.kernel.move_probability(x_t, belief, s=s, t=t)
        drawn = self._draw(logits, token.flatten()).view(x_t.shape)
        moved = torch.where(move < to_clean + to_noise, self.kernel.draw_noise(s, noise), x_t)
        return torch.where(is_open, torch.where(move < to_clean, drawn, moved), x_t)
