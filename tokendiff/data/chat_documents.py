"""Conversations as documents: rendered, ended, filled up, and short enough for a row."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tokendiff.data.bad_rows import BadRow
from tokendiff.data.chats import Conversation
from tokendiff.data.columns import shown
from tokendiff.data.packing import TokenizedDocuments
from tokendiff.data.templates import ChatRenderer, Rendered, RenderError, TrainOn

if TYPE_CHECKING:
    from tokendiff.config.preprocess import PreprocessConfig

_AT_ONCE = 64  # conversations that the tokenizer gets together


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """
    Attributes:
        dataset_format: one of `tokendiff.data.chats.FORMATS`.
        train_on: see `ChatRenderer`.
        too_long: what becomes of a conversation longer than a row.
        fills_answers: a model that denoises whole rows is given a slot of masks for its answer, and
            must learn to end inside it. So the last answer is filled up with EOS to a length that
            is drawn, by a hash of the conversation, log-uniformly between the answer's own and
            what a row has room for (LLaDA, arXiv 2502.09992, fills up to the longest of a batch).
    """

    dataset_format: str
    train_on: TrainOn = "answers"
    too_long: Literal["cut", "drop"] = "cut"
    fills_answers: bool = False

    @classmethod
    def of(
        cls, config: "PreprocessConfig", dataset_format: str, *, fill_answers: bool
    ) -> "ChatOptions | None":
        """The options of a config; None if its rows are text."""
        if dataset_format == "text":
            return None
        return cls(
            dataset_format=dataset_format,
            train_on=config.train_on,
            too_long=config.too_long,
            fills_answers=fill_answers,
        )


@dataclass(frozen=True, kw_only=True)
class ChatDocuments:
    """
    Attributes:
        tokenizer: with its chat template.
        dropped: counts what is left out: "too long", and "cut" and "reasoning", of which the rest
            is kept; and "joined", of which nothing is left out (`Rendered.joins_blank`).
    """

    tokenizer: Any
    options: ChatOptions
    max_length: int
    dropped: Counter[str]

    def of(
        self, conversations: Iterable[Conversation], refuse: Callable[[BadRow], None]
    ) -> Iterator[tuple[list[bytes], TokenizedDocuments]]:
        """Batches of documents: the question of each, and their tokens.

        Each ends with its last target, and with EOS.

        Args:
            refuse: gets each conversation that cannot be rendered.
        """

        def refused(conversation: Conversation, error: RenderError) -> None:
            row = shown([message.fields for message in conversation.messages])
            refuse(BadRow(place=conversation.place(), reason=str(error), row=row))

        template = str(getattr(self.tokenizer, "chat_template", None))
        renderer = _renderer(self.tokenizer, len(self.tokenizer), template, self.options.train_on)
        rest = iter(conversations)
        while batch := list(islice(rest, _AT_ONCE)):
            contents, documents = [], []
            for conversation, rendered in renderer.render(batch, refused):
                document = self._document(conversation, rendered)
                if document is not None:
                    if any(message.has_reasoning for message in conversation.messages):
                        self.dropped["reasoning"] += 1
                    self.dropped["joined"] += rendered.joins_blank
                    contents.append(conversation.prompt.encode("utf-8", "replace"))
                    documents.append(document)
            if documents:
                yield contents, _together(documents)

    def _document(self, conversation: Conversation, rendered: Rendered) -> "_Document | None":
        eos = self.tokenizer.eos_token_id
        stop = int(np.flatnonzero(rendered.is_target)[-1]) + 1
        tokens, is_target = rendered.tokens[:stop], rendered.is_target[:stop]
        if tokens[-1] != eos:
            tokens, is_target = np.append(tokens, np.int32(eos)), np.append(is_target, True)
        if len(tokens) > self.max_length:
            is_lost = not is_target[: self.max_length].any()
            if is_lost or self.options.too_long == "drop":
                self.dropped["too long"] += 1
                return None
            self.dropped["cut"] += 1
            return _Document(
                tokens=tokens[: self.max_length],
                is_target=is_target[: self.max_length],
                num_bytes=rendered.num_bytes(min(stop, self.max_length)),
            )
        num_filler = 0
        if self.options.fills_answers:
            key = repr(conversation.messages).encode("utf-8", "replace")
            num_filler = self._num_filler(is_target, key)
            tokens = np.append(tokens, np.full(num_filler, eos, dtype=np.int32))
            is_target = np.append(is_target, np.ones(num_filler, dtype=bool))
        return _Document(
            tokens=tokens,
            is_target=is_target,
            num_bytes=rendered.num_bytes(stop),
            num_filler=num_filler,
        )

    def _num_filler(self, is_target: np.ndarray, key: bytes) -> int:
        context = np.flatnonzero(~is_target)
        begin = int(context[-1]) + 1 if len(context) else 0
        length, most = len(is_target) - begin, self.max_length - begin
        digest = hashlib.blake2b(key, digest_size=8, person=b"answer fill").digest()
        drawn = int.from_bytes(digest, "big") / 2**64
        return int(length * (most / length) ** drawn) - length


@lru_cache(maxsize=1)
def _renderer(tokenizer: Any, num_tokens: int, template: str, train_on: TrainOn) -> ChatRenderer:
    """Kept for the next partition, with what it has found out about the tokenizer and its
    template. Of changes to the tokenizer it notices more tokens and another template alone.
    """
    return ChatRenderer(tokenizer=tokenizer, train_on=train_on)


@dataclass(frozen=True, kw_only=True)
class _Document:
    tokens: np.ndarray
    is_target: np.ndarray
    num_bytes: int
    num_filler: int = 0


def _together(documents: list[_Document]) -> TokenizedDocuments:
    return TokenizedDocuments(
        tokens=np.concatenate([document.tokens for document in documents]),
        num_bytes=np.array([document.num_bytes for document in documents]),
        lengths=np.array([len(document.tokens) for document in documents]),
        is_target=np.concatenate([document.is_target for document in documents]),
        num_filler=np.array([document.num_filler for document in documents]),
    )


def marked(tokenizer: Any, documents: TokenizedDocuments) -> str:
    """The first document as text, its targets in [[ ]], its filling left out."""
    assert documents.is_target is not None
    assert documents.num_filler is not None
    stop = int(documents.lengths[0] - documents.num_filler[0])
    tokens, is_target = documents.tokens[:stop], documents.is_target[:stop]
    changes = np.flatnonzero(np.diff(is_target.astype(np.int8))) + 1
    parts = []
    for run, chosen in zip(np.split(tokens, changes), np.split(is_target, changes), strict=True):
        text = str(tokenizer.decode(run.tolist()))
        parts.append(f"[[{text}]]" if chosen[0] else text)
    return "".join(parts)
