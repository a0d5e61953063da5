"""The field `generate.sampler`: one class per sampler, told apart by `name`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from tokendiff.config.base import MAX_BLOCK, MAX_COUNT, Section, added, named

Selection = Literal["random", "lowest_current_prob", "lowest_maxprob", "lowest_log_margin"]
_SELECTION_HELP = (
    "which tokens a sweep draws again: any (exact), or more often those that the model is less "
    "sure of, by the probability of the token that stands there, by that of the likeliest token, "
    "or by the ratio of the two likeliest (approximations)"
)


def _are_counts(ids: list[int]) -> list[int]:
    for token in ids:
        if token > MAX_COUNT:
            raise ValueError(f"token ids must be <= {MAX_COUNT}, got {token}")
    return ids


class _SamplerConfig(Section):
    """Fields that all samplers have."""

    temperature: float = Field(
        1.0,
        ge=0.0,
        description="temperature of the predicted distribution; 0 takes the likeliest token",
    )
    top_k: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="draw from the k likeliest tokens only"
    )
    top_p: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="draw from the smallest set of likeliest tokens whose probabilities sum to at "
        "least this",
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
        description="strength of classifier-free guidance towards the prompt; 1 is off, other "
        "values take two forward passes a step",
    )


class AncestralConfig(_FixedLengthConfig):
    """Ancestral sampling on a uniform time grid, for every noise process."""

    name: Literal["ancestral"] = "ancestral"
    num_inference_steps: int = Field(128, ge=1, le=MAX_COUNT, description="steps of the time grid")
    corrector_steps: int = added(
        0,
        ge=0,
        le=MAX_COUNT,
        description="number of sweeps after each step except the last; a sweep takes one forward "
        "pass and draws some tokens again, given all the others. For uniform and hybrid noise only",
    )
    corrector_k: int = added(
        1, ge=1, le=MAX_COUNT, description="tokens of a row that a sweep draws again; 1 is exact"
    )
    corrector_selection: Selection = added("random", description=_SELECTION_HELP)

    @model_validator(mode="after")
    def _corrector_is_used(self) -> "AncestralConfig":
        if self.corrector_steps == 0:
            self.refuse_ignored(("corrector_k", "corrector_selection"), "corrector_steps 0")
        return self


class BlockwiseConfig(_FixedLengthConfig):
    """One block after the other, from left to right, each on a grid of times or by confidence."""

    name: Literal["blockwise"] = "blockwise"
    num_inference_steps: int = Field(
        64,
        ge=1,
        le=MAX_COUNT,
        description="steps of each block: exactly these on a grid of times (ancestral), at most "
        "these otherwise",
    )
    block_size: int = Field(32, ge=1, le=MAX_BLOCK, description="tokens of a block")
    remasking_strategy: Literal[
        "ancestral",
        "sequential",
        "low_confidence_static",
        "low_confidence_dynamic",
        "entropy_bounded",
    ] = added(
        "ancestral",
        description="rule for which tokens of a block a step commits: ancestral, those that the "
        "noise process reveals; the others as in sampler sdar",
    )
    confidence_threshold: float = added(
        0.85,
        ge=0.0,
        description="low_confidence_dynamic: commit every token whose probability is above this",
    )
    entropy_threshold: float = added(
        0.5,
        ge=0.0,
        description="entropy_bounded: commit the surest tokens until their entropies, in nats, sum "
        "to this",
    )
    max_new_tokens: int | None = added(
        None,
        ge=1,
        le=MAX_COUNT,
        description="most tokens of an answer. Each row is then a prompt and an answer that begins "
        "behind it and ends at EOS; use it in place of seq_len",
    )
    stop_token_ids: Annotated[list[int], AfterValidator(_are_counts)] = added(
        [],
        description="ids that end an answer, beside the tokenizer's EOS and those of the model",
    )

    cache: Literal["none", "prefix", "dual"] = added(
        "none",
        description="keys and values that are kept while a block is filled in: none (exact); "
        "prefix, those before the block; dual, those on both sides. prefix and dual are "
        "approximations",
    )
    cache_refresh_steps: int | None = added(
        None,
        ge=1,
        le=MAX_COUNT,
        description="renew the cache after this many forward passes; by default only when a block "
        "begins",
    )

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "BlockwiseConfig":
        beside = f"remasking_strategy {self.remasking_strategy!r}"
        if self.remasking_strategy != "low_confidence_dynamic":
            self.refuse_ignored(("confidence_threshold",), beside)
        if self.remasking_strategy != "entropy_bounded":
            self.refuse_ignored(("entropy_threshold",), beside)
        if self.max_new_tokens is None:
            self.refuse_ignored(("stop_token_ids",), "max_new_tokens null")
        if self.cache == "none":
            self.refuse_ignored(("cache_refresh_steps",), "cache 'none'")
        return self


class RemaskingConfig(_FixedLengthConfig):
    """Revealed tokens may be masked again. Source: ReMDM (arXiv 2503.00307)."""

    name: Literal["remdm"] = "remdm"
    num_inference_steps: int = Field(128, ge=1, le=MAX_COUNT, description="steps of the time grid")
    eta: float = Field(
        0.02, ge=0.0, le=1.0, description="strength of remasking; 0 gives sampler ancestral"
    )
    remasking_schedule: Literal["cap", "rescale"] = Field(
        "cap",
        description="rule for the probability of remasking a token: cap, at most eta; rescale, eta "
        "times the largest possible value",
    )


class FirstHittingConfig(_FixedLengthConfig):
    """One token per forward pass, exactly. Source: arXiv 2409.02908."""

    name: Literal["first_hitting"] = "first_hitting"


class _OpenEndedConfig(_SamplerConfig):
    """Fields that all samplers have that continue a prompt until a stop token."""

    stop_token_ids: Annotated[list[int], AfterValidator(_are_counts)] = Field(
        [],
        description="ids that end a completion, beside the tokenizer's EOS and those of the "
        "model's generation config",
    )


class AutoregressiveSamplerConfig(_OpenEndedConfig):
    """Token after token, of any causal language model."""

    name: Literal["ar"] = "ar"
    max_new_tokens: int = Field(
        256, ge=1, le=MAX_COUNT, description="tokens of a completion at most"
    )


class _SpeculativeConfig(AutoregressiveSamplerConfig):
    """The text of a causal language model, in fewer of its passes."""

    draft_temperature: float | None = Field(
        None,
        ge=0.0,
        description="temperature of the draft; by default the same as temperature. Above 0, "
        "proposals are drawn, more are accepted, and the text has the target's "
        "distribution. At 0, the draft proposes its likeliest tokens, and the text is "
        "token for token that of sampler ar with the same seed",
    )

    @model_validator(mode="after")
    def _proposals_can_be_judged(self) -> "_SpeculativeConfig":
        if self.temperature == 0.0:
            self.refuse_ignored(("draft_temperature",), "temperature 0")
        return self


class DFlashSamplerConfig(_SpeculativeConfig):
    """The target's own text, by a draft. Source: DFlash (arXiv 2602.06036)."""

    name: Literal["dflash"] = "dflash"  # type: ignore[assignment]


class SelfSpeculationConfig(_SpeculativeConfig):
    """The text of sampler ar of a model that drafts for itself: objective block_diffusion with
    ar_loss_weight or keep_base.
    """

    name: Literal["self_speculation"] = "self_speculation"  # type: ignore[assignment]
    block_length: int | None = Field(
        None,
        ge=2,
        le=MAX_BLOCK,
        description="number of masks that a draft fills in; by default as many as in training",
    )
    draft_steps: int = added(
        1,
        ge=1,
        le=MAX_COUNT,
        description="forward passes that make a draft; each settles an equal share of the block, "
        "from the left. One more pass verifies it",
    )
    draft_ahead: bool = added(
        False,
        description="draft the next block in the pass that verifies this one. This takes half the "
        "passes, each over K + K^2 tokens for blocks of K, and pays if such a pass "
        "takes little longer (measure it with time_passes of jobs.evaluate)",
    )

    @model_validator(mode="after")
    def _steps_are_taken(self) -> "SelfSpeculationConfig":
        if self.draft_ahead:
            self.refuse_ignored(("draft_steps",), "draft_ahead true")
        return self


class SDARSamplerConfig(_OpenEndedConfig):
    """Block diffusion with a cache of finished blocks. Source: SDAR (arXiv 2510.06303)."""

    name: Literal["sdar"] = "sdar"
    max_new_tokens: int = Field(
        256, ge=1, le=MAX_COUNT, description="tokens of a completion at most"
    )
    block_length: int | None = Field(
        None,
        ge=1,
        le=MAX_BLOCK,
        description="tokens of a block; by default as the model was trained, else 4",
    )
    denoising_steps: int = Field(4, ge=1, le=MAX_COUNT, description="steps of a block at most")
    remasking_strategy: Literal[
        "sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded"
    ] = Field(
        "low_confidence_dynamic", description="rule for which tokens of a block a step commits"
    )
    confidence_threshold: float = Field(
        0.85,
        ge=0.0,
        description="low_confidence_dynamic: commit every token whose probability is above this",
    )
    entropy_threshold: float = Field(
        0.5,
        ge=0.0,
        description="entropy_bounded: commit the surest tokens until their entropies, in nats, sum "
        "to this",
    )

    @model_validator(mode="after")
    def _thresholds_are_used(self) -> "SDARSamplerConfig":
        beside = f"remasking_strategy {self.remasking_strategy!r}"
        if self.remasking_strategy != "low_confidence_dynamic":
            self.refuse_ignored(("confidence_threshold",), beside)
        if self.remasking_strategy != "entropy_bounded":
            self.refuse_ignored(("entropy_threshold",), beside)
        return self


class CanvasSamplerConfig(_OpenEndedConfig):
    """Blocks of random tokens that are denoised, of models trained on uniform noise."""

    name: Literal["canvas"] = "canvas"
    temperature: float = Field(
        1.0,
        ge=0.0,
        description="temperature of all rules but entropy_bound; 0 takes the likeliest token",
    )
    max_new_tokens: int = Field(
        256, ge=1, le=MAX_COUNT, description="tokens of a completion at most"
    )
    block_length: int | None = Field(
        None,
        ge=1,
        le=MAX_BLOCK,
        description="tokens of a canvas; by default as the model was trained",
    )
    num_inference_steps: int = Field(
        48, ge=1, le=MAX_COUNT, description="steps of a canvas at most"
    )
    canvas_rule: Literal["entropy_bound", "ddim", "ancestral", "block_refinement"] = Field(
        "entropy_bound",
        description="how a step changes the block: entropy_bound keeps the tokens that are "
        "surest and makes all others random again; ddim and ancestral follow the trained noise "
        "backwards; block_refinement commits tokens by confidence and a quota per step",
    )
    entropy_bound: float = Field(
        0.1,
        ge=0.0,
        description="rule entropy_bound: keep the surest tokens until their entropies, in nats, "
        "sum to this",
    )
    t_max: float = Field(
        0.8, gt=0.0, description="temperature of rule entropy_bound at the first step"
    )
    t_min: float = Field(0.4, gt=0.0, description="temperature that rule entropy_bound falls to")
    threshold: float = added(
        0.95,
        ge=0.0,
        description="block_refinement: commit every candidate whose probability is above this; a "
        "value above 1 commits only the step's quota",
    )
    editing_threshold: float | None = added(
        None,
        gt=0.0,
        description="block_refinement: replace a committed token by another one whose probability "
        "is above this; by default committed tokens stay",
    )
    corrector_steps: int = added(
        0,
        ge=0,
        le=MAX_COUNT,
        description="ddim and ancestral: sweeps after each step but the last that draw some tokens "
        "of the canvas again, given all the others; a forward pass each",
    )
    corrector_k: int = added(
        1, ge=1, le=MAX_COUNT, description="tokens of a row that a sweep draws again; 1 is exact"
    )
    corrector_selection: Selection = added("random", description=_SELECTION_HELP)
    stability_threshold: int = Field(
        1,
        ge=0,
        le=MAX_COUNT,
        description="steps without a change of the likeliest tokens before a canvas is finished "
        "early",
    )
    confidence_threshold: float | None = Field(
        0.005,
        gt=0.0,
        description="mean entropy in nats below which a stable canvas is finished early; null "
        "takes all steps",
    )

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "CanvasSamplerConfig":
        beside = f"canvas_rule {self.canvas_rule!r}"
        if self.canvas_rule == "entropy_bound":
            self.refuse_ignored(("temperature",), "canvas_rule 'entropy_bound', which has t_max")
        else:
            names = ("entropy_bound", "t_max", "t_min")
            self.refuse_ignored(names, beside)
        if self.canvas_rule != "block_refinement":
            self.refuse_ignored(("threshold", "editing_threshold"), beside)
        if self.canvas_rule not in ("ddim", "ancestral"):
            self.refuse_ignored(("corrector_steps",), beside)
        if self.corrector_steps == 0:
            self.refuse_ignored(("corrector_k", "corrector_selection"), "corrector_steps 0")
        if self.confidence_threshold is None:
            self.refuse_ignored(("stability_threshold",), "confidence_threshold null")
        if self.t_min > self.t_max:
            raise ValueError(f"t_min {self.t_min} must not exceed t_max {self.t_max}; lower it")
        return self


class BlockRefinementSamplerConfig(_OpenEndedConfig):
    """Blocks filled in by confidence, and edited. Source: LLaDA2.0 and 2.1."""

    name: Literal["block_refinement"] = "block_refinement"
    temperature: float = Field(
        0.0,
        ge=0.0,
        description="temperature of the predicted distribution; 0 takes the likeliest token",
    )
    gen_length: int = Field(256, ge=1, le=MAX_COUNT, description="tokens of a completion at most")
    block_length: int | None = Field(
        None,
        ge=1,
        le=MAX_BLOCK,
        description="tokens of a block; by default as the model was trained, else 32",
    )
    num_inference_steps: int = Field(
        32, ge=1, le=MAX_COUNT, description="steps that the tokens of a block are spread over"
    )
    threshold: float = Field(
        0.7,
        ge=0.0,
        description="commit every candidate whose probability is above this; a value above 1 "
        "commits only the step's quota",
    )
    minimal_topk: int = Field(1, ge=1, le=MAX_COUNT, description="least tokens that a step commits")
    editing_threshold: float | None = Field(
        None,
        gt=0.0,
        description="replace a committed token by another one whose probability is above this; by "
        "default committed tokens stay",
    )
    max_post_steps: int = Field(
        16,
        ge=0,
        le=MAX_COUNT,
        description="most steps of a block that only edit, after its last mask was filled",
    )
    eos_early_stop: bool = Field(
        True, description="end a completion at a stop token; false: always write gen_length tokens"
    )
    attention_mask_mode: Literal["2d", "4d", "auto"] = Field(
        "auto",
        description="what a position sees: 2d, what is before it, as in a causal model; 4d, also "
        "its whole block; auto, as the model was trained",
    )

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> "BlockRefinementSamplerConfig":
        if self.editing_threshold is None:
            self.refuse_ignored(("max_post_steps",), "editing_threshold null")
        if not self.eos_early_stop:
            self.refuse_ignored(("stop_token_ids",), "eos_early_stop false")
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
    | CanvasSamplerConfig
    | DFlashSamplerConfig
    | SelfSpeculationConfig
)
SamplerConfig = Annotated[
    FixedLengthSamplerConfig | OpenEndedSamplerConfig,
    Field(discriminator="name"),
    named("ancestral"),
]
