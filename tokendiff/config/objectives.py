"""The field `train.objective`: one class per objective, told apart by `name`."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tokendiff.config.base import MAX_BLOCK, MAX_COUNT, Section, added, named


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
        """What a checkpoint records of its noise process (`tokendiff.artifacts.noise_process`);
        `block_start` and `predict` are what the user set; None leaves the first to the rows and the
        second to the model that training starts from.
        """
        raise NotImplementedError

    def encoded_shape(self, rows: int, length: int) -> tuple[int, int]:
        """Rows and tokens of what the encoder is given for so many rows in a training pass."""
        return rows, length


class _ObjectiveConfig(_AnyObjectiveConfig):
    """Objectives whose noise has a time."""

    min_time: float = Field(
        1e-3,
        gt=0.0,
        lt=1.0,
        description="smallest time t that is drawn in training; at 0 the loss weight would be "
        "infinite",
    )
    max_loss_weight: float | None = Field(
        None,
        gt=0.0,
        description="largest loss weight in training; weights grow without limit near the ends of "
        "time. The reported bound is never clipped",
    )


class _ScheduledConfig(_ObjectiveConfig):
    """Objectives whose kernel takes any noise schedule."""

    alpha_schedule: Literal["log_linear", "linear", "cosine", "geometric"] = Field(
        "log_linear", description="noise schedule alpha(t)"
    )
    eps: float = Field(
        1e-3,
        gt=0.0,
        lt=0.5,
        description="distance that alpha keeps from 0 and 1 at the ends of time",
    )
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


class _WholeRowConfig(_ObjectiveConfig):
    """Objectives of denoisers that see whole rows."""

    predict: Literal["own", "next"] | None = added(
        None,
        description="hidden state that predicts a masked token: own, the state at its position, or "
        "next, the state at the position before it (Dream, and weights of "
        "autoregressive models); by default as the starting model was trained",
    )


class MDLMConfig(_WholeRowConfig, _ScheduledConfig):
    """Masked (absorbing) diffusion, continuous time. Source: MDLM (arXiv 2406.07524)."""

    name: Literal["mdlm"] = "mdlm"

    def process_fields(self) -> dict[str, Any]:
        return {
            "forward_process": "absorbing",
            "prediction": "loo",
            "predict": self.predict,
            **self._schedule_fields(),
        }


LOSS_TYPE_HELP = (
    "elbo trains the likelihood bound; cross_entropy trains p(x_0 | x_t), which "
    "samplers and bound convert when they use it"
)


class _TokenNoiseConfig(_WholeRowConfig):
    """Objectives whose noise is other tokens."""

    min_time: float = Field(
        1e-4,
        gt=0.0,
        lt=1.0,
        description="smallest time t that is drawn in training; at 0 the loss weight would be "
        "infinite",
    )
    loss_type: Literal["elbo", "cross_entropy"] = Field("elbo", description=LOSS_TYPE_HELP)

    @model_validator(mode="after")
    def _weight_is_used(self) -> "_TokenNoiseConfig":
        if self.loss_type == "cross_entropy":
            self.refuse_ignored(("max_loss_weight",), "loss_type 'cross_entropy'")
        return self

    def _prediction(self) -> str:
        return "loo" if self.loss_type == "elbo" else "posterior"


class UDLMConfig(_TokenNoiseConfig, _ScheduledConfig):
    """Uniform diffusion, continuous time. Source: UDLM (arXiv 2412.10193)."""

    name: Literal["udlm"] = "udlm"
    exclude_mask_from_uniform: bool = Field(
        True, description="draw noise from all ids except the mask; false: from all ids"
    )

    def process_fields(self) -> dict[str, Any]:
        return {
            "forward_process": "uniform",
            "prediction": self._prediction(),
            "predict": self.predict,
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
        description="how strongly uniform noise is concentrated around t = 1/2; values above 2 "
        "would make rates negative",
    )

    def process_fields(self) -> dict[str, Any]:
        return {
            "forward_process": "hybrid",
            "prediction": self._prediction(),
            "predict": self.predict,
            "p_uniform": self.p_uniform,
            "gamma": self.gamma,
        }


BLOCK_START_HELP = (
    "where the first block starts: at each answer, or at the first token of the "
    "document; by default at each answer if only answers are learnt. Choose "
    "document for serving engines that count blocks from the prompt's first token"
)


class BlockDiffusionConfig(_ScheduledConfig):
    """Diffusion block by block, on a causal model. Source: BD3-LM (arXiv 2503.09573)."""

    is_causal: ClassVar[bool] = True

    name: Literal["block_diffusion"] = "block_diffusion"
    block_length: int = Field(
        4, ge=1, le=MAX_BLOCK, description="tokens of a block; 1 is autoregressive"
    )
    block_start: Literal["answer", "document"] | None = added(None, description=BLOCK_START_HELP)
    noise: Literal["mask", "uniform"] = added(
        "mask",
        description="mask: noisy tokens are masks, which samplers sdar and block_refinement fill "
        "in; uniform: they are random tokens, which sampler canvas denoises",
    )
    exact_mask_counts: bool = Field(
        False,
        description="draw the number of masked tokens of a block, each number equally often, "
        "instead of a time; the bound is the same, with less variance",
    )

    ar_loss_weight: float = added(
        0.0,
        ge=0.0,
        description="weight of the next-token loss on the clean text, which lets the model also "
        "decode token by token (sampler ar). Above 0, a clean token sees only the "
        "tokens before it; at 0, it sees its whole block",
    )
    diffusion_loss_weight: float = added(1.0, gt=0.0, description="weight of the loss of blocks")
    predict: Literal["own", "next"] = added(
        "own",
        description="hidden state that predicts a masked token: own, the state at its position, or "
        "next, the state at the position before it, as weights of autoregressive models "
        "do already",
    )

    @model_validator(mode="after")
    def _times_are_used(self) -> "BlockDiffusionConfig":
        if self.exact_mask_counts:
            times = ("min_time", "alpha_schedule", "eps", "sigma_min", "sigma_max")
            self.refuse_ignored(times, "exact_mask_counts true, which draws no times")
        if self.noise == "uniform":
            self.refuse_ignored(("exact_mask_counts",), "noise 'uniform', which has no masks")
        return self

    def process_fields(self) -> dict[str, Any]:
        return {
            "forward_process": "absorbing" if self.noise == "mask" else "uniform",
            "prediction": "loo",
            "block_length": self.block_length,
            "block_start": self.block_start,
            "attention_mask_mode": "4d",
            "clean_context": True,
            "context_attention": "causal" if self.ar_loss_weight > 0.0 else "block",
            "predict": self.predict,
            **self._schedule_fields(),
        }

    def encoded_shape(self, rows: int, length: int) -> tuple[int, int]:
        return rows, 2 * length


class BlockRefinementConfig(_AnyObjectiveConfig):
    """Blocks of masks filled in by confidence, on a causal model. Source: LLaDA2.0."""

    is_causal: ClassVar[bool] = True

    name: Literal["block_refinement"] = "block_refinement"
    block_length: int = Field(32, ge=1, le=MAX_BLOCK, description="tokens of a block")
    block_start: Literal["answer", "document"] | None = added(None, description=BLOCK_START_HELP)
    prompt_length: int = Field(
        0, ge=0, le=MAX_COUNT, description="tokens at the start of each row that are never masked"
    )
    attention_mask_mode: Literal["2d", "4d", "auto"] = Field(
        "2d",
        description="what a position sees: 2d, itself and what is before it, as in a causal model; "
        "4d, also the rest of its block; auto, the same as 4d",
    )
    clean_context: bool = Field(
        False,
        description="show a block the clean text of earlier blocks, as in decoding; this doubles "
        "the length of the rows. false: show them with their own noise, as published",
    )

    def process_fields(self) -> dict[str, Any]:
        return {
            "forward_process": "absorbing",
            "prediction": "loo",
            "alpha_schedule": "log_linear",
            "block_length": self.block_length,
            "block_start": self.block_start,
            "prompt_length": self.prompt_length,
            "attention_mask_mode": "2d" if self.attention_mask_mode == "2d" else "4d",
            "clean_context": self.clean_context,
        }

    def encoded_shape(self, rows: int, length: int) -> tuple[int, int]:
        return 2 * rows, 2 * length if self.clean_context else length


class _NoiselessConfig(Section):
    """Objectives of a model that is no diffusion model: nothing of a process is recorded."""

    is_causal: ClassVar[bool] = True

    def process_fields(self) -> None:
        return None

    def encoded_shape(self, rows: int, length: int) -> tuple[int, int]:
        return rows, length


class AutoregressiveConfig(_NoiselessConfig):
    """The plain next-token loss of a causal model."""

    name: Literal["ar"] = "ar"


class DFlashConfig(_NoiselessConfig):
    """A draft of `target_model_id` for speculative decoding. Source: DFlash (arXiv 2602.06036)."""

    name: Literal["dflash"] = "dflash"
    num_anchors: int = Field(
        64, ge=1, le=1_000_000, description="blocks drafted per row, behind tokens chosen at random"
    )
    loss_type: Literal["dflash", "dpace"] = added(
        "dflash",
        description="weights of the tokens of a block: dflash, fixed by decay_gamma; dpace, from "
        "the draft's current predictions, so that the tokens at which acceptance ends "
        "count most",
    )
    dpace_alpha: float = added(
        0.5,
        gt=0.0,
        le=1.0,
        description="loss_type dpace: share of a token's weight that does not depend on the tokens "
        "before it; 1 gives fixed weights that fall linearly",
    )
    decay_gamma: float | None = Field(
        None,
        gt=0.0,
        description="decay of the loss over a block: the k-th drafted token has weight exp(-(k - "
        "1) / decay_gamma); by default 7, 5 and 4 for blocks of 16, 10 and 8, interpolated "
        "between them",
    )
    draft_layout: Literal["dflash", "dflash2"] = added(
        "dflash",
        description="layout of a new draft: dflash2 adds convolutions over the block to its "
        "layers, and a selector that chooses each drafted token from the 16 likeliest in view of "
        "the one before",
    )
    draft_num_layers: int = Field(5, ge=1, le=1000, description="layers of a new draft")
    block_size: int = Field(
        16,
        ge=2,
        le=MAX_BLOCK,
        description="tokens of a new draft's block, including the first one, which is given",
    )
    mask_token_id: int | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        description="token id that marks the positions that a new draft fills in; by default the "
        "tokenizer's mask token, else a reserved or unused one",
    )
    use_target_hidden_states: bool = Field(
        True,
        description="give the draft hidden states of the target's layers; false: give it the "
        "target's embeddings instead, to measure what the hidden states are worth",
    )

    @model_validator(mode="after")
    def _weights_are_used(self) -> "DFlashConfig":
        idle = "dpace_alpha" if self.loss_type == "dflash" else "decay_gamma"
        self.refuse_ignored((idle,), f"loss_type {self.loss_type!r}")
        return self


NEW_DRAFT_FIELDS = (
    "draft_layout",
    "draft_num_layers",
    "block_size",
    "mask_token_id",
    "use_target_hidden_states",
)

ObjectiveConfig = Annotated[
    MDLMConfig
    | UDLMConfig
    | HybridConfig
    | BlockRefinementConfig
    | BlockDiffusionConfig
    | AutoregressiveConfig
    | DFlashConfig,
    Field(discriminator="name"),
    named("mdlm"),
]
