"""One training run from config and data to `checkpoint-N/` and `final/`, in the process or worker
that calls it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

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
from tokendiff.artifacts.last_notes import LastNote
from tokendiff.artifacts.locations import Location, RemotePath
from tokendiff.artifacts.manifest import COMMITS, fetch, verify
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.rows import TokenData, step_batches, step_plan
from tokendiff.data.tokenizers import open_tokenizer
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.models.dflash.config import DFlashDraftConfig
from tokendiff.objectives.dflash import DFlash
from tokendiff.training.building import build_trainee, states_reader
from tokendiff.training.commits import commits_of_run, commits_opened
from tokendiff.training.heldout import heldout_acceptance
from tokendiff.training.identity import check_same_run, finished_run, run_identity
from tokendiff.training.inputs import filling_notes
from tokendiff.training.memory import MemoryPlan, check_memory, plan_memory
from tokendiff.training.saving import CheckpointSaver
from tokendiff.training.sharding import replica_size
from tokendiff.training.state import RunState
from tokendiff.training.trainer import Batches, OnEvent, Trainer
from tokendiff.training.watching import Watch
from tokendiff.training.world import World

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig

Folder = TypeVar("Folder", Path, RemotePath)


@dataclass(kw_only=True)
class TrainingRun:
    """A trainer together with the folder that its checkpoints go to.

    Attributes:
        state, saver: what its checkpoints hold, and what writes them.
        notes: what a user should know of the model and the rows that the run begins with.
        commits: of the hub models that it was built from, by the field that names them.
        memory: what a worker needs.
        watch: None where no held-out rows are judged.
    """

    trainer: Trainer
    config: "TrainConfig"
    data: TokenData
    output_dir: Location
    process: NoiseProcess | None
    tokenizer: Any
    on_event: OnEvent
    memory: MemoryPlan
    measure: Callable[[], dict[str, float]] = dict
    watch: Watch | None = None
    notes: Sequence[str] = ()
    commits: Mapping[str, str] = field(default_factory=dict)

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
        notes = filling_notes(config, data)
        memory = plan_memory(
            config,
            tokenizer,
            max_length=data.max_length,
            num_workers=world.size,
            replica_size=replica_size(config.sharding, world),
            device=world.device,
        )
        check_memory(config, memory, world)
        denoiser, objective, process = build_trainee(
            config, data, tokenizer, world=world, warn=notes.append
        )
        states_of_rows = states_reader(config, data, tokenizer, denoiser)
        trainer = Trainer(
            denoiser,
            objective,
            config,
            world,
            isolates_documents=data.isolates_documents,
            on_event=on_event,
            states_of_rows=states_of_rows,
        )
        measure: Callable[[], dict[str, float]] = dict
        watch = Watch.build(config, objective, process, data)
        is_asked = world.is_main or trainer.spread.is_sharded
        if isinstance(objective, DFlash) and is_asked and watch is None:
            measure = heldout_acceptance(trainer, objective, data)
        return cls(
            measure=measure,
            memory=memory,
            watch=watch,
            notes=notes,
            commits=commits_opened(config),
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
        self._check_blocks(folder)
        self.state.load(folder)
        if self.watch is not None:
            self.watch.load(folder)
        if self.trainer.world.is_main:
            self.on_event("resume", step=self.trainer.step, checkpoint=str(checkpoint))

    def _check_blocks(self, folder: Path) -> None:
        """Raise InputError where a checkpoint counts blocks from elsewhere: the default changed."""
        if self.process is None or self.process.block_length is None:
            return
        there, here = NoiseProcess.load(folder).block_start, self.process.block_start
        if there != here:
            raise InputError(
                f"{folder}: blocks start at {there or 'document'} there, at {here or 'document'} "
                f"here; set objective.block_start to {'answer' if there else 'document'}, or "
                "choose another output_dir"
            )

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
            needs = self.memory.describe()
            self.on_event("memory", total=self.memory.total, description=needs)
        try:
            return self._fit(batches, should_stop)
        finally:
            self.saver.close()
            if self.config.compile or self.trainer.world.device.type == "cuda":
                # torch counts how often it compiles a model's code, or on CUDA flex attention,
                # whichever run in this process it was for, and gives up after some: the next run
                # would not be compiled.
                torch.compiler.reset()

    def _fit(self, batches: Batches, should_stop: Callable[[], bool]) -> bool:
        with LastNote(self.output_dir, worker_name(self.trainer.world.rank)) as last:
            self.trainer.run(
                batches,
                last_good=self._last_good,
                save=self._save,
                rewind=self._rewind,
                note=last.write,
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
            **self._commits(),
        }

    def _commits(self) -> dict[str, Any]:
        return {COMMITS: dict(self.commits)} if self.commits else {}

    def _metadata(self) -> dict[str, Any]:
        return {
            "step": self.trainer.step,
            "run": run_identity(self.config, self.data),
            "data_path": str(self.data.folder),
            **self._commits(),
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
        if not self.trainer.world.is_main:
            return None
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
                needed=self._step_to_rewind_to(step_of(self.output_dir / name)),
            )

    def _step_to_rewind_to(self, step: int) -> int | None:
        """The same whatever a stop or a kill left in between, so that a run that was cut off goes
        back to where the others do.
        """
        every = self.config.checkpointing_steps
        return step // every * every if self.config.on_spike == "rewind" else None

    def _rewind(self) -> None:
        """Load the state of the last checkpoint in the rhythm of checkpointing_steps."""
        step, world = self._step_to_rewind_to(self.trainer.step), self.trainer.world
        assert step is not None
        checkpoint, problem = self.output_dir / checkpoint_name(step), ""
        self.saver.wait()
        if world.is_main:
            try:
                verify(checkpoint, kind=KIND, hashes=isinstance(checkpoint, Path))
            except (CorruptFileError, FileNotFoundError) as error:
                problem = str(error)
        if world.sum(torch.tensor([float(bool(problem))], device=world.device)).item():
            raise CorruptFileError(
                f"{checkpoint}, which on_spike rewind goes back to, is damaged or gone "
                f"({problem}); run the same command again: it goes on from the newest sound "
                "checkpoint. If the same step fails again, set on_spike to skip"
            )
        self.state.load(fetch(checkpoint))

    def _fetch_best(self, step: int) -> Path:
        checkpoint, is_main = self.output_dir / checkpoint_name(step), self.trainer.world.is_main
        try:
            if is_main:  # which reads all of it; the others read what they hold
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
        self.saver.save(FINAL, lambda: self.state.final(metadata, self.watch))
        self.saver.wait()


def worker_name(rank: int) -> str:
    """Of the note of what a worker is at."""
    return f"worker-{rank}"


def train_in_process(
    config: "TrainConfig",
    data: TokenData,
    output_dir: Folder,
    *,
    device: str = "cpu",
    on_event: OnEvent = lambda event, **fields: None,
) -> Folder:
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
    with commits_of_run(config, output_dir):
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
