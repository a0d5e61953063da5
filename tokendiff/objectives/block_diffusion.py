"""Block diffusion: autoregressive over blocks, masked diffusion inside each.

    -ln p(x) <= sum over blocks b of
        E_{t ~ U(0,1)} [ -alpha'_t / (1 - alpha_t) * sum over masked positions of b of
                         -ln x_theta(x_0 | x_t of block b, x_0 of the blocks before it) ]

The integral over t can be taken beforehand: every number l of the block's n tokens is masked as
often, and the sum counts n / l. That is `exact_mask_counts`: the same mean with less variance, as
no block comes out without a mask and no weight is larger than n (LLaDA, arXiv 2502.09992, eq. 6).

All blocks are trained in one pass over rows `[x_t ; x_0]` of twice the length, in which a noisy
block sees itself and the clean blocks before it: what decoding with a cache of finished blocks
sees. Sources: BD3-LM (arXiv 2503.09573), eq. 8; SDAR (arXiv 2510.06303). There a block's noise runs
from 0 to 1 as here; BD3-LM's clipped schedules are `max_loss_weight` and `min_time` here.

With `ar_loss_weight` the clean half is read from left to right, and carries the next-token loss:

    L = diffusion_loss_weight * L_blocks + ar_loss_weight * sum over targets of -ln p(x_i | x_<i)

One set of weights then decodes token by token and block by block, with the same cache.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import block_diffusion
from tokendiff.diffusion.devices import device_of, sent, sent_at
from tokendiff.diffusion.interfaces import (
    CausalDenoiser,
    DraftingDenoiser,
    LossOutput,
    SelfConditionedDenoiser,
    TokenBatch,
)
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.objectives.autoregressive import Autoregressive, next_token_loss
from tokendiff.objectives.blocks import GOLDEN, BlockRows, BlockSight, block_rows, mask_exactly
from tokendiff.objectives.masked import MaskedTokens, check_fields, masked_loss


@dataclass(frozen=True, kw_only=True)
class BlockDiffusion:
    """
    Attributes:
        block_length: tokens of a block; with 1 the bound is the autoregressive likelihood.
        eos_token_id: fills up the block that a document ends in; see `tokendiff.objectives.blocks`.
        exact_mask_counts: draw how many tokens of a block are masked, in place of a time.
        max_loss_weight: clips the weight -alpha'/(1 - alpha), or n / l.
        restarts_at_answers: blocks start anew at each answer; see `tokendiff.objectives.blocks`.
        ar_loss_weight: of the next-token loss of the clean half, which is then causal.
        keeps_base: the frozen base model encodes the clean half; adapters count in the noisy half
            alone.
        diffusion_loss_weight: of the loss of the blocks.
        predicts_next: the state before a token tells it; see `BlockSight`.
        lambda_conf: weight of the confidence term: per row, the mean entropy of
            softmax(logits / conf_temperature) over the correctly predicted masked tokens.

    The filling counts in the loss but not among the tokens, since the text is what the bound is of.
    """

    kernel: AbsorbingKernel
    block_length: int
    eos_token_id: int | None
    exact_mask_counts: bool = False
    min_time: float = 1e-3  # the weight -alpha'/(1 - alpha) is infinite at t = 0
    max_loss_weight: float | None = None
    restarts_at_answers: bool = False
    ar_loss_weight: float = 0.0
    diffusion_loss_weight: float = 1.0
    predicts_next: bool = False
    keeps_base: bool = False
    lambda_conf: float = 0.0
    conf_temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self.min_time, self.max_loss_weight, self.lambda_conf, self.conf_temperature)
        if self.block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {self.block_length}")
        weights = (self.ar_loss_weight, self.diffusion_loss_weight)
        if min(weights) < 0.0 or max(weights) == 0.0:
            raise ValueError(f"one loss weight must be positive, and none negative: {weights}")
        if self.keeps_base and self.ar_loss_weight > 0.0:
            raise ValueError(f"keeps_base leaves ar_loss_weight {self.ar_loss_weight} no effect")

    @property
    def sight(self) -> BlockSight:
        return BlockSight(
            context_is_causal=self.ar_loss_weight > 0.0 or self.keeps_base,
            predicts_next=self.predicts_next,
            keeps_base=self.keeps_base,
        )

    def loss(self, model: CausalDenoiser, batch: TokenBatch, generator: RowGenerator) -> LossOutput:
        """Draw a time or a number of masks per block, stratified over the global batch for the
        blocks of each ordinal and over the blocks of each row, and take the loss there.

        A block's loss depends on no other block's noise, so these draws may hang together.
        """
        if self.diffusion_loss_weight == 0.0:
            return scaled(Autoregressive().loss(model, batch, generator), self.ar_loss_weight)
        rows = block_rows(
            batch,
            block_length=self.block_length,
            fill_token_id=self.eos_token_id,
            restarts_at_answers=self.restarts_at_answers,
        )
        spread = block_strata(rows, generator)
        uniform = generator.uniform(rows.tokens.shape[1])
        if self.exact_mask_counts:
            masks = mask_exactly(rows, self._is_target(rows), spread, uniform)
            return self._loss_of(model, rows, *masks, max_weight=self.max_loss_weight)
        t = self.min_time + (1.0 - self.min_time) * spread
        is_masked = self._is_target(rows) & (uniform < 1.0 - self.kernel.alpha(t))
        return self.loss_at(model, rows, is_masked, t)

    def _is_target(self, rows: BlockRows) -> Tensor:
        # A literal mask token in the text is context, never a target.
        return self.sight.told(rows) & (rows.tokens != self.kernel.mask_token_id)

    def loss_at(
        self, model: CausalDenoiser, rows: BlockRows, is_masked: Tensor, t: Tensor
    ) -> LossOutput:
        """The loss with given positions masked ([B, W] bool) at their blocks' times t ([B, W])."""
        share = 1.0 - self.min_time
        weight = share * self.kernel.masked_loss_weight(t)
        most = None if self.max_loss_weight is None else share * self.max_loss_weight
        return self._loss_of(model, rows, is_masked, weight, max_weight=most)

    def _loss_of(
        self,
        model: CausalDenoiser,
        rows: BlockRows,
        is_masked: Tensor,
        weight: Tensor,
        *,
        max_weight: float | None,
    ) -> LossOutput:
        is_target = self._is_target(rows)
        hidden, clean = encode_both(
            model, rows, is_masked, mask_token_id=self.kernel.mask_token_id, sight=self.sight
        )
        at = is_masked.nonzero(as_tuple=True)
        blocks = masked_loss(
            model.head,
            MaskedTokens(
                hidden=hidden[sent_at(at, hidden.device)],
                targets=rows.tokens[at],
                row=at[0],
                weight=weight[at],
                row_tokens=is_target.sum(1),
                num_tokens=(is_target & rows.is_text).sum(),
            ),
            mask_token_id=self.kernel.mask_token_id,
            max_weight=max_weight,
            lambda_conf=self.lambda_conf,
            conf_temperature=self.conf_temperature,
        )
        return joint_loss(
            blocks,
            model,
            rows,
            clean,
            ar_loss_weight=self.ar_loss_weight,
            diffusion_loss_weight=self.diffusion_loss_weight,
        )


def block_strata(rows: BlockRows, generator: RowGenerator) -> Tensor:
    """[B, W] in [0, 1), equal within a block: stratified over the global batch for the blocks of
    each ordinal, and over the blocks of each row.
    """
    return torch.remainder(generator.stratified()[:, None] + rows.ordinal * GOLDEN, 1.0)


def joint_loss(
    blocks: LossOutput,
    model: CausalDenoiser,
    rows: BlockRows,
    clean: Tensor,
    *,
    ar_loss_weight: float,
    diffusion_loss_weight: float,
    metric: str = "elbo",
) -> LossOutput:
    """The loss of the blocks, weighted, and the next-token loss of the clean half beside it.

    Args:
        metric: what the loss of the blocks is called among the metrics.
        clean: [B, W, D] hidden states of x_0, each of which sees only up to itself where the
            next-token loss counts.
    """
    if ar_loss_weight == 0.0 and diffusion_loss_weight == 1.0:
        return blocks
    bound = {metric: (blocks.loss_sum.detach(), blocks.num_tokens), **blocks.metrics}
    loss = replace(scaled(blocks, diffusion_loss_weight), metrics=bound)
    if ar_loss_weight == 0.0:
        return loss
    is_next = rows.is_target & rows.is_text & (rows.position > 0)
    behind = is_next[:, 1:].nonzero(as_tuple=True)
    following = next_token_loss(
        model.head,
        clean[:, :-1][sent_at(behind, clean.device)],
        rows.tokens[:, 1:][behind],
    )
    nats = following.loss_sum.detach()
    return replace(
        loss,
        loss_sum=loss.loss_sum + ar_loss_weight * following.loss_sum,
        metrics={
            **bound,
            "ar_nll": (nats, following.num_tokens),
            "ar_accuracy": following.metrics["accuracy"],
        },
    )


def scaled(loss: LossOutput, weight: float) -> LossOutput:
    """The loss times a weight; its metrics stay."""
    return loss if weight == 1.0 else replace(loss, loss_sum=weight * loss.loss_sum)


def encode_beside_clean(
    model: CausalDenoiser,
    rows: BlockRows,
    is_masked: Tensor,
    *,
    mask_token_id: int,
    sight: BlockSight,
) -> Tensor:
    """Hidden states [B, W, D] that tell the token at each position of x_t, each block beside the
    clean blocks before it.

    Args:
        is_masked: [B, W].
    """
    return encode_both(model, rows, is_masked, mask_token_id=mask_token_id, sight=sight)[0]


def encode_both(
    model: CausalDenoiser,
    rows: BlockRows,
    is_masked: Tensor,
    *,
    mask_token_id: int,
    sight: BlockSight,
) -> tuple[Tensor, Tensor]:
    """As `encode_beside_clean`, and the hidden states [B, W, D] of x_0."""
    return encode_noisy(model, rows, rows.tokens.masked_fill(is_masked, mask_token_id), sight=sight)


def encode_noisy(
    model: CausalDenoiser,
    rows: BlockRows,
    x_t: Tensor,
    *,
    sight: BlockSight,
    is_told: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `encode_both`, of any noisy tokens x_t [B, W].

    Args:
        is_told: [B] bool, rows of which a `SelfConditionedDenoiser` is told what a pass before
            found; by default none.
    """
    there = device_of(model, like=rows.tokens)
    rows, x_t = rows.to(there), sent(x_t, there)
    rule = block_diffusion(
        rows.document,
        rows.block,
        rows.text_to_see,
        is_causal=sight.is_causal,
        context_is_causal=sight.context_is_causal,
    )
    both, places = torch.cat([x_t, rows.tokens], dim=1), rows.position.repeat(1, 2)
    if sight.keeps_base:
        is_draft = torch.arange(both.shape[1], device=both.device) < x_t.shape[1]
        drafting = cast(DraftingDenoiser, model)
        states = drafting.encode(both, places, rule, is_draft=is_draft.expand_as(both))
    elif isinstance(model, SelfConditionedDenoiser):
        states = model.encode_noisy(both, places, rule, is_told=is_told)
    else:
        states = model.encode(both, places, rule)
    noisy, clean = states.chunk(2, dim=1)
    return sight.telling(rows, noisy, clean), clean
