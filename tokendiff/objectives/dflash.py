"""Training a DFlash draft: blocks of masks behind anchors of a text, filled in one pass.

For an anchor at place a of a document, the draft reads the frozen target's hidden states of the
tokens before a and the block [x_a, m, ..., m]; what it says at place k of the block is judged
against x_{a+k}:

    L = sum over anchors and k = 1..K-1 of w_k * -ln p_k(x_{a+k})

With `loss_type` "dflash" the weights are fixed, w_k = exp(-(k - 1) / gamma), and L is divided by
their sum over the whole global batch. With "dpace" they follow from what the draft knows by now
(`tokendiff.objectives.draft_weights`), and L is divided by the number of anchors. Their sum is the
length that is expected to be accepted. Divided by it, all blocks would count the same, however much
of them is accepted.

A draft of the second layout has a selector of candidates (`tokendiff.diffusion.candidates`). It is
trained beside: of the C likeliest tokens at place k, the one that the text has, given the text's
token before it. With S the softmax of their scores,

    L += sum over anchors and k of w_k * -ln S_k(x_{a+k}),

where x_{a+k} is among the C; other places do not count. The weights and what L is divided by are
the same, and the gradient goes through the scores into the draft too.

Source: DFlash (arXiv 2602.06036), section 4; D-PACE (arXiv 2605.18810).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokendiff.diffusion.attention_masks import dflash_blocks, positions_in_document
from tokendiff.diffusion.candidates import Candidates, pair_scores
from tokendiff.diffusion.devices import device_of, sent, sent_at
from tokendiff.diffusion.interfaces import DraftBesideTarget, LossOutput, Selector, TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.objectives.chunked import (
    is_likeliest,
    negative_log_likelihood,
    predict_through_head,
    reduce_through_head,
)
from tokendiff.objectives.draft_weights import decay_weights, dpace_weights


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

    @property
    def anchors(self) -> Tensor:
        """[B, A] their tokens."""
        return self.tokens.unflatten(1, (*self.targets.shape[1:2], -1))[:, :, 0]

    @property
    def before(self) -> Tensor:
        """[B, A, K - 1] the text's token before each target."""
        return torch.cat([self.anchors[:, :, None], self.targets[:, :, :-1]], dim=2)


@dataclass(frozen=True, kw_only=True)
class DFlash:
    """
    Attributes:
        block_size: K, the anchor included.
        num_anchors: A, per row at most; a row with fewer places for one has fewer.
        loss_type: what the drafted tokens weigh.
        decay_gamma: of "dflash"; None takes `decay_gamma_of(block_size)`.
        dpace_alpha: of "dpace".
    """

    block_size: int
    mask_token_id: int
    num_anchors: int = 64
    loss_type: Literal["dflash", "dpace"] = "dflash"
    decay_gamma: float | None = None
    dpace_alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {self.block_size}")
        if self.num_anchors < 1:
            raise ValueError(f"num_anchors must be at least 1, got {self.num_anchors}")
        if self.decay_gamma is not None and self.decay_gamma <= 0.0:
            raise ValueError(f"decay_gamma must be positive, got {self.decay_gamma}")
        if self.loss_type not in ("dflash", "dpace"):
            raise ValueError(f"loss_type must be dflash or dpace, got {self.loss_type!r}")
        if not 0.0 <= self.dpace_alpha <= 1.0:
            raise ValueError(f"dpace_alpha must lie between 0 and 1, got {self.dpace_alpha}")

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
        loss_sum, metrics, is_right, num_tokens = self._reduce(
            model, self._hidden(model, batch, anchors, blocks), blocks
        )
        is_whole, num_targets = blocks.is_target.all(-1), blocks.is_target.sum()
        lengths = accepted(is_right).masked_fill(~sent(is_whole, is_right.device), 0)
        return LossOutput(
            loss_sum=loss_sum,
            num_tokens=num_tokens,
            metrics={
                **metrics,
                "draft_accuracy": (is_right.sum(), num_targets),
                "expected_acceptance_length": (lengths.sum(), is_whole.sum()),
                **_accuracy_by_place(is_right, blocks.is_target),
            },
        )

    def _reduce(
        self, model: DraftBesideTarget, hidden: Tensor, blocks: Blocks
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Tensor, Tensor]:
        """Loss, summed; metrics; [B, A, K - 1] whether a target is what the draft proposes, which
        is its likeliest token, or the selector's; and what the loss is a mean over.
        """
        is_target, weighs_blocks = blocks.is_target, self.loss_type == "dpace"
        # Weights that depend on the whole block are given whole blocks, those with any target.
        chosen = is_target[:, :, :1].expand_as(is_target) if weighs_blocks else is_target
        at = chosen.nonzero(as_tuple=True)
        fixed = decay_weights(self.block_size, self.decay_gamma).to(at[2].device)[at[2]]
        num_tokens = is_target[:, :, 0].sum() if weighs_blocks else fixed.sum()
        is_right = torch.zeros(is_target.shape, dtype=torch.bool, device=hidden.device)
        of_tokens = (blocks.targets.masked_fill(~is_target, 0)[at], is_target[at], fixed)
        targets, of_target, fixed = (sent(column, hidden.device) for column in of_tokens)
        at = sent_at(at, hidden.device)
        states, selecting = hidden[at], None
        if model.selector is not None:
            before = sent(blocks.before, hidden.device)[at]
            selecting = _Selecting(model.selector, states, before)
        right = torch.zeros_like(targets, dtype=torch.bool)  # written to, part by part

        def loss_of(
            logits: Tensor,
            targets: Tensor,
            is_target: Tensor,
            fixed: Tensor,
            right: Tensor,
            *selected: Tensor,
        ) -> tuple[Tensor, Tensor]:
            logits = _exact(logits)
            nll = negative_log_likelihood(logits, targets)
            right.copy_(is_likeliest(logits, targets) & is_target)
            weight = fixed.to(nll.dtype)
            if weighs_blocks:
                by_block = (part.view(-1, self.block_size - 1) for part in (nll, is_target))
                weight = dpace_weights(*by_block, alpha=self.dpace_alpha).flatten()
            nats = nll.detach().double().masked_fill(~is_target, 0.0)
            loss, figures = (weight * nll).sum(), [nats.sum()]
            if selecting is not None:
                more, *others = selecting.loss_of(logits, targets, weight, is_target, *selected)
                loss, figures = loss + more, [*figures, *others]
            return loss, torch.stack(figures)

        columns = (targets, of_target, fixed, right)
        loss_sum, figures = reduce_through_head(
            model.head,
            states,
            columns if selecting is None else (*columns, *selecting.columns),
            loss_of,
            group=self.block_size - 1 if weighs_blocks else 1,
        )
        is_right[at] = right
        num_targets = is_target.sum()
        metrics = {"draft_nll": (figures[0], num_targets)}
        if selecting is not None:
            loss_sum = loss_sum + selecting.gradient_alone()
            path = selecting.proposed(is_target.shape, at, blocks)
            is_right = (path == sent(blocks.targets, path.device)) & sent(is_target, path.device)
            metrics["selector_nll"] = (figures[1], figures[2])
            metrics["selector_recall"] = (figures[2], num_targets)
        return loss_sum, metrics, is_right, num_tokens

    @torch.no_grad()
    def agreement(
        self, model: DraftBesideTarget, batch: TokenBatch, anchors: Tensor, is_anchor: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which tokens of each block are the text's, of those that the draft proposes at
        temperature 0. A target whose greedy text this is takes as many tokens of a block as
        `accepted` says.

        Returns:
            [B, A, K - 1]; and [B, A] whether the block is a whole one of an anchor: only such are
            to be counted.
        """
        blocks = self.blocks_at(batch, anchors, is_anchor)
        at = blocks.is_target.nonzero(as_tuple=True)
        hidden = self._hidden(model, batch, anchors, blocks)
        if model.selector is not None:
            at = sent_at(at, hidden.device)
            before = sent(blocks.before, hidden.device)[at]
            selecting = _Selecting(model.selector, hidden[at], before)
            predict_through_head(model.head, hidden[at], selecting.columns, selecting.find)
            path = selecting.proposed(blocks.is_target.shape, at, blocks)
            is_right = path == sent(blocks.targets, path.device)
            return is_right & sent(blocks.is_target, path.device), blocks.is_target.all(-1)
        right = predict_through_head(
            model.head,
            hidden[sent_at(at, hidden.device)],
            (sent(blocks.targets[at], hidden.device),),
            lambda logits, targets: is_likeliest(_exact(logits), targets),
        )
        is_right = torch.zeros(blocks.is_target.shape, dtype=torch.bool, device=hidden.device)
        is_right[sent_at(at, hidden.device)] = right
        return is_right, blocks.is_target.all(-1)

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
    ) -> Tensor:
        """Hidden states [B, A, K - 1, D] of the drafted tokens, for the head."""
        length, there = batch.tokens.shape[1], device_of(model, like=batch.tokens)
        if batch.target_states is None:
            context = model.read(batch.tokens, blocks.positions[:, :length])
        else:
            context = sent(batch.target_states, there)
        rule = dflash_blocks(sent(batch.document, there), sent(anchors, there), self.block_size)
        tokens, positions = sent(blocks.tokens, there), sent(blocks.positions, there)
        hidden = model.draft(tokens, context, positions, rule)
        return hidden.unflatten(1, (-1, self.block_size))[:, :, 1:]


class _Selecting:
    """The selector's part of a loss whose logits are made and dropped in chunks.

    Its scores depend on the logits, whose gradient is the chunk's business, and on left = a_p * f
    and b. The gradient by those two is written down chunk by chunk, and `gradient_alone` passes it
    on.

    Args:
        states: [N, D] of the draft.
        before: [N] the token before each.

    Attributes:
        columns: what `loss_of` and `find` are given of a chunk: left, its gradient, and the
            candidates, tokens and logits [N, C] each; the last three are written to.
    """

    def __init__(self, selector: Selector, states: Tensor, before: Tensor) -> None:
        self._selector, self._features = selector, selector(states)
        # Not codebook[before]: with several threads, its backward pass adds up in any order.
        self._left = nn.functional.embedding(before, selector.predecessor_codebook) * self._features
        left = self._left.detach()
        exact = torch.promote_types(left.dtype, torch.float32)
        tokens = torch.zeros(len(left), selector.top_k, dtype=torch.int64, device=left.device)
        logits = torch.zeros(tokens.shape, dtype=exact, device=left.device)
        self.columns = (left, torch.zeros_like(left, dtype=exact), tokens, logits)
        self._by_successor = torch.zeros_like(selector.successor_codebook, dtype=exact)

    def find(
        self, logits: Tensor, left: Tensor, by_left: Tensor, tokens: Tensor, values: Tensor
    ) -> Tensor:
        """The candidates' logits [n, C]; `tokens` and `values` are written to."""
        best = _exact(logits).topk(self._selector.top_k)
        tokens.copy_(best.indices)
        values.copy_(best.values.detach())
        return best.values

    def loss_of(
        self,
        logits: Tensor,
        targets: Tensor,
        weight: Tensor,
        is_target: Tensor,
        left: Tensor,
        by_left: Tensor,
        tokens: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted loss of a chunk, and without weights the nats and how many count in them."""
        of_logits = self.find(logits, left, by_left, tokens, values)
        successors = self._selector.successor_codebook.detach()[tokens]
        scores = of_logits + pair_scores(left, successors).to(of_logits.dtype)
        is_it = tokens == targets[:, None]
        counts = is_it.any(-1) & is_target
        nll = -scores.log_softmax(-1).masked_fill(~is_it, 0.0).sum(-1)
        weight = weight * counts
        slope = (scores.detach().softmax(-1) - is_it.to(scores.dtype)) * weight[:, None]
        slope = slope.to(by_left.dtype)[:, :, None]
        by_left.copy_((slope * successors).sum(1))
        by_pair = slope * left.to(by_left.dtype)[:, None]
        self._by_successor.index_add_(0, tokens.flatten(), by_pair.flatten(0, 1))
        nats = nll.detach().double().masked_fill(~counts, 0.0)
        return (weight * nll).sum(), nats.sum(), counts.sum().double()

    def gradient_alone(self) -> Tensor:
        """0, with the gradient that was written down."""
        pairs = (
            (self._left, self.columns[1]),
            (
                self._selector.successor_codebook,
                self._by_successor,
            ),
        )
        total = torch.stack([(value * by_value).sum() for value, by_value in pairs]).sum()
        return total - total.detach()

    @torch.no_grad()
    def proposed(self, shape: torch.Size, at: Any, blocks: Blocks) -> Tensor:
        """[B, A, K - 1] what is drafted at temperature 0, in places that have a target, from the
        candidates that were found.

        Args:
            at: which places of [B, A, K - 1] these are of.
        """
        _, _, tokens, values = self.columns

        def spread(values: Tensor) -> Tensor:
            every = values.new_zeros(*shape, values.shape[-1])
            every[at] = values
            return every.flatten(0, 1)

        candidates = Candidates(
            tokens=spread(tokens),
            logits=spread(values),
            features=spread(self._features.detach()),
            predecessors=self._selector.predecessor_codebook,
            successors=self._selector.successor_codebook,
            vocab_size=len(self._selector.successor_codebook),
        )
        anchors = sent(blocks.anchors.flatten(), tokens.device)
        return candidates.likeliest(anchors).view(shape)


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


def _accuracy_by_place(is_right: Tensor, is_target: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """draft_accuracy_k, k = 1..K-1: share of the targets k places behind their anchor that are what
    the draft proposes, whatever stands before them. They leave the device with all other metrics.
    """
    counts = [of.flatten(0, 1).sum(0).unbind() for of in (is_right, is_target)]
    return {
        f"draft_accuracy_{k}": pair for k, pair in enumerate(zip(*counts, strict=True), start=1)
    }


def _exact(logits: Tensor) -> Tensor:
    """In float32 or better."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
