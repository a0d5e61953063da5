"""What speculative decoding gained: how many tokens a block came to, and what a pass of the target
gave.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from tokendiff.data.samples import num_new_tokens

COMMAND_LINE = "prompt"  # the source of prompts that no file held


def acceptance_metrics(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Figures of samples that were written with a draft.

    A block's acceptance length is what it added to its row: the drafted tokens that were accepted,
    and one of the target's own, or two where the pass that drafts gives one too. A block that a
    stop token or the length ended counts with what was kept of it, so short texts push the mean
    down.

    Args:
        records: as part files hold them; with `blocks_by_gain` and `source`. Gone through once, so
            that those of millions of rows need not be in memory together.

    Returns:
        acceptance_length_mean, acceptance_length_standard_error: over blocks, the error over rows
            (blocks of a row are not independent; ratio of sums, by linearisation). A single row
            has no error.
        acceptance_share_K: share of the blocks that added exactly K tokens.
        tokens_per_target_forward: new tokens over the target's forward passes that a row took part
            in, those of its prompt included.
        acceptance_length_mean/SOURCE: by prompt source, where there are several.
        Of no records there are no figures.
    """
    by_record: list[np.ndarray] = []
    sources: list[str] = []
    passes = new_tokens = 0
    for record in records:
        by_record.append(np.array(record["blocks_by_gain"], dtype=np.int32))
        # Names of metrics in MLflow have no other characters than these.
        name = re.sub(r"[^\w.-]", "_", record["source"] or COMMAND_LINE)
        sources.append(sys.intern(name))
        passes += record["num_model_calls"]
        new_tokens += num_new_tokens(record)
    if not by_record:
        return {}
    gains = np.array(by_record, dtype=np.float64)
    length = np.arange(1, gains.shape[1] + 1)
    by_row = accepted_by_row(gains)
    mean, error = _ratio(by_row["num_accepted"], by_row["num_blocks"])
    metrics = {
        "acceptance_length_mean": mean,
        **({} if error is None else {"acceptance_length_standard_error": error}),
        "tokens_per_target_forward": new_tokens / passes,
    }
    shares = gains.sum(0) / max(gains.sum(), 1.0)
    metrics |= {
        f"acceptance_share_{k}": float(share) for k, share in zip(length, shares, strict=True)
    }
    names = sorted(set(sources))
    if len(names) > 1:
        for name in names:
            own = gains[[source == name for source in sources]]
            metrics[f"acceptance_length_mean/{name}"], _ = _ratio(own @ length, own.sum(1))
    return metrics


def accepted_by_row(blocks: np.ndarray) -> dict[str, np.ndarray]:
    """Of counts [rows, K] of blocks that came to 1..K tokens: all those tokens, num_accepted, and
    num_blocks, each [rows].
    """
    length = np.arange(1, blocks.shape[1] + 1)
    return {"num_accepted": blocks @ length, "num_blocks": blocks.sum(1)}


def speedup_metrics(measured: Mapping[str, float]) -> dict[str, float]:
    """How much faster the target wrote with its draft than alone, on the same rows.

    Args:
        measured: sums over actors of what `CompletionModel.measured` returns; nothing, nothing.

    Returns:
        speedup: tokens per second over those of the target alone. Both are wall-clock of whole
            batches, prompts included, in one process, turn and turn about.
        tokens_per_second_with_draft, tokens_per_second_alone
        same_text_fraction: of the rows, where proposals were not drawn: all but those in which two
            tokens are equally likely to within rounding, which is another in a wider pass.
    """
    if not measured:
        return {}
    drafted = measured["new_tokens"] / measured["seconds"]
    alone = measured["new_tokens_alone"] / measured["seconds_alone"]
    same = measured.get("same_rows")
    return {
        "speedup": drafted / alone,
        "tokens_per_second_with_draft": drafted,
        "tokens_per_second_alone": alone,
        **({} if same is None else {"same_text_fraction": same / measured["rows"]}),
    }


def speculation_tables(
    metrics: Mapping[str, Any],
) -> list[tuple[str, list[str], list[list[Any]]]]:
    """The report's tables of these figures; none where no draft was decoded with."""
    if "acceptance_length_mean" not in metrics:
        return []
    named = [
        ("acceptance length", "acceptance_length_mean", "tokens that a block came to, on average"),
        ("its standard error", "acceptance_length_standard_error", "over rows"),
        ("tokens per target pass", "tokens_per_target_forward", "prompts included"),
        ("speed-up", "speedup", "tokens per second, over those of the target alone on these rows"),
        ("tokens/s with the draft", "tokens_per_second_with_draft", "wall-clock"),
        ("tokens/s alone", "tokens_per_second_alone", "wall-clock, in turn with the draft"),
        ("same text", "same_text_fraction", "share of rows in which both wrote the same tokens"),
    ]
    figures = [[label, metrics[key], note] for label, key, note in named if key in metrics]
    sources = _named_by(metrics, "acceptance_length_mean/")
    tables: list[tuple[str, list[str], list[list[Any]]]] = [
        ("Speculative decoding", ["figure", "value", "meaning"], figures),
        (
            "Tokens that a block came to",
            ["tokens", "share of blocks"],
            [[int(k), share] for k, share in _named_by(metrics, "acceptance_share_")],
        ),
    ]
    if sources:
        columns = ["prompts", "acceptance length"]
        tables.append(("Acceptance length by prompt file", columns, list(map(list, sources))))
    return tables


def _named_by(metrics: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    return [(k.removeprefix(prefix), value) for k, value in metrics.items() if k.startswith(prefix)]


def _ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float | None]:
    """sum / sum over rows, and its standard error, None of a single row; 0 where there is nothing
    to divide by.
    """
    total, count = denominators.sum(), len(denominators)
    if total == 0:
        return 0.0, None if count < 2 else 0.0
    ratio = numerators.sum() / total
    if count < 2:
        return float(ratio), None
    residual = numerators - ratio * denominators
    return float(ratio), float(np.sqrt(count / (count - 1) * (residual**2).sum()) / total)
