"""How much of a draft in training is accepted on held-out text."""

from collections.abc import Callable

import torch

from tokendiff.data.rows import TokenData
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.splitmix import key_from
from tokendiff.evaluation.draft_acceptance import acceptance_figures, count_blocks
from tokendiff.evaluation.evaluator import evaluation_rows
from tokendiff.objectives.dflash import DFlash
from tokendiff.training.trainer import Trainer

_ROWS = 16  # of a batch that is small beside the steps between two log lines


def heldout_acceptance(
    trainer: Trainer, objective: DFlash, data: TokenData
) -> Callable[[], dict[str, float]]:
    """What measures the expected acceptance length of the draft that a checkpoint would hold now,
    on the same few held-out rows behind the same anchors each time; nothing where there are none.
    """
    heldout = data.other_split("heldout")
    if not heldout.num_rows:
        return dict
    seed = trainer.config.seed
    rows = heldout.read(*evaluation_rows(heldout, seed=seed, max_rows=_ROWS))
    batch, ids = rows.batch(), torch.as_tensor(rows.row_ids)
    generator = RowGenerator.for_rows(key_from(seed, "evaluate"), ids)

    def measure() -> dict[str, float]:
        with trainer.as_a_checkpoint() as judge:
            blocks = judge(lambda trainee: count_blocks(objective, trainee, batch, generator)[0])
        counts = blocks.cpu().numpy()
        if not counts.sum():
            return {}  # no row has room for a block
        figures = acceptance_figures(counts)
        return {"heldout_acceptance_length": figures["expected_acceptance_length"]}

    return measure
