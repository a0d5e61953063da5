"""What a pipeline prints: plan, status, and the short table at the end of a run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from pipelines.runner import Results, store_command
from tokendiff.config import Config
from tokendiff.data.samples import read_samples
from tokendiff.evaluation.certificate import Check, failure, read_certificate

_SHOWN_SAMPLES = 2
_SHOWN_CHARACTERS = 400


def print_plan(rows: list[dict[str, str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['stage']:<11} {row['state']:<7} {row['folder']}")


def print_results(results: Results, config: Config, root: Path, *, as_json: bool) -> None:
    """The figures that matter, the first samples, and where everything is.

    Args:
        results: of the stages that are done.
        root: as for `run_pipeline`.
    """
    if as_json:
        cli.print_result(results, as_json=True)
        return
    lines = [*_training_lines(results), *_bound_lines(results), *_sample_lines(results)]
    if "evaluate" in results:
        lines += [("verified", line) for line in verified_lines(_checks(results))]
        lines.append(("report", results["evaluate"]["report"]))
    if "train" in results:
        lines.append(("checkpoint", results["train"]["checkpoint"]))
    if config.tracking.enabled:
        lines.append(("MLflow", store_command(config, root)))
    if not results:
        lines.append((config.name, "no stage is done yet"))
    print()
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        print(f"{label:<{width}}  " + text.replace("\n", "\n" + " " * (width + 2)))


def _training_lines(results: Results) -> list[tuple[str, str]]:
    lines = []
    if data := results.get("preprocess"):
        lines.append(
            (
                "data",
                f"{data['train_tokens']:,} training tokens in {data['train_rows']:,} rows, "
                f"{data['heldout_tokens']:,} held out, "
                f"{100 * data['padded_fraction']:.2f} % padding",
            )
        )
    if train := results.get("train"):
        speed = train["tokens_per_second"]
        lines.append(
            (
                "training",
                f"{train['step']} steps" + (f", {speed:,.0f} tokens/s" if speed else ""),
            )
        )
    if (samples := results.get("generate")) and samples["tokens_per_second"]:
        forward = samples["tokens_per_forward"]
        lines.append(
            (
                "sampling",
                f"{samples['rows']} samples, {samples['tokens_per_second']:,.0f} tokens/s"
                + (f", {forward:.2f} tokens per forward pass" if forward else ""),
            )
        )
    return lines


def _bound_lines(results: Results) -> list[tuple[str, str]]:
    figures = results.get("evaluate")
    if figures is None:
        return []
    if "expected_acceptance_length" in figures:
        error = figures["expected_acceptance_length_standard_error"]
        length = f"{figures['expected_acceptance_length']:.3f} ± {error:.3f}"
        return [("acceptance", f"{length} tokens a block expected on held-out text")]
    bound, unigram = figures["nats_per_token"], figures["unigram_entropy_nats"]
    lines = [
        (
            "likelihood" if "is_exact" in figures else "bound",
            f"{bound:.3f} ± {figures['standard_error']:.3f} nats per held-out token",
        ),
        ("unigram", f"{unigram:.3f} nats, its entropy: the bound is {_apart(bound, unigram)}"),
    ]
    if figures["bits_per_byte"] is not None:
        unigram_bits = unigram * figures["num_tokens"] / figures["num_bytes"] / math.log(2.0)
        lines.append(
            (
                "bits/byte",
                f"{figures['bits_per_byte']:.3f}, against {unigram_bits:.3f} "
                "at the unigram entropy",
            )
        )
    return lines


def _sample_lines(results: Results) -> list[tuple[str, str]]:
    if "generate" not in results:
        return []
    records = read_samples(Path(results["generate"]["output_dir"]))[:_SHOWN_SAMPLES]
    return [(f"sample {record['id']}", _shortened(record["text"])) for record in records]


def failure_of(results: Results) -> str | None:
    """What makes stages bad that are done; None where nothing does."""
    return failure(_checks(results))


def _checks(results: Results) -> list[Check]:
    certificate = results.get("evaluate", {}).get("certificate")
    return read_certificate(Path(certificate).parent) if certificate else []


def verified_lines(checks: Sequence[Check]) -> list[str]:
    """A line per subject: how many of its checks passed."""
    subjects = list(dict.fromkeys(check.subject for check in checks))
    width = max(map(len, subjects), default=0)
    lines = []
    for subject in subjects:
        passed = [check.passed for check in checks if check.subject == subject]
        lines.append(f"{subject:<{width}}  {sum(passed)} of {len(passed)} checks passed")
    return lines


def _apart(bound: float, unigram: float) -> str:
    share = 100 * (1 - bound / unigram) if unigram else 0.0
    return f"{abs(share):.0f} % " + ("below" if share >= 0 else "above, so nothing is learnt yet")


def _shortened(text: str) -> str:
    text = printable(text).strip()
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."


def printable(text: str) -> str:
    """The text without control characters: a sample must not be able to drive the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "\ufffd" for c in text)
