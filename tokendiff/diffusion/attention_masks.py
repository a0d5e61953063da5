"""Which position may see which, as rules.

A rule says for index tensors b, q, kv (row, query, key; broadcast against each other) whether the
query sees the key. One rule serves every kernel: `dense` evaluates it everywhere, for scaled
dot-product attention, and `mask_mod` hands it to flex_attention, which evaluates it per block.

Rules close over tensors [B, L] of where positions are: `document`, equal within one document and
-1 on padding, which sees itself alone, so that no query is left with nothing to see; and `block`,
which rises along a document. Documents and blocks lie in one piece.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.diffusion.key_runs import KeyRun, RunRule, run_around

# (b, q, kv) int64 tensors that broadcast against each other -> bool tensor of the common shape.
MaskRule = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense(
    rule: MaskRule,
    batch_size: int,
    num_queries: int,
    num_keys: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The rule everywhere: [B, 1, Q, KV] bool, True where the query sees the key."""
    b = torch.arange(batch_size, device=device)[:, None, None]
    q = torch.arange(num_queries, device=device)[:, None]
    kv = torch.arange(num_keys, device=device)
    return rule(b, q, kv).expand(batch_size, num_queries, num_keys)[:, None]


def mask_mod(rule: MaskRule) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule in the form that torch.nn.attention.flex_attention takes, the same for all heads."""
    return lambda b, h, q, kv: rule(b, q, kv)


def positions_in_document(document: Tensor) -> Tensor:
    """[B, L] places counted from 0 at the start of each run of equal `document` [B, L]."""
    place = torch.arange(document.shape[1], device=document.device).expand_as(document)
    is_start = torch.ones_like(document, dtype=torch.bool)
    is_start[:, 1:] = document[:, 1:] != document[:, :-1]
    return place - place.masked_fill(~is_start, 0).cummax(dim=1).values


def whole_documents(document: Tensor) -> MaskRule:
    """A position sees all of its document, and nothing else of the row."""

    def runs() -> tuple[KeyRun, ...]:
        begin, end = run_around(document)
        return (KeyRun(begin=begin, end=end),)

    return RunRule(rule=lambda b, q, kv: document[b, q] == document[b, kv], runs=runs)


def causal(document: Tensor) -> MaskRule:
    """A position sees its document up to itself."""

    def runs() -> tuple[KeyRun, ...]:
        begin, _ = run_around(document)
        return (KeyRun(begin=begin, end=_up_to_itself(document)),)

    return RunRule(rule=lambda b, q, kv: (document[b, q] == document[b, kv]) & (kv <= q), runs=runs)


def block_causal(document: Tensor, block: Tensor, is_text: Tensor | None = None) -> MaskRule:
    """A position sees its own block whole, and all earlier blocks of its document.

    Args:
        is_text: [B, L] bool; what is no text fills up a block, and no later block sees it. By
            default all is text.

    Source: SDAR (arXiv 2510.06303), LLaDA2.0.
    """

    def rule(b: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        block_q, block_kv = block[b, q], block[b, kv]
        is_earlier = block_kv < block_q
        if is_text is not None:
            is_earlier = is_earlier & is_text[b, kv]
        is_seen = (block_kv == block_q) | is_earlier
        return (document[b, q] == document[b, kv]) & is_seen

    def runs() -> tuple[KeyRun, ...]:
        first, _ = run_around(document)
        begin, end = _blocks(document, block)
        return (
            KeyRun(begin=begin, end=end),
            KeyRun(begin=first, end=begin, is_seen=is_text),
        )

    return RunRule(rule=rule, runs=runs)


def block_diffusion(
    document: Tensor,
    block: Tensor,
    is_text: Tensor | None = None,
    *,
    is_causal: bool = False,
    context_is_causal: bool = False,
) -> MaskRule:
    """Rows `[x_t ; x_0]` of twice the length: x_t, then x_0, each at the positions 0..L-1.

    A noisy position sees its own block of x_t and the earlier blocks of x_0; a clean one sees its
    own and the earlier blocks of x_0.

    Args:
        is_text: [B, L] bool; what is no text fills up a block. Its own noisy block sees it. No
            later block does, nor does the clean text of its block, which later blocks read: a
            prompt that holds the block has no filling. By default all is text.
        is_causal: inside a block, a position sees only up to itself.
        context_is_causal: a clean position sees only up to itself, as in the causal model; what a
            noisy one sees of x_0 is then what such a model keeps in its cache.

    Source: BD3-LM (arXiv 2503.09573), section 3 and appendix B.6.
    """
    length = document.shape[1]

    def rule(b: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        place_q, place_kv = q % length, kv % length
        is_clean_q, is_clean_kv = q >= length, kv >= length
        block_q, block_kv = block[b, place_q], block[b, place_kv]
        is_earlier = is_clean_kv & (block_kv < block_q)
        if is_text is not None:
            is_earlier = is_earlier & is_text[b, place_kv]
        is_own = (is_clean_q == is_clean_kv) & (block_kv == block_q)
        if is_text is not None:
            is_own = is_own & (~is_clean_q | is_text[b, place_kv] | ~is_text[b, place_q])
        if is_causal:
            is_own = is_own & (place_kv <= place_q)
        elif context_is_causal:
            is_own = is_own & (~is_clean_q | (place_kv <= place_q))
        return (document[b, place_q] == document[b, place_kv]) & (is_earlier | is_own)

    def runs() -> tuple[KeyRun, ...]:
        first, _ = run_around(document)
        begin, end = _blocks(document, block)
        noisy_end = _up_to_itself(document) if is_causal else end
        clean_end = _up_to_itself(document) if is_causal or context_is_causal else end
        both = torch.cat([begin, begin + length], 1), torch.cat([noisy_end, clean_end + length], 1)
        earlier = torch.cat([first, first], 1) + length, torch.cat([begin, begin], 1) + length
        if is_text is None:
            return KeyRun(begin=both[0], end=both[1]), KeyRun(begin=earlier[0], end=earlier[1])
        is_seen = is_text.repeat(1, 2)
        sees_text = torch.cat([torch.zeros_like(is_text), is_text], 1)  # of its own block alone
        return (
            KeyRun(begin=both[0], end=torch.where(sees_text, *both)),
            KeyRun(begin=both[0], end=torch.where(~sees_text, *both), is_seen=is_seen),
            KeyRun(begin=earlier[0], end=earlier[1], is_seen=is_seen),
        )

    return RunRule(rule=rule, runs=runs)


def _blocks(document: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Where the block of each position begins and ends: [B, L] each."""
    most = block.amax(1, keepdim=True) - block.amin(1, keepdim=True) + 1
    return run_around(document * most + block)


def _up_to_itself(document: Tensor) -> Tensor:
    """[B, L] the place behind each position."""
    return torch.arange(1, document.shape[1] + 1, device=document.device).expand_as(document)


def causal_by_position(b: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    """`causal` where q and kv are positions in one document, as they are while it is decoded."""
    return kv <= q


def block_causal_by_position(block_length: int) -> MaskRule:
    """`block_causal` where q and kv are positions in one document, whose blocks are counted from
    its first token.
    """
    return lambda b, q, kv: kv // block_length <= q // block_length


def block_causal_by_begin(begin: Tensor) -> MaskRule:
    """`block_causal` where q and kv are positions in one document, a row of `begin` [B, T]: the
    position that the block of each position begins at. Positions behind T count as the last one.
    """
    last = begin.shape[1] - 1
    return lambda b, q, kv: begin[b, kv.clamp(max=last)] <= begin[b, q.clamp(max=last)]


def causal_up_to(begin: Tensor) -> MaskRule:
    """`causal` for positions q and kv in one document, except that the active block, which begins
    at `begin` [B], sees itself whole.
    """
    return lambda b, q, kv: (kv <= q) | (q >= begin[b])


def masks_behind_each(begin: Tensor, block_length: int) -> MaskRule:
    """`causal` where q and kv are places in one row, behind whose first `begin` [B] tokens stand K
    more, then K groups of K masks: group a stands for the text behind the a-th of those tokens. It
    sees the text up to that token, and itself whole.
    """
    size = block_length

    def rule(b: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        from_q, from_kv = q - begin[b], kv - begin[b]
        group_q, group_kv = from_q // size - 1, from_kv // size - 1
        is_text = from_kv < size
        sees_text = from_kv <= torch.where(from_q < size, from_q, group_q)
        is_own = ~is_text & (group_q == group_kv)
        return (is_text & sees_text) | is_own

    return rule


@dataclass(frozen=True, kw_only=True)
class AnchoredBlocks:
    """A rule: queries are A blocks of `block_size`; keys are the row's L tokens, then the same
    blocks. A block sees a run of the tokens, and itself whole.

    Being two runs of keys per block, it can be had without asking it for each pair
    (`tokendiff.models.dflash.block_attention`).

    Attributes:
        begin, end: [B, A] int64, the run of tokens; empty where they are equal.
        length: L.
        window: W, a query at place p sees tokens of the row from p - W + 1 on; the first place of
            a block is `end`. None: all of the run.
    """

    begin: Tensor
    end: Tensor
    length: int
    block_size: int
    window: int | None = None

    def __call__(self, b: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        block = q // self.block_size
        is_context = (kv >= self.begin[b, block]) & (kv < self.end[b, block])
        if self.window is not None:
            is_context = is_context & (kv > self.end[b, block] + q % self.block_size - self.window)
        is_own = (kv >= self.length) & ((kv - self.length) // self.block_size == block)
        return is_context | is_own

    def begin_of_queries(self) -> Tensor:
        """[B, A, block_size]: where the run of each query begins, at `end` where it is empty."""
        begin = self.begin[:, :, None].expand(-1, -1, self.block_size)
        if self.window is None:
            return begin
        place = torch.arange(self.block_size, device=begin.device)
        end = self.end[:, :, None]
        return torch.maximum(begin, end + place - self.window + 1).minimum(end)


def dflash_blocks(
    document: Tensor, anchors: Tensor, block_size: int, window: int | None = None
) -> AnchoredBlocks:
    """A block sees the tokens of its anchor's document strictly before the anchor.

    Args:
        anchors: [B, A] int64 places in the row; a block that is not used has 0, and sees itself.

    Source: DFlash (arXiv 2602.06036).
    """
    place = positions_in_document(document).gather(1, anchors)
    return AnchoredBlocks(
        begin=anchors - place,
        end=anchors,
        length=document.shape[1],
        block_size=block_size,
        window=window,
    )
