"""What a reader of the report sees first: the figures in words, in order of weight."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tokendiff.evaluation.acceptance import speculation_tables
from tokendiff.evaluation.bound import Bound
from tokendiff.evaluation.report import Denoising, Report, Table, explain_bound

_SHOWN_SAMPLES = 16
_ACCURACY = "draft_accuracy_"
_JOINT_CURVES = (
    ("next-token loss, nats per token", "ar_nll"),
    ("both losses, weighted", "loss"),
)


def make_report(
    *,
    title: str,
    subtitle: str,
    split: str,
    bound: Bound | None,
    metrics: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    training_log: Sequence[Mapping[str, Any]],
    trace: Mapping[str, Any] | None,
    config_yaml: str,
    more_tables: Sequence[Table] = (),
) -> Report:
    """Lay the figures of one evaluation out as a report.

    Args:
        split: "heldout" or "train", which the rows are of.
        bound: None of a draft, which has none.
        metrics: `is_exact` among them where the "bound" is the negative log-likelihood itself.
        more_tables: those of the certificate, where there is one.
        training_log: the "metrics" and "heldout" events of the training run.
        trace: a sample on its way, or None where there is none to show.
    """
    reference, summary = None, acceptance_headline(metrics)
    rows = "training" if split == "train" else "held-out"
    explanation = explain_acceptance(metrics, rows)
    if bound is not None:
        unigram = float(metrics["unigram_entropy_nats"])
        reference = (f"unigram entropy, {'held out' if split == 'heldout' else rows}", unigram)
        summary = headline(bound, unigram, metrics, rows)
        explanation = explain_bound(
            bound.nats_per_token,
            unigram,
            standard_error=bound.standard_error,
            is_exact="is_exact" in metrics,
            rows=rows,
        )
    # A sum of two losses compares with neither the bound nor the entropy of single tokens.
    is_joint = any("ar_nll" in event and "elbo" in event for event in training_log)
    return Report(
        title=title,
        subtitle=subtitle,
        summary=[*summary, *_speed(training_log), *_samples_headline(metrics)],
        explanation=explanation,
        loss_curve=_curve(training_log, "elbo" if is_joint else "loss"),
        heldout_curve=_curve(training_log, "heldout_nats_per_token"),
        loss_reference=reference,
        loss_label="loss of the blocks, nats per token" if is_joint else "loss, nats per token",
        curves={
            name: _curve(training_log, key)
            for name, key in (
                *(_JOINT_CURVES if is_joint else ()),
                ("expected acceptance length, tokens", "expected_acceptance_length"),
                ("the same on held-out rows, tokens", "heldout_acceptance_length"),
                ("learning rate", "lr"),
                ("gradient norm", "grad_norm"),
                ("tokens per second", "tokens_per_second"),
            )
        },
        metrics={name: float(value) for name, value in metrics.items() if value is not None},
        samples=[dict(record) for record in samples[:_SHOWN_SAMPLES]],
        denoising=None if trace is None else Denoising(**trace),
        tables=[*accuracy_tables(metrics), *speculation_tables(metrics), *more_tables],
        config_yaml=config_yaml,
    )


def _curve(training_log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(event["step"], event[key]) for event in training_log if key in event]


def headline(
    bound: Bound,
    unigram_nats: float,
    metrics: Mapping[str, Any],
    rows_are: str,
) -> list[tuple[str, str, str]]:
    """(label, value, what it means) of the figures that a run is judged by; on rows that are
    "held-out" or "training".
    """
    is_exact = "is_exact" in metrics
    upper = "" if is_exact else "upper bound on the "
    rows = [
        (
            "Likelihood" if is_exact else "Bound",
            f"{bound.nats_per_token:.3f} ± {bound.standard_error:.3f} nats per token",
            f"{upper}negative log-likelihood of {bound.num_tokens:,} {rows_are} tokens",
        ),
        (
            "Unigram entropy",
            f"{unigram_nats:.3f} nats per token",
            "of the same tokens: what the best model without context gets",
        ),
        (
            "Perplexity",
            f"{'' if is_exact else 'at most '}{bound.perplexity:,.1f}",
            f"exp of the {'likelihood' if is_exact else 'bound'}, per token",
        ),
    ]
    if "ar_nats_per_token" in metrics:
        value = f"{metrics['ar_nats_per_token']:.3f} ± {metrics['ar_standard_error']:.3f}"
        rows.append(
            (
                "Token by token",
                f"{value} nats per token",
                "exact negative log-likelihood of the same model, read from left to right",
            )
        )
    if bound.bits_per_byte is not None:
        unigram_bits = unigram_nats * bound.num_tokens / bound.num_bytes / math.log(2.0)
        rows.append(
            (
                "Bits per byte",
                f"{bound.bits_per_byte:.3f}",
                f"of UTF-8 source text, comparable across tokenizers; {unigram_bits:.3f} "
                "at the unigram entropy",
            )
        )
    return rows


def acceptance_headline(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, what it means) of a draft's figures; none where there are none."""
    if "expected_acceptance_length" not in metrics:
        return []
    error = metrics["expected_acceptance_length_standard_error"]
    shares = [value for name, value in metrics.items() if "_acceptance_at_" in name]
    return [
        (
            "Expected acceptance length",
            f"{metrics['expected_acceptance_length']:.3f} ± {error:.3f} tokens a block",
            f"under teacher forcing, of at most {len(shares) + 1}: the agreeing prefix and one "
            f"token of the target's own, over {metrics['num_blocks']:,} blocks; what decoding "
            "accepts of the target's own text at temperature 0, and less on other text",
        ),
        (
            "First tokens accepted",
            ", ".join(f"{value:.1%}" for value in shares),
            "share of the blocks whose first 1, 2, 3, ... drafted tokens all agree",
        ),
    ]


def explain_acceptance(metrics: Mapping[str, Any], rows: str) -> str:
    """A sentence for people who do not know what an acceptance length is; empty without one."""
    if "expected_acceptance_length" not in metrics:
        return ""
    return (
        f"With this draft a forward pass of the target yields "
        f"{metrics['expected_acceptance_length']:.2f} tokens on average, where it writes text like "
        f"the {rows} rows; without a draft it yields one."
    )


def accuracy_tables(metrics: Mapping[str, Any]) -> list[Table]:
    """A draft's figures place by place; nothing where there are none."""
    accuracy = {
        int(name.removeprefix(_ACCURACY)): value
        for name, value in metrics.items()
        if name.startswith(_ACCURACY)
    }
    if not accuracy:
        return []
    rows = [[k, value, metrics[f"expected_acceptance_at_{k}"]] for k, value in accuracy.items()]
    columns = ["drafted token", "share that is right", "share right with all before it"]
    return [("Agreement with the text by place in the block", columns, rows)]


def _speed(training_log: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    speeds = sorted(speed for _, speed in _curve(training_log, "tokens_per_second"))
    if not speeds:
        return []
    return [
        (
            "Training speed",
            f"{speeds[len(speeds) // 2]:,.0f} tokens/s",
            "median over the log lines, all workers together",
        )
    ]


def _samples_headline(metrics: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    if "tokens_per_forward" in metrics:
        speed = metrics.get("sampled_tokens_per_second")
        rows.append(
            (
                "Tokens per forward pass",
                f"{metrics['tokens_per_forward']:,.2f}",
                f"of the samples, {metrics['num_model_calls']:,.0f} passes each"
                + (f"; {speed:,.0f} tokens/s" if speed else ""),
            )
        )
    if "generative_perplexity" in metrics:
        rows.append(
            (
                "Generative perplexity",
                f"{metrics['generative_perplexity']:,.1f}",
                "of the samples under the reference model; read it beside their entropy",
            )
        )
    return rows
