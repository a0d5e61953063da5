"""Conversations, in the formats that people keep them in, as messages of a role and a content.

A format is known by its columns (`FORMATS`). A row of it becomes a `Conversation`, or it is of no
use and says why.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from tokendiff.data.columns import shown
from tokendiff.errors import InputError

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
_TOOL_FIELDS = ("tool_calls", "function_call")  # a call beside the text, or in place of it
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_COMPLETIONS = ("completion", "response", "output", "answer")


@dataclass(frozen=True, kw_only=True)
class Message:
    """
    Attributes:
        role: one of ROLES.
        is_learnt: of an answer. One of `weight` 0 is context: no target, and no block starts there.
        has_reasoning: there are thoughts beside the content, which are left out.
    """

    role: str
    content: str
    # Answers are filled up to lengths that are drawn by how messages are written out, as before.
    is_learnt: bool = dataclass_field(default=True, repr=False)
    has_reasoning: bool = dataclass_field(default=False, repr=False)

    @property
    def fields(self) -> dict[str, str]:
        """As chat templates read it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order: one of the system may come first, then user and assistant in turn.

    The last one is of the assistant.

    Attributes:
        plain: the same without a chat template, where the format has only one turn: what stands
            before the answer, and the answer.
        place: says where it was read.
    """

    messages: tuple[Message, ...]
    plain: tuple[str, str] | None = None
    place: Callable[[], str] = lambda: "a conversation"

    @property
    def prompt(self) -> str:
        """All that stands before the first answer: conversations that share it are one question."""
        before = []
        for message in self.messages:
            if message.role == "assistant":
                break
            before.append(f"{message.role}\n{message.content}\n")
        return "".join(before)


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """
    Attributes:
        required: columns that a row must have; of a tuple, one of them.
        optional: columns that are read where they are there.
        read: a row as a conversation; raises ValueError, which says what is wrong.
    """

    required: tuple[str | tuple[str, ...], ...]
    read: Callable[[Mapping[str, Any]], Conversation]
    optional: tuple[str, ...] = ()

    def is_in(self, columns: Collection[str]) -> bool:
        return all(
            any(name in columns for name in ((names,) if isinstance(names, str) else names))
            for names in self.required
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """All that it may read."""
        found: list[str] = []
        for names in self.required:
            found += (names,) if isinstance(names, str) else names
        return (*found, *self.optional)

    @property
    def needs(self) -> str:
        """The columns that a row must have, in words."""
        return ", ".join(
            repr(names) if isinstance(names, str) else " or ".join(map(repr, names))
            for names in self.required
        )


def formats_in_words() -> str:
    """Each format and the columns that it needs."""
    return "; ".join(f"{name} ({form.needs})" for name, form in FORMATS.items())


def find_format(columns: Collection[str]) -> str | None:
    """The format of rows with these columns; None where they are no conversations."""
    return next((name for name, form in FORMATS.items() if form.is_in(columns)), None)


def check_format(name: str, columns: Collection[str], *, place: str) -> None:
    """Raise InputError where rows with these columns are not of a format."""
    if not FORMATS[name].is_in(columns):
        there = ", ".join(repr(str(column)) for column in columns) or "none"
        raise InputError(
            f"{place}: dataset_format {name} needs the columns {FORMATS[name].needs}, but there "
            f"are {there}; set dataset_format to another one ({', '.join(FORMATS)}, text)"
        )


def _messages(row: Mapping[str, Any]) -> Conversation:
    return _conversation(_message_list(row["messages"], "messages", "role", "content", ROLE_NAMES))


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    return _conversation(
        _message_list(row["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)
    )


def _prompt_completion(row: Mapping[str, Any]) -> Conversation:
    there = [name for name in _COMPLETIONS if name in row]
    name = next((name for name in there if row[name] is not None), there[0])
    prompt, completion = row["prompt"], row[name]
    if isinstance(prompt, str) and isinstance(completion, str):
        messages = [
            Message(role="user", content=text_of(prompt, "prompt")),
            Message(role="assistant", content=text_of(completion, name)),
        ]
        return _conversation(messages, plain=(prompt, completion))
    both = []
    for value, field, role in ((prompt, "prompt", "user"), (completion, name, "assistant")):
        if isinstance(value, str):
            both.append(Message(role=role, content=text_of(value, field)))
        else:
            both += _message_list(value, field, "role", "content", ROLE_NAMES)
    return _conversation(both)


def _alpaca(row: Mapping[str, Any]) -> Conversation:
    """The prompt is that of Stanford Alpaca, github.com/tatsu-lab/stanford_alpaca."""
    instruction, answer = (text_of(row[name], name) for name in ("instruction", "output"))
    given = text_of(row.get("input") or "", "input")
    question = f"{instruction}\n\n{given}" if given else instruction
    if given:
        plain = (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:\n"
        )
    else:
        plain = (
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
        )
    messages = [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return _conversation(messages, plain=(plain, answer))


def _message_list(
    value: Any, field: str, role_field: str, content_field: str, roles: Mapping[str, str]
) -> list[Message]:
    if isinstance(value, str):
        raise ValueError(
            f"{field!r} is a text, {shown(value)!r}, not a list of messages; where it is JSON, "
            f"read it first: jq -c '.{field} |= fromjson' FILE.jsonl > NEW.jsonl"
        )
    if not isinstance(value, list) or not value:
        raise ValueError(f"{field!r} must be a list of at least one message, got {shown(value)}")
    found = []
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise ValueError(f"{field}[{number}] must be an object, got {shown(message)}")
        # Many sets name the column `conversations` and the fields as `messages` does.
        has_other_names = message.get(role_field) is None and message.get("role") is not None
        role_name, content_name = (
            ("role", "content") if has_other_names else (role_field, content_field)
        )
        role = message.get(role_name)
        if not isinstance(role, str) or role not in roles:
            raise ValueError(
                f"{field}[{number}]: {role_name} must be one of {', '.join(roles)}, "
                f"got {shown(role)}"
            )
        for name in _TOOL_FIELDS:
            if _holds_call(message.get(name)):
                raise ValueError(
                    f"{field}[{number}] has {name}, which would be left out of what is learnt: "
                    f"write the call into the text of {content_name}, or leave the conversation "
                    f"out; got {shown(message[name])}"
                )
        content = message.get(content_name)
        if not isinstance(content, str) or not content.isascii():
            content = text_of(content, f"{field}[{number}].{content_name}")
        found.append(
            Message(
                role=roles[role],
                content=content,
                is_learnt=roles[role] != "assistant"
                or _is_learnt(message.get("weight"), f"{field}[{number}].weight"),
                has_reasoning=any(message.get(name) for name in REASONING_FIELDS),
            )
        )
    return found


def _holds_call(value: Any) -> bool:
    """Whether a field of calls holds one, and not what files write where there is none: an empty
    list, the same as JSON, or an object of nulls.
    """
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return any(map(_holds_call, value.values()))
    if isinstance(value, list):
        return any(map(_holds_call, value))
    return bool(value)


def _is_learnt(weight: Any, place: str) -> bool:
    if weight is not None and weight not in (0, 1):
        raise ValueError(
            f"{place} must be 0, for an answer that is not learnt, or 1, got {shown(weight)}"
        )
    return weight is None or bool(weight)


def text_of(value: Any, place: str) -> str:
    """A text, or the texts of a list of parts, joined.

    Raises:
        ValueError: it is neither, or a part is something else than text.
    """
    if isinstance(value, list):
        parts = []
        for number, part in enumerate(value):
            if not isinstance(part, dict) or (part.get("type") or "text") != "text":
                raise ValueError(f"{place}[{number}] must be a part of text, got {shown(part)}")
            parts.append(text_of(part.get("text"), f"{place}[{number}].text"))
        return "".join(parts)
    if not isinstance(value, str):
        raise ValueError(f"{place} must be a text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is not valid Unicode ({error.reason})") from error
    return value


def _conversation(messages: list[Message], *, plain: tuple[str, str] | None = None) -> Conversation:
    """Messages whose order makes sense; a question at the end that nobody answered is left out."""
    if messages and messages[-1].role == "user":
        messages = messages[:-1]
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not any(message.role == "assistant" for message in turns):
        raise ValueError("no message of the assistant: there is nothing to learn")
    if not any(message.is_learnt for message in turns if message.role == "assistant"):
        raise ValueError("every answer has weight 0: there is nothing to learn")
    first = len(messages) - len(turns)
    for number, message in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if message.role != wanted:
            raise ValueError(
                f"message {first + number} has the role {message.role}, but {wanted} is expected "
                "there: a system message comes first, then user and assistant take turns"
            )
        if message.role == "assistant" and (not message.content or message.content.isspace()):
            raise ValueError(f"message {first + number} is an empty answer")
    return Conversation(messages=tuple(messages), plain=plain)


ROLE_NAMES = {role: role for role in ROLES}
# The closed table behind `dataset_format: NAME`; where several fit, the first is taken.
FORMATS: dict[str, ChatFormat] = {
    "messages": ChatFormat(required=("messages",), read=_messages),
    "sharegpt": ChatFormat(required=("conversations",), read=_sharegpt),
    "prompt_completion": ChatFormat(required=("prompt", _COMPLETIONS), read=_prompt_completion),
    "alpaca": ChatFormat(required=("instruction", "output"), optional=("input",), read=_alpaca),
}
