"""One training run from config and data to `checkpoint-N/` and `final/`, in the process or worker
that calls it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendiff.artifacts.checkpoint import (
    BEST_STEP,
    FINAL,
    KIND,
    STOPPED_EARLY,
    checkpoint_name,
    newest_sound_checkpoint,
    remove_old_checkpoints,
    step_of,
)
from tokendiff.artifacts.locations import Location
from tokendiff.artifacts.manifest import fetch, verify
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.rows import TokenData, step_batches, step_plan
from tokendiff.data.tokenizers import open_tokenizer
from tokendiff.diffusion.interfaces import Objective
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.models.adapters import (
    add_adapters,
)
from tokendiff.models.denoiser import ModelInTwoParts
from tokendiff.models.dflash.model import DFlashDraftConfig
from tokendiff.models.dflash.planning import plan_draft
from tokendiff.models.dflash.trainee import DraftTrainee, load_trainee
from tokendiff.models.opening import load_causal_denoiser, load_denoiser
from tokendiff.models.vocabulary import check_vocabulary
from tokendiff.objectives.autoregressive import Autoregressive
from tokendiff.objectives.block_diffusion import BlockDiffusion
from tokendiff.objectives.block_refinement import BlockRefinement
from tokendiff.objectives.dflash import DFlash
from tokendiff.objectives.mdlm import MDLM
from tokendiff.objectives.token_noise import TokenNoiseDiffusion
from tokendiff.training.heldout import heldout_acceptance
from tokendiff.training.identity import check_same_run, finished_run, run_identity
from tokendiff.training.saving import CheckpointSaver
from tokendiff.training.state import RunState
from tokendiff.training.trainer import Batches, OnEvent, Trainer
from tokendiff.training.watching import Watch
from tokendiff.training.world import World

if TYPE_CHECKING:
    from tokendiff.config.objectives import (
        BlockDiffusionConfig,
        BlockRefinementConfig,
        DFlashConfig,
        HybridConfig,
        MDLMConfig,
        UDLMConfig,
    )
    from tokendiff.config.train import TrainConfig


def _build_mdlm(config: "MDLMConfig", process: NoiseProcess) -> Objective:
    kernel = process.kernel()
    assert isinstance(kernel, AbsorbingKernel)
    return MDLM(kernel=kernel, **_common_fields(config))


def _build_token_noise(config: "UDLMConfig | HybridConfig", process: NoiseProcess) -> Objective:
    return TokenNoiseDiffusion(
        kernel=process.kernel(), loss_type=config.loss_type, **_common_fields(config)
    )


def _build_block_diffusion(config: "BlockDiffusionConfig", process: NoiseProcess) -> Objective:
    kernel = process.kernel()
    assert isinstance(kernel, AbsorbingKernel)
    return BlockDiffusion(
        kernel=kernel,
        block_length=config.block_length,
        eos_token_id=process.eos_token_id,
        exact_mask_counts=config.exact_mask_counts,
        restarts_at_answers=process.block_start is not None,
        **_common_fields(config),
    )


def _build_block_refinement(config: "BlockRefinementConfig", process: NoiseProcess) -> Objective:
    if config.prompt_length >= process.max_length:
        raise InputError(
            f"prompt_length {config.prompt_length} leaves nothing of rows of {process.max_length} "
            "tokens to train on; lower it, or preprocess with a larger max_length"
        )
    mode = process.attention_mask_mode
    return BlockRefinement(
        mask_token_id=process.mask_token_id,
        block_length=config.block_length,
        eos_token_id=process.eos_token_id,
        attention_mask_mode="2d" if mode == "2d" else "4d",
        clean_context=config.clean_context,
        prompt_length=config.prompt_length,
        restarts_at_answers=process.block_start is not None,
        lambda_conf=config.lambda_conf,
        conf_temperature=config.conf_temperature,
    )


def _common_fields(
    config: "MDLMConfig | UDLMConfig | HybridConfig | BlockDiffusionConfig",
) -> dict[str, Any]:
    names = ("min_time", "max_loss_weight", "lambda_conf", "conf_temperature")
    return {name: getattr(config, name) for name in names}


def _build_dflash(config: "DFlashConfig", draft: DFlashDraftConfig) -> Objective:
    assert draft.block_size is not None
    return DFlash(
        block_size=draft.block_size,
        mask_token_id=draft.mask_token_id,
        num_anchors=config.num_anchors,
        decay_gamma=config.decay_gamma,
    )


# The closed table behind `objective: NAME`, of those with a noise process.
OBJECTIVES: dict[str, Callable[[Any, NoiseProcess], Objective]] = {
    "mdlm": _build_mdlm,
    "udlm": _build_token_noise,
    "hybrid": _build_token_noise,
    "block_refinement": _build_block_refinement,
    "block_diffusion": _build_block_diffusion,
}


def _build(
    config: "TrainConfig",
    data: TokenData,
    tokenizer: Any,
    *,
    world: World,
    warn: Callable[[str], None],
) -> tuple[ModelInTwoParts | DraftTrainee, Objective, NoiseProcess | None]:
    """What is trained, by what, and the noise process that the checkpoint records."""
    if config.objective.name == "dflash":
        plan = plan_draft(config, tokenizer=tokenizer, max_length=data.max_length)
        for note in plan.notes:
            warn(note)
        trainee = load_trainee(plan, device=world.device, seed=config.seed, dropout=config.dropout)
        return trainee, _build_dflash(config.objective, plan.draft), None
    load = load_causal_denoiser if config.objective.is_causal else load_denoiser
    field, start = starting_point(config)
    model: ModelInTwoParts = load(
        start,
        tokenizer=tokenizer,
        max_length=data.max_length,
        from_scratch=config.from_scratch,
        dropout=config.dropout,
        seed=config.seed,
        warn=warn,
        field=field,
        is_on_disk=config.sharding != "none" and world.size > 1,
    )
    if not config.from_scratch:
        check_vocabulary(start, tokenizer, field=field)
    if config.lora_rank is not None:
        add_configured_adapters(config, model.model, tokenizer)
    return model, *make_objective(config, tokenizer, data)


def starting_point(config: "TrainConfig") -> tuple[str, str]:
    """Field and name of the model that training starts from."""
    field = "model_name_or_path" if config.warm_start_from is None else "warm_start_from"
    return field, getattr(config, field)


def add_configured_adapters(config: "TrainConfig", model: Any, tokenizer: Any) -> None:
    """Put the adapters that a config asks for into a transformers model.

    Raises:
        InputError: peft is not installed, or the model has no such layers.
    """
    assert config.lora_rank is not None
    has_noise = config.objective.process_fields() is not None  # without it no mask is read
    add_adapters(
        model,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        trained_token_id=tokenizer.mask_token_id if has_noise else None,
        seed=config.seed,
    )


def make_objective(
    config: "TrainConfig", tokenizer: Any, data: TokenData
) -> tuple[Objective, NoiseProcess | None]:
    """The objective of a model that gives logits of the tokenizer's ids, and its noise process.

    Raises:
        InputError: the objective does not go with the rows.
    """
    fields = config.objective.process_fields()
    if fields is None:
        return Autoregressive(), None
    ends: dict[str, Any] = {}
    if config.objective.is_causal:
        ends["eos_token_id"] = tokenizer.eos_token_id
        ends["block_start"] = _block_start(fields.pop("block_start"), data)
    process = NoiseProcess(
        objective=config.objective.name,
        vocab_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        max_length=data.max_length,
        **fields,
        **ends,
    )
    return OBJECTIVES[config.objective.name](config.objective, process), process


def _block_start(wanted: str | None, data: TokenData) -> str | None:
    """What the noise process records, of what the config says."""
    starts = {"answers": "answer", "last_answer": "last_answer"}
    found = starts.get(data.train_on)
    if wanted == "answer" and found is None:
        raise InputError(
            "block_start answer: the loss of these rows is on all their tokens, and no answer is "
            "told from the rest; preprocess chats with train_on answers, or set it to document"
        )
    return None if wanted == "document" else found


@dataclass(kw_only=True)
class TrainingRun:
    """A trainer together with the folder that its checkpoints go to.

    Attributes:
        state, saver: what its checkpoints hold, and what writes them.
        notes: what a user should know of the model that the run begins with.
        watch: None where no held-out rows are judged.
    """

    trainer: Trainer
    config: "TrainConfig"
    data: TokenData
    output_dir: Location
    process: NoiseProcess | None
    tokenizer: Any
    on_event: OnEvent
    measure: Callable[[], dict[str, float]] = dict
    watch: Watch | None = None
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.state = RunState(self.trainer, self.tokenizer, self.process)
        self.saver = CheckpointSaver(
            self.output_dir,
            self.trainer.world,
            replica_size=self.trainer.spread.replica_size,
            after=self._remove_old,
        )

    @classmethod
    def build(
        cls,
        config: "TrainConfig",
        data: TokenData,
        output_dir: Location,
        *,
        world: World,
        on_event: OnEvent = lambda event, **fields: None,
    ) -> "TrainingRun":
        tokenizer = open_tokenizer(data.tokenizer_path, field="data_path")
        notes: list[str] = []
        denoiser, objective, process = _build(
            config, data, tokenizer, world=world, warn=notes.append
        )
        trainer = Trainer(
            denoiser,
            objective,
            config,
            world,
            isolates_documents=data.isolates_documents,
            on_event=on_event,
        )
        measure: Callable[[], dict[str, float]] = dict
        watch = Watch.build(config, objective, process, data)
        is_asked = world.is_main or trainer.spread.is_sharded
        if isinstance(objective, DFlash) and is_asked and watch is None:
            measure = heldout_acceptance(trainer, objective, data)
        return cls(
            measure=measure,
            watch=watch,
            notes=notes,
            trainer=trainer,
            config=config,
            data=data,
            output_dir=output_dir,
            process=process,
            tokenizer=tokenizer,
            on_event=on_event,
        )

    def resume(self, checkpoint: Location) -> None:
        """Continue from a checkpoint whose manifest was verified."""
        check_same_run(checkpoint, self.config, self.data)
        folder = fetch(checkpoint)
        self.state.load(folder)
        if self.watch is not None:
            self.watch.load(folder)
        if self.trainer.world.is_main:
            self.on_event("resume", step=self.trainer.step, checkpoint=str(checkpoint))

    def fit(self, batches: Batches, *, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end from where the run stands, and leave `final/`.

        Returns:
            Whether the end was reached; not where `should_stop` came first: the newest checkpoint
            is then of the last step taken.
        """
        if self.trainer.world.is_main:
            # What was new in the model when the run began is not new where it goes on.
            for note in self.notes if self.trainer.step == 0 else ():
                self.on_event("warning", message=note)
            self.on_event("start", **self._facts())
        self.trainer.run(
            batches,
            last_good=self._last_good,
            save=self._save,
            poll=self.saver.poll,
            should_stop=should_stop,
            measure=self.measure,
            watch=self.watch,
        )
        is_over = self.watch is not None and self.watch.is_over
        is_finished = is_over or self.trainer.step == self.config.max_train_steps
        self.saver.wait()
        if is_finished:
            self._save_final()
        elif self.trainer.world.is_main:
            self.on_event("stopped", step=self.trainer.step)
        self.trainer.world.barrier()
        return is_finished

    def _facts(self) -> dict[str, Any]:
        return {
            "step": self.trainer.step,
            "max_train_steps": self.config.max_train_steps,
            "rows": self.data.num_rows,
            "tokens_per_step": self.config.rows_per_step * self.data.max_length,
            "num_params": sum(p.numel() for p in self.trainer.denoiser.model.parameters()),
            "num_trained_params": sum(
                p.numel() for p in self.trainer.denoiser.model.parameters() if p.requires_grad
            ),
            "num_workers": self.trainer.world.size,
            "device": str(self.trainer.world.device),
        }

    def _metadata(self) -> dict[str, Any]:
        return {
            "step": self.trainer.step,
            "run": run_identity(self.config, self.data),
            "data_path": str(self.data.folder),
            **self._best_step(),
            **self._mask_of_draft(),
        }

    def _best_step(self) -> dict[str, int]:
        if self.watch is None or self.watch.best_step is None or self.config.keep == "last":
            return {}
        return {BEST_STEP: self.watch.best_step}

    def _mask_of_draft(self) -> dict[str, Any]:
        """Which id of the target a draft fills in; other objectives have a noise process to say."""
        config = self.trainer.denoiser.model.config
        if not isinstance(config, DFlashDraftConfig):
            return {}
        index = config.mask_token_id
        token = self.tokenizer.convert_ids_to_tokens(index)
        return {"mask": {"mask_token_id": index, "token": token}}

    def _last_good(self) -> Location | None:
        self.saver.wait()
        return newest_sound_checkpoint(self.output_dir, warn=lambda message: None)

    def _save(self) -> None:
        name, step = checkpoint_name(self.trainer.step), self.trainer.step
        self.saver.save(
            name,
            lambda: self.state.checkpoint(self._metadata(), self.watch),
            then=lambda: self.on_event("checkpoint", step=step, path=str(self.output_dir / name)),
        )

    def _remove_old(self, name: str) -> None:
        if name != FINAL:
            remove_old_checkpoints(
                self.output_dir,
                newest=step_of(self.output_dir / name),
                keep=self.config.checkpoints_total_limit,
            )

    def _fetch_best(self, step: int) -> Path:
        checkpoint = self.output_dir / checkpoint_name(step)
        try:
            verify(checkpoint, kind=KIND, hashes=isinstance(checkpoint, Path))
            return fetch(checkpoint)
        except (CorruptFileError, FileNotFoundError) as error:
            raise CorruptFileError(
                f"{checkpoint}, of the best step, was damaged while the run went on ({error}); the "
                "same command goes on from a checkpoint before it"
            ) from error

    def _save_final(self) -> None:
        metadata = self._metadata()
        if self.watch is not None and self.trainer.step < self.config.max_train_steps:
            metadata[STOPPED_EARLY] = self.watch.why_over()
            if self.trainer.world.is_main:
                reason = metadata[STOPPED_EARLY]
                self.on_event("stopped_early", step=self.trainer.step, reason=reason)
        best_step = metadata.get(BEST_STEP, self.trainer.step)
        holds_weights = self.trainer.world.is_main or self.trainer.spread.is_sharded
        if best_step != self.trainer.step and holds_weights:
            self.state.load_weights(self._fetch_best(best_step))
        self.saver.save(FINAL, lambda: self.state.final(metadata))
        self.saver.wait()


def train_in_process(
    config: "TrainConfig",
    data: TokenData,
    output_dir: Path,
    *,
    device: str = "cpu",
    on_event: OnEvent = lambda event, **fields: None,
) -> Path:
    """Train without Ray: in a notebook, or in each process of a torch.distributed group.

    Resumes from the newest sound checkpoint under `output_dir`, which all processes must see.
    Returns `final/`.
    """
    world = World.current(device)
    final = finished_run(
        output_dir, config, data, warn=lambda message: on_event("warning", message=message)
    )
    if final is not None:
        return output_dir / FINAL
    run = TrainingRun.build(config, data, output_dir, world=world, on_event=on_event)
    checkpoint = newest_sound_checkpoint(
        output_dir, warn=lambda message: on_event("warning", message=message)
    )
    if checkpoint is not None:
        run.resume(checkpoint)
    plan = step_plan(config, data, rank=world.rank, world_size=world.size)
    batches: Iterator[dict[str, Any]] = step_batches(
        data, plan, run.trainer.step, config.max_train_steps
    )
    run.fit(batches)
    return output_dir / FINAL
