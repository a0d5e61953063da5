"""Texts to token ids, and where in its text a token begins.

The tokenizers library computes the place of every token, which takes up to a sixth of its time. Few
of them are needed: where rows end, and where answers begin. Byte-level tokenizers write out every
byte of a text, so the lengths of the tokens before a place give it, and the library is told not to
compute it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from types import NoneType
from typing import Any
from unicodedata import is_normalized

import numpy as np

# Shows whether a tokenizer leaves blanks out of its places, or puts one in front.
_PROBE = "a  bc\n\n d\u00e9 \u5b57\U0001f642 x1 .\tA"


class Encoded:
    """A text as tokens.

    Attributes:
        text: as it was given.
        ids: [N] int32, those of `tokenizer(text, add_special_tokens=False)`.
    """

    def __init__(self, text: str, ids: Sequence[int] | np.ndarray) -> None:
        self.text = text
        self.ids = np.array(ids, dtype=np.int32)

    def starts_at(self, token: int) -> int:
        """The character in which a token begins; the length of the text for N.

        A slow tokenizer does not say: there a text is spread evenly over its tokens.
        """
        return token * len(self.text) // len(self.ids)

    def bytes_before(self, token: int) -> int:
        """UTF-8 bytes of text before the character in which a token begins."""
        return token * utf8_bytes(self.text) // len(self.ids)

    def first_from(self, char: int) -> int:
        """The first token that begins at a character or behind it; N where there is none."""
        return bisect_left(range(len(self.ids)), char, key=self.starts_at)


class Encoder:
    """Encodes texts as `tokenizer(texts, add_special_tokens=False)` does.

    Args:
        tokenizer: one of transformers.
        splits_special: whether a special token that a text spells out is text; None leaves it to
            the tokenizer.
    """

    def __init__(self, tokenizer: Any, *, splits_special: bool | None = None) -> None:
        self._tokenizer = tokenizer
        self._splits_special = (
            tokenizer.split_special_tokens if splits_special is None else splits_special
        )
        self._backend = tokenizer.backend_tokenizer if _is_only_rust(tokenizer) else None
        self._lengths = _Lengths(tokenizer)
        self._has_normalizer = self._backend is not None and self._backend.normalizer is not None
        self._is_byte_level = self._backend is not None and self._finds_places_by_bytes()

    def __call__(self, texts: list[str]) -> Sequence[Encoded]:
        if self._backend is None:
            return self._by_transformers(texts)
        self._set_up()
        if self._is_byte_level:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [_ByBytes(text, each.ids, self) for text, each in zip(texts, found, strict=True)]
        found = self._backend.encode_batch(texts, add_special_tokens=False)
        return [_ByOffsets(text, each.ids, each) for text, each in zip(texts, found, strict=True)]

    def with_offsets(self, text: str) -> "_ByOffsets":
        assert self._backend is not None
        self._set_up()
        found = self._backend.encode(text, add_special_tokens=False)
        return _ByOffsets(text, found.ids, found)

    def starts(self, ids: np.ndarray, text: str) -> np.ndarray | None:
        """[N] bytes before each token; None where the tokens do not write all of this text, or
        write another, for a normalizer changed it or an added token took the blanks beside it.
        """
        if self._has_normalizer and not is_normalized("NFC", text):
            return None
        lengths = self._lengths.of(ids)
        ends = np.cumsum(lengths)
        return ends - lengths if lengths.sum() == utf8_bytes(text) else None

    def _set_up(self) -> None:
        """As transformers does in each call."""
        assert self._backend is not None
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = self._splits_special

    def _by_transformers(self, texts: list[str]) -> Sequence[Encoded]:
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=self._splits_special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        if not found.encodings:
            return [*map(Encoded, texts, found["input_ids"])]
        return [*map(_ByOffsets, texts, found["input_ids"], found.encodings)]

    def _finds_places_by_bytes(self) -> bool:
        """Whether tokens are bytes of the text, each of them, in their order."""
        from tokenizers import normalizers, pre_tokenizers

        assert self._backend is not None
        letters = pre_tokenizers.ByteLevel.alphabet()
        if type(self._backend.normalizer) not in (NoneType, normalizers.NFC):
            return False
        if getattr(self._backend.model, "dropout", None):
            return False  # a text has other tokens each time
        # Such a token may be longer than the text that it stands for.
        for added in self._tokenizer.added_tokens_decoder.values():
            if added.content in letters and not added.content.isascii():
                return False
            if self._has_normalizer and not is_normalized("NFC", added.content):
                return False
        told = self.with_offsets(_PROBE)
        found = _ByBytes(_PROBE, told.ids, self)
        return self.starts(told.ids, _PROBE) is not None and all(
            found.starts_at(token) == told.starts_at(token) for token in range(len(told.ids))
        )


class _Placed(Encoded):
    def bytes_before(self, token: int) -> int:
        return utf8_bytes(self.text[: self.starts_at(token)])


class _ByOffsets(_Placed):
    def __init__(self, text: str, ids: Sequence[int], encoding: Any) -> None:
        super().__init__(text, ids)
        self._encoding = encoding

    def starts_at(self, token: int) -> int:
        if token == len(self.ids):
            return len(self.text)
        return int(self._encoding.token_to_chars(token)[0])


class _ByBytes(_Placed):
    def __init__(self, text: str, ids: Sequence[int] | np.ndarray, encoder: Encoder) -> None:
        super().__init__(text, ids)
        self._encoder = encoder

    def starts_at(self, token: int) -> int:
        if token == len(self.ids):
            return len(self.text)
        if self._starts is None:
            return self._by_library.starts_at(token)
        start = int(self._starts[token])
        if self.text.isascii():
            return start
        return len(self.text.encode()[:start].decode(errors="ignore"))

    def first_from(self, char: int) -> int:
        if self._starts is None:
            return self._by_library.first_from(char)
        return int(np.searchsorted(self._starts, len(self.text[:char].encode())))

    @cached_property
    def _starts(self) -> np.ndarray | None:
        return self._encoder.starts(self.ids, self.text)

    @cached_property
    def _by_library(self) -> _ByOffsets:
        return self._encoder.with_offsets(self.text)


class _Lengths:
    """How many bytes a token of a byte-level vocabulary is: each of its characters is one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known = np.full(len(tokenizer), -1, dtype=np.int32)

    def of(self, ids: np.ndarray) -> np.ndarray:
        more = ids.max(initial=-1) + 1 - len(self._known)
        if more > 0:  # there are vocabularies whose ids leave some out
            self._known = np.append(self._known, np.full(more, -1, dtype=np.int32))
        lengths = self._known[ids]
        if (is_new := lengths < 0).any():
            for id_ in np.unique(ids[is_new]).tolist():
                self._known[id_] = self._length(id_)
            lengths = self._known[ids]
        return lengths

    def _length(self, id_: int) -> int:
        if (added := self._added.get(id_)) is not None:
            return utf8_bytes(added.content)
        return len(self._tokenizer.convert_ids_to_tokens(id_))

    @cached_property
    def _added(self) -> dict[int, Any]:
        # transformers makes it anew each time that it is asked.
        added: dict[int, Any] = self._tokenizer.added_tokens_decoder
        return added


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _is_only_rust(tokenizer: Any) -> bool:
    """Whether its ids are those of its Rust tokenizer; some of transformers' add steps of their
    own.
    """
    from transformers import PreTrainedTokenizerFast

    steps = ("__call__", "_encode_plus", "_convert_encoding")
    here, there = type(tokenizer), PreTrainedTokenizerFast
    return all(hasattr(there, s) and getattr(here, s, None) is getattr(there, s) for s in steps)
