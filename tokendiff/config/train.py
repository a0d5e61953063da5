"""The section `train`: the model, the objective, and the optimisation."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tokendiff.config.base import MAX_BATCH, MAX_COUNT, Section, added, operational
from tokendiff.config.objectives import (
    NEW_DRAFT_FIELDS,
    BlockDiffusionConfig,
    DFlashConfig,
    MDLMConfig,
    ObjectiveConfig,
)

BUILTIN_MODEL_PREFIX = "builtin:"
REGISTERED_MODEL_PREFIX = "models:/"
BUILTIN_MODELS = (
    *("bert-tiny", "bert-mini", "bert-small", "bert-base"),
    *("dit-tiny", "dit-mini", "dit-small", "dit-base"),
    *("qwen3-tiny", "qwen3-mini", "qwen3-small", "qwen3-base"),
)


class TrainConfig(Section):
    """Packed rows to a checkpoint."""

    model_name_or_path: str = Field(
        "builtin:bert-mini",
        min_length=1,
        description="transformers name (or name@revision) or path, a checkpoint of tokendiff, or "
        "builtin:NAME (a small model with new weights)",
    )
    warm_start_from: str | None = Field(
        None,
        description="checkpoint or models:/NAME@ALIAS to start from; if there is no such "
        "registered model yet, training starts from model_name_or_path",
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
        description="objective dflash: the draft to continue training; by default a new one",
    )
    objective: ObjectiveConfig = Field(
        MDLMConfig(), description="objective that is trained: a name, or a mapping with its fields"
    )
    data_path: str | None = operational(None, description="folder that jobs.preprocess wrote")
    target_states_path: str | None = operational(
        None,
        min_length=1,
        description="objective dflash: folder of the target's hidden states that a stage of kind "
        "cache_target_states wrote for these rows; by default the target computes them in every "
        "step",
    )
    output_dir: str | None = operational(
        None, description="folder that checkpoint-N/ and final/ are written to"
    )

    push_to_hub: str | None = operational(
        None,
        pattern=r"^[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?$",
        description="repository of the Hugging Face hub that final/ is uploaded to once it is "
        "committed; a new one is private; the token is read from HF_TOKEN",
    )

    max_train_steps: int = Field(1000, ge=1, le=MAX_COUNT, description="optimiser steps")
    per_device_train_batch_size: int = operational(
        8,
        ge=1,
        le=MAX_BATCH,
        description="most rows in one forward and backward pass of one worker",
    )
    gradient_accumulation_steps: int = operational(
        1, ge=1, le=MAX_BATCH, description="forward and backward passes of one optimiser step"
    )
    global_batch_size: int | None = operational(
        None,
        ge=1,
        le=MAX_COUNT,
        description="rows of one optimiser step, divided among the workers; by default "
        "per_device_train_batch_size * gradient_accumulation_steps, whatever the number "
        "of workers",
    )
    optimizer: Literal["adamw", "muon"] = added(
        "adamw",
        description="optimiser: adamw, or muon, which trains the matrices of the layers with Muon "
        "and everything else with AdamW",
    )
    learning_rate: float = Field(1e-4, gt=0.0, description="peak learning rate of AdamW")
    muon_learning_rate: float = added(0.02, gt=0.0, description="peak learning rate of Muon")
    muon_momentum: float = added(0.95, ge=0.0, lt=1.0, description="momentum of Muon")
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = Field(
        "cosine", description="learning rate schedule, by its name in transformers.get_scheduler"
    )
    lr_warmup_steps: int = Field(0, ge=0, le=MAX_COUNT, description="steps of linear warm-up")
    weight_decay: float = Field(
        0.01, ge=0.0, description="decoupled weight decay, applied to matrices only"
    )
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="AdamW's decay of the first moment")
    adam_beta2: float = Field(
        0.999, ge=0.0, lt=1.0, description="AdamW's decay of the second moment"
    )
    adam_epsilon: float = Field(1e-8, gt=0.0, description="AdamW's denominator offset")
    max_grad_norm: float = Field(
        1.0, gt=0.0, description="largest gradient norm; larger gradients are scaled down to it"
    )
    on_spike: Literal["skip", "rewind", "stop"] | None = added(
        None,
        description="what to do if the loss or the gradient norm of a step jumps: skip leaves "
        "its rows out; rewind goes back to the weights of the last checkpoint and leaves out all "
        "rows since; stop ends the run. docs/how-to/spikes.md has the rule",
    )
    spike_window: int = added(
        128,
        ge=16,
        le=1_000_000,
        description="number of last steps that on_spike compares with; more than 10 spikes "
        "within them end the run",
    )
    spike_deviations: float = added(
        20.0,
        gt=0.0,
        description="distance above the median at which a step is a spike, in median absolute "
        "deviations scaled to standard deviations",
    )
    ema_decay: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="decay of the moving average of the weights, which final/ then holds; 0 is off",
    )
    dropout: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="dropout of the model; above 0, losses are repeatable only with the same "
        "number of workers",
    )
    lora_rank: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="rank of low-rank adapters, which are trained in place of the model's own "
        "weights and merged into them in every checkpoint; needs peft (pip install "
        "'tokendiff[lora]')",
    )
    lora_alpha: float = Field(
        16.0,
        gt=0.0,
        description="scale of the adapters: what they add is multiplied by lora_alpha / lora_rank",
    )
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout in front of the adapters")
    lora_target_modules: list[str] = Field(
        [],
        description="names of the layers that get adapters; by default all except the head and "
        "what routes to experts",
    )
    keep_base: bool = added(
        False,
        description="leave the causal model unchanged: adapters are used only while blocks are "
        "drafted, final/ holds them beside the unchanged weights, and samplers ar and "
        "self_speculation write the original model's text",
    )
    mixed_precision: Literal["no", "bf16"] = Field(
        "no",
        description="bf16: compute in bfloat16 by autocast; weights, gradients and optimiser state "
        "stay float32",
    )
    sharding: Literal["none", "gradients", "full", "hybrid"] = operational(
        "none",
        description="what is split among the workers: none, nothing; gradients, gradients and "
        "optimiser state; full, weights too; hybrid, as full but within each node",
    )
    gradient_checkpointing: bool = operational(
        False, description="recompute activations in the backward pass, to save memory"
    )
    compile: bool = operational(False, description="compile the encoder with torch.compile")
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of the initial weights, the order of rows and the noise",
    )

    checkpointing_steps: int = operational(
        500, ge=1, le=MAX_COUNT, description="steps between checkpoints"
    )
    checkpoints_total_limit: int = operational(
        3,
        ge=1,
        le=MAX_COUNT,
        description="number of newest checkpoints that are kept; keep: best keeps that of the best "
        "step as well",
    )
    logging_steps: int = operational(10, ge=1, le=MAX_COUNT, description="steps between log lines")

    eval_steps: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="steps between evaluations on held-out rows; the first is before training, the "
        "last at the end; by default there are none",
    )
    max_eval_rows: int = Field(
        256,
        ge=2,
        le=MAX_COUNT,
        description="most held-out rows of one evaluation, which costs about a third of training "
        "on as many rows",
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="evaluations in a row without an improvement after which training ends; an "
        "improvement must exceed the standard error of the paired difference to the "
        "best one",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="weights that final/ holds: those of the last step, or of the best evaluation; "
        "each new best one writes a checkpoint",
    )

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
            self.refuse_ignored(("from_scratch",), "warm_start_from")
        if self.lr_warmup_steps > self.max_train_steps:
            raise ValueError(
                f"lr_warmup_steps {self.lr_warmup_steps} exceeds max_train_steps "
                f"{self.max_train_steps}"
            )
        if self.lr_scheduler == "constant":
            self.refuse_ignored(
                ("lr_warmup_steps",), "lr_scheduler 'constant' (but with 'constant_with_warmup')"
            )
        return self

    @model_validator(mode="after")
    def _models_are_used(self) -> "TrainConfig":
        beside = f"objective {self.objective.name!r}"
        if not isinstance(self.objective, DFlashConfig):
            names = ("target_model_id", "draft_model_id", "target_states_path")
            self.refuse_ignored(names, beside)
            return self
        self.refuse_ignored(("model_name_or_path", "warm_start_from", "from_scratch"), beside)
        if self.draft_model_id is not None:
            self.objective.refuse_ignored(
                NEW_DRAFT_FIELDS, f"draft_model_id {self.draft_model_id!r}"
            )
        return self

    @model_validator(mode="after")
    def _adapters_are_used(self) -> "TrainConfig":
        if self.lora_rank is None:
            names = ("lora_alpha", "lora_dropout", "lora_target_modules")
            self.refuse_ignored(names, "lora_rank null")
        return self

    @model_validator(mode="after")
    def _base_can_be_kept(self) -> "TrainConfig":
        if not self.keep_base:
            return self
        if not isinstance(self.objective, BlockDiffusionConfig):
            raise ValueError(
                f"keep_base goes with objective block_diffusion, not with {self.objective.name!r}; "
                "leave it out"
            )
        if self.objective.noise == "uniform":
            raise ValueError(
                "keep_base drafts from masks, and objective.noise 'uniform' has none; leave one of "
                "the two out"
            )
        if self.lora_rank is None:
            raise ValueError(
                "keep_base trains adapters beside a model that stays as it is; set lora_rank"
            )
        if self.objective.ar_loss_weight > 0.0:
            raise ValueError(
                f"ar_loss_weight {self.objective.ar_loss_weight} has no effect with keep_base: the "
                "model that decodes token by token stays as it is; remove either"
            )
        self.refuse_ignored(("from_scratch",), "keep_base true")
        return self

    @model_validator(mode="after")
    def _optimizer_is_used(self) -> "TrainConfig":
        if self.optimizer == "adamw":
            names = ("muon_learning_rate", "muon_momentum")
            self.refuse_ignored(names, "optimizer 'adamw'")
        elif self.lora_rank is not None:
            raise ValueError(
                "optimizer muon trains the matrices of a model, and lora_rank trains adapters in "
                "their place; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_are_used(self) -> "TrainConfig":
        if self.eval_steps is None:
            names = ("max_eval_rows", "early_stopping_patience", "keep")
            self.refuse_ignored(names, "eval_steps null")
        return self

    @model_validator(mode="after")
    def _spikes_are_used(self) -> "TrainConfig":
        if self.on_spike is None:
            self.refuse_ignored(("spike_window", "spike_deviations"), "on_spike null")
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
        if self.early_stopping_patience is None and self.keep == "last":
            # Evaluations that decide nothing do not change the result.
            idle += ["eval_steps", "max_eval_rows", "early_stopping_patience", "keep"]
        if self.on_spike == "stop":
            # A run that ends met no spike, and is the one that nobody watched.
            idle += ["on_spike", "spike_window", "spike_deviations"]
        elif self.on_spike == "rewind":
            fields["checkpointing_steps"] = self.checkpointing_steps  # where it goes back to
        return {name: value for name, value in fields.items() if name not in idle}
