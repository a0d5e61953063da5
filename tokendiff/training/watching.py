"""A run that watches itself: held-out rows judged as it goes on, which step was the best so far,
and when there is no point in going on.

An evaluation has one draw of noise per row. A draw more costs as much as a row more, and more rows
take away the chance of both. The noise of a row is keyed by its id and the seed alone, so it is the
same in every evaluation, however many workers there are.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.rows import TokenData, TokenRows, check_rows_to_judge
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import Objective, TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import InputError
from tokendiff.evaluation.draft_acceptance import count_blocks
from tokendiff.evaluation.evaluator import evaluation_rows, nats_by_row
from tokendiff.objectives.dflash import DFlash

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig
    from tokendiff.training.trainer import Trainer

WATCH_STATE = "heldout.json"  # of a checkpoint

Columns = dict[str, np.ndarray]  # of `evaluation.paired`, one figure per row
# (model, rows, the same as a batch, generator) -> [B, 2] float64: numerator and denominator of a
# ratio, by row.
Judge = Callable[[Any, TokenRows, TokenBatch, RowGenerator], Tensor]


@dataclass(frozen=True, kw_only=True)
class Yardstick:
    """What an objective's rows are judged by.

    Attributes:
        metric: of `evaluation.paired.RATIOS`.
        logged_as: name in the log.
    """

    metric: str
    logged_as: str
    is_higher_better: bool
    judge: Judge


def yardstick_of(objective: Objective, process: NoiseProcess | None) -> Yardstick:
    """Acceptance length of a draft; of other objectives the bound, or likelihood, per token."""
    if isinstance(objective, DFlash):
        sizes = torch.arange(1, objective.block_size + 1, dtype=torch.float64)

        def judge_draft(
            model: Any, rows: TokenRows, batch: TokenBatch, generator: RowGenerator
        ) -> Tensor:
            counts, _ = count_blocks(objective, model, batch, generator)
            blocks = counts.double()
            return torch.stack([blocks @ sent(sizes, blocks.device), blocks.sum(1)], dim=1)

        return Yardstick(
            metric="expected_acceptance_length",
            logged_as="heldout_acceptance_length",
            is_higher_better=True,
            judge=judge_draft,
        )

    def judge_nats(
        model: Any, rows: TokenRows, batch: TokenBatch, generator: RowGenerator
    ) -> Tensor:
        nats, counts = nats_by_row(model, process, batch, generator, num_mask_samples=1)
        # Per token of the answers, as `jobs.evaluate` has it: what fills them up is not counted.
        counts = counts - torch.as_tensor(rows.num_filler)
        return torch.stack([nats, sent(counts.double(), nats.device)], dim=1)

    return Yardstick(
        metric="nats_per_token",
        logged_as="heldout_nats_per_token",
        is_higher_better=False,
        judge=judge_nats,
    )


def is_better(yardstick: Yardstick, rows: Columns, best: Columns) -> bool:
    """Whether an evaluation improves on the best one before it.

    It does where the metric is better by more than one standard error of the paired difference.
    Every evaluation is compared with the best one and not with the one before: a slow gain adds up
    until it shows, so training that still learns is not stopped. Chance alone passes for a gain in
    about one evaluation in six, and then raises what the next one has to beat, so a run that learns
    no more ends. Two standard errors would end runs whose gains are real but small beside the noise
    of a few hundred rows.

    Figures that are not finite never improve on others, and any finite ones improve on them.
    """
    from tokendiff.evaluation.paired import paired_standard_error  # which needs pydantic

    value, value_of_best = (_mean(yardstick, columns) for columns in (rows, best))
    if not math.isfinite(value_of_best):
        return math.isfinite(value)
    gain = (value - value_of_best) * (1.0 if yardstick.is_higher_better else -1.0)
    return gain > paired_standard_error(yardstick.metric, rows, best)


def _mean(yardstick: Yardstick, columns: Columns) -> float:
    from tokendiff.evaluation.paired import RATIOS

    ratio = RATIOS[yardstick.metric]
    return float(columns[ratio.numerator].sum() / columns[ratio.denominator].sum())


def _standard_error(yardstick: Yardstick, columns: Columns) -> float:
    """Standard error of the metric, with rows taken as independent (as in `evaluation.bound`)."""
    from tokendiff.evaluation.paired import RATIOS

    with np.errstate(all="ignore"):  # what is not finite is said by the result
        influence = RATIOS[yardstick.metric].influence(columns)
        return float(influence.std(ddof=1) / math.sqrt(len(influence)))


@dataclass(kw_only=True)
class Watch:
    """Judges held-out rows before training, every `eval_steps` and at the end, and remembers the
    best evaluation. The one before training shows what training gains; it decides nothing.

    What it remembers is part of a checkpoint. An evaluation that is made again after a kill gives
    the same figures, so it decides the same.

    Attributes:
        rows: all that are judged, on every worker.
        best_step: of the best evaluation; None before the first one.
        since_best: how many evaluations have not improved on it.
    """

    config: "TrainConfig"
    yardstick: Yardstick
    rows: TokenRows
    best_step: int | None = None
    since_best: int = 0
    _best: Columns = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        config: "TrainConfig",
        objective: Objective,
        process: NoiseProcess | None,
        data: TokenData,
    ) -> "Watch | None":
        """None where the config asks for no evaluation.

        Raises:
            InputError: the folder of the rows has no held-out ones.
        """
        if config.eval_steps is None:
            return None
        check_rows_to_judge(data.folder, "heldout")
        heldout = data.other_split("heldout")
        places = evaluation_rows(heldout, seed=config.seed, max_rows=config.max_eval_rows)
        return cls(
            config=config,
            yardstick=yardstick_of(objective, process),
            rows=heldout.read(*places),
        )

    def is_due(self, step: int) -> bool:
        assert self.config.eval_steps is not None
        return step % self.config.eval_steps == 0 or step == self.config.max_train_steps

    @property
    def is_over(self) -> bool:
        """Whether the last evaluations in a row, as many as the patience, improved on nothing."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.since_best >= patience

    @property
    def keeps_this_step(self) -> bool:
        """Whether the evaluation just made was the best one, and final/ may come to be of it."""
        return self.config.keep == "best" and self.since_best == 0

    def why_over(self) -> str:
        count = f"{self.since_best} evaluation{'s' * (self.since_best > 1)}"
        return f"{count} in a row did not improve on that of step {self.best_step}"

    def best_in_words(self) -> str | None:
        """What the best evaluation came to; None before the first one."""
        if self.best_step is None or not self._best:
            return None
        value, error = (f(self.yardstick, self._best) for f in (_mean, _standard_error))
        unit = self.yardstick.metric.replace("_", " ")
        return (
            f"{value:.4f} ± {error:.4f} {unit}, the best evaluation on {len(self.rows)} rows, at "
            f"step {self.best_step:,}"
        )

    def evaluate(self, trainer: "Trainer") -> dict[str, Any]:
        """Judge the model that a checkpoint would hold now, together with all other workers.

        Returns:
            what is logged, the same on every worker.

        Raises:
            InputError: the rows hold nothing that can be judged.
        """
        columns = self._judge(trainer)
        figures = {
            self.yardstick.logged_as: _mean(self.yardstick, columns),
            "heldout_standard_error": _standard_error(self.yardstick, columns),
        }
        if trainer.step == 0:
            return figures
        if self.best_step is None or is_better(self.yardstick, columns, self._best):
            self.best_step, self.since_best, self._best = trainer.step, 0, columns
        else:
            self.since_best += 1
        return {
            **figures,
            "heldout_best_step": self.best_step,
            "heldout_since_best": self.since_best,
        }

    def _judge(self, trainer: "Trainer") -> Columns:
        from tokendiff.evaluation.paired import RATIOS, ROW_ID

        device, world = trainer.world.device, trainer.world
        size = self.config.per_device_train_batch_size
        figures = torch.zeros(len(self.rows), 2, dtype=torch.float64, device=device)
        mine = np.arange(world.rank, len(self.rows), world.size)
        with trainer.as_a_checkpoint() as judge:
            for number in range(trainer.spread.num_passes(len(self.rows), size)):
                at = number * size
                index = mine[at : at + size]
                is_idle = not len(index)  # others have rows left
                rows = self.rows.take(np.zeros(1, dtype=int) if is_idle else index)
                found = judge(self._work(rows))
                if not is_idle:
                    figures[sent(torch.as_tensor(index), device)] = found
                done = min((at + size) * world.size, len(self.rows))
                trainer.tell_of_heldout(done, len(self.rows))
        numerator, denominator = world.sum(figures).cpu().numpy().T
        if not denominator.sum():
            raise InputError(
                f"eval_steps {self.config.eval_steps}: none of the {len(self.rows)} held-out "
                "rows can be evaluated, because they have no learnt tokens or no room for a block; "
                "remove eval_steps, or preprocess longer documents"
            )
        ratio = RATIOS[self.yardstick.metric]
        return {
            ROW_ID: self.rows.row_ids,
            ratio.numerator: numerator.copy(),
            ratio.denominator: denominator.copy(),
        }

    def _work(self, rows: TokenRows) -> Callable[[Any], Tensor]:
        ids = torch.as_tensor(rows.row_ids)
        generator = RowGenerator.for_rows(key_from(self.config.seed, "evaluate"), ids)
        batch = rows.batch()
        return lambda model: self.yardstick.judge(model, rows, batch, generator)

    def files(self) -> dict[str, str]:
        """What a checkpoint holds of it: name and content."""
        best = {name: column.tolist() for name, column in self._best.items()}
        state = {"best_step": self.best_step, "since_best": self.since_best, "best": best}
        return {WATCH_STATE: json.dumps(state)}

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint. One that an unwatched run wrote tells nothing, and neither does
        one that judged other rows, which a run may where nothing is decided by them.
        """
        if not (folder / WATCH_STATE).is_file():
            return
        state = cast(dict[str, Any], json.loads((folder / WATCH_STATE).read_text()))
        if state["best"].get("row_id") != self.rows.row_ids.tolist():
            return
        self.best_step, self.since_best = state["best_step"], state["since_best"]
        self._best = {name: np.array(column) for name, column in state["best"].items()}
