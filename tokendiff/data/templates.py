"""Conversations to token ids by a chat template, and which of those tokens are answers.

The ids are those of `tokenizer.apply_chat_template` of the whole conversation. Its answers are
found from the template's generation tags, where it has some, and else by writing out how the
conversation begins: what an answer adds to the messages before it, with the words that ask for an
answer, is that answer. So it holds the token that ends the turn, which the model must learn too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tokendiff.artifacts.locations import location
from tokendiff.data.chats import Conversation, Message
from tokendiff.errors import InputError, reason_of

Written = tuple[str, list[tuple[int, int]]]  # a text, and the characters that each answer takes
TrainOn = Literal["answers", "last_answer", "all"]


class RenderError(ValueError):
    """A conversation that cannot be written out; says why."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as tokens.

    Attributes:
        tokens: [N] int32, with what stands behind the last answer.
        is_target: [N] bool, the tokens that are learnt.
        num_bytes: [N] int32, UTF-8 bytes of text that each target stands for; of others, and of
            special tokens, 0.
    """

    tokens: np.ndarray
    is_target: np.ndarray
    num_bytes: np.ndarray


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
        kept, written = [], []
        for conversation in conversations:
            try:
                written.append(self._write(conversation))
                kept.append(conversation)
            except RenderError as error:
                refuse(conversation, error)
        for conversation, rendered in zip(kept, self._tokenize(written), strict=True):
            if isinstance(rendered, RenderError):
                refuse(conversation, rendered)
            else:
                yield conversation, rendered

    def _write(self, conversation: Conversation) -> Written:
        self._refuse_special_tokens(conversation)
        if self.has_template:
            text = self._written(conversation.messages)
            return text, self._answers(conversation.messages, text)
        if conversation.plain is None:
            raise RenderError("there is no chat template, and more than one turn")
        prompt, answer = conversation.plain
        return prompt + answer, [(len(prompt), len(prompt) + len(answer))]

    def _tokenize(self, written: Sequence[Written]) -> list[Rendered | RenderError]:
        if not written:
            return []
        encoding = self.tokenizer(
            [text for text, _ in written],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        found: list[Rendered | RenderError] = []
        for (text, spans), ids, places in zip(
            written, encoding["input_ids"], encoding["offset_mapping"], strict=True
        ):
            tokens = np.array(ids, dtype=np.int32)
            offsets = np.array(places, dtype=np.int64).reshape(-1, 2)
            is_target = self._in_spans(offsets, spans)
            if self.train_on == "all":
                is_target = np.ones(len(tokens), dtype=bool)
            if not len(tokens):
                found.append(RenderError("it renders to nothing"))
            elif not is_target.any():
                found.append(RenderError("none of its tokens is of an answer"))
            else:
                num_bytes = self._bytes_of(text, tokens, offsets, is_target)
                found.append(Rendered(tokens=tokens, is_target=is_target, num_bytes=num_bytes))
        return found

    def _in_spans(self, offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
        """[N] bool, tokens that begin in one of the spans of characters."""
        chosen = spans[-1:] if self.train_on == "last_answer" else spans
        found = np.zeros(len(offsets), dtype=bool)
        for start, stop in chosen:
            found |= (offsets[:, 0] >= start) & (offsets[:, 0] < stop)
        return found

    def _bytes_of(
        self, text: str, tokens: np.ndarray, offsets: np.ndarray, is_target: np.ndarray
    ) -> np.ndarray:
        decoder = self.tokenizer.added_tokens_decoder
        special = np.isin(tokens, [index for index, token in decoder.items() if token.special])
        places = np.concatenate([[0], np.cumsum([len(char.encode()) for char in text])])
        # Up to where the next one begins: of the tokens of one character the last has its bytes.
        sizes = np.diff(places[offsets[:, 0]], append=places[-1])
        return np.where(is_target & ~special, sizes, 0).astype(np.int32)

    def _written(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        import jinja2

        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(
                self.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=ask)
            )
        except (jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
            raise RenderError(f"the chat template refuses it ({reason_of(error)})") from error

    def _answers(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Characters of `text` that each answer takes, with what ends its turn."""
        if "{% generation" in _words(self.tokenizer.chat_template):
            return self._tagged(messages, text)
        found = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            is_last = number == len(messages) - 1
            if self.train_on == "last_answer" and not is_last:
                continue
            before = self._written(messages[:number], ask=True)
            after = text if is_last else self._written(messages[: number + 1])
            if not text.startswith(before) or not text.startswith(after):
                raise RenderError(
                    f"the chat template writes what stands up to message {number} otherwise once "
                    "more follows, so answers cannot be told; set train_on to last_answer, or "
                    "give a template that marks answers ({% generation %})"
                )
            found.append((len(before), len(before) + len(after[len(before) :].rstrip())))
        return found

    def _tagged(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        plain = [{"role": message.role, "content": message.content} for message in messages]
        render: Any = render_jinja_template  # its annotation names the first of two results
        rendered, spans = render(
            conversations=[plain],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        if rendered[0] != text:
            raise RenderError("the chat template writes it otherwise with its answers marked")
        return [self._with_end(text, start, stop) for start, stop in spans[0]]

    def _with_end(self, text: str, start: int, stop: int) -> tuple[int, int]:
        """The span of an answer, with the special token behind it: what ends the turn."""
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special and text.startswith(token.content, stop):
                return start, stop + len(token.content)
        return start, stop

    def _refuse_special_tokens(self, conversation: Conversation) -> None:
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        for number, message in enumerate(conversation.messages):
            for token in sorted(special):
                if token in message.content:
                    raise RenderError(
                        f"message {number} spells the special token {token!r}, which would end or "
                        "begin a turn; take it out of the text"
                    )


# Formats of one turn, which can be written out without a template.
PLAIN_FORMATS = ("prompt_completion", "alpaca")


def _words(template: Any) -> str:
    """A template, or all of a dict of them, with blanks as in `{% generation %}`."""
    texts = template.values() if isinstance(template, dict) else [template]
    return "\n".join(texts).replace("{%-", "{%").replace("{%generation", "{% generation")


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
