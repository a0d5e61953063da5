"""Generation metrics against brute force, generative perplexity against a row-by-row loop."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2Tokenizer,
)

from tokendiff.data.samples import given_text
from tokendiff.errors import InputError
from tokendiff.evaluation.generation_metrics import (
    cost_metrics,
    generation_metrics,
    unigram_entropy_nats,
)
from tokendiff.evaluation.reference import generative_perplexity

VOCABULARY = [
    "<|endoftext|>",
    "\u0120",
    *"abcdefghijklmnopqrstuvwxyz",
]  # \u0120 is the byte-level space
TEXTS = [
    "the cat sat on the mat",
    "a dog",
    "and the dog ran off and the cat sat on a mat and a dog ran",
    "off off off off",
    "mat the on sat cat and a dog",  # longer than the 24 positions of the GPT-2 below, not than 40
]


def entropy(values: list[Any]) -> float:
    total = len(values)
    return -sum(c / total * math.log(c / total) for c in Counter(values).values())


def ngrams(sample: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]


def test_metrics_equal_brute_force_on_ragged_samples() -> None:
    generator = np.random.default_rng(0)
    lengths = [0, 1, 2, 3, 4, 5, 40, 40, 200]
    samples = [generator.integers(0, 5, length).tolist() for length in lengths]
    # Ids far apart: the pairing of tokens to n-grams must neither collide nor overflow.
    samples = [[token * 2**40 for token in sample] for sample in samples]
    everything = [token for sample in samples for token in sample]
    repeated = [1 - len(set(g)) / len(g) for s in samples if (g := ngrams(s, 4))]
    expected = {
        "num_samples": 9,
        "length_mean": sum(lengths) / 9,
        "length_min": 0,
        "length_max": 200,
        "unigram_entropy_sample_nats": sum(entropy(s) for s in samples) / 9,
        "unigram_entropy_pooled_nats": entropy(everything),
        "repeated_4gram_fraction": sum(repeated) / len(repeated),
    }
    for n in (1, 2, 3):
        grams = [gram for sample in samples for gram in ngrams(sample, n)]
        expected[f"distinct_{n}"] = len(set(grams)) / len(grams)
    metrics = generation_metrics(samples)
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert all(type(value) is float for value in metrics.values())


def test_ngrams_do_not_cross_samples() -> None:
    metrics = generation_metrics([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert metrics["distinct_2"] == 3 / 6
    assert metrics["repeated_4gram_fraction"] == 0.0


def test_ngrams_of_a_large_vocabulary_are_told_apart() -> None:
    """Four ids of 17 bits are more than an int64 holds."""
    every, sample = list(range(2**17)), [0, 1, 2, 3, 2**13, 1, 2, 3]
    assert generation_metrics([every, sample])["repeated_4gram_fraction"] == 0.0


def test_degenerate_samples_have_defined_values() -> None:
    degenerate: list[list[list[int]]] = [[[]], [[], []], [[7]], [[7, 7, 7]]]
    for samples in degenerate:
        metrics = generation_metrics(samples)
        assert all(math.isfinite(value) for value in metrics.values()), (samples, metrics)
        assert metrics["repeated_4gram_fraction"] == 0.0
        assert math.copysign(1, metrics["unigram_entropy_sample_nats"]) == 1.0
    for length in range(1, 60):  # N ln N / N is not always ln N
        assert 0.0 <= generation_metrics([[7] * length])["unigram_entropy_sample_nats"] < 1e-12
    assert generation_metrics([[7, 7, 7]])["distinct_3"] == 1.0
    assert generation_metrics([[7] * 10])["repeated_4gram_fraction"] == pytest.approx(6 / 7)
    with pytest.raises(InputError, match="no samples"):
        generation_metrics([])


def test_unigram_entropy() -> None:
    assert unigram_entropy_nats([3, 0, 1]) == pytest.approx(
        entropy(["a", "a", "a", "b"]), abs=1e-15
    )
    assert unigram_entropy_nats(np.full(1000, 5)) == pytest.approx(math.log(1000))
    for counts in ([], [0, 0], [0, 12]):
        assert math.copysign(1, unigram_entropy_nats(counts)) == 1.0
        assert unigram_entropy_nats(counts) == 0.0
    for wrong in ([1, -1], [math.nan, 1]):
        with pytest.raises(InputError, match="not negative"):
            unigram_entropy_nats(wrong)


def save_tokenizer(folder: Path, kind: str) -> None:
    """One token per character, in the real models' classes: GPT-2's has a BOS, Qwen2's none."""
    tokenizer = (GPT2Tokenizer if kind == "gpt2" else Qwen2Tokenizer)(
        vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=[]
    )
    tokenizer.save_pretrained(folder)


def save_reference(folder: Path, kind: str) -> nn.Module:
    """A tiny causal LM with weights so large that its predictions are far from uniform."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=len(VOCABULARY), n_positions=24, n_embd=16, n_layer=2, n_head=2)
        )
    else:
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=len(VOCABULARY),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    model.save_pretrained(folder)
    return model.eval()


def row_by_row(model: nn.Module, rows: list[list[int]]) -> tuple[float, int]:
    """Summed nats and number of tokens, one prefix at a time: no batch, padding or mask."""
    nats, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            for i in range(1, len(row)):
                logits = model(input_ids=torch.tensor([row[:i]])).logits[0, -1].double()
                nats -= float(logits.log_softmax(-1)[row[i]])
                count += 1
    return nats, count


@pytest.mark.parametrize(("kind", "limit"), [("gpt2", 24), ("qwen2", 40)])
def test_perplexity_equals_row_by_row_at_every_batch_size(
    tmp_path: Path, kind: str, limit: int
) -> None:
    model = save_reference(tmp_path, kind)
    save_tokenizer(tmp_path, kind)
    prefix = [0] if kind == "gpt2" else []
    rows = [prefix + [VOCABULARY.index(c) for c in text.replace(" ", "\u0120")] for text in TEXTS]
    nats, count = row_by_row(model, [row[:limit] for row in rows])
    for batch_size in (1, 2, 3, 100):
        result = generative_perplexity(
            TEXTS,
            str(tmp_path),
            given=[""] * len(TEXTS),
            batch_size=batch_size,
            max_length=40,
            device="cpu",
        )
        assert result["reference_nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
        assert result["generative_perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
        assert result["num_scored_tokens"] == count
        assert result["num_texts_cut"] == sum(len(row) > limit for row in rows)
        assert result["num_texts_skipped"] == 0


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_what_a_model_was_given_is_read_and_not_scored(tmp_path: Path, kind: str) -> None:
    model = save_reference(tmp_path, kind)
    save_tokenizer(tmp_path, kind)
    prefix = [0] if kind == "gpt2" else []
    given = ["the cat ", "a dog", "", "off", "mat the"]
    nats, count, limit = 0.0, 0, 20
    for text, front in zip(TEXTS, given, strict=True):
        row = prefix + [VOCABULARY.index(c) for c in text.replace(" ", "\u0120")]
        of_all = row_by_row(model, [row[:limit]])
        of_front = row_by_row(model, [row[: len(prefix) + len(front)]])
        nats, count = nats + of_all[0] - of_front[0], count + of_all[1] - of_front[1]

    found = [
        generative_perplexity(
            TEXTS, str(tmp_path), given=given, batch_size=size, max_length=limit, device="cpu"
        )
        for size in (1, 4)
    ]

    for result in found:
        assert result["reference_nats_per_token"] == pytest.approx(nats / count, rel=1e-5)
        assert result["num_scored_tokens"] == count
        assert result["num_texts_skipped"] == 1  # the second is all given


def record_of(prompt: str | None, text: str, completion: str, gaps: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "text": text, "completion": completion, "gaps": gaps}


@pytest.mark.parametrize(
    ("record", "given"),
    [
        (record_of("the cat", "the cat sat", " sat", []), "the cat"),
        (record_of("The Cat", "the cat sat", "sat", []), "the cat "),  # a normalising tokenizer
        (record_of('[{"role": "user"}]', "user hi assistant yes", "yes", []), "user hi assistant "),
        (record_of(None, "a dog", "a dog", []), ""),
        (record_of("a dog", "a dog", "", []), "a dog"),
        (record_of("a", "ab cd ef", "##b cd ef", []), "a"),  # word pieces, decoded alone
        (record_of("the [MASK] sat", "the cat sat on", " on", [1]), "the "),
    ],
)
def test_what_a_record_was_given(record: dict[str, Any], given: str) -> None:
    assert given_text(record) == given


def test_texts_with_nothing_to_score_are_skipped(tmp_path: Path) -> None:
    save_reference(tmp_path, "qwen2")
    save_tokenizer(tmp_path, "qwen2")

    def score(texts: list[str]) -> dict[str, float]:
        return generative_perplexity(
            texts,
            str(tmp_path),
            batch_size=2,
            max_length=8,
            device="cpu",
        )

    mixed, alone = score(["", "c", "cat sat"]), score(["cat sat"])
    assert mixed["generative_perplexity"] == pytest.approx(alone["generative_perplexity"], rel=1e-6)
    assert (mixed["num_texts_skipped"], alone["num_texts_skipped"]) == (2, 0)
    nothing = score(["", "c"])
    assert nothing == {"num_scored_tokens": 0, "num_texts_cut": 0, "num_texts_skipped": 2}


def test_what_is_not_a_causal_lm_is_refused(tmp_path: Path) -> None:
    def score(name: str, **changed: int) -> dict[str, float]:
        sizes: dict[str, Any] = {"batch_size": 2, "max_length": 8} | changed
        given = [""] * len(TEXTS)
        return generative_perplexity(TEXTS, name, given=given, device="cpu", **sizes)

    with pytest.raises(InputError, match=r"no-such-folder.*cannot be opened"):
        score(str(tmp_path / "no-such-folder"))
    with pytest.raises(InputError, match="cannot be opened"):
        score(str(tmp_path))
    # transformers lists BERT among the causal LMs, and loads it as one that sees the future.
    bert = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert", "gpt2")
    with pytest.raises(InputError, match=r"bert.*not a causal language model"):
        score(str(tmp_path / "bert"))
    # A folder without tokenizer files: transformers makes an empty tokenizer up and says nothing.
    save_reference(tmp_path / "good", "qwen2")
    with pytest.raises(InputError, match=r"good.*no tokenizer"):
        score(str(tmp_path / "good"))
    save_tokenizer(tmp_path / "good", "qwen2")
    for wrong in ({"max_length": 1}, {"batch_size": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            score(str(tmp_path / "good"), **wrong)
    headless = Qwen2Model(save_reference(tmp_path / "headless", "qwen2").config)  # type: ignore[arg-type]
    headless.save_pretrained(tmp_path / "headless")
    save_tokenizer(tmp_path / "headless", "qwen2")
    with pytest.raises(InputError, match=r"headless.*no weights for lm_head.weight"):
        score(str(tmp_path / "headless"))
    weights = tmp_path / "good" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="good': weights cannot be read"):
        score(str(tmp_path / "good"))
    weights.unlink()
    with pytest.raises(InputError, match="a config but no weights"):
        score(str(tmp_path / "good"))


def test_cost_of_samples() -> None:
    metrics = cost_metrics([10, 3, 0], [4, 2, 0], ["length", "stop", "length"])
    assert metrics == {
        "num_model_calls": pytest.approx(2.0),
        "tokens_per_forward": pytest.approx(13 / 6),
        "stopped_fraction": pytest.approx(1 / 3),
    }
    assert "tokens_per_forward" not in cost_metrics([0], [0], ["length"])
