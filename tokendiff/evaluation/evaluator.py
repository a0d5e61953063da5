"""A checkpoint ready to be judged on rows: what an evaluation actor holds."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess, objective_of
from tokendiff.data.order import RowOrder
from tokendiff.data.rows import TokenData, TokenRows
from tokendiff.diffusion.interfaces import OnProgress, TokenBatch, unwatched
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.splitmix import key_from
from tokendiff.evaluation.block_bound import block_row_bounds
from tokendiff.evaluation.bound import row_bounds
from tokendiff.models.checkpoints import load_autoregressive, load_for_inference
from tokendiff.objectives.autoregressive import row_nats

if TYPE_CHECKING:
    from tokendiff.config.evaluate import EvaluateConfig


class Evaluator:
    def __init__(self, checkpoint: Path, config: "EvaluateConfig", *, device: str) -> None:
        self.process: NoiseProcess | None = None
        if objective_of(checkpoint) == "ar":
            denoiser, self.tokenizer = load_autoregressive(checkpoint)
        else:
            denoiser, self.tokenizer, self.process = load_for_inference(checkpoint)
        self._denoiser = denoiser.to(device)
        self._device, self._config = torch.device(device), config

    def bounds(
        self, rows: TokenRows, *, on_progress: OnProgress = unwatched
    ) -> dict[str, np.ndarray]:
        """Per row: nats (float64; a bound, and exact for objective ar), num_tokens, num_bytes; and
        the token counts [1, V] of the targets of all rows together. A model that decodes token by
        token too also has ar_nats (exact) and their number of tokens, ar_tokens.

        The filling behind an answer counts in the nats, but not in the tokens and the counts, since
        p(answer) >= p(answer and filling).
        """
        nats, counts, of_ar = [], [], []
        is_joint = self.process is not None and self.process.decodes_by_token
        for at in range(0, len(rows), self._config.batch_size):
            batch = rows.take(slice(at, at + self._config.batch_size))
            token_batch = batch.batch()  # on the CPU: the model is sent what it reads
            ids = torch.tensor(batch.row_ids)  # Ray's arrays are read-only
            generator = RowGenerator.for_rows(key_from(self._config.seed, "evaluate"), ids)
            is_bf16 = self._config.mixed_precision == "bf16"
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=is_bf16):
                row_nats, row_tokens = nats_by_row(
                    self._denoiser,
                    self.process,
                    token_batch,
                    generator,
                    num_mask_samples=self._config.num_mask_samples,
                )
                if is_joint:
                    # A kept base model may have no logit of the mask. A mask that stands in the
                    # text is context, as for the bound.
                    is_known = token_batch.tokens < self._denoiser.vocab_size
                    known = replace(token_batch, is_target=token_batch.is_target & is_known)
                    of_ar.append(nats_by_row(self._denoiser, None, known, generator))
            nats.append(row_nats.cpu().numpy())
            counts.append(row_tokens.numpy())
            on_progress(partial(rows.first, at + self._config.batch_size))
        histogram = np.bincount(rows.tokens[rows.is_target], minlength=len(self.tokenizer))
        if num_filler := int(rows.num_filler.sum()):
            histogram[self.tokenizer.eos_token_id] -= num_filler
        num_tokens = np.concatenate(counts) - rows.num_filler
        return {
            "nats": np.concatenate(nats),
            "num_tokens": num_tokens,
            "num_bytes": self._num_bytes(rows, num_tokens),
            "token_counts": histogram[None],
            **_of_ar(of_ar),
        }

    def _num_bytes(self, rows: TokenRows, num_tokens: np.ndarray) -> np.ndarray:
        """[rows] int64, bytes that the nats are of."""
        num_bytes = rows.num_bytes.astype(np.int64)
        if self.process is None or self.process.predict == "next":
            # The first token of a document is given; it stands for as many bytes as the others do.
            share = num_tokens / np.maximum(rows.is_target.sum(1) - rows.num_filler, 1)
            num_bytes = (num_bytes * share).round().astype(np.int64)
        if self.process is None:
            return num_bytes
        # What a prompt is given stands for bytes that the bound is not of.
        return num_bytes * (self.process.prompt_length == 0)


def _of_ar(parts: list[tuple[Tensor, Tensor]]) -> dict[str, np.ndarray]:
    if not parts:
        return {}
    nats, counts = zip(*parts, strict=True)
    return {"ar_nats": torch.cat(nats).cpu().numpy(), "ar_tokens": torch.cat(counts).numpy()}


def nats_by_row(
    denoiser: Any,
    process: NoiseProcess | None,
    batch: TokenBatch,
    generator: RowGenerator,
    *,
    num_mask_samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """Nats and token counts per row, for `jobs.evaluate` and for evaluations during training.

    Args:
        denoiser: a Denoiser, or a CausalDenoiser where the process has blocks, or there is none.
        process: None of objective ar, whose likelihood is exact.
        num_mask_samples: of `row_bounds` and `block_row_bounds`.

    Returns:
        nats [B] float64 of the whole row, where the model is; and the number of tokens [B] int64
        that they are of, the filling of answers included, where the rows are.
    """
    if process is None:
        return row_nats(denoiser, batch)
    if process.block_length is not None:
        return block_row_bounds(
            denoiser, batch, generator, process=process, num_mask_samples=num_mask_samples
        )
    return row_bounds(
        denoiser,
        batch,
        generator,
        kernel=process.kernel(),
        prediction=process.prediction,
        predicts_next=process.predict == "next",
        num_mask_samples=num_mask_samples,
    )


def evaluation_rows(
    data: TokenData, *, seed: int, max_rows: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(row group, row) of the rows that are evaluated: all in order, or a random subset that the
    seed decides.
    """
    if max_rows is None or max_rows >= data.num_rows:
        groups = np.repeat(np.arange(len(data.row_group_sizes)), data.row_group_sizes)
        return groups, np.concatenate([np.arange(size) for size in data.row_group_sizes])
    order = RowOrder(row_group_sizes=data.row_group_sizes, seed=seed)
    _, groups, rows = order.rows(0, max_rows)
    by_place = np.lexsort((rows, groups))
    return groups[by_place], rows[by_place]
