"""Conversations to token ids by a chat template, and which of those tokens are answers.

The ids are those of `tokenizer.apply_chat_template` of the whole conversation. Its answers are
found from the template's generation tags, where it has some, and else by writing out how the
conversation begins: what an answer adds to the messages before it, with the words that ask for an
answer, is that answer. So it holds the token that ends the turn, which the model must learn too.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from tokendiff.artifacts.locations import location
from tokendiff.data.chats import Conversation, Message
from tokendiff.data.encoding import Encoded, Encoder
from tokendiff.errors import InputError, reason_of

Spans = Sequence[tuple[int, int]]
Written = tuple[str, list[tuple[int, int]]]  # a text, and the characters that each answer takes
TrainOn = Literal["answers", "last_answer", "all"]

_BEGINNING = 8  # characters of a special token that are looked for first


class RenderError(ValueError):
    """A conversation that cannot be written out; says why."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as tokens.

    Attributes:
        tokens: [N] int32, with what stands behind the last answer.
        is_target: [N] bool, the tokens that are learnt.
        is_special: [N] bool, the tokens that are special ones of the tokenizer.
        encoded: the same tokens, and where in the text they stand.
        joins_blank: the blank before an answer is in the token of its first word, so that a prompt
            which ends in that blank ends in a token that is not seen here.
    """

    tokens: np.ndarray
    is_target: np.ndarray
    is_special: np.ndarray
    encoded: Encoded
    joins_blank: bool = False

    def num_bytes(self, stop: int) -> int:
        """UTF-8 bytes of text that the targets among the first `stop` tokens stand for, but for
        special tokens.

        A token's text goes on to where the next one begins, so the last one of a character that
        takes several has its bytes.
        """
        is_counted = np.zeros(stop + 2, dtype=bool)  # not in front, and not behind
        is_counted[1:-1] = self.is_target[:stop] & ~self.is_special[:stop]
        edges = np.flatnonzero(is_counted[1:] != is_counted[:-1])
        places = [self.encoded.bytes_before(edge) for edge in edges.tolist()]
        return sum(places[1::2]) - sum(places[::2])


@dataclass(frozen=True, kw_only=True)
class ChatRenderer:
    """
    Attributes:
        tokenizer: a fast one, which can say where in a text its tokens stand.
        train_on: which tokens are targets: those of all answers, of the last one, or all.

    Raises:
        InputError: the tokenizer is a slow one.
    """

    tokenizer: Any
    train_on: TrainOn = "answers"

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise InputError(
                "conversations need a fast tokenizer (tokenizer.json), which says where in the "
                "text a token stands; this model has a slow one only"
            )

    @cached_property
    def _added(self) -> dict[int, Any]:
        # transformers makes it anew each time that it is asked.
        added: dict[int, Any] = self.tokenizer.added_tokens_decoder
        return added

    @cached_property
    def _special(self) -> list[str]:
        return sorted({token.content for token in self._added.values() if token.special})

    @cached_property
    def _is_special(self) -> np.ndarray:
        """[N] bool by id: whether it is a special token. The last one stands for all ids above."""
        special = [id_ for id_, token in self._added.items() if token.special]
        found = np.zeros(max(special, default=0) + 2, dtype=bool)
        found[special] = True
        return found

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def check(self, dataset_format: str) -> None:
        """Raise InputError where conversations of a format cannot be written out at all."""
        if not self.has_template and dataset_format not in PLAIN_FORMATS:
            raise InputError(
                f"dataset_format {dataset_format}: the tokenizer has no chat template; give one "
                "(--chat_template FILE), or the tokenizer of a chat model"
            )
        if self.has_template:
            probe = (Message(role="user", content="a"), Message(role="assistant", content="b"))
            try:
                self(Conversation(messages=probe))
            except RenderError as error:
                raise InputError(f"the chat template cannot be used: {error}") from error

    def __call__(self, conversation: Conversation) -> Rendered:
        """
        Raises:
            RenderError: the template refuses it, or does not let its answers be told.
        """
        (rendered,) = self._tokenize([self._write(conversation)])
        if isinstance(rendered, RenderError):
            raise rendered
        return rendered

    def render(
        self,
        conversations: Iterable[Conversation],
        refuse: Callable[[Conversation, RenderError], None],
    ) -> Iterator[tuple[Conversation, Rendered]]:
        """Those that can be written out, tokenized together.

        Args:
            refuse: is told of the others.
        """
        given = list(conversations)
        kept, written = [], []
        for conversation, text in zip(given, self._texts(given), strict=True):
            try:
                written.append(self._write(conversation, text))
                kept.append(conversation)
            except RenderError as error:
                refuse(conversation, error)
        for conversation, rendered in zip(kept, self._tokenize(written), strict=True):
            if isinstance(rendered, RenderError):
                refuse(conversation, rendered)
            else:
                yield conversation, rendered

    def _texts(self, conversations: Sequence[Conversation]) -> Sequence[str | None]:
        """What they render to; None where each has to be rendered by itself."""
        if self.has_template and not self._is_tagged:
            with suppress(RenderError):  # of one of them, which is not known
                return self._written([conversation.messages for conversation in conversations])
        return [None] * len(conversations)

    @cached_property
    def _is_tagged(self) -> bool:
        template = self.tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template]
        return any(_GENERATION_TAG.search(text) for text in texts)

    def _write(
        self, conversation: Conversation, text: str | None = None
    ) -> tuple[str, Spans, Spans]:
        """The text, and the characters of the answers that are learnt, and of those that are not
        for their weight.
        """
        text, spans = self._write_out(conversation, text)
        if self.train_on == "last_answer":
            spans = spans[-1:]
        answers = [m for m in conversation.messages if m.role == "assistant"]
        if all(answer.is_learnt for answer in answers):
            return text, spans, []
        if self.train_on != "answers" and not answers[-1].is_learnt:
            raise RenderError(
                f"its last answer has weight 0, and train_on {self.train_on} goes up to that one; "
                "take it out, or set train_on to answers"
            )
        if self.train_on == "last_answer":
            return text, spans, []
        if len(answers) != len(spans):
            raise RenderError(
                f"the chat template marks {len(spans)} parts of {len(answers)} answers, so those "
                "of weight 0 cannot be told; give a template that marks each answer once, or leave "
                "the weights out"
            )
        found: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for answer, span in zip(answers, spans, strict=True):
            found[answer.is_learnt].append(span)
        return text, found[True], found[False]

    def _write_out(self, conversation: Conversation, text: str | None) -> Written:
        self._refuse_special_tokens(conversation)
        if self.has_template:
            if self._is_tagged:
                return self._tagged(conversation.messages)
            return self._by_outline(conversation.messages, text)
        if conversation.plain is None:
            raise RenderError(
                "a conversation of more than one turn needs a chat template, and there is none"
            )
        prompt, answer = conversation.plain
        return prompt + answer, [(len(prompt), len(prompt) + len(answer))]

    def _tokenize(
        self, written: Sequence[tuple[str, Spans, Spans]]
    ) -> list[Rendered | RenderError]:
        if not written:
            return []
        found: list[Rendered | RenderError] = []
        encoded = self._encoder([text for text, _, _ in written])
        for (_, learnt, unlearnt), each in zip(written, encoded, strict=True):
            if self.train_on == "all":
                is_target = ~self._in_spans(each, unlearnt)
            else:
                is_target = self._in_spans(each, learnt)
            if not len(each.ids):
                found.append(RenderError("it renders to nothing"))
            elif not is_target.any():
                found.append(RenderError("none of its tokens is of an answer"))
            else:
                found.append(
                    Rendered(
                        tokens=each.ids,
                        is_target=is_target,
                        is_special=self._is_special.take(each.ids, mode="clip"),
                        encoded=each,
                        joins_blank=_joins_blank(each, [start for start, _ in learnt]),
                    )
                )
        return found

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    def _in_spans(self, encoded: Encoded, spans: Spans) -> np.ndarray:
        """[N] bool, tokens that begin in one of the spans of characters, or hold its beginning."""
        found = np.zeros(len(encoded.ids), dtype=bool)
        if not spans:
            return found
        edges = encoded.firsts_from([char for span in spans for char in span])
        for (start, _), first, stop in zip(spans, edges[::2], edges[1::2], strict=True):
            found[_with_beginning(encoded, first, start) : stop] = True
        return found

    def _written(self, talks: Sequence[Sequence[Message]], *, ask: bool = False) -> list[str]:
        """Each talk by itself. All at once: what the template needs is gathered once a call, which
        takes longer than a talk.
        """
        plain = [[message.fields for message in messages] for messages in talks]
        try:
            written: list[str] = self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=ask
            )
        # A template is a program of whoever made the model, in a sandbox: it may raise anything.
        except Exception as error:
            raise RenderError(f"the chat template refuses it ({reason_of(error)})") from error
        return written

    def _by_outline(self, messages: Sequence[Message], text: str | None = None) -> Written:
        """As `_by_prefixes`, by one rendering, `text`, in place of two for each answer: where the
        outline of other conversations with the same roles is the outline of this one too.
        """
        if text is None:
            (text,) = self._written([messages])
        outline = self._outline(tuple(message.role for message in messages))
        contents = [message.content for message in messages]
        if outline is not None and (spans := outline.spans(contents, text)) is not None:
            return text, spans
        return self._by_prefixes(messages)

    def _outline(self, roles: tuple[str, ...]) -> "_Outline | None":
        """Made from words that stand nowhere else; None where the template does not keep them."""
        if roles not in self._outlines:
            words = [f"word{number}word" for number in range(len(roles))]
            probe = [Message(role=r, content=word) for r, word in zip(roles, words, strict=True)]
            try:
                self._outlines[roles] = _Outline.of(words, *self._by_prefixes(probe))
            except RenderError:
                self._outlines[roles] = None
        return self._outlines[roles]

    @cached_property
    def _outlines(self) -> "dict[tuple[str, ...], _Outline | None]":
        return {}

    def _by_prefixes(self, messages: Sequence[Message]) -> Written:
        answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
        if self.train_on == "last_answer":
            answers = answers[-1:]
        whole, *afters = self._written([messages, *(messages[: number + 1] for number in answers)])
        befores = self._written([messages[:number] for number in answers], ask=True)
        text, found = whole, []
        for number, before, after in zip(answers, befores, afters, strict=True):
            if not text.startswith(before) or not text.startswith(after):
                raise RenderError(
                    f"the chat template changes the text before message {number} when later "
                    "messages are added, so the answers cannot be located; set train_on to "
                    "last_answer, or give a template that marks answers ({% generation %})"
                )
            found.append((len(before), len(before) + len(after[len(before) :].rstrip())))
        return text, found

    def _tagged(self, messages: Sequence[Message]) -> Written:
        from transformers.utils.chat_template_utils import render_jinja_template

        (text,) = self._written([messages])
        plain = [message.fields for message in messages]
        render: Any = render_jinja_template  # its annotation names the first of two results
        rendered, spans = render(
            conversations=[plain],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        if rendered[0] != text:
            raise RenderError(
                "the chat template writes this conversation differently when its answers are marked"
            )
        return text, [self._with_end(text, start, stop) for start, stop in spans[0]]

    def _with_end(self, text: str, start: int, stop: int) -> tuple[int, int]:
        """The span of an answer, with the special token behind it: what ends the turn. One that
        has its own needs no other, which would be that of the next turn.
        """
        if any(text.endswith(token, start, stop) for token in self._special):
            return start, stop
        for token in self._added.values():
            if token.special and text.startswith(token.content, stop):
                return start, stop + len(token.content)
        return start, stop

    @cached_property
    def _beginnings(self) -> set[str]:
        """How special tokens begin, of which there may be hundreds; few texts contain any. It takes
        less to look for a longer beginning.
        """
        return {token[:_BEGINNING] for token in self._special}

    def _refuse_special_tokens(self, conversation: Conversation) -> None:
        everything = "".join([message.content for message in conversation.messages])
        if not any(beginning in everything for beginning in self._beginnings):
            return
        for number, message in enumerate(conversation.messages):
            for token in self._special:
                if token in message.content:
                    raise RenderError(
                        f"message {number} spells the special token {token!r}, which would end or "
                        "begin a turn; take it out of the text"
                    )


def _with_beginning(encoded: Encoded, first: int, char: int) -> int:
    """The first token of an answer from `char` on: the one before `first`, if that holds how the
    answer begins, as " Paris" does where a template asks for an answer with "assistant: ".

    Blanks of an answer that belong to a token before it are left out.
    """
    if first == 0 or not encoded.text[char : encoded.starts_at(first)].strip():
        return first
    return first - 1 if encoded.reaches(first - 1, char) else first


def _joins_blank(encoded: Encoded, starts: Iterable[int]) -> bool:
    """Whether one of the answers that start there begins within a token, behind a blank."""
    for start in starts:
        if encoded.text[max(start - 1, 0) : start] == " ":
            first = encoded.first_from(start)
            if _with_beginning(encoded, first, start) < first:
                return True
    return False


@dataclass(frozen=True, kw_only=True)
class _Outline:
    """How a template writes conversations of some roles.

    Attributes:
        around: what stands before, between and behind the messages.
        answers: (message, characters of the answer before what it says, characters behind).
    """

    around: Sequence[str]
    answers: Sequence[tuple[int, int, int]]

    @classmethod
    def of(
        cls, contents: Sequence[str], text: str, spans: Sequence[tuple[int, int]]
    ) -> "_Outline | None":
        """The outline of a rendered conversation; None if one of its contents does not stand in the
        text exactly once.
        """
        if any(text.count(content) != 1 for content in contents):
            return None
        begins = [text.index(content) for content in contents]
        ends = [begin + len(content) for begin, content in zip(begins, contents, strict=True)]
        if begins != sorted(begins):
            return None
        answers = []
        for start, stop in spans:
            inside = [at for at, begin in enumerate(begins) if start <= begin and ends[at] <= stop]
            if len(inside) != 1:
                return None
            answers.append((inside[0], begins[inside[0]] - start, stop - ends[inside[0]]))
        edges = zip([0, *ends], [*begins, len(text)], strict=True)
        return cls(around=[text[end:begin] for end, begin in edges], answers=answers)

    def spans(self, contents: Sequence[str], text: str) -> list[tuple[int, int]] | None:
        """Where the answers of a text of this outline are, which may have its contents without the
        blanks around them; None of another text.
        """
        place = len(self.around[0])
        if not text.startswith(self.around[0]):
            return None
        said = []
        for content, behind in zip(contents, self.around[1:], strict=True):
            stop = place + len(content)
            if not (text.startswith(content, place) and text.startswith(behind, stop)):
                words = content.strip()
                stop = place + len(words)
                if not (text.startswith(words, place) and text.startswith(behind, stop)):
                    return None
            said.append((place, stop))
            place = stop + len(behind)
        if place != len(text):
            return None
        found = []
        for message, before, behind_it in self.answers:
            start = said[message][0] - before
            stop = min(said[message][1] + behind_it, len(text))
            while stop > start and text[stop - 1].isspace():
                stop -= 1
            found.append((start, stop))
        return found


# Formats of one turn, which can be written out without a template.
PLAIN_FORMATS = ("prompt_completion", "alpaca")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")


def read_template(path: str) -> str:
    """The chat template in a file.

    Raises:
        InputError: there is none.
    """
    try:
        return location(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"chat_template {path}: cannot be read ({error}); give a file with a Jinja template"
        ) from error
