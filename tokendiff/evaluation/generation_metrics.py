"""How varied samples are: entropy of their tokens, distinct n-grams, repetition, length.

Low entropy and high repetition unmask samples whose generative perplexity is good only because
they repeat themselves (arXiv 2409.02908). All entropies are in nats.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokendiff.errors import InputError

_REPEATED_N = 4


def unigram_entropy_nats(counts: ArrayLike) -> float:
    """Entropy of the empirical distribution of tokens: the best that knows no context.

    Args:
        counts: [V] occurrences of each token; without any occurrence the entropy is 0.

    Raises:
        InputError: a count is negative or not finite.
    """
    occurrences = np.asarray(counts, dtype=np.float64).ravel()
    if not np.all(np.isfinite(occurrences) & (occurrences >= 0)):
        raise InputError("unigram_entropy_nats: counts must be finite and not negative")
    occurrences = occurrences[occurrences > 0]
    probabilities = occurrences / occurrences.sum()
    return abs(float(probabilities @ np.log(probabilities)))  # abs, since -0.0 reads badly


def generation_metrics(samples: Sequence[Sequence[int]]) -> dict[str, float]:
    """Statistics of the token ids of samples.

    Args:
        samples: the generated tokens of each sample, without prompt and padding; may be empty.

    Returns:
        num_samples
        length_mean, length_min, length_max: tokens of a sample.
        unigram_entropy_sample_nats: entropy of the tokens of one sample, averaged over samples;
            the "sample entropy" of the MDLM and GIDD papers. An empty sample has entropy 0. At
            most ln(length), so comparable only between samples of one length.
        unigram_entropy_pooled_nats: entropy of the tokens of all samples together.
        distinct_1, distinct_2, distinct_3: different n-grams of all samples together over n-grams
            (arXiv 1510.03055); falls as there are more samples, so comparable only at equal sizes.
        repeated_4gram_fraction: 1 - different 4-grams over 4-grams of one sample, averaged over the
            samples of at least 4 tokens ("seq-rep-4", arXiv 1908.04319).
        An n-gram never crosses samples; where no sample is long enough to hold one, the value is 0.

    Raises:
        InputError: there is no sample.
    """
    if len(samples) == 0:
        raise InputError(
            "generation_metrics: there are no samples to measure; generate at least one"
        )
    lengths = np.array([len(sample) for sample in samples])
    sample = np.repeat(np.arange(len(samples)), lengths)
    tokens = _dense(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in samples]))
    metrics = {
        "num_samples": float(len(samples)),
        "length_mean": float(lengths.mean()),
        "length_min": float(lengths.min()),
        "length_max": float(lengths.max()),
        "unigram_entropy_sample_nats": float(_entropy_of_each(tokens, sample, lengths).mean()),
        "unigram_entropy_pooled_nats": unigram_entropy_nats(np.bincount(tokens)),
    }
    for n in (1, 2, 3):
        grams, _ = _ngrams(tokens, sample, n)
        metrics[f"distinct_{n}"] = len(np.unique(grams)) / max(len(grams), 1)
    metrics[f"repeated_{_REPEATED_N}gram_fraction"] = _repeated_fraction(
        tokens, sample, len(samples)
    )
    return metrics


def cost_metrics(
    new_tokens: Sequence[int], model_calls: Sequence[int], finish_reasons: Sequence[str]
) -> dict[str, float]:
    """What samples cost: an entry per sample, of the tokens that were not given.

    Returns:
        num_model_calls: forward passes that a sample took part in, averaged over samples.
        tokens_per_forward: tokens of all samples over their forward passes; left out where there
            were none.
        stopped_fraction: samples that ended at a stop token.
    """
    calls = sum(model_calls)
    metrics = {
        "num_model_calls": calls / len(model_calls),
        "stopped_fraction": sum(reason == "stop" for reason in finish_reasons)
        / len(finish_reasons),
    }
    return {**metrics, "tokens_per_forward": sum(new_tokens) / calls} if calls else metrics


def _entropy_of_each(tokens: NDArray, sample: NDArray, lengths: NDArray) -> NDArray:
    """[number of samples]: ln N - (1/N) sum of c ln c over the counts c of a sample of N tokens."""
    owner, counts = _count_pairs(sample, tokens)
    sums = np.bincount(owner, weights=counts * np.log(counts), minlength=len(lengths))
    sizes = np.maximum(lengths, 1)
    return np.maximum(np.log(sizes) - sums / sizes, 0.0)


def _repeated_fraction(tokens: NDArray, sample: NDArray, num_samples: int) -> float:
    grams, sample_of_gram = _ngrams(tokens, sample, _REPEATED_N)
    num_grams = np.bincount(sample_of_gram, minlength=num_samples)
    num_different = np.bincount(_count_pairs(sample_of_gram, grams)[0], minlength=num_samples)
    has_any = num_grams > 0
    if not has_any.any():
        return 0.0
    return float(np.mean(1.0 - num_different[has_any] / num_grams[has_any]))


def _ngrams(tokens: NDArray, sample: NDArray, n: int) -> tuple[NDArray, NDArray]:
    """A number for every n-gram (equal n-grams, equal numbers) and the sample that it stands in."""
    base = int(tokens.max(initial=0)) + 1
    grams = tokens
    for k in range(1, n):
        grams = _dense(grams[:-1] * base + tokens[k:])
    is_inside = sample[: len(grams)] == sample[n - 1 :]
    return grams[is_inside], sample[: len(grams)][is_inside]


def _dense(values: NDArray) -> NDArray:
    """Each value's rank among the different values, so that a product of two fits in 64 bits."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _count_pairs(owner: NDArray, values: NDArray) -> tuple[NDArray, NDArray]:
    """The owner and the count of each different (owner, value); values are not negative."""
    base = int(values.max(initial=0)) + 1
    pairs, counts = np.unique(owner * base + values, return_counts=True)
    return pairs // base, counts
