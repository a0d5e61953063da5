"""What a task asks of a model, as text, and what the model answers.

A request is one of three kinds, those of lm-evaluation-harness: the log-likelihood of a
continuation given its context; that of a whole text, however long; and text that continues a
context until a stop string.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tokendiff.errors import InputError

Kind = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
# nats and is_greedy, or nats, or text, by kind; of a request that cannot be served: error, why.
Answer = dict[str, Any]

DEFAULT_NEW_TOKENS = 256  # where a task does not say
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Unserved(float):
    """The log-likelihood of a request that could not be served: minus infinity, told apart from
    that of a text which a model finds impossible.
    """


UNSERVED = Unserved("-inf")


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """One thing to compute.

    Attributes:
        context: what is given; "" of loglikelihood_rolling.
        continuation: the text that is scored; "" of generate_until.
        settings: of generate_until, as `generation_settings` gives them.
        repeat: tells requests apart that ask for several texts of one context.
    """

    kind: Kind
    context: str = ""
    continuation: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    repeat: int = 0

    @property
    def digest(self) -> str:
        """A digest of the whole request, equal for equal requests."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @property
    def noise_id(self) -> int:
        """With the seed, what decides the randomness of the request: a number below 2^62.

        The choices of a question have one context, and so the same noise: what noise does to all of
        them alike does not change which is the likeliest.
        """
        text = json.dumps([self.kind, self.context or self.continuation, self.repeat])
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 2

    @property
    def length(self) -> int:
        """Characters, by which requests are put together in batches."""
        return len(self.context) + len(self.continuation)

    def describe(self) -> str:
        """Its kind, and the end of what it is about, on one line."""
        text = self.context + self.continuation
        shown = text if len(text) <= 60 else f"...{text[-57:]}"
        return f"{self.kind} {shown!r}"


def generation_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a task's `generation_kwargs` ask for.

    Returns:
        until: stop strings; max_gen_toks; temperature, 0 where nothing is to be drawn; and top_k
        and top_p where they are given and something is drawn.

    Raises:
        InputError: the task asks for what no sampler here does, or for no tokens.
    """
    left = dict(given)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else [text for text in until if text]
    lengths = [left.pop(name, None) for name in _LENGTH_NAMES]
    length = next((int(value) for value in lengths if value is not None), DEFAULT_NEW_TOKENS)
    if length < 1:
        raise InputError(
            f"generation_kwargs of the task: its texts have {length} tokens, and need at least 1; "
            "raise max_gen_toks in the task's file, or leave it out "
            f"({DEFAULT_NEW_TOKENS} tokens)"
        )
    temperature = float(left.pop("temperature", None) or 0.0)
    does_sample = left.pop("do_sample", None)
    if does_sample is False:
        temperature = 0.0
    elif does_sample and temperature == 0.0:
        temperature = 1.0
    filters = {name: left.pop(name, None) for name in ("top_k", "top_p")}
    kept = {name: value for name, value in filters.items() if temperature and value is not None}
    unknown = sorted(name for name, value in left.items() if (name, value) != ("num_beams", 1))
    if unknown:
        raise InputError(
            f"generation_kwargs of the task: {', '.join(unknown)}: no sampler here does that; "
            "leave it out of the task's file"
        )
    return {"until": until, "max_gen_toks": length, "temperature": temperature, **kept}


def cut_at(text: str, until: list[str]) -> str:
    """The text before the first stop string."""
    places = [at for stop in until if (at := text.find(stop)) >= 0]
    return text[: min(places)] if places else text
