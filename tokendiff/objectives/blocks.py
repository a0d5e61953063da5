"""Rows of packed documents, cut into blocks as decoding cuts them.

Decoding starts a document at position 0 and goes on block after block of the same length; the block
that a document ends in is full of masks all the same. So positions and blocks start anew with each
document of a row, and its last block is filled up with EOS: a model that only ever saw as many
masks there as there were tokens left would have learnt to read the end of a text off their number.
What a row cuts off has no end, and is not filled up. The filling is a target where the document's
last token is one: behind the end of an answer, but not behind a question that nothing answers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import positions_in_document
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator

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
    """

    tokens: Tensor
    document: Tensor
    position: Tensor
    block: Tensor
    ordinal: Tensor
    source: Tensor
    is_target: Tensor

    @property
    def is_valid(self) -> Tensor:
        """[B, W] False on padding."""
        return self.document >= 0

    @property
    def is_text(self) -> Tensor:
        """[B, W] False on padding and filling."""
        return self.source >= 0

    def block_uniform(self, generator: RowGenerator) -> Tensor:
        """[B, W] a draw from (0, 1) per block, independent of all others."""
        draws = generator.fold_in(_BLOCK).uniform(self.tokens.shape[1])
        return draws.gather(1, self.ordinal)

    def block_counts(self, is_counted: Tensor) -> Tensor:
        """[B, W] how many counted positions ([B, W] bool) the row's block of that ordinal has."""
        return torch.zeros_like(self.ordinal).scatter_add_(1, self.ordinal, is_counted.long())


def block_rows(batch: TokenBatch, *, block_length: int, fill_token_id: int | None) -> BlockRows:
    """Cut rows into blocks.

    Args:
        fill_token_id: the token (EOS) that fills up the last block of a document which it ends;
            None fills nothing.
    """
    document, tokens = batch.document, batch.tokens
    place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    source, is_target = place.masked_fill(~batch.is_valid, -1), batch.is_target
    if fill_token_id is not None:
        document, source, nearest = _filled(batch, block_length, fill_token_id)
        tokens = torch.where(source >= 0, tokens.gather(1, nearest), fill_token_id)
        is_target = is_target.gather(1, nearest) & (document >= 0)
    position = positions_in_document(document)
    is_start = (position % block_length == 0) & (document >= 0)
    return BlockRows(
        tokens=tokens,
        document=document,
        position=position.masked_fill(document < 0, 0),
        block=position // block_length,
        ordinal=(is_start.cumsum(1) - 1).clamp(min=0),
        source=source,
        is_target=is_target,
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


def _filled(batch: TokenBatch, block_length: int, eos: int) -> tuple[Tensor, Tensor, Tensor]:
    """Document and source of each place once last blocks are filled up; and the place whose token
    it is, which on filling is that of the document's last token.
    """
    document, is_valid = batch.document, batch.is_valid
    index = document.clamp(min=0)
    counts = torch.zeros(len(document), int(document.max()) + 1, dtype=torch.long)
    counts = counts.to(document.device)
    lengths = counts.scatter_add(1, index, is_valid.long())
    is_last = is_valid.clone()
    is_last[:, :-1] &= document[:, :-1] != document[:, 1:]
    is_ended = counts.scatter_add(1, index, (is_last & (batch.tokens == eos)).long()) > 0
    whole = (lengths + block_length - 1) // block_length * block_length
    filled = torch.where(is_ended, whole, lengths)
    stops = filled.cumsum(1)
    width = int(stops[:, -1].max())
    place = torch.arange(width, device=document.device).expand(len(document), -1).contiguous()
    found = torch.searchsorted(stops, place, right=True)
    is_padding = found == stops.shape[1]
    found = found.clamp(max=stops.shape[1] - 1)
    position = place - (stops - filled).gather(1, found)
    size = lengths.gather(1, found)
    is_text = ~is_padding & (position < size)
    first = (lengths.cumsum(1) - lengths).gather(1, found)
    nearest = first + torch.minimum(position, size - 1)
    source = nearest.masked_fill(~is_text, -1)
    return found.masked_fill(is_padding, -1), source, nearest.clamp(min=0)
