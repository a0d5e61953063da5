"""The bound on -ln p(x) of a model that decodes block by block.

    -ln p(x) = sum over blocks b of -ln p(x_b | x of the blocks before it),

and each term is bounded as masked diffusion's is, by the mean over all orders of the order-wise
negative log-likelihood inside the block, given the clean blocks before it. The low-variance
estimator of `tokendiff.evaluation.bound`, taken per block: the number of masked positions is drawn
from U{1..n} for the n positions of the block, exactly that many are masked, and the sum counts
n / l. For blocks of one token nothing is left to chance, and it is the autoregressive likelihood.

Where the noise of a block is other tokens, its term is the integral of `row_bounds` over a time of
its own, given the clean blocks before it, with the prior and the reconstruction.

Both block objectives are judged under the attention that decoding uses: earlier blocks clean,
whatever they were in training, and the block itself seen up to each position (2d) or whole (4d).
In mode 4d the block that a text ends in is filled up with EOS, as decoding meets it. Its likelihood
is part of the nats, and it is no token: p(text) >= p(text and filling).

Where only some tokens are targets, each term is of the targets of its block, given its other tokens
and the blocks before it.
"""

import torch
from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.devices import device_of, sent, sent_at
from tokendiff.diffusion.interfaces import CausalDenoiser, TokenBatch
from tokendiff.diffusion.kernels import LEAST_TIME, AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.evaluation.bound import (
    NatsOfTokens,
    has_end,
    integrand,
    reconstruction,
    sum_by_row,
)
from tokendiff.objectives.block_diffusion import encode_beside_clean, encode_noisy
from tokendiff.objectives.blocks import GOLDEN, BlockRows, BlockSight, block_rows, mask_exactly
from tokendiff.objectives.chunked import (
    negative_log_likelihood,
    predict_through_head,
    without_mask,
)

_STRATUM, _END = -1, -2  # what a row's random numbers are for, beside the samples 0, 1, ...


@torch.no_grad()
def block_row_bounds(
    model: CausalDenoiser,
    batch: TokenBatch,
    generator: RowGenerator,
    *,
    process: NoiseProcess,
    num_mask_samples: int,
) -> tuple[Tensor, Tensor]:
    """One estimate of the bound per row, given its first `process.prompt_length` tokens.

    Args:
        process: of a block objective.
        num_mask_samples: draws per block, their numbers of masks stratified.

    Returns:
        nats [B] float64 of all targets of the row, where the model is; and the number of tokens [B]
        int64 that they are the bound of, where the rows are.
    """
    rows, is_target = target_rows(batch, process)
    kernel = process.kernel()
    is_masking = isinstance(kernel, AbsorbingKernel)
    stratum = generator.fold_in(_STRATUM).uniform(1) + rows.ordinal * GOLDEN
    there = device_of(model, like=batch.tokens)
    total = torch.zeros(len(batch.tokens), dtype=torch.float64, device=there)
    # A block of one token has one level: it is masked.
    num_samples = 1 if process.block_length == 1 and is_masking else num_mask_samples
    for sample in range(num_samples):
        level = torch.remainder((torch.remainder(stratum, 1.0) + sample) / num_samples, 1.0)
        noise = generator.fold_in(sample).uniform(rows.tokens.shape[1])
        if is_masking:
            is_masked, weight = mask_exactly(rows, is_target, level, noise)
            total += _nats(model, rows, is_masked, weight, process)
        else:
            t, slope = kernel.warped_time(level)
            of_tokens = integrand(kernel, process.prediction)
            total += _noisy_nats(model, rows, is_target, t, slope, noise, process, of_tokens)
    total /= num_samples
    if not is_masking:
        total += sent(kernel.prior_nats() * is_target.sum(1), there)
        if has_end(kernel):
            t = torch.full_like(rows.tokens, LEAST_TIME, dtype=torch.float64)
            noise = generator.fold_in(_END).uniform(t.shape[1])
            of_tokens = reconstruction(kernel, process.prediction)
            one = torch.ones_like(t)
            total += _noisy_nats(model, rows, is_target, t, one, noise, process, of_tokens)
    return total, (is_target & rows.is_text).sum(1)


def target_rows(batch: TokenBatch, process: NoiseProcess) -> tuple[BlockRows, Tensor]:
    """Rows in blocks, and [B, W] which tokens the bound counts: the targets, except the prompt and
    a mask that stands in the text.

    Raises:
        ValueError: the process has no blocks.
    """
    if process.block_length is None:
        raise ValueError("a process without block_length has no blocks")
    fill = process.eos_token_id if process.attention_mask_mode == "4d" else None
    rows = block_rows(
        batch,
        block_length=process.block_length,
        fill_token_id=fill,
        restarts_at_answers=process.block_start is not None,
    )
    is_prompt = rows.is_text & (rows.source < process.prompt_length)
    is_told = sight_of(process).told(rows)
    return rows, is_told & ~is_prompt & (rows.tokens != process.mask_token_id)


def sight_of(process: NoiseProcess) -> BlockSight:
    """What decoding lets positions see."""
    return BlockSight(
        is_causal=process.attention_mask_mode == "2d",
        context_is_causal=process.context_attention == "causal",
        predicts_next=process.predict == "next",
        keeps_base=process.keeps_base,
    )


def _noisy_nats(
    model: CausalDenoiser,
    rows: BlockRows,
    is_target: Tensor,
    t: Tensor,
    slope: Tensor,
    noise: Tensor,
    process: NoiseProcess,
    of_tokens: NatsOfTokens,
) -> Tensor:
    """[B] nats of targets [B, W] that are noised at their blocks' times [B, W] by numbers [B, W] in
    (0, 1), each counted `slope` [B, W] times.
    """
    x_t = process.kernel().corrupt(rows.tokens, t, uniform=noise, is_noisable=is_target)
    hidden, _ = encode_noisy(model, rows, x_t, sight=sight_of(process))
    at = is_target.nonzero(as_tuple=True)
    columns = [sent(each[at], hidden.device) for each in (rows.tokens, x_t, t, slope)]
    states = hidden[sent_at(at, hidden.device)]
    nats = predict_through_head(model.head, states, tuple(columns[:3]), of_tokens)
    return sum_by_row(nats * columns[3], at[0], num_rows=len(is_target))


def _nats(
    model: CausalDenoiser,
    rows: BlockRows,
    is_masked: Tensor,
    weight: Tensor,
    process: NoiseProcess,
) -> Tensor:
    """[B] weighted nats of the masked positions."""
    mask = process.mask_token_id
    hidden = encode_beside_clean(
        model,
        rows,
        is_masked,
        mask_token_id=mask,
        sight=sight_of(process),
    )
    at = is_masked.nonzero(as_tuple=True)
    nll = predict_through_head(
        model.head,
        hidden[sent_at(at, hidden.device)],
        (sent(rows.tokens[at], hidden.device),),
        lambda logits, targets: negative_log_likelihood(without_mask(logits, mask), targets),
    )
    nats = nll.double() * sent(weight[at], nll.device)
    return sum_by_row(nats, at[0], num_rows=len(is_masked))
