"""The training loop: torch, a denoiser and an objective; not Ray, nor where rows come from.

One step: every worker takes the gradient of the *sum* of its rows' losses; the sums of loss, tokens
and metrics are added over all workers; the gradient is divided by the token count of the whole
global batch. The mean is thus taken once, and is the same however the rows are spread over workers
and micro-batches.

Rows stay on the CPU, where the objective decides what is noised; what the model needs is sent to
its device without waiting. Nor are a step's figures waited for there: they are read once the next
step is queued, and at once where the step is logged, judged or saved (`late_figures`).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendiff.artifacts.locations import Location
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import LossOutput, Objective, TokenBatch
from tokendiff.diffusion.random import RowGenerator, strata_of
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import naming_memory
from tokendiff.training.ema import WeightAverage
from tokendiff.training.late_figures import StepFigures
from tokendiff.training.optimizer import Optimizer, StoredTensors
from tokendiff.training.sharding import SpreadModel
from tokendiff.training.spikes import SpikeWatch
from tokendiff.training.world import World

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig
    from tokendiff.models.denoiser import ModelInTwoParts
    from tokendiff.models.dflash.trainee import DraftTrainee
    from tokendiff.training.watching import Watch

_TOKENS = "tokens read"  # of a step: what the speed is counted in, whatever the loss is a mean over

OnEvent = Callable[..., None]  # (event name, **fields), called on the main worker only
# One per step: tokens, is_start, is_target [b, L]; length, row_id, epoch [b].
Batches = Iterator[dict[str, Any]]


_STOP = "stop"  # beside the metrics' names: how many workers want to
_TELL_SECONDS = 2.0
_NAMED_ROWS = 8
MEMORY_REMEDY = (
    "lower per_device_train_batch_size and raise gradient_accumulation_steps as much, which keeps "
    "the step, or give shorter rows (max_length) or more memory"
)


class Trainer:
    """Model, optimiser, schedule, average and step: everything that a checkpoint must hold.

    Args:
        objective: gives sums; see `tokendiff.diffusion.interfaces.LossOutput`.
        isolates_documents: of the rows; see `tokendiff.diffusion.interfaces.TokenBatch`.
        on_event: hears "metrics" every `logging_steps` steps, "heldout" after each evaluation, and
            "progress" every two seconds, between micro-batches too: parts of steps count.
        states_of_rows: given row ids [b] and lengths [b], what the target of a draft says of the
            rows, where that was computed before.
    """

    def __init__(
        self,
        denoiser: "ModelInTwoParts | DraftTrainee",
        objective: Objective,
        config: "TrainConfig",
        world: World,
        *,
        isolates_documents: bool = False,
        on_event: OnEvent = lambda event, **fields: None,
        states_of_rows: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self._isolates_documents = isolates_documents
        self._states_of_rows = states_of_rows
        self.config = config
        self.world = world
        self.objective = objective
        self.denoiser = denoiser.train()
        if config.gradient_checkpointing:
            denoiser.recompute_activations()
        self.spread = SpreadModel(
            denoiser,
            world,
            sharding=config.sharding,
            is_compiled=config.compile,
        )
        self.optimizer = Optimizer(denoiser.model, config)
        self.average = (
            WeightAverage(denoiser.model, config.ema_decay) if config.ema_decay > 0.0 else None
        )
        self.spikes = SpikeWatch.build(config)
        self.step = 0
        self._learning_rate = 0.0  # of the last step
        self._grad_norm = 0.0  # of the last step whose figures were read
        self._late: list[StepFigures] = []  # of steps that were queued
        # How many steps' figures may be on their way while more is queued.
        self._most_late = 0 if world.device.type == "cpu" or self.spikes is not None else 1
        self._num_tokens = 0.0  # that this process has seen the workers train on
        self._tell_at = 0.0
        self._on_event = on_event
        self._since_log: dict[
            str, list[float]
        ] = {}  # metric -> [sum, count], global, part of the state

    def run(
        self,
        batches: Batches,
        *,
        last_good: Callable[[], Location | None],
        save: Callable[[], None],
        rewind: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
        note: Callable[[str], None] = lambda what: None,
        poll: Callable[[], None] = lambda: None,
        measure: Callable[[], dict[str, float]] = dict,
        watch: "Watch | None" = None,
    ) -> None:
        """Train until `max_train_steps`, or until `watch` says that it is over; `save` is called
        every `checkpointing_steps`, at the end, and at every step that `watch` keeps.

        Args:
            watch: evaluates before the step is saved, so that no checkpoint lacks a decision.
            measure: figures that are logged beside those of training; asked on the main worker, and
                on all where the model is sharded.
            rewind: called on every worker at a spike with `on_spike: rewind`; loads the state of
                the checkpoint to go back to.
            note: told on every worker which step it begins, with its rows, and "" after it.
            poll: called in every step on every worker, for what goes on in the background.
            should_stop: asked in every step on every worker; when one of them says so, all end
                after that step, which is saved. On a device several workers end one step later.

        Raises:
            FloatingPointError: on all workers alike, when loss or gradient is not finite, or is a
                spike that ends the run: before the optimiser step, or, without `on_spike` on a
                device, a step later, and before anything is saved.
        """
        self._tell(0.0, 0.0)
        if watch is not None and self.step == 0:
            self._evaluate(watch)
        if self.spikes is not None and self.spikes.action == "rewind" and self.step == 0:
            save()  # the first spike may come before the first checkpoint
        clock = _Clock()
        while self.step < self.config.max_train_steps and not (watch and watch.is_over):
            with clock.waiting():
                batch = next(batches)
            is_asked_to_stop = should_stop()
            note(self._place_of(batch))
            with naming_memory(partial(self._place_of, batch), MEMORY_REMEDY):
                self._take_step(batch, last_good, rewind, is_asked_to_stop)
            note("")
            poll()
            clock.steps += 1
            is_evaluated = watch is not None and watch.is_due(self.step)
            is_waited_for = is_evaluated or self._is_logged_or_saved()
            if self.world.size == 1 and is_asked_to_stop:  # nobody else need hear of it
                is_waited_for = True
            is_stopped = self._read_figures(clock, last_good, is_waited_for)
            self._tell(0.0, 0.0)
            if watch is not None and is_evaluated:
                with clock.standing_still():
                    self._evaluate(watch)
            is_end = self.step == self.config.max_train_steps or bool(watch and watch.is_over)
            if self.step % self.config.logging_steps == 0 or is_end:
                self._log(clock, measure)
                clock = _Clock()
            is_kept = watch is not None and is_evaluated and watch.keeps_this_step
            if self.step % self.config.checkpointing_steps == 0 or is_end or is_stopped or is_kept:
                save()
            if is_stopped:
                return

    def _is_logged_or_saved(self) -> bool:
        """Whether the step that was taken last is, unless somebody stops training."""
        config = self.config
        every = (config.logging_steps, config.checkpointing_steps, config.max_train_steps)
        return any(self.step % steps == 0 for steps in every)

    def _read_figures(
        self, clock: "_Clock", last_good: Callable[[], Location | None], is_waited_for: bool
    ) -> bool:
        """Count in the figures of steps, but for the last one where they are not waited for.

        Returns:
            Whether some worker wants to stop; all figures are read then.
        """
        is_stopped = False
        while len(self._late) > (0 if is_waited_for or is_stopped else self._most_late):
            figures = self._late.pop(0)
            totals, grad_norm = self._checked(figures, last_good)
            is_stopped |= totals.pop(_STOP)[0] > 0.0
            num_tokens, _ = totals.pop(_TOKENS)
            if figures.is_learnt:
                self._grad_norm = grad_norm
                self._count(totals)
            clock.tokens += num_tokens
            self._num_tokens += num_tokens
        return is_stopped

    def _checked(
        self, figures: StepFigures, last_good: Callable[[], Location | None]
    ) -> tuple[dict[str, list[float]], float]:
        totals, grad_norm = figures.read()
        if not figures.is_learnt:
            return totals, grad_norm
        for what, value in (("loss", totals["loss"][0]), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise FloatingPointError(self._divergence(figures.step, what, value, last_good()))
        return totals, grad_norm

    def _evaluate(self, watch: "Watch") -> None:
        figures = watch.evaluate(self)
        if self.world.is_main:
            self._on_event("heldout", step=self.step, **figures)

    @contextmanager
    def as_a_checkpoint(self) -> Iterator[Callable[[Callable[[Any], Tensor]], Tensor]]:
        """What judges the model as a checkpoint of now would be judged, inside this block: with the
        averaged weights where there are any, in the precision that it is trained in, and without
        dropout. It is given the work to do with the model, on every worker where that is sharded.
        """
        average = self.average
        with (
            nullcontext() if average is None else average.in_place_of_weights(),
            self._autocast(),
        ):
            self.denoiser.eval()
            try:
                yield self.spread.judge
            finally:
                self.denoiser.train()

    def _autocast(self) -> torch.autocast:
        """The precision that the model is trained in.

        Autocast keeps each weight that it has cast until the pass is over. Where layers are
        gathered one at a time, or computed again, those copies would be of the whole model.
        """
        keeps_weights = not (self.spread.is_sharded or self.config.gradient_checkpointing)
        return torch.autocast(
            self.world.device.type,
            dtype=torch.bfloat16,
            enabled=self.config.mixed_precision == "bf16",
            cache_enabled=keeps_weights,
        )

    def _take_step(
        self,
        columns: dict[str, Any],
        last_good: Callable[[], Location | None],
        rewind: Callable[[], None],
        is_asked_to_stop: bool,
    ) -> None:
        """One optimiser step, or none where the step is a spike. Its figures are under way then:
        global sums and counts of loss and metrics (and of the workers that want to stop), and the
        gradient norm before clipping.
        """
        self.optimizer.zero_grad()
        device = self.world.device
        micro_batches, rows_per_pass = (
            list(self._micro_batches(columns)),
            self.config.per_device_train_batch_size,
        )
        num_passes = self.spread.num_passes(self.config.rows_per_step, rows_per_pass)
        sums: dict[str, Tensor] = {}
        for index in range(num_passes):
            batch, generator = micro_batches[min(index, len(micro_batches) - 1)]
            if index >= len(micro_batches):  # others have rows left; these have nothing to learn
                batch = replace(batch, is_target=torch.zeros_like(batch.is_target))
            if self._states_of_rows is not None:  # of one pass at a time: they are large
                batch = self._with_states(
                    batch, columns, min(index, len(micro_batches) - 1) * rows_per_pass
                )
            self._seed_dropout(index)
            is_last = index == num_passes - 1
            with self.spread.micro_batch(is_last=is_last) as give:
                with self._autocast():
                    output = _as_output(give(partial(self._loss, batch, generator)))
                output.loss_sum.backward()
            if index >= len(micro_batches):
                continue
            if not is_last:
                rows = (index + 1) * rows_per_pass
                self._tell((index + 1) / num_passes, float(columns["length"][:rows].sum()))
            for name, (total, count) in _pairs(output, batch).items():
                both = (total.detach().double(), count.double())
                pair = torch.stack([sent(number, device) for number in both])
                sums[name] = sums.get(name, 0.0) + pair
        # Rides with the metrics, so that all workers stop after the same step at no cost.
        is_stopping = torch.tensor([float(is_asked_to_stop), 1.0], dtype=torch.float64)
        sums[_STOP] = sent(is_stopping, device)
        names = sorted(sums)
        totals = self.world.sum(torch.stack([sums[name] for name in names]))
        # DistributedDataParallel averages over workers; what is wanted is the sum over workers per
        # token. A step whose rows have nothing to learn from has no gradient either.
        num_tokens = totals[names.index("loss"), 1]
        self.optimizer.scale_grad(torch.where(num_tokens > 0, self.world.size / num_tokens, 0.0))
        self._learning_rate = self.optimizer.learning_rate
        grad_norm = self.optimizer.clip_grad(self.config.max_grad_norm)
        figures = StepFigures.of(self.step + 1, names, totals, grad_norm)
        if self.spikes is not None:
            spike = self._judge(self.spikes, figures, last_good)
            if spike is not None:
                self._late.append(replace(figures, is_learnt=False))
                self._pass_over(self.spikes, spike, columns, rewind)
                return
        self._late.append(figures)
        if not self._most_late:
            self._checked(figures, last_good)
        self.optimizer.step()
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)

    def _place_of(self, columns: dict[str, Any]) -> str:
        """The step under way on this worker, and its rows."""
        rows, size = columns["row_id"], self.config.per_device_train_batch_size
        some = ", ".join(str(row) for row in rows[:_NAMED_ROWS].tolist())
        return (
            f"step {self.step + 1}, worker {self.world.rank}: {len(rows)} rows of up to "
            f"{int(columns['length'].max())} tokens, {size} at a time (the first row_ids: {some})"
        )

    def _judge(
        self, spikes: SpikeWatch, figures: StepFigures, last_good: Callable[[], Location | None]
    ) -> str | None:
        """Why the step is a spike that is passed over, or None; waits for its figures."""
        totals, grad_norm = figures.read()
        loss_sum, num_tokens = totals["loss"]
        if not num_tokens:  # nothing to learn from, and nothing to compare with
            return None
        spike = spikes.judge(figures.step, loss=loss_sum / num_tokens, gradient_norm=grad_norm)
        if spike is not None and spikes.is_over:
            why = self._why_over(spikes, last_good())
            raise FloatingPointError(f"step {figures.step}: {spike}; {why}")
        return spike

    def _why_over(self, spikes: SpikeWatch, checkpoint: Location | None) -> str:
        kept = f"last good checkpoint: {checkpoint}" if checkpoint else "there is no checkpoint yet"
        if spikes.action == "stop":
            return (
                f"stopped before the optimiser step, as on_spike says, {kept}. Look at the rows of "
                "this step, or run the same command with on_spike skip or rewind: jobs.train goes "
                "on from the checkpoint, a stage of a pipeline begins anew"
            )
        return (
            f"stopped, as {len(spikes.spikes)} of the last {spikes.window} steps were "
            f"spikes, {kept}. Lower learning_rate or max_grad_norm, or raise spike_deviations"
        )

    def _pass_over(
        self, spikes: SpikeWatch, spike: str, columns: dict[str, Any], rewind: Callable[[], None]
    ) -> None:
        """Take the step without learning from its rows: the order of rows and the learning rates of
        later steps stay as they are.
        """
        step, counted = self.step + 1, spikes.counted()
        what = "its rows are passed over"
        if spikes.action == "rewind":
            rewind()
            spikes.recount(counted)
            self._since_log = {}
            what = f"back to the weights of step {self.step}, all rows since are passed over"
        self.step = step
        self.optimizer.stand_at(step)
        if self.world.is_main:
            some = ", ".join(str(row) for row in columns["row_id"][:_NAMED_ROWS].tolist())
            self._on_event(
                "warning", message=f"step {step}: {spike}; {what} (the first row_ids: {some})"
            )

    def _loss(self, batch: TokenBatch, generator: RowGenerator, model: Any) -> tuple[Any, ...]:
        """The fields of a LossOutput."""
        output = self.objective.loss(model, batch, generator)
        return output.loss_sum, output.num_tokens, output.metrics

    def _micro_batches(self, columns: dict[str, Any]) -> Iterator[tuple[TokenBatch, RowGenerator]]:
        seed = self.config.seed
        names = ("tokens", "length", "is_start", "is_target", "row_id", "epoch")
        tokens, length, is_start, is_target, row_id, epoch = (
            torch.as_tensor(columns[name]) for name in names
        )
        positions = torch.arange(self.world.rank, self.config.rows_per_step, self.world.size)
        strata = strata_of(key_from(seed, "time", self.step), positions, self.config.rows_per_step)
        generator = RowGenerator.for_rows(key_from(seed, "noise"), row_id, strata=strata).fold_in(
            epoch
        )
        for rows in torch.arange(len(tokens)).split(self.config.per_device_train_batch_size):
            batch = TokenBatch.of_rows(
                tokens[rows],
                length[rows],
                is_start[rows],
                is_target[rows],
                isolates_documents=self._isolates_documents,
            )
            yield batch, generator.select(rows)

    def _with_states(self, batch: TokenBatch, columns: dict[str, Any], first: int) -> TokenBatch:
        assert self._states_of_rows is not None
        rows = slice(first, first + len(batch.tokens))
        states = self._states_of_rows(columns["row_id"][rows], columns["length"][rows])
        return replace(batch, target_states=states)

    def _seed_dropout(self, micro_batch: int) -> None:
        if self.config.dropout > 0.0 or self.config.lora_dropout > 0.0:
            key = key_from(self.config.seed, "dropout", self.step, self.world.rank, micro_batch)
            torch.manual_seed(key % 2**63)

    def _divergence(self, step: int, what: str, value: float, checkpoint: Location | None) -> str:
        kept = f"last good checkpoint: {checkpoint}" if checkpoint else "there is no checkpoint yet"
        stopped = "stopped before the optimiser step"
        if self._most_late:
            stopped = "stopped before anything was saved"
        return (
            f"step {step}: {what} is {value}; {stopped}, {kept}. "
            "Lower learning_rate or max_grad_norm, or look at the rows of this step"
        )

    def _count(self, totals: dict[str, list[float]]) -> None:
        for name, (total, count) in totals.items():
            kept = self._since_log.setdefault(name, [0.0, 0.0])
            kept[0] += total
            kept[1] += count

    def _log(self, clock: "_Clock", measure: Callable[[], dict[str, float]]) -> None:
        if not self._since_log:  # all steps since were spikes
            return
        means = {name: total / count for name, (total, count) in self._since_log.items() if count}
        means.setdefault("loss", 0.0)  # of steps whose rows had nothing to learn from
        self._since_log = {}
        figures = measure() if self.world.is_main or self.spread.is_sharded else {}
        if self.spikes is not None:
            figures = {**figures, "num_spikes": self.spikes.num_spikes}
            self._grad_norm = self.spikes.last("gradient_norm", default=self._grad_norm)
        if self.world.is_main:
            self._on_event(
                "metrics",
                step=self.step,
                **means,
                lr=self._learning_rate,
                grad_norm=self._grad_norm,
                **clock.figures(),
                **figures,
            )

    def tell_of_heldout(self, done: int, total: int) -> None:
        """Say how many of the held-out rows are judged, unless something was said just now."""
        self._tell(0.0, 0.0, heldout_rows=[done, total])

    def _tell(self, share: float, num_tokens: float, **fields: Any) -> None:
        """Say how far the run is, unless it was said just now.

        Args:
            share: of the step under way, and this worker's tokens of it; others have as many.
            fields: what else is told of the moment.
        """
        if self.world.is_main and time.monotonic() >= self._tell_at:
            self._on_event(
                "progress",
                unit="steps",
                done=self.step + share,
                total=self.config.max_train_steps,
                tokens=self._num_tokens + num_tokens * self.world.size,
                **fields,
            )
            self._tell_at = time.monotonic() + _TELL_SECONDS

    def state_tensors(self) -> dict[str, Tensor]:
        """Optimiser state by parameter name."""
        return self.optimizer.tensors()

    def state(self) -> dict[str, Any]:
        """The rest of the state, plain JSON; floats survive JSON exactly."""
        spikes = {} if self.spikes is None else {"spikes": self.spikes.state()}
        return {"step": self.step, "since_log": self._since_log, **spikes}

    def load_state(self, state: dict[str, Any], optimizer_tensors: StoredTensors) -> None:
        self.step = state["step"]
        self._since_log = state["since_log"]
        if self.spikes is not None and "spikes" in state:
            self.spikes.load(state["spikes"])
        self.optimizer.load(optimizer_tensors, step=self.step)


def _as_output(fields: tuple[Any, ...]) -> LossOutput:
    loss_sum, num_tokens, metrics = fields
    return LossOutput(loss_sum=loss_sum, num_tokens=num_tokens, metrics=metrics)


class _Clock:
    """Time since the last log line, and how much of it was spent waiting for rows."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._waited = 0.0
        self.steps = 0
        self.tokens = 0.0

    def waiting(self) -> "_Clock":
        return self

    def __enter__(self) -> None:
        self._asked = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._asked

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """The time spent in this block is not counted."""
        begun = time.perf_counter()
        yield
        self._start += time.perf_counter() - begun

    def figures(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        return {
            "tokens_per_second": self.tokens / elapsed,
            "seconds_per_step": elapsed / self.steps,
            "data_wait_fraction": self._waited / elapsed,
        }


def _pairs(output: LossOutput, batch: TokenBatch) -> dict[str, tuple[Tensor, Tensor]]:
    num_tokens = batch.is_valid.sum()
    return {
        "loss": (output.loss_sum, output.num_tokens),
        _TOKENS: (num_tokens, num_tokens),
        **output.metrics,
    }
