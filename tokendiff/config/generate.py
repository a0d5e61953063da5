"""The section `generate`: what is sampled from which model."""

from typing import Literal

from pydantic import Field, model_validator

from tokendiff.config.base import MAX_BATCH, MAX_COUNT, Section, operational
from tokendiff.config.samplers import (
    AncestralConfig,
    BlockwiseConfig,
    DFlashSamplerConfig,
    OpenEndedSamplerConfig,
    SamplerConfig,
    SelfSpeculationConfig,
)


class GenerateConfig(Section):
    """Checkpoint and prompts to samples."""

    checkpoint_path: str | None = operational(None, description="a checkpoint-N/ or final/ folder")
    model_id: str | None = Field(
        None,
        min_length=1,
        description="transformers name (or name@revision) or folder of a causal language model or "
        "a published denoiser (LLaDA, Dream), in place of checkpoint_path",
    )
    trust_remote_code: bool = Field(
        False,
        description="run the Python code that comes with model_id, if transformers has no class "
        "for it",
    )
    target_model_id: str | None = Field(
        None,
        min_length=1,
        description="sampler dflash: the causal language model whose text is written",
    )
    draft_model_id: str | None = Field(
        None,
        min_length=1,
        description="sampler dflash: its draft, published or a checkpoint of objective dflash; or "
        "models:/NAME@ALIAS",
    )
    output_dir: str | None = operational(None, description="folder for the samples")
    prompt: list[str] = Field([], description="a prompt; may be given several times")
    prompts: list[str] = Field(
        [],
        description="prompt files or globs: .txt (a prompt a line), .jsonl or .parquet (prompt, or "
        "messages of a chat); .txt and .jsonl also compressed",
    )
    use_chat_template: bool = Field(
        False,
        description="treat each prompt as a user's message and write it out with the chat template",
    )
    add_generation_prompt: bool = Field(
        False, description="end each chat with the tokens that begin an answer"
    )
    num_samples: int = Field(
        4, ge=1, le=MAX_COUNT, description="number of samples; with prompts, of each prompt"
    )
    seq_len: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="tokens of a sample, its prompt included; by default the trained max_length",
    )
    sampler: SamplerConfig = Field(
        AncestralConfig(),
        description="sampler: a name, or a mapping with its fields. If none is named, "
        "jobs.generate with a model_id chooses by the model: blockwise for LLaDA and Dream, sdar "
        "for SDAR, block_refinement for LLaDA2, canvas for DiffusionGemma, ar for others",
    )
    batch_size: int = Field(
        16,
        ge=1,
        le=MAX_BATCH,
        description="rows that are sampled together; a sampler that ends rows at different times "
        "keeps this many in flight",
    )
    output_format: Literal["jsonl", "parquet"] = Field(
        "jsonl", description="format of the part files"
    )
    measure_speedup: bool = Field(
        False,
        description="samplers dflash and self_speculation: also write the same rows token by token "
        "with the model alone, and compare times and texts",
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="bf16: compute in bfloat16, by autocast or with weights of that type"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of the samples; a row's randomness depends on it and on the row's id",
    )
    max_errors: int = operational(
        100,
        ge=0,
        le=MAX_COUNT,
        description="most prompts of files that may be unusable (too long, not text); they are "
        "left out and named in errors/. With more of them the job fails",
    )
    max_row_failures: int = operational(
        4,
        ge=3,
        le=MAX_COUNT,
        description="number of times that the actor sampling a row may die (the last time with "
        "that row alone) before the row is set aside; set_aside/ then names it, and the job ends "
        "with exit code 1",
    )

    @property
    def is_open_ended(self) -> bool:
        return isinstance(self.sampler, OpenEndedSamplerConfig)

    @property
    def max_new_tokens(self) -> int | None:
        """Most tokens of an answer, where a sampler of whole rows writes answers; else None."""
        return self.sampler.max_new_tokens if isinstance(self.sampler, BlockwiseConfig) else None

    @property
    def is_speculative(self) -> bool:
        return isinstance(self.sampler, DFlashSamplerConfig | SelfSpeculationConfig)

    @model_validator(mode="after")
    def _fields_agree(self) -> "GenerateConfig":
        sampler = f"sampler {self.sampler.name!r}"
        if self.sampler.name == "dflash":
            self.refuse_ignored(("checkpoint_path", "model_id"), sampler)
        else:
            self.refuse_ignored(("target_model_id", "draft_model_id"), sampler)
        if not self.is_speculative:
            self.refuse_ignored(("measure_speedup",), sampler)
        if self.model_id is None:
            self.refuse_ignored(("trust_remote_code",), "no model_id")
        elif self.checkpoint_path is not None:
            raise ValueError("checkpoint_path and model_id both name the model; give one")
        elif not self.is_open_ended:
            self.refuse_ignored(("trust_remote_code",), f"{sampler}, which runs no remote code")
            if self.seq_len is None and self.max_new_tokens is None:
                raise ValueError(
                    f"{sampler} with a model_id needs the length of a sample: seq_len, or "
                    "max_new_tokens of sampler 'blockwise'"
                )
        if self.is_open_ended:
            self.refuse_ignored(("seq_len",), sampler)
        elif self.max_new_tokens is not None:
            self.refuse_ignored(("seq_len",), f"max_new_tokens {self.max_new_tokens}")
        if not self.prompts:
            self.refuse_ignored(("max_errors",), "no prompts of files")
        if not self.use_chat_template and not self.prompts:
            self.refuse_ignored(("add_generation_prompt",), "prompts that are no chats")
        return self
