"""Everything a user may set, checked at birth: one section per job, one file for a whole pipeline.

Field names are those of the published examples' flags. A section is what a YAML file holds under
the section's name, what `-o section.field=value` overrides, and what a job's `--field value` flags
set. Of libraries, this module imports pydantic alone, so that `--help` answers at once.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tokendiff.errors import InputError

BUILTIN_MODEL_PREFIX = "builtin:"
BUILTIN_MODELS = (
    *("bert-tiny", "bert-mini", "bert-small", "bert-base"),
    *("dit-tiny", "dit-mini", "dit-small", "dit-base"),
    *("qwen3-tiny", "qwen3-mini", "qwen3-small", "qwen3-base"),
)
FILE_FORMATS = ("text", "jsonl", "parquet")
SAMPLES = "samples"  # the folders that jobs.generate writes
# Figures that an evaluation keeps by row too, so that two can be compared row by row
# (tokendiff.evaluation.paired).
PAIRED_METRICS = (
    *("nats_per_token", "bits_per_byte", "perplexity"),
    *("expected_acceptance_length", "acceptance_length_mean"),
)


class Section(BaseModel):
    """Strict: unknown fields and wrong types are errors; nothing is coerced or changes later."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    def result_fields(self) -> dict[str, Any]:
        """The fields that decide the result, as plain JSON: what a stage's key is made of."""
        chosen = {}
        for name, info in type(self).model_fields.items():
            extra = info.json_schema_extra
            if isinstance(extra, dict) and extra.get("affects_result") is False:
                continue
            value = getattr(self, name)
            chosen[name] = value.result_fields() if isinstance(value, Section) else value
        return chosen

    def _refuse_ignored(self, names: tuple[str, ...], beside: str) -> None:
        """Nothing may be set in vain. A default may be given: it is how a file's value is undone.

        Raises:
            ValueError: one of these fields differs from its default.
        """
        for name in names:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                raise ValueError(f"{name} {value!r} has no effect with {beside}; remove either")


def operational(default: Any, **kwargs: Any) -> Any:
    """A field that changes how a job runs, not what it makes: no part of a stage's key."""
    return Field(default, json_schema_extra={"affects_result": False}, **kwargs)


def _named(default_name: str) -> BeforeValidator:
    """`objective: mdlm` is short for `objective: {name: mdlm}`."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" not in value:
            return {"name": default_name, **value}
        return value

    return BeforeValidator(expand)


class PreprocessConfig(Section):
    """Text to packed token rows."""

    dataset_name: str = Field(
        "builtin",
        min_length=1,
        description="builtin (CPython's own documentation), text | jsonl | parquet | samples "
        "(what jobs.generate wrote; all with data_files), or a Hugging Face dataset: a hub name "
        "or a local folder",
    )
    dataset_config_name: str | None = Field(
        None, description="configuration of a Hugging Face dataset"
    )
    dataset_split: str = Field("train", description="split of a Hugging Face dataset")
    data_files: list[str] = Field(
        [], description="files or globs for text, jsonl and parquet; folders for samples"
    )
    text_column: str = Field("text", min_length=1, description="column that holds the text")
    sample_by: Literal["line", "document"] = Field(
        "line", description="what one document is in text files: a line or the whole file"
    )
    use_dummy_data: bool = Field(False, description="random tokens in place of a dataset")
    num_dummy_samples: int = Field(2048, ge=1, description="rows of random tokens")
    tokenizer_name_or_path: str | None = Field(
        None,
        description="bytes, bpe (trained on the corpus), or a transformers name or path; "
        "by default the model's own, or bpe where the model is a built-in one",
    )
    vocab_size: int = Field(2048, ge=300, description="size of the bpe vocabulary")
    max_length: int = Field(128, ge=2, description="tokens per packed row")
    heldout_fraction: float = Field(
        0.05,
        ge=0.0,
        le=1.0,
        description="share of documents, chosen by hash, that is kept for evaluation",
    )
    partition_bytes: int = Field(
        32 << 20, ge=1, description="input bytes packed by one task; also the unit of a shard"
    )
    new_since: str | None = Field(
        None,
        description="models:/NAME@ALIAS: files that this model was trained on give held-out rows "
        "only, and its tokenizer is used; while there is no such model, all files are new",
    )
    output_dir: str | None = operational(None, description="folder for the shards")

    @model_validator(mode="after")
    def _files_where_they_belong(self) -> "PreprocessConfig":
        if self.use_dummy_data:
            self._refuse_ignored(("dataset_name",), "use_dummy_data")
        takes_files = self.dataset_name in (*FILE_FORMATS, SAMPLES)
        if takes_files and not self.data_files:
            raise ValueError(
                f"dataset_name {self.dataset_name!r} needs data_files: a list of files or globs"
            )
        if self.data_files and not takes_files:
            raise ValueError(
                "data_files goes with dataset_name text, jsonl, parquet or samples, not "
                f"{self.dataset_name!r}"
            )
        if self.new_since is not None and self.dataset_name not in FILE_FORMATS:
            raise ValueError(
                "new_since tells files apart: it goes with dataset_name text, jsonl or parquet, "
                f"not {self.dataset_name!r}"
            )
        if "num_dummy_samples" in self.model_fields_set and not self.use_dummy_data:
            raise ValueError("num_dummy_samples goes with use_dummy_data")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "PreprocessConfig":
        beside = f"dataset_name {self.dataset_name!r}"
        if self.dataset_name != "text":
            self._refuse_ignored(("sample_by",), beside)
        if self.dataset_name in ("builtin", SAMPLES, *FILE_FORMATS):
            self._refuse_ignored(("dataset_config_name", "dataset_split"), beside)
        if self.dataset_name == SAMPLES:
            self._refuse_ignored(("text_column",), beside)
        if self.tokenizer_name_or_path not in (None, "bpe"):
            self._refuse_ignored(
                ("vocab_size",), f"tokenizer_name_or_path {self.tokenizer_name_or_path!r}"
            )
        return self


class _AnyObjectiveConfig(Section):
    """Fields that all objectives have."""

    # Whether it trains a causal language model as one, or a denoiser that sees both ways.
    is_causal: ClassVar[bool] = False

    lambda_conf: float = Field(0.0, ge=0.0, description="weight of the confidence term")
    conf_temperature: float = Field(
        1.0, gt=0.0, description="temperature inside the confidence term"
    )

    @model_validator(mode="after")
    def _confidence_is_used(self) -> "_AnyObjectiveConfig":
        # A weight of 0 that somebody wrote down turns the term off, as one value of a sweep may.
        is_off = "lambda_conf" in self.model_fields_set
        if self.lambda_conf == 0.0 and self.conf_temperature != 1.0 and not is_off:
            raise ValueError("conf_temperature has no effect while lambda_conf is 0")
        return self

    def process_fields(self) -> dict[str, Any]:
        """What a checkpoint records of the noise process (`tokendiff.checkpoint.NoiseProcess`)."""
        raise NotImplementedError


class _ObjectiveConfig(_AnyObjectiveConfig):
    """Objectives whose noise has a time."""

    min_time: float = Field(1e-3, gt=0.0, lt=1.0, description="smallest time that is trained on")
    max_loss_weight: float | None = Field(
        None,
        gt=0.0,
        description="clip the loss weights, which grow without bound at the ends of time; "
        "the reported bound is never clipped",
    )


class _ScheduledConfig(_ObjectiveConfig):
    """Objectives whose kernel takes any noise schedule."""

    alpha_schedule: Literal["log_linear", "linear", "cosine", "geometric"] = Field(
        "log_linear", description="noise schedule alpha(t)"
    )
    eps: float = Field(1e-3, gt=0.0, lt=0.5, description="distance of alpha from its ends")
    sigma_min: float = Field(1e-4, ge=1e-8, description="least noise of the geometric schedule")
    sigma_max: float = Field(
        20.0, gt=0.0, le=100.0, description="most noise of the geometric schedule"
    )

    @model_validator(mode="after")
    def _schedule_is_used(self) -> "_ScheduledConfig":
        geometric = self.alpha_schedule == "geometric"
        idle = {"eps"} if geometric else {"sigma_min", "sigma_max"}
        if given := sorted(idle & self.model_fields_set):
            raise ValueError(
                f"{', '.join(given)}: not used by alpha_schedule {self.alpha_schedule!r}"
            )
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        return self

    def _schedule_fields(self) -> dict[str, Any]:
        names = ("alpha_schedule", "eps", "sigma_min", "sigma_max")
        return {name: getattr(self, name) for name in names}


class MDLMConfig(_ScheduledConfig):
    """Masked (absorbing) diffusion, continuous time. Source: MDLM (arXiv 2406.07524)."""

    name: Literal["mdlm"] = "mdlm"

    def process_fields(self) -> dict[str, Any]:
        return {"forward_process": "absorbing", "prediction": "loo", **self._schedule_fields()}


LOSS_TYPE_HELP = (
    "elbo trains what bound and sampler are built on; cross_entropy trains p(x_0 | x_t), "
    "which they then convert"
)


class _TokenNoiseConfig(_ObjectiveConfig):
    """Objectives whose noise is other tokens."""

    min_time: float = Field(1e-4, gt=0.0, lt=1.0, description="smallest time that is trained on")
    loss_type: Literal["elbo", "cross_entropy"] = Field("elbo", description=LOSS_TYPE_HELP)

    @model_validator(mode="after")
    def _weight_is_used(self) -> "_TokenNoiseConfig":
        if self.loss_type == "cross_entropy":
            self._refuse_ignored(("max_loss_weight",), "loss_type 'cross_entropy'")
        return self

    def _prediction(self) -> str:
        return "loo" if self.loss_type == "elbo" else "posterior"


class UDLMConfig(_TokenNoiseConfig, _ScheduledConfig):
    """Uniform diffusion, continuous time. Source: UDLM (arXiv 2412.10193)."""

    name: Literal["udlm"] = "udlm"
    exclude_mask_from_uniform: bool = Field(
        True, description="noise is any id but the mask; false: any id, the mask too"
    )

    def process_fields(self) -> dict[str, Any]:
        return {
            "forward_process": "uniform",
            "prediction": self._prediction(),
            "exclude_mask_from_uniform": self.exclude_mask_from_uniform,
            **self._schedule_fields(),
        }


class HybridConfig(_TokenNoiseConfig):
    """Masks and uniform noise in one process. Source: GIDD (arXiv 2503.04482)."""

    name: Literal["hybrid"] = "hybrid"
    p_uniform: float = Field(
        0.1, ge=0.0, lt=1.0, description="share of tokens that are uniform noise at t = 1/2"
    )
    gamma: float = Field(
        1.0,
        ge=0.05,
        le=2.0,
        description="how uniform noise gathers around t = 1/2; above 2 rates would be negative",
    )

    def process_fields(self) -> dict[str, Any]:
        return {
            "forward_process": "hybrid",
            "prediction": self._prediction(),
            "p_uniform": self.p_uniform,
            "gamma": self.gamma,
        }


class BlockDiffusionConfig(_ScheduledConfig):
    """Masked diffusion block by block, on a causal model. Source: BD3-LM (arXiv 2503.09573)."""

    is_causal: ClassVar[bool] = True

    name: Literal["block_diffusion"] = "block_diffusion"
    block_length: int = Field(4, ge=1, description="tokens of a block; 1 is autoregressive")
    exact_mask_counts: bool = Field(
        False,
        description="draw how many tokens of a block are masked, each number as often, in place of "
        "a time; the same bound with less variance",
    )

    @model_validator(mode="after")
    def _times_are_used(self) -> "BlockDiffusionConfig":
        if self.exact_mask_counts:
            times = ("min_time", "alpha_schedule", "eps", "sigma_min", "sigma_max")
            self._refuse_ignored(times, "exact_mask_counts true, which draws no times")
        return self

    def process_fields(self) -> dict[str, Any]:
        return {
            "forward_process": "absorbing",
            "prediction": "loo",
            "block_length": self.block_length,
            "attention_mask_mode": "4d",
            "clean_context": True,
            **self._schedule_fields(),
        }


class BlockRefinementConfig(_AnyObjectiveConfig):
    """Blocks of masks filled in by confidence, on a causal model. Source: LLaDA2.0."""

    is_causal: ClassVar[bool] = True

    name: Literal["block_refinement"] = "block_refinement"
    block_length: int = Field(32, ge=1, description="tokens of a block")
    prompt_length: int = Field(
        0, ge=0, description="tokens at the start of each row that are never masked"
    )
    attention_mask_mode: Literal["2d", "4d", "auto"] = Field(
        "2d",
        description="2d: a position sees up to itself, as in the causal model; 4d: the rest of its "
        "block too; auto: 4d, which every model that can be trained takes",
    )
    clean_context: bool = Field(
        False,
        description="earlier blocks are clean, as they are in decoding, for rows of twice the "
        "length; false: as noisy as they were drawn, as published",
    )

    def process_fields(self) -> dict[str, Any]:
        return {
            "forward_process": "absorbing",
            "prediction": "loo",
            "alpha_schedule": "log_linear",
            "block_length": self.block_length,
            "prompt_length": self.prompt_length,
            "attention_mask_mode": "2d" if self.attention_mask_mode == "2d" else "4d",
            "clean_context": self.clean_context,
        }


class _NoiselessConfig(Section):
    """Objectives of a model that is no diffusion model: nothing of a process is recorded."""

    is_causal: ClassVar[bool] = True

    def process_fields(self) -> None:
        return None


class AutoregressiveConfig(_NoiselessConfig):
    """The plain next-token loss of a causal model."""

    name: Literal["ar"] = "ar"


class DFlashConfig(_NoiselessConfig):
    """A draft of `target_model_id` for speculative decoding. Source: DFlash (arXiv 2602.06036)."""

    name: Literal["dflash"] = "dflash"
    num_anchors: int = Field(
        64, ge=1, description="blocks drafted per row, behind tokens chosen at random"
    )
    decay_gamma: float | None = Field(
        None,
        gt=0.0,
        description="the k-th drafted token weighs exp(-(k - 1) / decay_gamma); by default 7, 5, 4 "
        "for blocks of 16, 10, 8 and a line between them",
    )
    draft_num_layers: int = Field(5, ge=1, description="layers of a new draft")
    block_size: int = Field(16, ge=2, description="tokens of a new draft's block, its first given")
    mask_token_id: int | None = Field(
        None,
        ge=0,
        description="id of the target's embedding that stands for what a new draft is to fill in; "
        "by default the tokenizer's mask token",
    )
    use_target_hidden_states: bool = Field(
        True,
        description="false: a new draft is told the target's embeddings of the text in their "
        "place, to measure what they are worth",
    )


NEW_DRAFT_FIELDS = ("draft_num_layers", "block_size", "mask_token_id", "use_target_hidden_states")

ObjectiveConfig = Annotated[
    MDLMConfig
    | UDLMConfig
    | HybridConfig
    | BlockRefinementConfig
    | BlockDiffusionConfig
    | AutoregressiveConfig
    | DFlashConfig,
    Field(discriminator="name"),
    _named("mdlm"),
]


class TrainConfig(Section):
    """Packed rows to a checkpoint."""

    model_name_or_path: str = Field(
        "builtin:bert-mini",
        min_length=1,
        description="transformers name or path, a checkpoint of ours, "
        "or builtin:NAME (a small model, new weights)",
    )
    warm_start_from: str | None = Field(
        None,
        description="a checkpoint, or models:/NAME@ALIAS, whose weights are gone on from; "
        "while there is no such model, model_name_or_path",
    )
    from_scratch: bool = Field(
        False, description="take the model's config, but start from new weights"
    )
    target_model_id: str | None = Field(
        None,
        min_length=1,
        description="objective dflash: the causal language model that the draft is for",
    )
    draft_model_id: str | None = Field(
        None,
        min_length=1,
        description="objective dflash: a draft to go on with; by default a new one",
    )
    objective: ObjectiveConfig = Field(MDLMConfig(), description="what is trained")
    data_path: str | None = operational(None, description="folder that jobs.preprocess wrote")
    output_dir: str | None = operational(None, description="gets checkpoint-N/ and final/")

    max_train_steps: int = Field(1000, ge=1, description="optimiser steps")
    per_device_train_batch_size: int = operational(
        8, ge=1, description="rows in one forward and backward pass of one worker, at most"
    )
    gradient_accumulation_steps: int = operational(1, ge=1, description="passes that make one step")
    global_batch_size: int | None = operational(
        None,
        ge=1,
        description="rows of one optimiser step, shared by all workers; "
        "by default per_device_train_batch_size * gradient_accumulation_steps, "
        "however many workers there are",
    )
    learning_rate: float = Field(1e-4, gt=0.0, description="peak learning rate of AdamW")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = Field("cosine", description="a schedule of transformers.get_scheduler")
    lr_warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.01, ge=0.0, description="AdamW's, on matrices only")
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="AdamW's decay of the first moment")
    adam_beta2: float = Field(
        0.999, ge=0.0, lt=1.0, description="AdamW's decay of the second moment"
    )
    adam_epsilon: float = Field(1e-8, gt=0.0, description="AdamW's denominator offset")
    max_grad_norm: float = Field(1.0, gt=0.0, description="gradient norm is clipped to this")
    ema_decay: float = Field(
        0.0, ge=0.0, lt=1.0, description="moving average of the weights; 0 is off"
    )
    dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="above 0, losses are repeatable only for the same number of workers",
    )
    lora_rank: int | None = Field(
        None,
        ge=1,
        description="train low-rank adapters of this rank, which final/ holds merged, and leave "
        "the model's own weights; needs peft (pip install 'tokendiff[lora]')",
    )
    lora_alpha: float = Field(
        16.0, gt=0.0, description="what an adapter adds counts lora_alpha / lora_rank"
    )
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout in front of the adapters")
    lora_target_modules: list[str] = Field(
        [], description="names of the layers that get adapters; by default all but the head"
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="bf16 autocast; weights stay fp32"
    )
    gradient_checkpointing: bool = operational(
        False, description="recompute activations, save memory"
    )
    compile: bool = operational(False, description="torch.compile the encoder")
    seed: int = Field(
        0, ge=0, lt=2**63, description="decides initial weights, order of rows and noise"
    )

    checkpointing_steps: int = operational(500, ge=1, description="steps between checkpoints")
    checkpoints_total_limit: int = operational(
        3, ge=1, description="newest checkpoints that are kept"
    )
    logging_steps: int = operational(10, ge=1, description="steps between log lines")

    @model_validator(mode="after")
    def _fields_agree(self) -> "TrainConfig":
        if (
            self.global_batch_size is not None
            and "gradient_accumulation_steps" in self.model_fields_set
        ):
            raise ValueError(
                "global_batch_size and gradient_accumulation_steps both set the rows of a step; "
                "give one"
            )
        if self.warm_start_from is not None:
            self._refuse_ignored(("from_scratch",), "warm_start_from")
        if self.lr_warmup_steps > self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps {self.lr_warmup_steps} exceeds max_train_steps "
                f"{self.max_train_steps}"
            )
        if self.lr_scheduler == "constant":
            self._refuse_ignored(
                ("lr_warmup_steps",), "lr_scheduler 'constant' (but with 'constant_with_warmup')"
            )
        return self

    @model_validator(mode="after")
    def _models_are_used(self) -> "TrainConfig":
        beside = f"objective {self.objective.name!r}"
        if not isinstance(self.objective, DFlashConfig):
            self._refuse_ignored(("target_model_id", "draft_model_id"), beside)
            return self
        self._refuse_ignored(("model_name_or_path", "warm_start_from", "from_scratch"), beside)
        if self.draft_model_id is not None:
            self.objective._refuse_ignored(
                NEW_DRAFT_FIELDS, f"draft_model_id {self.draft_model_id!r}"
            )
        return self

    @model_validator(mode="after")
    def _adapters_are_used(self) -> "TrainConfig":
        if self.lora_rank is None:
            names = ("lora_alpha", "lora_dropout", "lora_target_modules")
            self._refuse_ignored(names, "lora_rank null")
        elif not self.objective.is_causal:
            raise ValueError(
                f"lora_rank goes with objectives on causal language models, not with "
                f"{self.objective.name!r}; leave it out"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step over all workers: the batch that the loss is a mean over."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def result_fields(self) -> dict[str, Any]:
        fields = {**super().result_fields(), "rows_per_step": self.rows_per_step}
        # A run without adapters is the one that it was before there were any.
        idle = [name for name in fields if name.startswith("lora_") and self.lora_rank is None]
        return {name: value for name, value in fields.items() if name not in idle}


class _SamplerConfig(Section):
    """Fields that all samplers have."""

    temperature: float = Field(
        1.0, ge=0.0, description="of the predicted distribution; 0 is argmax"
    )
    top_k: int | None = Field(None, ge=1, description="keep the k likeliest tokens")
    top_p: float | None = Field(
        None, gt=0.0, le=1.0, description="keep the likeliest tokens of this total"
    )

    @model_validator(mode="after")
    def _filters_are_used(self) -> "_SamplerConfig":
        if self.temperature == 0.0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p have no effect at temperature 0 (argmax)")
        return self


class _FixedLengthConfig(_SamplerConfig):
    """Fields that all samplers have that fill rows of one length."""

    guidance_scale: float = Field(
        1.0,
        ge=0.0,
        description="classifier-free guidance towards the prompt; 1 is off, "
        "others take two forward passes",
    )


class AncestralConfig(_FixedLengthConfig):
    """Ancestral sampling on a uniform time grid, for every noise process."""

    name: Literal["ancestral"] = "ancestral"
    num_inference_steps: int = Field(128, ge=1, description="steps of the time grid")


class BlockwiseConfig(_FixedLengthConfig):
    """Ancestral sampling of one block after the other, from left to right."""

    name: Literal["blockwise"] = "blockwise"
    num_inference_steps: int = Field(64, ge=1, description="steps of the time grid, of each block")
    block_size: int = Field(32, ge=1, description="tokens of a block")


class RemaskingConfig(_FixedLengthConfig):
    """Revealed tokens may be masked again. Source: ReMDM (arXiv 2503.00307)."""

    name: Literal["remdm"] = "remdm"
    num_inference_steps: int = Field(128, ge=1, description="steps of the time grid")
    eta: float = Field(
        0.02, ge=0.0, le=1.0, description="how much is masked again; 0 is the ancestral sampler"
    )
    remasking_schedule: Literal["cap", "rescale"] = Field(
        "cap", description="sigma is at most eta, or eta times the most that is possible"
    )


class FirstHittingConfig(_FixedLengthConfig):
    """One token per forward pass, exactly. Source: arXiv 2409.02908."""

    name: Literal["first_hitting"] = "first_hitting"


class _OpenEndedConfig(_SamplerConfig):
    """Fields that all samplers have that continue a prompt until a stop token."""

    stop_token_ids: list[int] = Field(
        [],
        description="ids that end a completion, beside the tokenizer's EOS and those of the "
        "model's generation config",
    )


class AutoregressiveSamplerConfig(_OpenEndedConfig):
    """Token after token, of any causal language model."""

    name: Literal["ar"] = "ar"
    max_new_tokens: int = Field(256, ge=1, description="tokens of a completion at most")


class DFlashSamplerConfig(AutoregressiveSamplerConfig):
    """The target's own text, in fewer of its passes. Source: DFlash (arXiv 2602.06036)."""

    name: Literal["dflash"] = "dflash"  # type: ignore[assignment]
    draft_temperature: float | None = Field(
        None,
        ge=0.0,
        description="of the draft's proposals, by default temperature. Above 0 they are drawn and "
        "judged by p/q: the text has the target's distribution. 0: its likeliest tokens, and the "
        "text is that of sampler ar with the same seed, token for token",
    )

    @model_validator(mode="after")
    def _proposals_can_be_judged(self) -> "DFlashSamplerConfig":
        if self.temperature == 0.0:
            self._refuse_ignored(("draft_temperature",), "temperature 0")
        return self


class SDARSamplerConfig(_OpenEndedConfig):
    """Block diffusion with a cache of finished blocks. Source: SDAR (arXiv 2510.06303)."""

    name: Literal["sdar"] = "sdar"
    max_new_tokens: int = Field(256, ge=1, description="tokens of a completion at most")
    block_length: int | None = Field(
        None, ge=1, description="tokens of a block; by default as the model was trained, else 4"
    )
    denoising_steps: int = Field(4, ge=1, description="steps of a block at most")
    remasking_strategy: Literal[
        "sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded"
    ] = Field("low_confidence_dynamic", description="which tokens of a block a step commits")
    confidence_threshold: float = Field(
        0.85, ge=0.0, description="low_confidence_dynamic commits all above this probability"
    )
    entropy_threshold: float = Field(
        0.5, ge=0.0, description="nats; entropy_bounded commits tokens up to this total"
    )

    @model_validator(mode="after")
    def _thresholds_are_used(self) -> "SDARSamplerConfig":
        beside = f"remasking_strategy {self.remasking_strategy!r}"
        if self.remasking_strategy != "low_confidence_dynamic":
            self._refuse_ignored(("confidence_threshold",), beside)
        if self.remasking_strategy != "entropy_bounded":
            self._refuse_ignored(("entropy_threshold",), beside)
        return self


class BlockRefinementSamplerConfig(_OpenEndedConfig):
    """Blocks filled in by confidence, and edited. Source: LLaDA2.0 and 2.1."""

    name: Literal["block_refinement"] = "block_refinement"
    temperature: float = Field(
        0.0, ge=0.0, description="of the predicted distribution; 0 is argmax"
    )
    gen_length: int = Field(256, ge=1, description="tokens of a completion at most")
    block_length: int | None = Field(
        None, ge=1, description="tokens of a block; by default as the model was trained, else 32"
    )
    num_inference_steps: int = Field(32, ge=1, description="steps that a block is spread over")
    threshold: float = Field(
        0.7,
        ge=0.0,
        description="a step commits all candidates above this probability; above 1, none for that",
    )
    minimal_topk: int = Field(1, ge=1, description="tokens that a step commits at least")
    editing_threshold: float | None = Field(
        None,
        gt=0.0,
        description="committed tokens are replaced by others above this probability; "
        "by default they stay",
    )
    max_post_steps: int = Field(
        16, ge=0, description="steps of a block, at most, that only edit, after its last mask"
    )
    eos_early_stop: bool = Field(
        True, description="false: stop tokens end nothing, gen_length tokens are written"
    )
    attention_mask_mode: Literal["2d", "4d", "auto"] = Field(
        "auto",
        description="2d: a causal model as it is; 4d: a block sees itself whole; auto: as the "
        "model was trained",
    )

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "BlockRefinementSamplerConfig":
        if self.editing_threshold is None:
            self._refuse_ignored(("max_post_steps",), "editing_threshold null")
        if not self.eos_early_stop:
            self._refuse_ignored(("stop_token_ids",), "eos_early_stop false")
        if self.minimal_topk > self.gen_length:
            raise ValueError(
                f"minimal_topk {self.minimal_topk} must not exceed gen_length {self.gen_length}"
            )
        return self


# Rows of one length, filled in anywhere; and prompts that are continued until a stop token.
FixedLengthSamplerConfig = AncestralConfig | BlockwiseConfig | RemaskingConfig | FirstHittingConfig
OpenEndedSamplerConfig = (
    AutoregressiveSamplerConfig
    | BlockRefinementSamplerConfig
    | SDARSamplerConfig
    | DFlashSamplerConfig
)
SamplerConfig = Annotated[
    FixedLengthSamplerConfig | OpenEndedSamplerConfig,
    Field(discriminator="name"),
    _named("ancestral"),
]


class GenerateConfig(Section):
    """Checkpoint and prompts to samples."""

    checkpoint_path: str | None = operational(None, description="a checkpoint-N/ or final/ folder")
    model_id: str | None = Field(
        None,
        min_length=1,
        description="in place of checkpoint_path: a causal language model that is no checkpoint "
        "of ours, by its transformers name or folder",
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
        "messages of a chat)",
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
    sampler: SamplerConfig = Field(AncestralConfig(), description="how samples are drawn")
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
        description="sampler dflash: let the target alone write the same rows too, in turn with "
        "the draft, and compare times and texts",
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

    @model_validator(mode="after")
    def _fields_agree(self) -> "GenerateConfig":
        sampler = f"sampler {self.sampler.name!r}"
        if self.sampler.name == "dflash":
            self._refuse_ignored(("checkpoint_path", "model_id"), sampler)
        else:
            self._refuse_ignored(("target_model_id", "draft_model_id", "measure_speedup"), sampler)
        if self.model_id is None:
            self._refuse_ignored(("trust_remote_code",), "no model_id")
        elif self.checkpoint_path is not None:
            raise ValueError("checkpoint_path and model_id both name the model; give one")
        elif not self.is_open_ended:
            raise ValueError(
                f"{sampler} needs a checkpoint of ours, whose noise process is known: give "
                "checkpoint_path, or a sampler that continues prompts (ar, sdar, block_refinement)"
            )
        if self.is_open_ended:
            self._refuse_ignored(("seq_len",), sampler)
        if not self.prompts:
            self._refuse_ignored(("max_errors",), "no prompts of files")
        if not self.use_chat_template and not self.prompts:
            self._refuse_ignored(("add_generation_prompt",), "prompts that are no chats")
        return self


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


class GateConfig(Section):
    """One thing that a candidate must show before it becomes the champion."""

    metric: str = Field(min_length=1, description="a figure of the evaluation, nats_per_token")
    direction: Literal["lower", "higher"] = Field(description="which is better")
    margin: float = Field(
        0.0,
        description="how much better than the champion at least; below 0: how much worse at most",
    )
    min_standard_errors: float = Field(
        0.0,
        ge=0.0,
        description="how many standard errors of the difference, paired by row, it must be better "
        "than the champion by, besides; of many rows, 2 lets chance pass in one of 44 cases, of 10 "
        "rows in one of 26, of 2 rows in one of 7; 0 leaves chance out",
    )
    limit: float | None = Field(
        None, description="what it must reach in any case, with a champion or without"
    )

    @model_validator(mode="after")
    def _chance_can_be_told(self) -> "GateConfig":
        if not self.min_standard_errors:
            return self
        if self.metric not in PAIRED_METRICS:
            raise ValueError(
                f"min_standard_errors: an evaluation keeps no figures by row of {self.metric!r}, "
                f"only of {', '.join(PAIRED_METRICS)}; remove it, or gate on one of these"
            )
        if self.margin < 0.0:
            raise ValueError(
                f"margin {self.margin:g} has no effect with min_standard_errors, which asks for "
                "better; remove either"
            )
        return self

    def result_fields(self) -> dict[str, Any]:
        fields = super().result_fields()
        if not self.min_standard_errors:  # the gate that it was before there was such a field
            del fields["min_standard_errors"]
        return fields


class PromoteConfig(Section):
    """A checkpoint that passes its gate becomes the champion of a registered model."""

    registered_model: str = Field(
        "tokendiff", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="MLflow: the model's name"
    )
    alias: str = Field(
        "champion", pattern=r"^[A-Za-z][A-Za-z0-9_-]*$", description="MLflow: what is moved"
    )
    gate: list[GateConfig] = Field(
        [GateConfig(metric="nats_per_token", direction="lower")],
        min_length=1,
        description="all must hold, against the champion on the same held-out rows",
    )


class StageConfig(Section):
    """One entry of `stages`; `tokendiff.stage_graph` knows which inputs each kind takes."""

    kind: Literal["preprocess", "train", "regenerate", "generate", "evaluate", "promote"] = Field(
        description="what the stage does"
    )
    inputs: dict[str, str] = Field({}, description="role of an input -> the stage that it is")
    config: dict[str, Any] = Field(
        {}, description="fields of the kind's section that differ in this stage"
    )
    max_retries: int | None = operational(None, ge=0, description="by default the runner's")
    timeout_s: float | None = operational(None, gt=0.0, description="by default the runner's")


class RunnerConfig(Section):
    """How a pipeline runs its stages. Nothing here changes a result, or is part of a key."""

    max_retries: int = Field(
        2, ge=0, description="of a stage, after failures that may pass: a lost node, a network"
    )
    retry_wait_s: float = Field(10.0, ge=0.0, description="before a retry; doubles each time")
    timeout_s: float | None = Field(None, gt=0.0, description="seconds that a stage may take")
    max_parallel: int | None = Field(
        None,
        ge=1,
        description="stages side by side; by default as many as the cluster has room for",
    )


class ClusterConfig(Section):
    """How the work is spread. Nothing here changes a result, or is part of a stage's key."""

    address: str | None = Field(
        None,
        description="Ray: a running cluster; by default RAY_ADDRESS, else one on this machine",
    )
    num_workers: int = Field(1, ge=1, description="training workers")
    cpus_per_worker: float = Field(1.0, gt=0.0, description="CPUs reserved by one worker or actor")
    use_gpu: bool | None = Field(None, description="by default, whether the cluster has a GPU")
    threads_per_worker: int | None = Field(
        None,
        ge=1,
        description="torch threads on CPU; by default the machine's cores over its workers",
    )
    num_actors: int = Field(1, ge=1, description="actors that sample and evaluate, at most")
    min_actors: int | None = Field(
        None,
        ge=1,
        description="actors that sampling starts with; more come as the cluster has room for them; "
        "by default num_actors",
    )
    gpus_per_actor: float = Field(
        1.0, gt=0.0, description="GPUs of an actor that samples; 0.5 lets two share one"
    )
    max_failures: int = Field(
        3, ge=0, description="lost workers that are survived before the job fails"
    )
    worker_start_timeout_s: float = Field(
        600.0, gt=0.0, description="seconds to wait for the workers' resources"
    )

    @model_validator(mode="after")
    def _actors_agree(self) -> "ClusterConfig":
        if self.min_actors is not None and self.min_actors > self.num_actors:
            raise ValueError(
                f"min_actors {self.min_actors} exceeds num_actors {self.num_actors}; raise that"
            )
        if self.gpus_per_actor > 1.0 and self.gpus_per_actor % 1.0:
            raise ValueError(
                f"gpus_per_actor {self.gpus_per_actor:g}: above 1 it must be a whole number"
            )
        if self.use_gpu is False:
            self._refuse_ignored(("gpus_per_actor",), "use_gpu false")
        return self


class TrackingConfig(Section):
    """Where runs are recorded, beside the run's own log."""

    enabled: bool = Field(True, description="MLflow: mirror the log to it")
    uri: str | None = Field(
        None,
        description="MLflow: its store; MLFLOW_TRACKING_URI goes first; by default sqlite in root",
    )
    experiment: str = Field("tokendiff", min_length=1, description="MLflow: the experiment")


class Config(Section):
    """A whole pipeline file. Each job reads the sections it needs, so one file serves them all."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the pipeline's name"
    )
    root: str = operational(
        "output", min_length=1, description="folder or URI that everything is written under"
    )
    preprocess: PreprocessConfig = PreprocessConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig | None = GenerateConfig()
    evaluate: EvaluateConfig | None = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    stages: dict[str, StageConfig] = Field(
        {},
        description="by name, where preprocess, train, generate, evaluate in a row will not do; "
        "the sections are then what stages of their kind have in common",
    )
    matrix: dict[str, list[Any]] = Field(
        {}, description="section.field -> values: the pipeline runs for every combination"
    )
    runner: RunnerConfig = RunnerConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def tokenizer_name_or_path(self) -> str:
        """What the tokenizer is, where the preprocess section leaves it open."""
        if self.preprocess.tokenizer_name_or_path is not None:
            return self.preprocess.tokenizer_name_or_path
        model = self.train.target_model_id or self.train.model_name_or_path
        return "bpe" if model.startswith(BUILTIN_MODEL_PREFIX) else model

    def check_pipeline(self) -> None:
        """What the sections must agree on where one pipeline uses them all; a job alone need not.

        Raises:
            InputError: listing all that cannot work, or not as it is set.
        """
        problems = [
            *self.generate_problems(),
            *self.evaluate_problems(),
            *self.train_problems(),
        ]
        if problems:
            raise InputError("\n".join(problems))

    def generate_problems(self) -> list[str]:
        """Why samples cannot be drawn from what these sections train."""
        max_length = self.preprocess.max_length
        if self.generate and self.generate.model_id is not None:
            return ["generate.model_id: samples are drawn from what is trained here; remove it"]
        if self.generate and (self.generate.seq_len or 0) > max_length:
            return [
                f"generate.seq_len {self.generate.seq_len} exceeds preprocess.max_length "
                f"{max_length}, which the model is trained for; lower it, or raise max_length"
            ]
        return []

    def evaluate_problems(self) -> list[str]:
        """Why nothing can be evaluated on what these sections preprocess."""
        is_on_heldout = self.evaluate is not None and self.evaluate.split == "heldout"
        if is_on_heldout and self.preprocess.heldout_fraction == 0.0:
            return [
                "evaluate.split 'heldout': preprocess.heldout_fraction 0 keeps no rows for it; "
                "raise that, or evaluate on split train"
            ]
        return []

    def train_problems(self) -> list[str]:
        """Why nothing can be trained on what these sections preprocess."""
        problems = []
        rows, max_length = self.train.rows_per_step, self.preprocess.max_length
        prompt_length = getattr(self.train.objective, "prompt_length", 0)
        if prompt_length >= max_length:
            problems.append(
                f"train.objective.prompt_length {prompt_length} leaves nothing of rows of "
                f"{max_length} tokens to train on; lower it, or raise preprocess.max_length"
            )
        if self.preprocess.heldout_fraction == 1.0:
            problems.append("preprocess.heldout_fraction 1.0 leaves nothing to train on; lower it")
        if rows < self.cluster.num_workers:
            problems.append(
                f"cluster.num_workers {self.cluster.num_workers} exceeds the {rows} rows of a "
                "training step; lower it, or raise train.global_batch_size"
            )
        model = self.train.model_name_or_path
        names = [BUILTIN_MODEL_PREFIX + name for name in BUILTIN_MODELS]
        if model.startswith(BUILTIN_MODEL_PREFIX) and model not in names:
            problems.append(
                f"train.model_name_or_path {model!r}: no such built-in model; "
                f"there are {', '.join(names)}"
            )
        return problems
