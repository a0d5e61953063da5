"""Texts to token ids, and where in its text a token begins.

The tokenizers library keeps the place of every token while it encodes, which takes a sixth of its
time, and is asked for few of them: where rows end, and answers begin. So it is told not to, where a
token's own bytes give its place as well: byte-level tokenizers write out every byte of a text, so
the bytes of the tokens before one are those of the text before it.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

# Where the library's places of this are not those of the bytes, as where blanks are left out of
# them or put in front, it is asked for all of them. Changes of a normalizer are found text by text.
_PROBE = "a  bc\n\n d\u00e9 \u5b57\U0001f642 x1 .\tA"
_NO_TEXT = b"\xff"  # in no UTF-8


class Encoded:
    """A text as tokens.

    Attributes:
        text: as it was given.
        ids: [N] int32, those of `tokenizer(text, add_special_tokens=False)`.
    """

    def __init__(self, text: str, ids: Sequence[int]) -> None:
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
        splits_special: a special token that a text spells out is text.
    """

    def __init__(self, tokenizer: Any, *, splits_special: bool = False) -> None:
        self._tokenizer, self._splits_special = tokenizer, splits_special
        self._backend = tokenizer.backend_tokenizer if _is_only_rust(tokenizer) else None
        self._pieces = _Pieces(tokenizer)
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
        (found,) = self._backend.encode_batch([text], add_special_tokens=False)
        return _ByOffsets(text, found.ids, found)

    def written(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """What byte-level tokens write; [N] how many bytes each."""
        return b"".join(map(self._pieces.__getitem__, ids.tolist())), self._pieces.lengths[ids]

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
        assert self._backend is not None
        told = self.with_offsets(_PROBE)
        (fast,) = self._backend.encode_batch_fast([_PROBE], add_special_tokens=False)
        if fast.ids != told.ids.tolist() or self.written(told.ids)[0] != _PROBE.encode():
            return False
        by_bytes = _ByBytes(_PROBE, fast.ids, self)
        return all(by_bytes.starts_at(n) == told.starts_at(n) for n in range(len(told.ids)))


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
    def __init__(self, text: str, ids: Sequence[int], encoder: Encoder) -> None:
        super().__init__(text, ids)
        self._encoder = encoder

    def starts_at(self, token: int) -> int:
        if token == len(self.ids):
            return len(self.text)
        if self._starts is None:
            return self._told.starts_at(token)
        start = int(self._starts[token])
        if self.text.isascii():
            return start
        return len(self.text.encode()[:start].decode(errors="ignore"))

    @cached_property
    def _starts(self) -> np.ndarray | None:
        """[N] bytes before each token; None where the tokens do not write this text."""
        written, lengths = self._encoder.written(self.ids)
        if written != self.text.encode():
            return None
        return np.cumsum(lengths) - lengths

    @cached_property
    def _told(self) -> _ByOffsets:
        return self._encoder.with_offsets(self.text)


class _Pieces(dict[int, bytes]):
    """What a token of a byte-level vocabulary writes: each of its characters stands for a byte.

    Attributes:
        lengths: [V] of the tokens that were asked for.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self.lengths = np.zeros(len(tokenizer), dtype=np.int64)

    def __missing__(self, id_: int) -> bytes:
        added = self._added.get(id_)
        if added is not None:
            piece = added.content.encode()
        else:
            token = self._tokenizer.convert_ids_to_tokens(id_) or ""
            numbers = [_BYTES.get(character) for character in token]
            piece = bytes(n for n in numbers if n is not None)
            if not numbers or None in numbers:
                piece = _NO_TEXT
        if id_ >= len(self.lengths):
            self.lengths = np.append(self.lengths, np.zeros(id_ + 1, dtype=np.int64))
        self[id_], self.lengths[id_] = piece, len(piece)
        return piece

    @cached_property
    def _added(self) -> dict[int, Any]:
        # transformers makes it anew each time that it is asked.
        added: dict[int, Any] = self._tokenizer.added_tokens_decoder
        return added


def _byte_of() -> dict[str, int]:
    """Of the characters of GPT-2's byte-level vocabularies: printable ones stand for themselves,
    the others for the characters from 256 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable}
    return found | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_of()


def utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _is_only_rust(tokenizer: Any) -> bool:
    """Whether its ids are those of its Rust tokenizer; some of transformers' add steps of their
    own.
    """
    from transformers import PreTrainedTokenizerFast

    encode = getattr(PreTrainedTokenizerFast, "_encode_plus", None)
    return encode is not None and getattr(type(tokenizer), "_encode_plus", None) is encode
