"""What `jobs.evaluate --verify` certifies of a checkpoint that decodes block by block: its one pass
over `[x_t ; x_0]` against each block by itself, in float64.
"""

import tempfile
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.attention_masks import (
    block_causal,
    causal,
    causal_by_position,
    causal_up_to,
)
from tokendiff.diffusion.interfaces import LossOutput, TokenBatch
from tokendiff.diffusion.kernels import ForwardKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.evaluation.block_bound import sight_of, target_rows
from tokendiff.models.diffusion_gemma import EncoderDecoder, EncoderDecoderDenoiser
from tokendiff.objectives.autoregressive import Autoregressive
from tokendiff.objectives.block_diffusion import encode_noisy
from tokendiff.objectives.block_refinement import BlockRefinement
from tokendiff.objectives.block_uniform import UniformBlockDiffusion
from tokendiff.objectives.blocks import BlockRows, BlockSight
from tokendiff.objectives.chunked import (
    negative_log_likelihood,
    tempered_entropy,
    without_mask,
)
from tokendiff.verification.certificate import Rule, rule
from tokendiff.verification.installed_code import loss_distance

# transformers normalises in float32 whatever the weights are, so two ways to the same logits agree
# to its digits only.
_FLOAT32 = 1e-4
_LAMBDA, _TEMPERATURE = 0.5, 0.7  # of the confidence term that is checked


@dataclass(frozen=True, kw_only=True)
class _UnderSight(BlockRefinement):
    """Its loss, where positions see what those of any block model do."""

    given: BlockSight

    @property
    def sight(self) -> BlockSight:
        return self.given


@dataclass(frozen=True, kw_only=True)
class LoadedBlockCheckpoint:
    """
    Attributes:
        model: a TransformersCausalDenoiser or EncoderDecoderDenoiser in float64, on the CPU.
        batch: rows of text.
    """

    process: NoiseProcess
    model: Any
    batch: TokenBatch

    @property
    def sight(self) -> BlockSight:
        return sight_of(self.process)

    @cached_property
    def rows(self) -> BlockRows:
        return target_rows(self.batch, self.process)[0]

    @cached_property
    def kernel(self) -> ForwardKernel:
        return self.process.kernel()

    @cached_property
    def generator(self) -> RowGenerator:
        return RowGenerator.for_rows(0, torch.arange(len(self.batch.tokens)))

    @cached_property
    def is_noised(self) -> Tensor:
        """[B, W] half of all targets."""
        is_target = target_rows(self.batch, self.process)[1]
        return is_target & (self.generator.uniform(self.rows.tokens.shape[1]) < 0.5)

    def noised(self, rows: BlockRows, is_noised: Tensor) -> Tensor:
        """[B, W] tokens, with the process's noise in place of some."""
        uniform = self.generator.fold_in(1).uniform(rows.tokens.shape[1])
        noise = self.kernel.draw_noise(torch.ones(()).double(), uniform)
        return torch.where(is_noised, noise[: len(rows.tokens)], rows.tokens)

    def all_logits(self, rows: BlockRows, is_noised: Tensor) -> Tensor:
        """[B, W, V] of one pass."""
        x_t = self.noised(rows, is_noised)
        logits: Tensor = self.model.head(encode_noisy(self.model, rows, x_t, sight=self.sight)[0])
        return logits

    def logits(self, rows: BlockRows, is_noised: Tensor) -> Tensor:
        """As `all_logits`, the mask excluded."""
        return without_mask(self.all_logits(rows, is_noised), self.process.mask_token_id)

    def alone(self, x_t: Tensor, own: Tensor, *, position: Tensor, block: Tensor) -> Tensor:
        """[N, V] of tokens [N], the last of which are a noisy block and the others clean text."""
        if isinstance(self.model, EncoderDecoderDenoiser):
            return self._decoded(x_t, own)
        document = torch.zeros_like(x_t)[None]
        if self.sight.is_causal:
            rule_ = causal(document)
        elif self.sight.context_is_causal:
            rule_ = causal_up_to(torch.tensor([int((~own).sum())]))
        else:
            rule_ = block_causal(document, block[None])
        drafts = {"is_draft": own[None]} if self.sight.keeps_base else {}
        logits: Tensor = self.model.head(
            self.model.encode(x_t[None], position[None], rule_, **drafts)
        )
        return logits[0]

    def _decoded(self, x_t: Tensor, own: Tensor) -> Tensor:
        """As `alone`, as decoding computes it; zeros of the clean text."""
        decoder = EncoderDecoder(self.model.model, vocab_size=self.model.vocab_size)
        cache, first, context = decoder.new_cache(1), torch.zeros(1).long(), x_t[~own]
        if len(context):
            count = torch.tensor([len(context)])
            decoder.encode(context[None], count, cache, first, causal_by_position)
            cache.extend(first, count)
        logits = decoder.head(decoder.denoise(x_t[own][None], None, cache, first))[0]
        return torch.cat([logits.new_zeros(len(context), logits.shape[1]), logits])

    def loss(self, rows: BlockRows, is_masked: Tensor) -> LossOutput:
        assert self.process.block_length is not None
        objective = _UnderSight(
            given=self.sight,
            mask_token_id=self.process.mask_token_id,
            block_length=self.process.block_length,
            eos_token_id=self.process.eos_token_id,
            attention_mask_mode="2d" if self.sight.is_causal else "4d",
            clean_context=True,
            prompt_length=self.process.prompt_length,
            lambda_conf=_LAMBDA,
            conf_temperature=_TEMPERATURE,
        )
        return objective.loss_at(self.model, rows, is_masked)


@rule(
    claim="scheduler_config.json, written and read again; fields that differ",
    oracle="the process as it was read",
    tolerance=0.0,
)
def scheduler_config(loaded: LoadedBlockCheckpoint) -> float:
    with tempfile.TemporaryDirectory() as folder:
        loaded.process.save(Path(folder))
        again = asdict(NoiseProcess.load(Path(folder)))
    return sum(again[name] != value for name, value in asdict(loaded.process).items())


@rule(
    claim="logits of all blocks in one pass over [x_t ; x_0]; relative",
    oracle="each block by itself behind the clean text before it",
    tolerance=_FLOAT32,
)
@torch.no_grad()
def one_pass(loaded: LoadedBlockCheckpoint) -> float:
    rows, worst = loaded.rows, 0.0
    together, noisy = (
        loaded.all_logits(rows, loaded.is_noised),
        loaded.noised(rows, loaded.is_noised),
    )
    for row in range(len(rows.tokens)):
        for ordinal in rows.ordinal[row, rows.is_valid[row]].unique().tolist():
            is_own = (rows.ordinal[row] == ordinal) & rows.is_valid[row]
            stop = int(is_own.nonzero().max()) + 1
            # Later blocks do not see what earlier ones are filled up with.
            is_seen = (rows.is_text | (rows.ordinal == ordinal))[row, :stop]
            is_beside = rows.document[row, :stop] == rows.document[row, stop - 1]
            before = (is_beside & is_seen).nonzero()[:, 0]
            own = is_own[before]
            x_t = torch.where(own, noisy[row, before], rows.tokens[row, before])
            alone = loaded.alone(
                x_t, own, position=rows.position[row, before], block=rows.block[row, before]
            )
            told, by = before[own], own.nonzero()[:, 0]
            if loaded.sight.predicts_next:  # the first token of a document is told by none
                told, by = told[by > 0], by[by > 0] - 1
            if not len(told):
                continue
            distance = (together[row, told] - alone[by]).abs().max()
            worst = max(worst, float(distance / alone[by].abs().max()))
    return worst


@rule(
    claim="another later block leaves the logits of all earlier ones; values that change a bit",
    oracle="the logits before",
    tolerance=0.0,
)
@torch.no_grad()
def later_blocks(loaded: LoadedBlockCheckpoint) -> float:
    rows = loaded.rows
    half = rows.ordinal.amax(1, keepdim=True) // 2
    is_later = (rows.ordinal > half) & rows.is_valid
    tokens = torch.where(is_later, rows.tokens.flip(0, 1), rows.tokens)
    changed = loaded.logits(replace(rows, tokens=tokens), loaded.is_noised ^ is_later)
    is_earlier = (rows.ordinal <= half) & rows.is_valid
    return float((changed != loaded.logits(rows, loaded.is_noised))[is_earlier].sum())


@rule(
    claim="the loss with its confidence term, value and gradient of every parameter; relative",
    oracle="all logits of both views at once",
    tolerance=_FLOAT32,
)
def loss(loaded: LoadedBlockCheckpoint) -> float:
    rows, is_target = target_rows(loaded.batch, loaded.process)
    ours = loaded.loss(rows, loaded.is_noised).loss_sum
    nll, entropies, correct = (torch.zeros(len(rows.tokens)).double() for _ in range(3))
    for is_masked in (loaded.is_noised, is_target & ~loaded.is_noised):
        logits = loaded.logits(rows, is_masked)
        of_rows = negative_log_likelihood(logits.flatten(0, 1), rows.tokens.flatten())
        nll = nll + torch.where(is_masked, of_rows.view_as(rows.tokens), 0.0).sum(1)
        is_right = is_masked & (logits.argmax(-1) == rows.tokens)
        entropies = entropies + (tempered_entropy(logits, _TEMPERATURE) * is_right).sum(1)
        correct = correct + is_right.sum(1)
    mean = entropies / correct.clamp(min=1.0)
    expected = (nll + _LAMBDA * is_target.sum(1) * mean).sum()
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    return loss_distance(ours, expected, parameters)


@rule(
    claim="logits of a row in a padded batch; relative",
    oracle="the row alone, without padding",
    tolerance=_FLOAT32,
)
@torch.no_grad()
def padding(loaded: LoadedBlockCheckpoint) -> float:
    lengths = loaded.batch.is_valid.sum(1)
    lengths[1:] = (lengths[1:] + 1) // 2
    is_valid = torch.arange(loaded.batch.tokens.shape[1]) < lengths[:, None]
    cut = TokenBatch(tokens=loaded.batch.tokens, is_valid=is_valid)
    together, _ = target_rows(cut, loaded.process)
    no_noise = torch.zeros_like(together.is_valid)
    logits = loaded.all_logits(together, no_noise)
    worst = 0.0
    for row, length in enumerate(lengths.tolist()):
        part = TokenBatch(
            tokens=cut.tokens[row : row + 1, :length], is_valid=is_valid[row : row + 1, :length]
        )
        alone, _ = target_rows(part, loaded.process)
        width = alone.tokens.shape[1]
        expected = loaded.all_logits(alone, no_noise[:1, :width])
        distance = (logits[row, :width] - expected[0]).abs().max()
        worst = max(worst, float(distance / expected.abs().max()))
    return worst


@rule(
    claim="the loss of blocks of random tokens, value and gradient of every parameter; relative",
    oracle="the general formula over all logits, and the clean text by itself",
    tolerance=_FLOAT32,
)
def noisy_loss(loaded: LoadedBlockCheckpoint) -> float:
    """Each block at a time of its own, counted a number of times of its own."""
    rows, is_target = target_rows(loaded.batch, loaded.process)
    t = 0.1 + 0.8 * torch.remainder(0.6 * rows.ordinal.double() + 0.3, 1.0)
    slope = 1.0 + rows.ordinal.double()
    uniform = loaded.generator.fold_in(1).uniform(rows.tokens.shape[1])
    x_t = loaded.kernel.corrupt(rows.tokens, t, uniform=uniform, is_noisable=is_target)
    is_bound = loaded.process.prediction == "loo"
    ar_weight = _LAMBDA if loaded.sight.context_is_causal else 0.0
    assert isinstance(loaded.kernel, UniformKernel)
    assert loaded.process.block_length is not None
    objective = UniformBlockDiffusion(
        kernel=loaded.kernel,
        block_length=loaded.process.block_length,
        eos_token_id=loaded.process.eos_token_id,
        loss_type="elbo" if is_bound else "cross_entropy",
        ar_loss_weight=ar_weight,
        predicts_next=loaded.sight.predicts_next,
    )
    ours = objective.loss_at(loaded.model, rows, x_t, t, slope).loss_sum

    states, _ = encode_noisy(loaded.model, rows, x_t, sight=loaded.sight)
    logits = without_mask(loaded.model.head(states[is_target]), loaded.process.mask_token_id)
    x_0, z = rows.tokens[is_target], x_t[is_target]
    if is_bound:
        belief = logits.softmax(-1)[:, None]
        nats = loaded.kernel.nelbo(belief, x_0[:, None], z[:, None], t[is_target])[:, 0]
        expected = (nats * slope[is_target]).sum()
    else:
        expected = -logits.log_softmax(-1).gather(-1, x_0[:, None]).sum()
    if ar_weight > 0.0:
        following = Autoregressive().loss(loaded.model, loaded.batch, loaded.generator)
        expected = expected + ar_weight * following.loss_sum
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    return loss_distance(ours, expected, parameters)


BLOCK_RULES: tuple[Rule[LoadedBlockCheckpoint], ...] = (
    scheduler_config,
    one_pass,
    later_blocks,
    loss,
    padding,
)


def block_rules(process: NoiseProcess) -> tuple[Rule[LoadedBlockCheckpoint], ...]:
    """What is checked of a checkpoint, with the loss that its noise has."""
    if process.forward_process == "absorbing":
        return BLOCK_RULES
    return tuple(noisy_loss if check is loss else check for check in BLOCK_RULES)
