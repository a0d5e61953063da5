"""A whole pipeline file: its sections, its stages, how it runs and where it is recorded."""

from typing import Any, Literal

from pydantic import Field

from tokendiff.config.base import MAX_COUNT, MAX_WORKERS, Section, operational
from tokendiff.config.cluster import ClusterConfig
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.frontier import FrontierConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.preprocess import FILLED_FOR, PreprocessConfig
from tokendiff.config.promote import PromoteConfig
from tokendiff.config.train import (
    BUILTIN_MODEL_PREFIX,
    BUILTIN_MODELS,
    REGISTERED_MODEL_PREFIX,
    TrainConfig,
)
from tokendiff.errors import InputError


class StageConfig(Section):
    """One entry of `stages`; `tokendiff.config.stage_graph` knows which inputs each kind takes."""

    kind: Literal[
        "preprocess",
        "cache_target_states",
        "train",
        "regenerate",
        "generate",
        "evaluate",
        "frontier",
        "promote",
    ] = Field(description="what the stage does")
    inputs: dict[str, str] = Field(
        {}, description="stages that this one reads from, by the role of the input"
    )
    config: dict[str, Any] = Field(
        {}, description="fields that differ from the section of the stage's kind"
    )
    max_retries: int | None = operational(
        None, ge=0, le=MAX_COUNT, description="retries of this stage; by default runner.max_retries"
    )
    timeout_s: float | None = operational(
        None, gt=0.0, description="seconds that this stage may take; by default runner.timeout_s"
    )


class RunnerConfig(Section):
    """How a pipeline runs its stages. Nothing here changes a result, or is part of a key."""

    max_retries: int = Field(
        2,
        ge=0,
        le=MAX_COUNT,
        description="retries of a stage after failures that may pass (a lost node, a network)",
    )
    retry_wait_s: float = Field(
        10.0, ge=0.0, description="seconds before the first retry; the wait doubles each time"
    )
    timeout_s: float | None = Field(None, gt=0.0, description="seconds that a stage may take")
    keep_runs: int | None = Field(
        None,
        ge=1,
        le=MAX_COUNT,
        description="number of finished runs whose stage folders are kept. After each run that "
        "ends well, folders that only older runs used are deleted, except what a registered model "
        "holds; by default all are kept",
    )
    max_parallel: int | None = Field(
        None,
        ge=1,
        le=MAX_WORKERS,
        description="most stages that run at the same time; by default as many as the cluster has "
        "room for",
    )


class TrackingConfig(Section):
    """Where runs are recorded, beside the run's own log."""

    enabled: bool = Field(True, description="MLflow: mirror the run's log")
    uri: str | None = Field(
        None,
        description="MLflow: address of its store; MLFLOW_TRACKING_URI takes precedence; by "
        "default a sqlite file under root",
    )
    experiment: str = Field("tokendiff", min_length=1, description="MLflow: name of the experiment")
    tensorboard: bool = Field(
        False,
        description="write the log's numbers for TensorBoard too, into run/tensorboard of each "
        "result; needs tensorboard (pip install 'tokendiff[tensorboard]')",
    )
    wandb_project: str | None = Field(
        None,
        min_length=1,
        description="project of Weights & Biases that gets the log's numbers too; the key comes "
        "from WANDB_API_KEY, and WANDB_MODE=offline sends nothing; needs wandb (pip install "
        "'tokendiff[wandb]')",
    )


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
    frontier: FrontierConfig | None = None
    promote: PromoteConfig = PromoteConfig()
    stages: dict[str, StageConfig] = Field(
        {},
        description="stages by name, for pipelines other than preprocess, train, generate, "
        "evaluate in a row; a section then holds what the stages of its kind have in common",
    )
    matrix: dict[str, list[Any]] = Field(
        {},
        description="values to try, by section.field; the pipeline runs once for every combination",
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
        if not model.startswith(BUILTIN_MODEL_PREFIX):
            return model
        start = self.train.warm_start_from
        # What an alias of a pipeline stands for is known to the stage that trains alone; its rows
        # get that tokenizer by `new_since`.
        if start is None or start.startswith(REGISTERED_MODEL_PREFIX):
            return "bpe"
        return start

    @property
    def fill_answers(self) -> bool:
        """Whether answers are filled up: as the preprocess section or else the objective has it."""
        if self.preprocess.fill_answers is not None:
            return self.preprocess.fill_answers
        return self.train.objective.name in FILLED_FOR

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
        # Of other models only their own config tells, which is read when samples are drawn.
        is_made_so_long = self.train.model_name_or_path.startswith(
            tuple(f"{BUILTIN_MODEL_PREFIX}{family}-" for family in ("bert", "dit"))
        )
        if self.generate and is_made_so_long and (self.generate.seq_len or 0) > max_length:
            return [
                f"generate.seq_len {self.generate.seq_len} exceeds preprocess.max_length "
                f"{max_length}: {self.train.model_name_or_path} has positions for no more; lower "
                "it, or raise max_length"
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
        if self.train.eval_steps is not None and self.preprocess.heldout_fraction == 0.0:
            problems.append(
                f"train.eval_steps {self.train.eval_steps}: preprocess.heldout_fraction 0 keeps no "
                "rows to evaluate on; raise that, or leave eval_steps out"
            )
        if rows < self.cluster.max_workers:
            problems.append(
                f"cluster.num_workers {self.cluster.num_workers} exceeds the {rows} rows of a "
                "training step; lower it, or raise train.global_batch_size"
            )
        is_elastic = self.cluster.min_workers < self.cluster.max_workers
        if is_elastic and self.train.sharding == "hybrid":
            problems.append(
                f"cluster.num_workers {self.cluster.num_workers} does not go with train.sharding "
                "hybrid, whose nodes have as many workers each; give one number, or set sharding "
                "to full"
            )
        model = self.train.model_name_or_path
        names = [BUILTIN_MODEL_PREFIX + name for name in BUILTIN_MODELS]
        if model.startswith(BUILTIN_MODEL_PREFIX) and model not in names:
            problems.append(
                f"train.model_name_or_path {model!r}: no such built-in model; "
                f"there are {', '.join(names)}"
            )
        return problems
