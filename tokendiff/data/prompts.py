"""What a prompt may be, and its token ids; `tokendiff.data.prompt_index` reads files of them."""

import json
from collections.abc import Container
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tokendiff.data import chats
from tokendiff.data.templates import ChatRenderer, RenderError
from tokendiff.errors import InputError, reason_of

Message = dict[str, Any]  # role and content, as chat templates read them
Prompt = str | list[Message]
_WORDS = ("a", "the", "The", "1")  # with which a text might go on


@dataclass(frozen=True, kw_only=True)
class GenerationRow:
    """One sample to draw.

    Attributes:
        id: its place in the whole job; with the seed it decides the row's randomness.
        prompt: text, or the messages of a chat, that the sample begins with; or None.
        source: name of the file that held the prompt; None of one from the command line.
    """

    id: int
    prompt: Prompt | None
    source: str | None = None


def check_new_id(row: GenerationRow, under_way: Container[int]) -> None:
    """Raise InputError where another row has the id."""
    if row.id in under_way:
        raise InputError(
            f"two rows have the id {row.id}, by which samples are told apart; number the rows"
        )


def prompt_text(prompt: Prompt | None) -> str | None:
    """The prompt as records hold it: as it was given, messages as JSON."""
    return json.dumps(prompt, ensure_ascii=False) if isinstance(prompt, list) else prompt


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """Prompts to token ids.

    Attributes:
        use_chat_template: take a text for the message of a user. Messages are always written out
            by the tokenizer's chat template.
        add_generation_prompt: end a chat with what an answer begins with.
        keeps_prefix: begin a text that is no chat with what the tokenizer puts in front of it, say
            BOS. Special tokens behind it (EOS, SEP) are always left out.
        subject: whose tokenizer it is, for messages.

    Raises:
        InputError: use_chat_template, but the tokenizer has none.
    """

    tokenizer: Any
    use_chat_template: bool = False
    add_generation_prompt: bool = False
    keeps_prefix: bool = False
    subject: str = "the checkpoint"

    def __post_init__(self) -> None:
        if self.use_chat_template:
            self._check_template("use_chat_template")

    def __call__(self, prompt: Prompt | None) -> list[int]:
        """The ids, [] of None.

        Raises:
            InputError: messages that there is no template for, or that it refuses.
        """
        if prompt is None:
            return []
        if isinstance(prompt, str) and not self.use_chat_template:
            return self._encode_text(prompt)
        return self._encode(self._written(prompt))

    def loses_blank(self, prompt: Prompt | None) -> bool:
        """Whether a prompt ends in a blank that the tokenizer joins to a word behind it: encoded by
        itself it is another token than in texts that go on.
        """
        is_text = isinstance(prompt, str) and not self.use_chat_template
        text = prompt if prompt is None or is_text else self._written(prompt)
        if not isinstance(text, str) or not text.endswith(" "):
            return False
        ids = self._encode(text)
        return any(self._encode(text + word)[: len(ids)] != ids for word in _WORDS)

    def _written(self, prompt: Prompt) -> str:
        """A prompt as the chat template writes it out."""
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        self._check_template("a prompt of messages")
        try:
            text: str = self.tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=self.add_generation_prompt
            )
        # A template is a program of whoever made the model, in a sandbox: it may raise anything.
        except Exception as error:
            raise InputError(
                f"messages {json.dumps(prompt, ensure_ascii=False)[:80]}: the chat template of "
                f"{self.subject} refuses them ({reason_of(error)})"
            ) from error
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def answers_in(self, messages: list[Message], ids: list[int]) -> np.ndarray:
        """[len(ids)] bool: which tokens of a prompt of messages, encoded as `ids`, are those of
        earlier answers, as training on answers marks them. All are False where the template does
        not let answers be told, or writes them otherwise in a longer conversation.

        Raises:
            InputError: the tokenizer is a slow one, which cannot say.
        """
        found = np.zeros(len(ids), dtype=bool)
        turns = tuple(
            chats.Message(role=m["role"], content=m["content"], is_learnt=m.get("weight") != 0)
            for m in messages
        )
        try:
            rendered = self._renderer(chats.Conversation(messages=turns))
        except RenderError:
            return found
        length = min(len(ids), len(rendered.tokens))
        differs = np.flatnonzero(rendered.tokens[:length] != np.array(ids[:length]))
        length = int(differs[0]) if len(differs) else length
        found[:length] = rendered.is_target[:length]
        return found

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(tokenizer=self.tokenizer)

    def _encode_text(self, text: str) -> list[int]:
        ids = self._encode(text)
        if not self.keeps_prefix:
            return ids
        around: list[int] = self.tokenizer(text, add_special_tokens=True)["input_ids"]
        for begin in range(len(around) - len(ids) + 1):
            if around[begin : begin + len(ids)] == ids:
                return around[: begin + len(ids)]
        return ids

    def _check_template(self, what: str) -> None:
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"{what}: the tokenizer of {self.subject} has no chat template; give prompts as "
                "plain text"
            )


def prompt_of_record(record: Any, place: str) -> Prompt:
    """The prompt of a record with a field `prompt` (a text) or `messages` (of a chat).

    Raises:
        InputError: neither, both, or not what they must be.
    """
    fields = record if isinstance(record, dict) else {}
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if prompt is not None and messages is not None:
        raise InputError(
            f'{place}: has both "prompt" and "messages", and one of them alone can be continued; '
            "remove the other"
        )
    if prompt is None and messages is None:
        raise InputError(
            f'{place}: needs a field "prompt", as in {{"prompt": "Once upon"}}, or "messages", as '
            'in {"messages": [{"role": "user", "content": "Hello"}]}'
        )
    if messages is not None:
        return checked_messages(messages, place)
    if not isinstance(prompt, str):
        raise InputError(f'{place}: "prompt" must be a string, got {prompt!r:.80}')
    _check_unicode(prompt, place)
    return prompt


def checked_messages(messages: Any, place: str) -> list[Message]:
    """Messages as chat templates read them.

    Raises:
        InputError: they are none.
    """
    if not isinstance(messages, list) or not messages:
        shown = f"{messages!r:.80}"
        raise InputError(f'{place}: "messages" must be a list of at least one, got {shown}')
    messages = [_with_text(message) for message in messages]
    for number, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise InputError(
                    f'{place}: messages[{number}] needs the strings "role" and "content", got '
                    f"{message!r:.80}"
                )
            _check_unicode(message[name], place)
    # Parquet fills up fields that a message does not have.
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


def _with_text(message: Any) -> Any:
    """A message whose content is a list of text parts with their text, as training reads it."""
    if isinstance(message, dict) and isinstance(message.get("content"), list):
        with suppress(ValueError):  # of other parts, which the message is then refused for
            return {**message, "content": chats.text_of(message["content"], "content")}
    return message


def _check_unicode(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: the prompt is not valid Unicode ({error.reason})") from error
