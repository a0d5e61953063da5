"""Training a DFlash draft: blocks of masks behind anchors of a text, filled in one pass.

For an anchor at place a of a document, the draft reads the frozen target's hidden states of the
tokens before a and the block [x_a, m, ..., m]; what it says at place k of the block is judged
against x_{a+k}:

    L = sum over anchors and k = 1..K-1 of w_k * -ln p_k(x_{a+k}),   w_k = exp(-(k - 1) / gamma)

divided by the sum of the weights of the whole global batch. An early token counts more since the
later ones are thrown away where it is refused.

Source: DFlash (arXiv 2602.06036), section 4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import dflash_blocks, positions_in_document
from tokendiff.diffusion.interfaces import DraftBesideTarget, LossOutput, TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.objectives.chunked import (
    is_likeliest,
    negative_log_likelihood,
    predict_through_head,
    reduce_through_head,
)


def decay_gamma_of(block_size: int) -> float:
    """The published gamma, 7, 5 and 4 for blocks of 16, 10 and 8, and between them a straight
    line; half the block size below.
    """
    return block_size / 2 if block_size <= 10 else 5 + (block_size - 10) / 3


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Drafted blocks of some rows, and what their tokens should be.

    Attributes:
        tokens: [B, A K] the anchor's token, then masks, for each of A anchors.
        positions: [B, L + A K] in the document: of the row's tokens, then of the blocks'.
        targets: [B, A, K - 1] the tokens behind the anchor; anything where there is none.
        is_target: [B, A, K - 1] whether the text, or the answer that the block is in, goes on that
            far.
    """

    tokens: Tensor
    positions: Tensor
    targets: Tensor
    is_target: Tensor


@dataclass(frozen=True, kw_only=True)
class DFlash:
    """
    Attributes:
        block_size: K, the anchor included.
        num_anchors: A, per row at most; a row with fewer places for one has fewer.
        decay_gamma: None takes `decay_gamma_of(block_size)`.
    """

    block_size: int
    mask_token_id: int
    num_anchors: int = 64
    decay_gamma: float | None = None

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")
        if self.num_anchors < 1:
            raise ValueError(f"num_anchors must be at least 1, got {self.num_anchors}")
        if self.decay_gamma is not None and self.decay_gamma <= 0.0:
            raise ValueError(f"decay_gamma must be positive, got {self.decay_gamma}")

    @property
    def weights(self) -> Tensor:
        """[K - 1] float64, falling from 1."""
        gamma = self.decay_gamma or decay_gamma_of(self.block_size)
        return torch.exp(-torch.arange(self.block_size - 1, dtype=torch.float64) / gamma)

    def loss(
        self, model: DraftBesideTarget, batch: TokenBatch, generator: RowGenerator
    ) -> LossOutput:
        """Draw the anchors, and take the loss there."""
        return self.loss_at(model, batch, *draw_anchors(batch, generator, self.num_anchors))

    def loss_at(
        self, model: DraftBesideTarget, batch: TokenBatch, anchors: Tensor, is_anchor: Tensor
    ) -> LossOutput:
        """The loss at given anchors [B, A]; nothing is drawn here."""
        blocks = self.blocks_at(batch, anchors, is_anchor)
        hidden, at = self._hidden(model, batch, anchors, blocks)
        targets = blocks.targets[at]
        weight = self.weights.to(hidden.device)[at[2]]
        right = torch.zeros_like(targets, dtype=torch.bool)  # written to, part by part

        def loss_of(
            logits: Tensor, targets: Tensor, weight: Tensor, right: Tensor
        ) -> tuple[Tensor, Tensor]:
            logits = _exact(logits)
            nll = negative_log_likelihood(logits, targets)
            right.copy_(is_likeliest(logits, targets))
            return (weight.to(nll.dtype) * nll).sum(), nll.detach().double().sum()[None]

        loss_sum, sums = reduce_through_head(model.head, hidden, (targets, weight, right), loss_of)
        is_right = torch.zeros_like(blocks.is_target)
        is_right[at] = right
        is_whole = blocks.is_target.all(-1)
        num_tokens = blocks.is_target.sum()
        return LossOutput(
            loss_sum=loss_sum,
            num_tokens=weight.sum(),
            metrics={
                "draft_nll": (sums[0], num_tokens),
                "draft_accuracy": (is_right.sum(), num_tokens),
                "expected_acceptance_length": (accepted(is_right)[is_whole].sum(), is_whole.sum()),
            },
        )

    @torch.no_grad()
    def acceptance(
        self, model: DraftBesideTarget, batch: TokenBatch, anchors: Tensor, is_anchor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """How many tokens of each block a target whose greedy text this is would take.

        Returns:
            [B, A] from 1 (none of the draft's, and the target's own next token) to K; and [B, A]
            whether the block is a whole one of an anchor: only such are to be counted.
        """
        blocks = self.blocks_at(batch, anchors, is_anchor)
        hidden, at = self._hidden(model, batch, anchors, blocks)
        right = predict_through_head(
            model.head,
            hidden,
            (blocks.targets[at],),
            lambda logits, targets: is_likeliest(_exact(logits), targets),
        )
        is_right = torch.zeros_like(blocks.is_target)
        is_right[at] = right
        return accepted(is_right), blocks.is_target.all(-1)

    def blocks_at(self, batch: TokenBatch, anchors: Tensor, is_anchor: Tensor) -> Blocks:
        length, size = batch.tokens.shape[1], self.block_size
        places = anchors[:, :, None] + torch.arange(size, device=anchors.device)
        within = places.clamp(max=length - 1)
        row = torch.arange(len(anchors), device=anchors.device)[:, None, None]
        is_target = (
            is_anchor[:, :, None]
            & (places < length)
            & batch.is_target[row, within]
            & (batch.document[row, within] == batch.document[row, anchors[:, :, None]])
        )
        text = batch.tokens[row, within]
        tokens = torch.full_like(text, self.mask_token_id)
        tokens[:, :, 0] = text[:, :, 0]
        position = positions_in_document(batch.document)
        of_blocks = position[row, anchors[:, :, None]] + torch.arange(size, device=anchors.device)
        return Blocks(
            tokens=tokens.flatten(1),
            positions=torch.cat([position, of_blocks.flatten(1)], dim=1),
            targets=text[:, :, 1:],
            # What follows an answer is not drafted, nor is what lies behind that.
            is_target=is_target[:, :, 1:].long().cumprod(-1).bool(),
        )

    def _hidden(
        self, model: DraftBesideTarget, batch: TokenBatch, anchors: Tensor, blocks: Blocks
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Hidden states [N, D] for the head, of the N drafted tokens that have a target, and where
        those are in [B, A, K - 1].
        """
        length = batch.tokens.shape[1]
        context = model.read(batch.tokens, blocks.positions[:, :length])
        rule = dflash_blocks(batch.document, anchors, self.block_size)
        hidden = model.draft(blocks.tokens, context, blocks.positions, rule)
        hidden = hidden.unflatten(1, (-1, self.block_size))[:, :, 1:]
        at = blocks.is_target.nonzero(as_tuple=True)
        return hidden[at], at


def draw_anchors(
    batch: TokenBatch, generator: RowGenerator, num_anchors: int
) -> tuple[Tensor, Tensor]:
    """Places for anchors, without repetition, uniform over those of the row that can be one.

    An anchor has a token before it (decoding starts from a prompt) and a target behind it, both of
    its document: in chats the last token of a question can be an anchor, the last of an answer
    cannot. A row draws from its own generator, so its anchors do not depend on the rows beside it.

    Returns:
        anchors [B, A] in rising order, and [B, A] whether there is one: a row that has fewer than
        the others is filled up with 0. A is at least 1.
    """
    document, length = batch.document, batch.tokens.shape[1]
    has_target = torch.zeros_like(batch.is_valid)
    has_target[:, :-1] = (document[:, 1:] == document[:, :-1]) & batch.is_target[:, 1:]
    can_be = has_target & (positions_in_document(document) > 0)
    counts = can_be.sum(1).clamp(max=num_anchors)
    most = max(1, int(counts.max()))
    score = generator.uniform(length).masked_fill(~can_be, torch.inf)
    chosen = score.argsort(dim=1)[:, :most]
    is_anchor = torch.arange(most, device=chosen.device) < counts[:, None]
    in_order = chosen.masked_fill(~is_anchor, length).sort(dim=1).values
    return in_order.masked_fill(~is_anchor, 0), is_anchor


def accepted(is_right: Tensor) -> Tensor:
    """1 + the length of the agreeing prefix: [...] int64 of is_right [..., K - 1].

    Its mean over blocks is 1 + sum over k of the share of blocks whose first k tokens are right.
    """
    return 1 + is_right.long().cumprod(-1).sum(-1)


def _exact(logits: Tensor) -> Tensor:
    """In float32 or better."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
