"""The section `evaluate`: what is measured, on which rows and samples."""

from typing import Literal

from pydantic import Field

from tokendiff.config.base import Section, operational

# Figures that an evaluation keeps by row too, so that two can be compared row by row
# (tokendiff.evaluation.paired).
PAIRED_METRICS = (
    *("nats_per_token", "bits_per_byte", "perplexity", "ar_nats_per_token"),
    *("expected_acceptance_length", "acceptance_length_mean", "tokens_per_target_forward"),
)


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
        "heldout", description="rows that the bound is taken on"
    )
    max_eval_rows: int | None = Field(None, ge=2, description="rows at most; by default all")
    num_mask_samples: int = Field(4, ge=1, description="noise levels drawn per row")
    target_model_id: str | None = Field(
        None,
        min_length=1,
        description="of a DFlash draft: what it drafts for; by default what it was trained for",
    )
    num_anchors: int = Field(
        16, ge=1, description="of a DFlash draft: blocks per row that acceptance is measured on"
    )
    verify: bool = Field(
        False,
        description="prove the installed code and the checkpoint against brute force first; "
        "the certificate stands in the report",
    )
    batch_size: int = Field(16, ge=1, description="rows in one forward pass")
    reference_model_name_or_path: str | None = Field(
        None, description="causal LM that scores the samples (generative perplexity)"
    )
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16 autocast")
    seed: int = Field(0, ge=0, lt=2**63, description="with a row's id, decides its noise")
