"""The section `generate`: what is sampled from which model."""

from typing import Literal

from pydantic import Field, model_validator

from tokendiff.config.base import Section, operational
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
        description="in place of checkpoint_path: a causal language model, or a published denoiser "
        "(LLaDA, Dream), that is no checkpoint of ours, by its transformers name or folder",
    )
    trust_remote_code: bool = Field(
        False, description="run code that comes with model_id, where transformers has none for it"
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
        False, description="prompts are what a user says, written out by the chat template"
    )
    add_generation_prompt: bool = Field(
        False, description="a chat ends with what an answer begins with"
    )
    num_samples: int = Field(4, ge=1, description="samples, or samples per prompt")
    seq_len: int | None = Field(
        None,
        ge=1,
        description="tokens of a sample, its prompt included; by default the trained max_length",
    )
    sampler: SamplerConfig = Field(
        AncestralConfig(),
        description="how samples are drawn; jobs.generate with a model_id uses the sampler of the "
        "model's family where none is named (blockwise of LLaDA and Dream, sdar, block_refinement "
        "of LLaDA2, else ar)",
    )
    batch_size: int = Field(
        16,
        ge=1,
        description="rows that are sampled together; where rows end at different times, rows in "
        "flight",
    )
    output_format: Literal["jsonl", "parquet"] = Field(
        "jsonl", description="format of the part files"
    )
    measure_speedup: bool = Field(
        False,
        description="samplers dflash and self_speculation: let the model alone write the same rows "
        "too, token by token, in turn with the draft, and compare times and texts",
    )
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16 autocast")
    seed: int = Field(0, ge=0, lt=2**63, description="with a row's id, decides its randomness")
    max_errors: int = operational(
        100,
        ge=0,
        description="prompts of files that may be of no use (too long, not text) before the job "
        "fails; errors/ names them",
    )

    @property
    def is_open_ended(self) -> bool:
        return isinstance(self.sampler, OpenEndedSamplerConfig)

    @property
    def max_new_tokens(self) -> int | None:
        """Of a sampler of rows of one length, where each row is a prompt and its answer."""
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
