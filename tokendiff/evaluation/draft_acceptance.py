"""How far a draft's blocks agree with a text: what `jobs.evaluate` reports of a draft in place of a
bound.

Under teacher forcing: every block stands behind true text, and its tokens are accepted as long as
the draft's likeliest token is the text's. On a text that the target wrote at temperature 0 that is
what decoding accepts at these places; on other text, where the target would have gone on in another
way, it is less. What decoding does accept is measured by sampling (`evaluation.acceptance`).
"""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tokendiff.artifacts.manifest import is_committed, load_manifest
from tokendiff.data.rows import TokenRows
from tokendiff.diffusion.devices import sent
from tokendiff.diffusion.interfaces import (
    DraftBesideTarget,
    OnProgress,
    TokenBatch,
    unwatched,
)
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.splitmix import key_from
from tokendiff.errors import InputError
from tokendiff.models.checkpoints import load_tokenizer, take_average
from tokendiff.models.dflash.planning import (
    DraftPlan,
    check_fit,
    open_draft_config,
    open_target_config,
)
from tokendiff.models.dflash.trainee import load_trainee
from tokendiff.models.vocabulary import check_vocabulary
from tokendiff.objectives.dflash import DFlash, accepted, draw_anchors

if TYPE_CHECKING:
    from tokendiff.config.evaluate import EvaluateConfig


def plan_of_checkpoint(checkpoint: Path, target_model_id: str | None) -> DraftPlan:
    """Draft and target of an opened draft checkpoint, by their configs.

    Args:
        target_model_id: None takes the one that the draft was trained for.

    Raises:
        InputError: neither says what the target is, or the two do not fit.
    """
    metadata: dict[str, Any] = (
        load_manifest(checkpoint).metadata if is_committed(checkpoint) else {}
    )
    name = target_model_id or metadata.get("run", {}).get("target_model_id")
    if name is None:
        raise InputError(
            f"checkpoint_path {checkpoint} is a DFlash draft that does not say what it is for; "
            "give target_model_id"
        )
    draft, target = open_draft_config(str(checkpoint)), open_target_config(name)
    check_fit(draft, target, draft_model_id=str(checkpoint), target_model_id=name)
    check_vocabulary(name, load_tokenizer(checkpoint), field="target_model_id")
    return DraftPlan(
        draft=draft, target=target, target_model_id=name, draft_model_id=str(checkpoint)
    )


class DraftEvaluator:
    """A draft beside its target, ready to be judged on rows: what an evaluation actor holds."""

    def __init__(self, checkpoint: Path, config: "EvaluateConfig", *, device: str) -> None:
        plan = plan_of_checkpoint(checkpoint, config.target_model_id)
        self._device, self._config = torch.device(device), config
        trainee = load_trainee(plan, device=self._device)
        take_average(trainee.model, checkpoint)
        self._trainee = trainee.to(device).eval()
        assert plan.draft.block_size is not None
        self._objective = DFlash(
            block_size=plan.draft.block_size,
            mask_token_id=plan.draft.mask_token_id,
            num_anchors=config.num_anchors,
        )

    def acceptance(
        self, rows: TokenRows, *, on_progress: OnProgress = unwatched
    ) -> dict[str, np.ndarray]:
        """Per row: blocks [rows, K], how many of its blocks have 1..K tokens accepted, and right
        [rows, K - 1], in how many of them the 1st, 2nd, ... drafted token is the text's.
        """
        counts = []
        for at in range(0, len(rows), self._config.batch_size):
            part = rows.take(slice(at, at + self._config.batch_size))
            batch = part.batch()  # on the CPU: the model is sent what it reads
            ids = torch.as_tensor(part.row_ids)
            generator = RowGenerator.for_rows(key_from(self._config.seed, "evaluate"), ids)
            is_bf16 = self._config.mixed_precision == "bf16"
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_bf16):
                found = count_blocks(self._objective, self._trainee, batch, generator)
            counts.append(torch.cat(found, dim=1).cpu().numpy())
            on_progress(partial(rows.first, at + self._config.batch_size))
        blocks, right = np.split(np.concatenate(counts), [self._objective.block_size], axis=1)
        return {"blocks": blocks, "right": right}


def count_blocks(
    objective: DFlash, model: DraftBesideTarget, batch: TokenBatch, generator: RowGenerator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row's blocks behind anchors that are drawn, those that the text ends in left out.

    Returns:
        [B, K] how many have 1..K tokens accepted; and [B, K - 1] in how many the 1st, 2nd, ...
        drafted token is the text's, whatever stands before it.
    """
    anchors = draw_anchors(batch, generator, objective.num_anchors)
    is_right, is_whole = objective.agreement(model, batch, *anchors)
    lengths, is_whole = accepted(is_right), sent(is_whole, is_right.device)
    sizes = torch.arange(1, objective.block_size + 1, device=lengths.device)
    has_length = (lengths[:, :, None] == sizes) & is_whole[:, :, None]
    return has_length.sum(1), (is_right & is_whole[:, :, None]).sum(1)


def acceptance_figures(blocks: np.ndarray) -> dict[str, float]:
    """Figures of counts [rows, K] from `DraftEvaluator`.

    Returns:
        expected_acceptance_length: mean over blocks, from 1 to K; and its standard error, of a
            ratio of sums over rows taken as independent.
        expected_acceptance_share_N: share of blocks with exactly N tokens accepted, the target's
            own among them.
        expected_acceptance_at_N: share of blocks whose first N drafted tokens are all accepted.

    Raises:
        InputError: no row has a whole block.
    """
    per_block, total = blocks.sum(1).astype(np.float64), int(blocks.sum())
    if total == 0:
        raise InputError(
            f"no row has room for a block of {blocks.shape[1]} tokens behind a prompt; evaluate on "
            "longer documents"
        )
    size = np.arange(1, blocks.shape[1] + 1)
    mean = float((blocks @ size).sum() / total)
    residual = blocks @ size - mean * per_block
    rows = len(blocks)
    error = math.sqrt(rows / max(rows - 1, 1) * float((residual**2).sum())) / total
    shares = blocks.sum(0) / total
    at_least = shares[::-1].cumsum()[::-1]
    return {
        "expected_acceptance_length": mean,
        "expected_acceptance_length_standard_error": error,
        **{f"expected_acceptance_share_{n}": float(s) for n, s in zip(size, shares, strict=True)},
        **{f"expected_acceptance_at_{n}": float(at_least[n]) for n in size[:-1]},
        "num_rows": rows,
        "num_blocks": total,
    }


def accuracy_figures(right: np.ndarray, blocks: np.ndarray) -> dict[str, float]:
    """draft_accuracy_k, k = 1..K-1: share of the blocks whose k-th drafted token is the text's,
    whatever stands before it.

    Args:
        right, blocks: counts [rows, K - 1] and [rows, K] from `DraftEvaluator`, of some block.
    """
    shares = right.sum(0) / blocks.sum()
    return {f"draft_accuracy_{k}": float(share) for k, share in enumerate(shares, start=1)}
