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
from tokendiff.diffusion.attention_masks import block_causal, causal, causal_up_to
from tokendiff.diffusion.interfaces import LossOutput, TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.evaluation.block_bound import sight_of, target_rows
from tokendiff.objectives.block_diffusion import encode_beside_clean
from tokendiff.objectives.block_refinement import BlockRefinement
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
        model: a TransformersCausalDenoiser in float64, on the CPU.
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
    def is_masked(self) -> Tensor:
        """[B, W] half of all targets."""
        generator = RowGenerator.for_rows(0, torch.arange(len(self.batch.tokens)))
        is_target = target_rows(self.batch, self.process)[1]
        return is_target & (generator.uniform(self.rows.tokens.shape[1]) < 0.5)

    def logits(self, rows: BlockRows, is_masked: Tensor) -> Tensor:
        """[B, W, V] of one pass, the mask excluded."""
        mask = self.process.mask_token_id
        hidden = encode_beside_clean(
            self.model, rows, is_masked, mask_token_id=mask, sight=self.sight
        )
        return without_mask(self.model.head(hidden), mask)

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
    rows, model, worst = loaded.rows, loaded.model, 0.0
    together = model.head(
        encode_beside_clean(
            model,
            rows,
            loaded.is_masked,
            mask_token_id=loaded.process.mask_token_id,
            sight=loaded.sight,
        )
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
            x_t = rows.tokens[row, before].clone()
            x_t[own & loaded.is_masked[row, before]] = loaded.process.mask_token_id
            document = torch.zeros_like(x_t)[None]
            block = rows.block[row, before][None]
            begin = int((~own).sum())
            if loaded.sight.is_causal:
                rule_ = causal(document)
            elif loaded.sight.context_is_causal:
                rule_ = causal_up_to(torch.tensor([begin]))
            else:
                rule_ = block_causal(document, block)
            drafts = {"is_draft": own[None]} if loaded.sight.keeps_base else {}
            position = rows.position[row, before][None]
            alone = model.head(model.encode(x_t[None], position, rule_, **drafts))
            told, by = before[own], own.nonzero()[:, 0]
            if loaded.sight.predicts_next:  # the first token of a document is told by none
                told, by = told[by > 0], by[by > 0] - 1
            if not len(told):
                continue
            distance = (together[row, told] - alone[0, by]).abs().max()
            worst = max(worst, float(distance / alone[0, by].abs().max()))
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
    changed = loaded.logits(replace(rows, tokens=tokens), loaded.is_masked ^ is_later)
    is_earlier = (rows.ordinal <= half) & rows.is_valid
    return float((changed != loaded.logits(rows, loaded.is_masked))[is_earlier].sum())


@rule(
    claim="the loss with its confidence term, value and gradient of every parameter; relative",
    oracle="all logits of both views at once",
    tolerance=_FLOAT32,
)
def loss(loaded: LoadedBlockCheckpoint) -> float:
    rows, is_target = target_rows(loaded.batch, loaded.process)
    ours = loaded.loss(rows, loaded.is_masked).loss_sum
    nll, entropies, correct = (torch.zeros(len(rows.tokens)).double() for _ in range(3))
    for is_masked in (loaded.is_masked, is_target & ~loaded.is_masked):
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
    no_mask = torch.zeros_like(together.is_valid)
    states = loaded.model.head(
        encode_beside_clean(
            loaded.model,
            together,
            no_mask,
            mask_token_id=loaded.process.mask_token_id,
            sight=loaded.sight,
        )
    )
    worst = 0.0
    for row, length in enumerate(lengths.tolist()):
        part = TokenBatch(
            tokens=cut.tokens[row : row + 1, :length], is_valid=is_valid[row : row + 1, :length]
        )
        alone, _ = target_rows(part, loaded.process)
        width = alone.tokens.shape[1]
        expected = loaded.model.head(
            encode_beside_clean(
                loaded.model,
                alone,
                no_mask[:1, :width],
                mask_token_id=loaded.process.mask_token_id,
                sight=loaded.sight,
            )
        )
        distance = (states[row, :width] - expected[0]).abs().max()
        worst = max(worst, float(distance / expected.abs().max()))
    return worst


BLOCK_RULES: tuple[Rule[LoadedBlockCheckpoint], ...] = (
    scheduler_config,
    one_pass,
    later_blocks,
    loss,
    padding,
)


def block_rules(process: NoiseProcess) -> tuple[Rule[LoadedBlockCheckpoint], ...]:
    """What is checked of a checkpoint: the loss of masks only where they are its noise."""
    if process.forward_process == "absorbing":
        return BLOCK_RULES
    return tuple(check for check in BLOCK_RULES if check is not loss)
