"""What objectives and samplers are given and give back; a model is known here only as what it is
called by.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import AnchoredBlocks, MaskRule
from tokendiff.diffusion.candidates import Candidates
from tokendiff.diffusion.random import RowGenerator


class Denoiser(Protocol):
    """A model in two parts, so that logits are computed only where they are needed."""

    @property
    def is_time_conditioned(self) -> bool:
        """Whether `encode` reads the time; what it returns is otherwise good at any time."""
        ...

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        """Hidden states [B, L, D] of noisy tokens [B, L] at times [B] in [0, 1]; positions outside
        `is_valid` ([B, L]) are not seen. The states are on the model's device, wherever the rows
        are.

        Args:
            document: [B, L] as in TokenBatch: a position sees those of its own document alone, and
                positions are counted anew in each. None takes a row for one document.
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], over every id of the vocabulary, the mask
        included.
        """
        ...


@runtime_checkable
class WindowedDenoiser(Denoiser, Protocol):
    """A denoiser that can read some positions of a row again, beside the keys and values that it
    has kept of the others.

    The result is that of `encode` where the others were read with the same tokens all over the row,
    and an approximation else.
    """

    def new_memory(self, num_rows: int) -> Any:
        """What is kept of so many rows."""
        ...

    def encode_window(
        self, tokens: Tensor, positions: Tensor, is_valid: Tensor, memory: Any, rows: Tensor
    ) -> Tensor:
        """Hidden states [n, N, D] that tell the tokens at some positions of n rows; what is kept of
        these positions is written anew.

        Args:
            tokens: [n, L] of the whole rows.
            positions: [n, N] without gaps, rising; the last one may be repeated, to fill a row up,
                and what is returned for a repetition means nothing.
            is_valid: [n, L] as in `encode`.
            rows: [n] int64, the rows of the memory that they belong to.
        """
        ...


class CausalDenoiser(Protocol):
    """A causal language model that is told where each token stands and what it sees.

    Whether its logits at a position are for the token there or for the next one is the objective's
    business: nothing is shifted here. What it is given is on the model's own device
    (`tokendiff.diffusion.devices`).
    """

    def encode(self, tokens: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
        """Hidden states [B, Q, D] of tokens [B, Q] at positions [B, Q] (counted from 0), each
        seeing what `rule` says (`tokendiff.diffusion.attention_masks`).
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], over every id of the vocabulary, the mask
        included.
        """
        ...


@runtime_checkable
class SelfConditionedDenoiser(CausalDenoiser, Protocol):
    """One that reads noisy text otherwise than clean text, which alone `encode` is for, and can be
    told what a pass before found, with the mask as no candidate.
    """

    def encode_noisy(
        self, tokens: Tensor, positions: Tensor, rule: MaskRule, *, is_told: Tensor | None
    ) -> Tensor:
        """As `encode`, of rows `[x_t ; x_0]` of noisy and of clean tokens.

        Args:
            is_told: [B] bool on the CPU, rows that are told what a pass without gradient found;
                None: none.
        """
        ...


class DraftingDenoiser(CausalDenoiser, Protocol):
    """One with adapters for what it drafts, without which it is the model that it was."""

    def encode(
        self,
        tokens: Tensor,
        positions: Tensor,
        rule: MaskRule,
        *,
        is_draft: Tensor | None = None,
    ) -> Tensor:
        """As `CausalDenoiser.encode`.

        Args:
            is_draft: [B, Q] bool, where the adapters count; None: nowhere.
        """
        ...


class Selector(Protocol):
    """Which of its likeliest tokens a draft proposes (`tokendiff.diffusion.candidates`)."""

    @property
    def top_k(self) -> int:
        """Candidates of a place."""
        ...

    @property
    def predecessor_codebook(self) -> Tensor: ...

    @property
    def successor_codebook(self) -> Tensor: ...

    def __call__(self, hidden: Tensor) -> Tensor:
        """Features [..., R] of hidden states [..., D]."""
        ...


class DraftBesideTarget(Protocol):
    """A draft that is trained, with the frozen causal language model whose tokens it drafts."""

    @property
    def selector(self) -> Selector | None:
        """None where the draft proposes its likeliest tokens."""
        ...

    def read(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """What the draft is told of each token: [B, L, C], without gradient.

        Args:
            positions: [B, L], counted from 0 in each document; documents do not see each other.
        """
        ...

    def draft(
        self, tokens: Tensor, context: Tensor, positions: Tensor, rule: AnchoredBlocks
    ) -> Tensor:
        """Hidden states [B, Q, D] of blocks.

        Args:
            tokens: [B, Q] of the blocks, side by side.
            context: [B, L, C] from `read`.
            positions: [B, L + Q] of the context, then of the blocks.
            rule: what the Q queries see of those L + Q keys.
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of hidden states [N, D], by the target's head, which stays as it is."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Rows of packed tokens.

    Attributes:
        tokens: [B, L] int64 clean tokens, padded at the right.
        is_valid: [B, L] bool; False on padding.
        document: [B, L] int64, which document of its row a position belongs to, counted from 0; -1
            on padding. By default a row is one document.
        is_target: [B, L] bool, what the loss and the bound are of: in chats the answers, whose
            prompts are given. By default all that is valid.
        isolates_documents: whether the documents of a row are hidden from each other also in models
            that see whole rows; in causal ones they always are.
        target_states: [B, L, C] what `DraftBesideTarget.read` gives of these rows, where that was
            computed before; anything on padding.
    """

    tokens: Tensor
    is_valid: Tensor
    document: Tensor = field(default=cast(Tensor, None))
    is_target: Tensor = field(default=cast(Tensor, None))
    isolates_documents: bool = False
    target_states: Tensor | None = None

    def __post_init__(self) -> None:
        if self.document is None:
            object.__setattr__(self, "document", self.is_valid.long() - 1)
        if self.is_target is None:
            object.__setattr__(self, "is_target", self.is_valid)

    def without_first_tokens(self) -> "TokenBatch":
        """The rows for a model whose state before a token tells it: a token that no state stands
        before, the first of a row or of an isolated document, is given and no target.
        """
        document = self.document if self.isolates_documents else torch.zeros_like(self.document)
        is_behind_one = torch.zeros_like(self.is_target)
        is_behind_one[:, 1:] = document[:, 1:] == document[:, :-1]
        return replace(self, is_target=self.is_target & is_behind_one)

    @property
    def isolated(self) -> Tensor | None:
        """What `Denoiser.encode` is told of documents."""
        return self.document if self.isolates_documents else None

    @classmethod
    def of_rows(
        cls,
        tokens: Tensor,
        lengths: Tensor,
        is_start: Tensor,
        is_target: Tensor | None = None,
        *,
        isolates_documents: bool = False,
    ) -> "TokenBatch":
        """Rows as shards hold them.

        Args:
            tokens: [B, L] ids, anything on padding.
            lengths: [B] where padding begins.
            is_start: [B, L] bool, where a document begins.
            is_target: [B, L] bool, anything on padding; None for all tokens.
        """
        is_valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        document = (is_start.cumsum(1) - 1).masked_fill(~is_valid, -1)
        return cls(
            tokens=tokens.long(),
            is_valid=is_valid,
            document=document,
            is_target=is_valid if is_target is None else is_valid & is_target,
            isolates_documents=isolates_documents,
        )


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A sum and a count, so that the mean is taken once, over all workers and micro-batches.

    Attributes:
        loss_sum: scalar, nats, with gradient.
        num_tokens: scalar count of valid tokens that `loss_sum / num_tokens` is a mean over.
        metrics: name to (sum, count), scalars without gradient.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    def loss(self, model: Any, batch: TokenBatch, generator: RowGenerator) -> LossOutput:
        """Draw noise for the rows and take the loss; `model` is of the kind that the objective
        trains, a `Denoiser` or a `CausalDenoiser`.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Finished sequences.

    Attributes:
        tokens: [B, L] int64, no mask among them.
        num_model_calls: [B] int64, forward passes that the row took part in, those for guidance
            included.
    """

    tokens: Tensor
    num_model_calls: Tensor


class DecodingCache(Protocol):
    """Keys and values of rows that have their own lengths.

    A call writes the keys and values of its tokens behind the end of each row. Later calls do not
    see them unless `extend` keeps them, or some of them.
    """

    @property
    def lengths(self) -> Tensor:
        """[R] int64 on the CPU, tokens that are kept per row; not to be written to."""
        ...

    def extend(self, rows: Tensor, counts: Tensor) -> None:
        """Keep the first `counts` [n] of the tokens that the last call encoded for `rows` [n]."""
        ...

    def crop(self, rows: Tensor, lengths: Tensor) -> None:
        """Cut rows [n] back to at most `lengths` [n] tokens; 0 frees a row for another text."""
        ...

    def move(self, source: int, target: int) -> None:
        """Put the row `source` in place of the row `target`."""
        ...


class Decoder(Protocol):
    """A causal language model that keeps what it has read.

    Numbers of rows and tokens may be on the CPU, and then nothing waits for the device; hidden
    states, and what a rule closes over, are on it.

    Hidden states at position i are those of the token at i; whether they are read as logits for i
    or for i + 1 is the sampler's business.
    """

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, num_rows: int) -> DecodingCache: ...

    def encode(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
    ) -> Tensor:
        """Hidden states [n, N, D] of new tokens, which stand behind the kept ones of their rows.

        Args:
            tokens: [n, N] int64.
            num_tokens: [n] int64, how many of a row's N are there; the others are padding, which
                nothing sees.
            rows: [n] int64, the cache's rows that they belong to, each at most once.
            rule: what a token sees (`tokendiff.diffusion.attention_masks`), q and kv being
                positions in the row, and b counting the n rows of this call.
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] of hidden states [n, D], over every id of the vocabulary."""
        ...


class SelfDraftingDecoder(Decoder, Protocol):
    """A decoder that drafts for itself."""

    @property
    def max_length(self) -> int | None:
        """Positions that the model has; None where it does not say."""
        ...

    def encode(
        self,
        tokens: Tensor,
        num_tokens: Tensor,
        cache: DecodingCache,
        rows: Tensor,
        rule: MaskRule,
        *,
        positions: Tensor | None = None,
        is_draft: Tensor | None = None,
    ) -> Tensor:
        """As `Decoder.encode`; q and kv of the rule are places behind one another.

        Args:
            positions: [n, N] where the tokens stand in their texts; by default at their places.
            is_draft: [n, N] bool, where adapters count that the model has for what it drafts; None:
                nowhere.
        """
        ...


@runtime_checkable
class DraftedDecoder(Decoder, Protocol):
    """A decoder with a draft model beside it. The draft reads what `extend` keeps of a row."""

    @property
    def block_size(self) -> int:
        """K, tokens of a block, at least 2: the anchor, and those that are drafted."""
        ...

    def draft(self, anchors: Tensor, cache: DecodingCache, rows: Tensor) -> "Tensor | Candidates":
        """Hidden states [n, K - 1, D], for `head`, of the tokens behind an anchor ([n] int64) that
        stands behind what is kept of each of `rows` [n]; or, of a draft with a selector, the
        candidates for these tokens.
        """
        ...


@runtime_checkable
class CanvasDecoder(Decoder, Protocol):
    """A decoder that denoises a block in passes of their own, over the clean text before it that
    `encode` has read, and that is told what the pass before found (self-conditioning).
    """

    def denoise(
        self, tokens: Tensor, found: Tensor | None, cache: DecodingCache, rows: Tensor
    ) -> Tensor:
        """Hidden states [n, K, D], for `head`, of noisy blocks [n, K] that stand behind what is
        kept of `rows` [n]. A block sees itself whole; nothing is kept of it.

        Args:
            found: [n, K, D] from `expected_embedding` of the pass before, 0 in the first pass of a
                block; None where it is the first of all.
        """
        ...

    def expected_embedding(self, logits: Tensor) -> Tensor:
        """[N, D] the mean embedding of tokens under logits [N, V]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue.

    Attributes:
        id: with the seed it decides the row's randomness.
        prompt: token ids, at least one.
        block_starts: places in the prompt, or its length, at which samplers that decode block by
            block start anew to count blocks, rising; by default they count from the first token.
    """

    id: int
    prompt: tuple[int, ...]
    block_starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        starts = self.block_starts
        if list(starts) != sorted(set(starts)) or (starts and starts[-1] > len(self.prompt)):
            raise ValueError(
                f"row {self.id}: block_starts must rise and lie in the prompt of "
                f"{len(self.prompt)} tokens or at its end, got {list(starts)}"
            )

    def block_begins(self, block_length: int, num_tokens: int) -> Tensor:
        """[num_tokens] int64: where the block of each position of the prompt, and of what follows
        it, begins.
        """
        place, starts = torch.arange(num_tokens), torch.tensor((0, *self.block_starts))
        start = starts[torch.searchsorted(starts, place, right=True) - 1]
        return start + (place - start) // block_length * block_length


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished continuation.

    Attributes:
        tokens: new tokens, the stop token included where there is one.
        finish_reason: "stop" at a stop token, "length" at the most tokens that were asked for.
        num_model_calls: forward passes that the row took part in, those of its prompt included.
        counts: what else a sampler counts, per row; a list is a histogram.
    """

    id: int
    tokens: list[int]
    finish_reason: FinishReason
    num_model_calls: int
    counts: dict[str, int | list[int]] = field(default_factory=dict)


# Called after each step of a sampler with (time reached, x_t [B, L]); x_t must not be written to.
StepCallback = Callable[[float, Tensor], None]
# How far some work has got: what is done of it, say rows, and its tokens. What is under way counts
# in part.
Figures = tuple[float, float]
# Called in the course of the work, after every step of it, with a function that says how far it has
# got. That may cost something, so it is asked only where somebody wants to know.
OnProgress = Callable[[Callable[[], Figures]], None]


def unwatched(figures: Callable[[], Figures]) -> None:
    """The OnProgress of work that nobody watches."""
