"""The section `frontier`: settings of samplers to try, and the rule that chooses one of them."""

import difflib
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tokendiff.config.base import MAX_BATCH, MAX_COUNT, Section, operational
from tokendiff.config.evaluate import is_task_metric, split_at_commas
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.samplers import OpenEndedSamplerConfig, SamplerConfig

PERPLEXITY = "generative_perplexity"


class FrontierConfig(Section):
    """A checkpoint and settings of its samplers to an operating point."""

    checkpoint_path: str | None = operational(None, description="a checkpoint-N/ or final/ folder")
    samplers: list[SamplerConfig] = Field(min_length=1, description="samplers to try")
    over: dict[str, list[Any]] = Field(
        {},
        description="values to try, by the name of a sampler's field; every combination is tried "
        "with each sampler that has the field",
    )
    prompt: list[str] = Field([], description="a prompt; may be given several times")
    prompts: list[str] = Field([], description="prompt files or globs, as of generate")
    num_samples: int = Field(
        4, ge=1, le=MAX_COUNT, description="number of samples; with prompts, of each prompt"
    )
    seq_len: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="tokens of a sample of fixed length; by default as trained",
    )
    batch_size: int = Field(16, ge=1, le=MAX_BATCH, description="rows that are sampled together")
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16 autocast")
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of the samples; a row's randomness depends on it and on the row's id",
    )
    reference_model_name_or_path: str | None = Field(
        None, description="causal LM that scores the samples (generative perplexity)"
    )
    tasks: Annotated[list[str], BeforeValidator(split_at_commas)] = Field(
        [], description="tasks to measure at each point, as of evaluate"
    )
    tasks_path: str | None = Field(None, description="folder with task files (YAML) of your own")
    max_task_documents: int | None = Field(
        None, ge=1, le=MAX_COUNT, description="documents of each task at most; by default all"
    )
    quality: str = Field(
        PERPLEXITY,
        description="figure that measures quality: generative_perplexity, or TASK/METRIC of a task "
        "that has text written (multiple-choice tasks do not depend on steps or "
        "thresholds)",
    )
    direction: Literal["lower", "higher"] | None = Field(
        None,
        description="direction in which quality is better; by default lower for a perplexity, and "
        "what the task says for its metric",
    )
    speed: Literal["tokens_per_forward", "tokens_per_second"] = Field(
        "tokens_per_forward",
        description="figure that measures speed; tokens_per_forward is the same in every run, "
        "tokens_per_second is not",
    )
    within: float = Field(
        0.01,
        ge=0.0,
        description="largest loss of quality, as a share of the best quality, that the operating "
        "point may have; the fastest such setting is chosen",
    )
    limit: float | None = Field(None, description="quality that the operating point must reach")
    min_entropy_nats: float = Field(
        0.0,
        ge=0.0,
        description="least unigram entropy of the samples at the operating point. Samples that "
        "repeat themselves have a good perplexity, and a low entropy",
    )

    @property
    def points(self) -> list[Any]:
        """The settings to try, each a sampler's section."""
        found: list[Any] = []
        for sampler in self.samplers:
            given = sampler.model_dump(include=sampler.model_fields_set)
            axes = [name for name in self.over if name in type(sampler).model_fields]
            for values in product(*(self.over[name] for name in axes)):
                fields = {**given, **dict(zip(axes, values, strict=True)), "name": sampler.name}
                point = type(sampler).model_validate(fields)
                if point not in found:
                    found.append(point)
        return found

    def sampling(self, point: Any) -> GenerateConfig:
        """How samples are drawn at a point."""
        names = ("prompt", "prompts", "num_samples", "batch_size", "mixed_precision", "seed")
        fields = {name: getattr(self, name) for name in names}
        is_open_ended = isinstance(point, OpenEndedSamplerConfig)
        sampler = point.model_dump(include=point.model_fields_set | {"name"})
        length = {} if is_open_ended else {"seq_len": self.seq_len}
        return GenerateConfig.model_validate({**fields, **length, "sampler": sampler})

    @model_validator(mode="after")
    def _points_can_be_tried(self) -> "FrontierConfig":
        known = {name for sampler in self.samplers for name in type(sampler).model_fields}
        for name in self.over:
            if name not in known - {"name"}:
                close = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"over: none of the samplers has a field {name!r}{hint}")
        if any(sampler.name == "dflash" for sampler in self.samplers):
            raise ValueError("samplers: 'dflash' needs a draft beside the checkpoint; leave it out")
        try:
            for point in self.points:
                self.sampling(point)
        except ValidationError as error:
            problems = "; ".join(str(problem["msg"]) for problem in error.errors())
            raise ValueError(f"over: a combination cannot be: {problems}") from error
        return self

    @model_validator(mode="after")
    def _quality_is_measured(self) -> "FrontierConfig":
        is_of_task = is_task_metric(self.quality) and self.tasks
        if self.quality != PERPLEXITY and not is_of_task:
            raise ValueError(
                f"quality {self.quality!r} must be {PERPLEXITY}, or TASK/METRIC of one of tasks"
            )
        if self.quality == PERPLEXITY and self.direction == "higher":
            raise ValueError(f"direction 'higher': {PERPLEXITY} is better when lower; remove it")
        if not self.tasks:
            self.refuse_ignored(("tasks_path", "max_task_documents"), "no tasks")
        return self

    def result_fields(self) -> dict[str, Any]:
        fields = super().result_fields()
        if self.quality == PERPLEXITY:  # as it was when lower was the default of every quality
            fields["direction"] = "lower"
        return fields
