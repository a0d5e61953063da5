"""The section `evaluate`: what is measured, on which rows and samples."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tokendiff.config.base import MAX_BATCH, MAX_COUNT, Section, added, operational
from tokendiff.config.samplers import SamplerConfig

# Figures that an evaluation keeps by row too, so that two can be compared row by row
# (tokendiff.evaluation.paired).
PAIRED_METRICS = (
    *("nats_per_token", "bits_per_byte", "perplexity", "ar_nats_per_token"),
    *("expected_acceptance_length", "acceptance_length_mean", "tokens_per_target_forward"),
)

# All figures that an evaluation may have, but for those of tasks, prompt files (TASK/METRIC) and
# those below.
METRICS = (
    *("nats_per_token", "standard_error", "bits_per_byte", "perplexity", "is_exact"),
    *("ar_nats_per_token", "ar_standard_error", "unigram_entropy_nats"),
    *("num_rows", "num_tokens", "num_bytes", "num_blocks"),
    *("expected_acceptance_length", "expected_acceptance_length_standard_error"),
    *("acceptance_length_mean", "acceptance_length_standard_error", "tokens_per_target_forward"),
    *("speedup", "tokens_per_second_with_draft", "tokens_per_second_alone", "same_text_fraction"),
    *("num_samples", "length_mean", "length_min", "length_max", "stopped_fraction"),
    *("unigram_entropy_sample_nats", "unigram_entropy_pooled_nats"),
    *("distinct_1", "distinct_2", "distinct_3", "repeated_4gram_fraction"),
    *("num_model_calls", "tokens_per_forward", "sampled_tokens_per_second"),
    *("generative_perplexity", "reference_nats_per_token", "num_scored_tokens"),
    *("num_texts_cut", "num_texts_skipped"),
    *("verify_passed", "verify_failed", "unserved_requests"),
)
# With a number in the place of {}: of tokens, of rows.
NUMBERED_METRICS = (
    *("expected_acceptance_share_{}", "expected_acceptance_at_{}", "draft_accuracy_{}"),
    *("acceptance_share_{}", "pass_seconds_batch_{}_tokens_{}"),
)


def is_metric(name: str) -> bool:
    """Whether an evaluation of some checkpoint may have such a figure."""
    pattern = re.sub(r"[0-9]+", "{}", name)
    return is_task_metric(name) or name in METRICS or pattern in NUMBERED_METRICS


def is_task_metric(name: str) -> bool:
    """Whether a figure is one of a task: TASK/METRIC, arc_easy/acc."""
    return "/" in name


def split_at_commas(names: object) -> object:
    """`a,b` is short for `[a, b]`, as in lm-evaluation-harness."""
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, list) or not all(isinstance(name, str) for name in listed):
        return names  # which pydantic refuses
    return [part.strip() for name in listed for part in name.split(",") if part.strip()]


class EvaluateConfig(Section):
    """Checkpoint and held-out rows (and samples) to metrics and a report."""

    checkpoint_path: str | None = operational(None, description="a checkpoint-N/ or final/ folder")
    data_path: str | None = operational(
        None,
        description="folder that jobs.preprocess wrote; by default the checkpoint's own",
    )
    samples_path: str | None = operational(None, description="folder that jobs.generate wrote")
    output_dir: str | None = operational(
        None, description="folder for metrics.json, rows.parquet and report/"
    )
    split: Literal["heldout", "train"] = Field(
        "heldout", description="rows that the bound is measured on"
    )
    max_eval_rows: int | None = Field(
        None, ge=2, le=MAX_COUNT, description="most rows that are evaluated; by default all"
    )
    num_mask_samples: int = Field(
        4,
        ge=1,
        le=100_000,
        description="noise levels that are drawn for each row; more give a smaller standard error",
    )
    target_model_id: str | None = Field(
        None,
        min_length=1,
        description="DFlash drafts: the target model; by default the one that the draft was "
        "trained for",
    )
    num_anchors: int = Field(
        16,
        ge=1,
        le=1_000_000,
        description="DFlash drafts: blocks of each row that acceptance is measured on",
    )
    verify: bool = Field(
        False,
        description="check the installed code and the checkpoint against brute force first, and "
        "add the certificate to the report",
    )
    time_passes: bool = added(
        False,
        description="causal models: time passes over one token and over many, and print how many "
        "drafted tokens must be accepted for speculative decoding to be faster on this "
        "machine",
    )
    batch_size: int = Field(16, ge=1, le=MAX_BATCH, description="rows in one forward pass")
    reference_model_name_or_path: str | None = Field(
        None, description="causal LM that scores the samples (generative perplexity)"
    )
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16 autocast")
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of the noise; a row's noise depends on it and on the row's id",
    )
    tasks: Annotated[list[str], BeforeValidator(split_at_commas)] = added(
        [],
        description="tasks of lm-evaluation-harness, separated by commas (arc_easy,gsm8k); builtin "
        "is a small set that needs no network",
    )
    tasks_path: str | None = added(
        None, min_length=1, description="folder with task files (YAML) of your own"
    )
    sampler: SamplerConfig | None = added(
        None,
        description="tasks: the sampler that writes and scores texts. ar and self_speculation "
        "give exact likelihoods, the others bounds; by default one that fits the checkpoint",
    )
    num_fewshot: int | None = added(
        None,
        ge=0,
        le=MAX_COUNT,
        description="tasks: solved examples before each document; by default the task's",
    )
    max_task_documents: int | None = added(
        None, ge=1, le=MAX_COUNT, description="tasks: most documents of each task; by default all"
    )
    apply_chat_template: bool = added(
        False, description="tasks: write documents out as chats with the tokenizer's template"
    )

    @model_validator(mode="after")
    def _tasks_are_named(self) -> "EvaluateConfig":
        if not self.tasks:
            beside = ("tasks_path", "num_fewshot", "max_task_documents", "apply_chat_template")
            self.refuse_ignored((*beside, "sampler"), "no tasks")
        return self
