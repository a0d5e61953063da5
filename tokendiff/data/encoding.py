"""Texts to token ids, and where in its text a token begins.

The tokenizers library computes the place of every token, which takes up to a sixth of its time. Few
of them are needed: where rows end, and where answers begin. Byte-level tokenizers write out every
byte of a text, BERT's tokenizers every letter but no blanks. So the lengths of the tokens before a
place give it, and the library is told not to compute it.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from types import NoneType
from typing import Any
from unicodedata import combining, is_normalized

import numpy as np

_CONTINUES = "##"  # what BERT puts before a token within a word
_MANY = 2**24  # letters: it is not known how many
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
        # Faster than np.array of a list.
        self.ids = np.fromiter(ids, dtype=np.int32, count=len(ids))

    def starts_at(self, token: int) -> int:
        """The character in which a token begins; the length of the text for N.

        A slow tokenizer does not say: there a text is spread evenly over its tokens.
        """
        return token * len(self.text) // len(self.ids)

    def bytes_before(self, token: int) -> int:
        """UTF-8 bytes of text before the character in which a token begins."""
        return token * utf8_bytes(self.text) // len(self.ids)

    def reaches(self, token: int, char: int) -> bool:
        """Whether a token that begins before a character holds it, or what stands behind it."""
        return self.starts_at(token + 1) > char

    def first_from(self, char: int) -> int:
        """The first token that begins at a character or behind it; N where there is none."""
        return bisect_left(range(len(self.ids)), char, key=self.starts_at)

    def firsts_from(self, chars: Sequence[int]) -> Sequence[int]:
        """`first_from` of several characters, in any order."""
        return [self.first_from(char) for char in chars]


class Encoder:
    """Encodes texts as `tokenizer(texts, add_special_tokens=False)` does. For one thread at a time.

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
        self._has_normalizer = self._backend is not None and self._backend.normalizer is not None
        self._lengths = _Numbers(self._bytes_of_token)
        self._placed: type[_ByBytes | _ByLetters] | None = None
        if self._backend is not None and self._finds_places_by_bytes():
            self._placed = _ByBytes
        elif self._backend is not None and self._finds_places_by_letters():
            self._placed, self._lengths = _ByLetters, _Numbers(self._letters_of_token)

    def __call__(self, texts: list[str]) -> Sequence[Encoded]:
        if self._backend is None:
            return self._by_transformers(texts)
        self._set_up()
        if (placed := self._placed) is not None:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [placed(text, each.ids, self) for text, each in zip(texts, found, strict=True)]
        found = self._backend.encode_batch(texts, add_special_tokens=False)
        return [_ByOffsets(text, each.ids, each) for text, each in zip(texts, found, strict=True)]

    def with_offsets(self, text: str) -> "_ByOffsets":
        assert self._backend is not None
        self._set_up()
        found = self._backend.encode(text, add_special_tokens=False)
        return _ByOffsets(text, found.ids, found)

    def byte_starts(self, ids: np.ndarray, text: str) -> np.ndarray | None:
        """[N] bytes before each token; None where the tokens do not write all of this text, or
        write another, for a normalizer changed it or an added token took the blanks beside it.
        """
        if self._has_normalizer and not is_normalized("NFC", text):
            return None
        lengths = self._lengths.of(ids)
        ends = lengths.cumsum()
        return ends - lengths if ends[-1:].sum() == utf8_bytes(text) else None

    def letter_starts(self, ids: np.ndarray, text: str) -> np.ndarray | None:
        """[N] the character in which each token begins; None where lengths do not tell: an unknown
        word, marks that change their order, an added token that begins with no letter.
        """
        lengths, letters = self._lengths.of(ids), self._letters.of(_code_points(text))
        if not lengths.sum() == letters.sum() < _MANY:
            return None
        return np.repeat(np.arange(len(text)), letters)[np.cumsum(lengths) - lengths]

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
        return self.byte_starts(told.ids, _PROBE) is not None and all(
            found.starts_at(token) == told.starts_at(token) for token in range(len(told.ids))
        )

    def _finds_places_by_letters(self) -> bool:
        """Whether tokens are the letters that BERT's normalizer makes of a text, each of them, in
        their order. The normalizer looks at one character at a time.
        """
        from tokenizers import models, normalizers, pre_tokenizers

        assert self._backend is not None
        model = self._backend.model
        return (
            type(self._backend.normalizer) is normalizers.BertNormalizer
            and type(self._backend.pre_tokenizer) is pre_tokenizers.BertPreTokenizer
            and type(model) is models.WordPiece
            and model.continuing_subword_prefix == _CONTINUES
        )

    def _bytes_of_token(self, id_: int) -> int:
        """Each character of a byte-level vocabulary is a byte."""
        if (added := self._added.get(id_)) is not None:
            return utf8_bytes(added.content)
        assert self._backend is not None
        return len(self._backend.id_to_token(id_))

    def _letters_of_token(self, id_: int) -> int:
        assert self._backend is not None
        token, added = self._backend.id_to_token(id_), self._added.get(id_)
        if token == self._backend.model.unk_token:
            return _MANY
        if added is None:
            return len(token.removeprefix(_CONTINUES))
        letters = self._letters.of(_code_points(token))
        # Such a token begins before its first letter.
        begins_apart = added.lstrip or not letters[:1].any()
        return _MANY if begins_apart else int(letters.sum())

    @cached_property
    def _letters(self) -> "_Numbers":
        """By code point, how many letters are left of a character, blanks being none."""
        assert self._backend is not None
        normalizer = self._backend.normalizer

        def letters_of(code: int) -> int:
            found = normalizer.normalize_str(chr(code)).strip()
            # Marks are sorted among themselves, and then stand elsewhere than in the text.
            return _MANY if any(map(combining, found)) else len(found)

        return _Numbers(letters_of)

    @cached_property
    def _added(self) -> dict[int, Any]:
        # transformers makes it anew each time that it is asked.
        added: dict[int, Any] = self._tokenizer.added_tokens_decoder
        return added


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

    def reaches(self, token: int, char: int) -> bool:
        return bool(self._encoding.token_to_chars(token)[1] > char)


class _ByLengths(_Placed):
    """Places from the lengths of tokens; asked of the library where they do not give them."""

    def __init__(self, text: str, ids: Sequence[int] | np.ndarray, encoder: Encoder) -> None:
        super().__init__(text, ids)
        self._encoder = encoder

    def starts_at(self, token: int) -> int:
        if token == len(self.ids):
            return len(self.text)
        if self._starts is None:
            return self._by_library.starts_at(token)
        return int(self._starts[token])

    def first_from(self, char: int) -> int:
        return self.firsts_from([char])[0]

    def firsts_from(self, chars: Sequence[int]) -> Sequence[int]:
        if self._starts is None:
            return self._by_library.firsts_from(chars)
        found: list[int] = self._starts.searchsorted(self._in_starts(chars)).tolist()
        return found

    def _in_starts(self, chars: Sequence[int]) -> Sequence[int]:
        """Characters in the units of `_starts`."""
        return chars

    @cached_property
    def _starts(self) -> np.ndarray | None:
        raise NotImplementedError

    @cached_property
    def _by_library(self) -> _ByOffsets:
        return self._encoder.with_offsets(self.text)


class _ByLetters(_ByLengths):
    @cached_property
    def _starts(self) -> np.ndarray | None:
        return self._encoder.letter_starts(self.ids, self.text)

    def reaches(self, token: int, char: int) -> bool:
        return self._by_library.reaches(token, char)  # between letters there may be others


class _ByBytes(_ByLengths):
    def starts_at(self, token: int) -> int:
        if token == len(self.ids) or self._starts is None or self.text.isascii():
            return super().starts_at(token)
        return len(self._bytes[: int(self._starts[token])].decode(errors="ignore"))

    def bytes_before(self, token: int) -> int:
        if token == len(self.ids) or self._starts is None:
            return super().bytes_before(token)
        place = int(self._starts[token])
        if not self.text.isascii():
            while self._bytes[place] & 0b11000000 == 0b10000000:  # within a character
                place -= 1
        return place

    @cached_property
    def _bytes(self) -> bytes:
        return self.text.encode()

    def _in_starts(self, chars: Sequence[int]) -> Sequence[int]:
        if self.text.isascii():
            return chars
        places, at, num_bytes = {0: 0}, 0, 0
        for char in sorted(set(chars)):
            num_bytes += utf8_bytes(self.text[at:char])
            at = char
            places[char] = num_bytes
        return [places[char] for char in chars]

    @cached_property
    def _starts(self) -> np.ndarray | None:
        return self._encoder.byte_starts(self.ids, self.text)


class _Numbers:
    """A number of each of many ids, found when it is first asked for."""

    def __init__(self, find: Callable[[int], int]) -> None:
        self._find = find
        self._known = np.empty(0, dtype=np.int32)

    def of(self, ids: np.ndarray) -> np.ndarray:
        more = int(ids.max(initial=-1)) + 1 - len(self._known)
        if more > 0:
            self._known = np.append(self._known, np.full(more, -1, dtype=np.int32))
        numbers = self._known.take(ids)
        if numbers.min(initial=0) < 0:
            for id_ in np.unique(ids[numbers < 0]).tolist():
                self._known[id_] = self._find(id_)
            numbers = self._known.take(ids)
        return numbers


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<i4")


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
