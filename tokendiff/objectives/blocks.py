"""Rows of packed documents, cut into blocks as decoding cuts them.

Decoding starts a document at position 0 and goes on block after block of the same length; the block
that a document ends in is full of masks all the same. So positions and blocks start anew with each
document of a row, and its last block is filled up with EOS: a model that only ever saw as many
masks there as there were tokens left would have learnt to read the end of a text off their number.
A document that the row cuts off has no end here, and is not filled up. The filling is a target if
the document's last token is one: behind the end of an answer, but not behind a question without an
answer.

In a chat, decoding starts where the prompt ends. So blocks may start anew wherever targets begin or
end. Each answer then has blocks of its own, and its last one is filled up even where the next
question follows: the filling stands beside that question, at the same positions, and no later block
sees it. Blocks of a document whose tokens are all targets are the same either way.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import positions_in_document
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator

# Places k * GOLDEN mod 1 are spread evenly for any number of k.
GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_BLOCK = -11  # what per-block numbers are for, apart from those of times and of positions


@dataclass(frozen=True, kw_only=True)
class BlockRows:
    """Rows of W positions, the filling included.

    Attributes:
        tokens: [B, W] clean tokens.
        document: [B, W] as in TokenBatch, -1 on padding.
        position: [B, W] place in the document.
        block: [B, W] which block of its document a position is in.
        ordinal: [B, W] which block of the row.
        source: [B, W] place in the row that was given; -1 for filling and padding.
        is_target: [B, W] as in TokenBatch; False on padding.
        fills_answers: whether blocks may be filled up that text follows in their document.
    """

    tokens: Tensor
    document: Tensor
    position: Tensor
    block: Tensor
    ordinal: Tensor
    source: Tensor
    is_target: Tensor
    fills_answers: bool = False

    @property
    def is_valid(self) -> Tensor:
        """[B, W] False on padding."""
        return self.document >= 0

    @property
    def is_text(self) -> Tensor:
        """[B, W] False on padding and filling."""
        return self.source >= 0

    @property
    def text_to_see(self) -> Tensor | None:
        """`is_text`, where rules must tell it from filling (`diffusion.attention_masks`)."""
        return self.is_text if self.fills_answers else None

    def to(self, device: torch.device) -> "BlockRows":
        """The rows on a device; see `tokendiff.diffusion.devices`."""
        columns: dict[str, Any] = {
            name: sent(column, device)
            for name, column in vars(self).items()
            if isinstance(column, Tensor)
        }
        return replace(self, **columns)

    def block_uniform(self, generator: RowGenerator) -> Tensor:
        """[B, W] a draw from (0, 1) per block, independent of all others."""
        draws = generator.fold_in(_BLOCK).uniform(self.tokens.shape[1])
        return draws.gather(1, self.ordinal)

    def block_counts(self, is_counted: Tensor) -> Tensor:
        """[B, W] how many counted positions ([B, W] bool) the row's block of that ordinal has."""
        return torch.zeros_like(self.ordinal).scatter_add_(1, self.ordinal, is_counted.long())


@dataclass(frozen=True, kw_only=True)
class BlockSight:
    """What positions of `[x_t ; x_0]` see, and which state tells a token.

    Attributes:
        is_causal: inside a block, a position sees only up to itself.
        context_is_causal: a clean position sees only up to itself.
        predicts_next: the state of the position before a token tells it, as in an autoregressive
            model; that of a block's first token is the clean one before the block. The first token
            of a document is told by none. Else the state at its own position tells it. Sources:
            Dream (arXiv 2508.15487), Fast-dLLM v2 (arXiv 2509.26328).
        keeps_base: the model has adapters, which count at noisy positions alone.
    """

    is_causal: bool = False
    context_is_causal: bool = False
    predicts_next: bool = False
    keeps_base: bool = False

    def told(self, rows: BlockRows) -> Tensor:
        """[B, W] bool: the targets that a state tells."""
        return rows.is_target & (rows.position > 0) if self.predicts_next else rows.is_target

    def telling(self, rows: BlockRows, noisy: Tensor, clean: Tensor) -> Tensor:
        """[B, W, D] the state that tells each position, from those of x_t and of x_0; at the start
        of a document, where none does, its own.
        """
        if not self.predicts_next:
            return noisy
        place = torch.arange(noisy.shape[1], device=noisy.device)
        last_text = place.masked_fill(~rows.is_text, 0).cummax(1).values.roll(1, dims=1)
        before = clean.gather(1, last_text[..., None].expand_as(clean))
        is_first = positions_in_document(rows.ordinal) == 0
        told = torch.where(is_first[..., None], before, noisy.roll(1, dims=1))
        return torch.where(rows.position[..., None] > 0, told, noisy)


def block_rows(
    batch: TokenBatch,
    *,
    block_length: int,
    fill_token_id: int | None,
    restarts_at_answers: bool = False,
) -> BlockRows:
    """Cut rows into blocks.

    Args:
        fill_token_id: the token (EOS) that fills up the last block of a document which it ends;
            None fills nothing.
        restarts_at_answers: blocks start anew where targets begin or end, and the last block of
            every answer that ends in the row is filled up.
    """
    document, tokens, is_target = batch.document, batch.tokens, batch.is_target
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    segment = _segments(batch) if restarts_at_answers else document
    source = place.masked_fill(~batch.is_valid, -1)
    position = positions_in_document(document)
    if fill_token_id is not None:
        is_ended = _is_end(batch, segment, fill_token_id, restarts_at_answers)
        segment, source, nearest, behind = _filled(segment, is_ended, block_length)
        tokens = torch.where(source >= 0, tokens.gather(1, nearest), fill_token_id)
        document = document.gather(1, nearest).masked_fill(segment < 0, -1)
        position = position.gather(1, nearest) + behind
        is_target = is_target.gather(1, nearest) & (document >= 0)
    is_start = positions_in_document(segment) % block_length == 0
    block = is_start.cumsum(1) - 1
    first = torch.arange(tokens.shape[1], device=tokens.device) - positions_in_document(document)
    return BlockRows(
        tokens=tokens,
        document=document,
        position=position.masked_fill(document < 0, 0),
        block=block - block.gather(1, first),
        ordinal=((is_start & (document >= 0)).cumsum(1) - 1).clamp(min=0),
        source=source,
        is_target=is_target,
        fills_answers=restarts_at_answers and fill_token_id is not None,
    )


def mask_exactly(
    rows: BlockRows, is_target: Tensor, level: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Mask l of the n targets of each block.

    Args:
        is_target: [B, W].
        level: [B, W] in [0, 1), equal within a block: l is 1 + floor(level n).
        noise: [B, W] in (0, 1): the l smallest of a block are masked.

    Returns:
        [B, W] which are masked, and [B, W] float64 n / l of each position's block.
    """
    count = rows.block_counts(is_target)  # by ordinal
    in_block = count.gather(1, rows.ordinal)
    num_masked = 1 + (level * in_block).long()
    # Blocks lie one after the other; so do the ranks of their targets, in order of their noise.
    score = (rows.ordinal + noise).masked_fill(~is_target, torch.inf)
    rank = score.argsort(dim=1).argsort(dim=1)
    first = (count.cumsum(1) - count).gather(1, rows.ordinal)
    is_masked = is_target & (rank - first < num_masked)
    return is_masked, in_block.double() / num_masked.double()


def _segments(batch: TokenBatch) -> Tensor:
    """[B, L] runs of targets and runs of other tokens, none over the end of a document, counted
    along the row; -1 on padding.
    """
    document, is_target = batch.document, batch.is_target
    is_new = torch.zeros_like(is_target)
    is_new[:, 1:] = (document[:, 1:] != document[:, :-1]) | (is_target[:, 1:] != is_target[:, :-1])
    return is_new.cumsum(1).masked_fill(~batch.is_valid, -1)


def _is_end(batch: TokenBatch, segment: Tensor, eos: int, restarts_at_answers: bool) -> Tensor:
    """[B, L] bool: the last token of what is to be filled up."""
    document, is_last = batch.document, batch.is_valid.clone()
    is_last[:, :-1] &= segment[:, :-1] != segment[:, 1:]
    is_ended = batch.tokens == eos
    if restarts_at_answers:
        # An answer that something follows has ended, whatever token ends it.
        is_ended[:, :-1] |= document[:, :-1] == document[:, 1:]
        is_ended &= batch.is_target
    return is_last & is_ended


def _filled(
    segment: Tensor, is_end: Tensor, block_length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows whose segments that have an `is_end` ([B, L]) are filled up to whole blocks.

    Returns:
        [B, W] each: segment; source; the place of the token that a position stands for, which on
        filling is the segment's last token; and how far behind that token the position is.
    """
    is_valid, index = segment >= 0, segment.clamp(min=0)
    shape = (len(segment), int(segment.max()) + 1)
    counts = torch.zeros(shape, dtype=torch.long, device=segment.device)
    lengths = counts.scatter_add(1, index, is_valid.long())
    is_ended = counts.scatter_add(1, index, is_end.long()) > 0
    whole = (lengths + block_length - 1) // block_length * block_length
    filled = torch.where(is_ended, whole, lengths)
    stops = filled.cumsum(1)
    width = int(stops[:, -1].max())
    place = torch.arange(width, device=segment.device).expand(len(segment), -1).contiguous()
    found = torch.searchsorted(stops, place, right=True)
    is_padding = found == stops.shape[1]
    found = found.clamp(max=stops.shape[1] - 1)
    position = place - (stops - filled).gather(1, found)
    size = lengths.gather(1, found)
    is_text = ~is_padding & (position < size)
    first = (lengths.cumsum(1) - lengths).gather(1, found)
    in_text = torch.minimum(position, size - 1)
    nearest = (first + in_text).clamp(min=0)
    source = nearest.masked_fill(~is_text, -1)
    return found.masked_fill(is_padding, -1), source, nearest, position - in_text
