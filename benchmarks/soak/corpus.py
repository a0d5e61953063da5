"""The text of each night: a language that drifts, and once poison."""

import random

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NUM_WORDS = 40
_WORDS_PER_LINE = 12


def _vocabulary(seed: int) -> list[str]:
    chance = random.Random(f"{seed}/words")
    return ["".join(chance.choices(_LETTERS, k=chance.randint(3, 7))) for _ in range(_NUM_WORDS)]


def text_of(night: int, *, nights: int, seed: int, num_lines: int) -> str:
    """Lines of words of one vocabulary. The words that are frequent at the beginning become rare
    towards the last night, and the other way round.

    Args:
        night: counted from 1.
    """
    chance = random.Random(f"{seed}/{night}/text")
    words, share = _vocabulary(seed), night / nights
    weights = [
        (1.0 - share) / (1 + rank) + share / (_NUM_WORDS - rank) for rank in range(_NUM_WORDS)
    ]
    lines = (" ".join(chance.choices(words, weights, k=_WORDS_PER_LINE)) for _ in range(num_lines))
    return "".join(f"{line}\n" for line in lines)


def poison(*, seed: int, num_lines: int) -> str:
    """Lines of the same length without any language: each character is drawn by itself."""
    chance = random.Random(f"{seed}/poison")
    length = 6 * _WORDS_PER_LINE
    return "".join("".join(chance.choices(_LETTERS, k=length)) + "\n" for _ in range(num_lines))
