"""Tasks that need no network: a small set made here, for any checkpoint.

Their texts are short, since small models take few tokens. Each has 64 documents, drawn by a fixed
seed. Three ask for the likeliest of four choices, where chance gets a quarter right; arithmetic is
written, and chance gets next to nothing.

    builtin_copying     the last of three words that were just said, among the three and another
    builtin_arithmetic  a sum of two numbers below 10, behind two that are solved
    builtin_cloze       how a passage of the built-in corpus goes on, among passages of others
    builtin_infilling   the word between both sides of a passage, among words of other passages

Checkpoints of the quickstart are trained on the same corpus: of them cloze and infilling say how
much they remember.
"""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from tokendiff.data.sources import builtin_documents

NUM_DOCUMENTS = 64
_NUM_CHOICES = 4
_WORDS = (
    *("apple", "river", "stone", "cloud", "table", "green", "music", "paper", "horse", "light"),
    *("bread", "glass", "smoke", "chair", "plant", "sugar", "wheel", "ocean", "metal", "grass"),
)


def builtin_tasks() -> dict[str, dict[str, Any]]:
    """By name, what the harness takes for the file of a task."""
    return {
        "builtin_copying": _choices("builtin_copying", _copying),
        "builtin_arithmetic": _written("builtin_arithmetic", _arithmetic),
        "builtin_cloze": _choices("builtin_cloze", _cloze),
        "builtin_infilling": _choices("builtin_infilling", _infilling),
    }


def _task(name: str, documents: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    def dataset(**metadata: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(documents())}

    return {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }


def _choices(name: str, documents: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        **_task(name, documents),
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def _written(name: str, documents: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        **_task(name, documents),
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def _copying() -> list[dict[str, Any]]:
    chance, documents = random.Random(1), []
    for _ in range(NUM_DOCUMENTS):
        *said, other = chance.sample(_WORDS, _NUM_CHOICES)
        context = f"{' '.join(said)}\n{' '.join(said[:-1])}"
        documents.append(_document(chance, context, said[-1], [*said[:-1], other]))
    return documents


def _arithmetic() -> list[dict[str, Any]]:
    chance, documents = random.Random(2), []
    for _ in range(NUM_DOCUMENTS):
        sums = [(chance.randrange(10), chance.randrange(10)) for _ in range(3)]
        lines = [f"{a}+{b}={a + b}\n" for a, b in sums[:-1]]
        a, b = sums[-1]
        documents.append({"context": f"{''.join(lines)}{a}+{b}=", "answer": str(a + b)})
    return documents


def _cloze() -> list[dict[str, Any]]:
    chance, documents = random.Random(3), []
    for passages in _passages(chance):
        words = passages[0].split(" ")
        ends = [" ".join(passage.split(" ")[8:10]) for passage in passages]
        documents.append(_document(chance, " ".join(words[:8]), ends[0], ends[1:]))
    return documents


def _infilling() -> list[dict[str, Any]]:
    chance, documents = random.Random(4), []
    for passages in _passages(chance):
        words = passages[0].split(" ")
        behind = " ".join(words[6:])
        fillers = [f"{passage.split(' ')[5]} {behind}" for passage in passages]
        documents.append(_document(chance, " ".join(words[:5]), fillers[0], fillers[1:]))
    return documents


def _document(chance: random.Random, context: str, right: str, wrong: list[str]) -> dict[str, Any]:
    choices = [right, *wrong]
    chance.shuffle(choices)
    return {
        "context": context,
        "choices": [f" {choice}" for choice in choices],
        "right": choices.index(right),
    }


def _passages(chance: random.Random) -> list[list[str]]:
    """Ten words each; the first of four is asked about, and the others differ from it wherever
    choices are taken from.
    """
    found: list[list[str]] = []
    while len(found) < NUM_DOCUMENTS:
        chosen = chance.sample(_ten_words(), _NUM_CHOICES)
        if all(len({p.split(" ")[at] for p in chosen}) == _NUM_CHOICES for at in (5, 8)):
            found.append(chosen)
    return found


@cache
def _ten_words() -> list[str]:
    """One passage of each document: ten words of letters that stand in a row."""
    passages = []
    for document in builtin_documents():
        run: list[str] = []
        for word in document.split():
            run = [*run, word] if word.isalpha() and len(word) < 10 else []
            if len(run) == 10:
                passages.append(" ".join(run))
                break
    return passages
