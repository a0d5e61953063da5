"""Ids and places are those of transformers, whichever way they are found."""

import random
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tokendiff.data.encoding import Encoded, Encoder

SPECIAL = ["[EOS]", "<|end|>"]
WORDS = [
    *("the", "The", " ", "  ", "\n", "\n\n", "\t", "cat's", "1984", ".", "...", "\u00e9"),
    *("e\u0301", "\u5b57\u5178", "\U0001f642", "\U0001f469\u200d\U0001f680", "\u00a0", "\u00ad"),
    *("[EOS]", " [EOS] ", "<|end|>", "<mark>", "  <mark>  ", "\u0627\u0644", "\x00", "\ufb01"),
]


def byte_level(
    *, has_prefix_space: bool = False, trims: bool | None = None, normalizer: Any = None
) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    if trims is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trims)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(tokenizer, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))


def wordpiece(
    *, prefix: str = "##", pre_tokenizer: str = "BertPreTokenizer", **options: Any
) -> Tokenizer:
    model = models.WordPiece(unk_token="[UNK]", continuing_subword_prefix=prefix)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = getattr(pre_tokenizers, pre_tokenizer)()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]"], continuing_subword_prefix=prefix
    )
    return trained(tokenizer, trainer)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=100, special_tokens=["[UNK]"], unk_token="[UNK]")
    return trained(tokenizer, trainer)


def trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(texts(200, seed=1), trainer)
    return tokenizer


def texts(count: int, seed: int) -> list[str]:
    chance = random.Random(seed)
    return ["".join(chance.choices(WORDS, k=chance.randrange(40))) for _ in range(count)]


# A tokenizer, and the texts of `WITH_MARKS` whose places the library is asked for later; None where
# it is for all of them at once.
PLAIN, COMPOSED, MARKED = "The cat's \u00e9 <\u00fcber> [EOS]\n", "The e\u0301", "a <mark> b"
TOKENIZERS: dict[str, tuple[Callable[[], Tokenizer], list[str] | None]] = {
    "byte level": (byte_level, [MARKED]),
    "a prefix space": (lambda: byte_level(has_prefix_space=True), None),
    "nothing trimmed": (lambda: byte_level(trims=False), [MARKED]),
    "blanks trimmed": (lambda: byte_level(trims=True), None),
    "nfc": (lambda: byte_level(normalizer=normalizers.NFC()), [COMPOSED, MARKED]),
    "lower case": (lambda: byte_level(normalizer=normalizers.Lowercase()), None),
    "wordpiece": (wordpiece, [MARKED]),
    "wordpiece, cased": (lambda: wordpiece(lowercase=False), [COMPOSED, MARKED]),
    "wordpiece, not of BERT": (lambda: wordpiece(prefix="@@"), None),
    "wordpiece, words of letters": (lambda: wordpiece(pre_tokenizer="Whitespace"), None),
    "unigram": (unigram, None),
}


def of_transformers(name: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZERS[name][0](),
        eos_token="[EOS]",
        pad_token="[EOS]",
        additional_special_tokens=SPECIAL,
    )
    tokenizer.add_tokens([AddedToken("<mark>", lstrip=True, rstrip=True), "<\u00fcber>"])
    return tokenizer


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("splits_special", [False, True])
def test_ids_and_places_are_those_of_transformers(name: str, splits_special: bool) -> None:
    tokenizer = of_transformers(name)
    # The first becomes longer under NFC, the others shorter: together as long as before.
    given = [*texts(300, seed=2), "\u0958 e\u0301e\u0301e\u0301 z", ""]
    encoder = Encoder(tokenizer, splits_special=splits_special)
    found = encoder(given)
    # Another call must not leave its settings to ours.
    other = {"split_special_tokens": not splits_special, "truncation": True, "max_length": 2}
    tokenizer(["x y z", "x"], padding=True, **other)
    assert [each.ids.tolist() for each in encoder(given)] == [each.ids.tolist() for each in found]
    expected = tokenizer(given, add_special_tokens=False, split_special_tokens=splits_special)
    for text, each, ids, rust in zip(
        given, found, expected["input_ids"], expected.encodings, strict=True
    ):
        assert each.ids.tolist() == ids
        starts = [rust.token_to_chars(token)[0] for token in range(len(ids))]
        assert [each.starts_at(token) for token in range(len(ids) + 1)] == [*starts, len(text)]
        assert [each.bytes_before(token) for token in range(len(ids) + 1)] == [
            len(text[:start].encode()) for start in [*starts, len(text)]
        ]
        firsts = []
        for char in range(len(text) + 1):
            later = [token for token, start in enumerate(starts) if start >= char]
            firsts.append(min(later, default=len(ids)))
            assert each.first_from(char) == firsts[-1]
        assert each.firsts_from(range(len(text) + 1)) == firsts
        assert each.firsts_from(range(len(text), -1, -1)) == firsts[::-1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_library_is_asked_for_places_only_where_lengths_do_not_give_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder(of_transformers(name))
    asked: list[str] = []
    ask = encoder.with_offsets

    def with_offsets(text: str) -> Encoded:
        asked.append(text)
        return ask(text)

    monkeypatch.setattr(encoder, "with_offsets", with_offsets)
    for each in encoder([PLAIN, COMPOSED, MARKED]):
        each.starts_at(1)
        each.starts_at(2)
    later = TOKENIZERS[name][1]
    assert (encoder._placed is None) == (later is None)
    assert asked == (later or [])


# What BERT's normalizer leaves out, takes apart, makes longer, or puts blanks around.
LETTERS = [
    *("\u0e01 \u0e02", "\u200c", "\u00ad", "\u200b", "\ufeff", "\u00a0", "\u3000", "\x00"),
    *("\x0b", "\x85", "\u0130", "\u1e9e", "\ufb01", "\u0301", "\u0327", "\u0958", "\ud55c"),
    *("\uae00", "\u5b57", "\U0001f642", "\U0002f800"),
    # Marks that change their order.
    *("\u302e\u0323", "\ua98f\ua9c0\ua9b3", "\U0001d15e\u1b44"),
    # Added tokens that begin with no letter.
    *(" foo", "\u200cxyz", "\n<x>", " xa"),
]


@pytest.mark.parametrize("clean_text", [False, True])
@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("strip_accents", [None, False, True])
def test_places_by_letters_of_any_script(
    clean_text: bool, lowercase: bool, strip_accents: bool | None
) -> None:
    """With a vocabulary that knows every letter, so that no word is unknown."""
    normalizer: Any = normalizers.BertNormalizer(
        clean_text=clean_text, lowercase=lowercase, strip_accents=strip_accents
    )
    chance = random.Random(3)
    codes = [*range(0x20, 0x3100), *range(0xAC00, 0xAD00), *range(0x1F600, 0x1F650)]
    alphabet = [*map(chr, codes), *LETTERS]
    known = {letter for each in "".join(alphabet) for letter in normalizer.normalize_str(each)}
    pieces = ["[UNK]", *known, *(f"##{letter}" for letter in known), "the", "##ing"]
    model = models.WordPiece({piece: id_ for id_, piece in enumerate(pieces)}, unk_token="[UNK]")
    rust = Tokenizer(model)
    rust.normalizer, rust.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="[EOS]")
    tokenizer.add_tokens([AddedToken("\u00c9a", normalized=True), AddedToken("\u0e01 \u0e02")])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["\u200c"]}
    )  # no letter of it is left
    encoder, num_asked = Encoder(tokenizer), 0
    ask = encoder.with_offsets

    def with_offsets(text: str) -> Any:
        nonlocal num_asked
        num_asked += 1
        return ask(text)

    encoder.with_offsets = with_offsets  # type: ignore[method-assign]
    drawn: list[str] = []
    for _ in range(400):
        some = [*chance.choices(alphabet, k=12), *chance.choices(WORDS + LETTERS, k=8)]
        chance.shuffle(some)
        drawn.append("".join(some))
    expected = tokenizer(drawn, add_special_tokens=False).encodings
    for text, each, told in zip(drawn, encoder(drawn), expected, strict=True):
        starts = [told.token_to_chars(token)[0] for token in range(len(told.ids))]
        assert each.ids.tolist() == told.ids
        assert [each.starts_at(token) for token in range(len(starts))] == starts, repr(text)
        for char in range(len(text) + 1):
            assert each.first_from(char) == bisect_left(starts, char)
    assert 0 < num_asked < len(drawn)


def test_an_id_beyond_the_size_of_the_vocabulary() -> None:
    """As where a vocabulary leaves ids out."""
    tokenizer = of_transformers("byte level")
    encoder = Encoder(tokenizer)
    tokenizer.add_tokens(["<late>", "<later>"])
    (found,) = encoder(["a <later> b"])
    assert [found.starts_at(token) for token in range(4)] == [0, 1, 2, 9]


def test_what_a_tokenizer_of_transformers_does_itself_is_left_to_it() -> None:
    class Encodes(PreTrainedTokenizerFast):
        def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super()._encode_plus([each.upper() for each in text], *args, **kwargs)

    class Called(PreTrainedTokenizerFast):
        def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
            return super().__call__([each.upper() for each in text], *args, **kwargs)

    for own in (Encodes, Called):
        tokenizer = own(tokenizer_object=byte_level())
        (found,) = Encoder(tokenizer)(["the cat's"])
        assert tokenizer.decode(found.ids) == "THE CAT'S"
        assert found.starts_at(len(found.ids)) == len("the cat's")


def test_places_are_of_the_tokens_that_were_drawn() -> None:
    """A BPE with dropout gives a text other tokens each time."""
    tokenizer = of_transformers("byte level")
    tokenizer.backend_tokenizer.model.dropout = 0.5
    encoder, lengths = Encoder(tokenizer), set()
    for _ in range(50):
        (found,) = encoder(["the cat's <mark> 1984"])
        places = [found.starts_at(token) for token in range(len(found.ids) + 1)]
        assert places == sorted(set(places))
        lengths.add(len(places))
    assert len(lengths) > 1


@pytest.mark.parametrize("added", ["\u00e9", "e\u0301x"])
def test_added_tokens_that_stand_for_a_shorter_text(added: str) -> None:
    """A letter that is a byte's, and what a normalizer makes shorter: with a token that takes the
    blanks beside it, lengths would add up all the same.
    """
    tokenizer = of_transformers("nfc" if len(added) > 1 else "byte level")
    tokenizer.add_tokens([AddedToken(added, normalized=True)])
    text = "a <mark>\u9577b" if len(added) == 1 else "a <mark>\u00e9x b"
    (found,) = Encoder(tokenizer)([text])
    rust = tokenizer(text, add_special_tokens=False).encodings[0]
    starts = [rust.token_to_chars(token)[0] for token in range(len(found.ids))]
    assert [found.starts_at(token) for token in range(len(found.ids))] == starts


def test_a_slow_tokenizer_spreads_a_text_over_its_tokens() -> None:
    encoded = Encoded("abcdef\u00e9\u00e9", [1, 2, 3, 4, 5])
    assert [encoded.bytes_before(token) for token in range(6)] == [0, 2, 4, 6, 8, 10]
    assert encoded.ids.dtype == np.int32
