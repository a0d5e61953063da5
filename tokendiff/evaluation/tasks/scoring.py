"""Log-likelihoods of continuations given their contexts.

They are exact for a model that reads from left to right. For other models they are the bound of
`tokendiff.evaluation.bound` or `block_bound` on -ln p(continuation | context): only tokens of the
continuation are masked, and the context stays clean.

The last block may have positions behind the continuation. They stay masked and are not counted, so
the bound does not depend on what would follow the continuation.

Rows are on the CPU wherever the model is: it is sent what it reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.attention_masks import causal_by_position
from tokendiff.diffusion.devices import sent, sent_at
from tokendiff.diffusion.interfaces import Decoder, TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.evaluation.block_bound import sight_of, target_rows
from tokendiff.evaluation.bound import sum_by_row
from tokendiff.evaluation.evaluator import nats_by_row
from tokendiff.objectives.block_diffusion import encode_beside_clean
from tokendiff.objectives.chunked import (
    is_likeliest,
    negative_log_likelihood,
    predict_through_head,
    without_mask,
)


@dataclass(frozen=True, kw_only=True)
class TokenPair:
    """What is scored.

    Attributes:
        context: token ids that are given.
        continuation: token ids that are scored, at least one.
        noise_id: with the seed, what decides the noise.
    """

    context: list[int]
    continuation: list[int]
    noise_id: int = 0


@torch.no_grad()
def exact_nats(model: Decoder, pairs: Sequence[TokenPair]) -> tuple[Tensor, Tensor]:
    """-ln p(continuation | context) of a model that decodes token by token.

    Args:
        pairs: each with a context of at least one token.

    Returns:
        [B] float64, and [B] bool: whether each token of the continuation is the likeliest one. Both
        are where the model is.
    """
    # The state at a token predicts the next one, so the last token is a target but no input.
    rows = [[*pair.context, *pair.continuation][:-1] for pair in pairs]
    num_tokens = torch.tensor([len(row) for row in rows])
    tokens = _padded(rows, 0)
    place = torch.arange(tokens.shape[1])
    first = torch.tensor([len(pair.context) - 1 for pair in pairs])
    at = ((place >= first[:, None]) & (place < num_tokens[:, None])).nonzero(as_tuple=True)
    every = torch.arange(len(pairs))
    cache = model.new_cache(len(pairs))
    hidden = model.encode(tokens, num_tokens, cache, every, causal_by_position)
    there = hidden.device
    targets = torch.tensor([t for pair in pairs for t in pair.continuation])

    def judged(logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.double()
        nats = negative_log_likelihood(logits, targets)
        return torch.stack([nats, is_likeliest(logits, targets).double()], dim=1)

    states = hidden[sent_at(at, there)]
    found = predict_through_head(model.head, states, (sent(targets, there),), judged)
    nats, num_likeliest = (
        sum_by_row(column, at[0], num_rows=len(pairs)) for column in found.unbind(1)
    )
    return nats, num_likeliest == sent(at[0].bincount(), there)


def bounded_nats(
    denoiser: Any,
    process: NoiseProcess,
    pairs: Sequence[TokenPair],
    *,
    key: int,
    num_mask_samples: int,
) -> Tensor:
    """[B] float64, where the model is: one estimate of the bound on -ln p(continuation | context)
    for each pair.

    Args:
        denoiser: a Denoiser, or a CausalDenoiser where the process has blocks.
        key: with the pair's noise_id, what decides the noise.
        num_mask_samples: as for `row_bounds`.

    Raises:
        ValueError: a pair has no context, and the state before a token predicts it: the first token
            would be given, and cost nothing.
    """
    if process.predict == "next" and not all(pair.context for pair in pairs):
        raise ValueError("a process that predicts the next token needs a context in every pair")
    ids = torch.tensor([pair.noise_id for pair in pairs])
    process = _anywhere(process)
    nats, _ = nats_by_row(
        denoiser,
        process,
        pair_batch(pairs, process),
        RowGenerator.for_rows(key, ids),
        num_mask_samples=num_mask_samples,
    )
    return nats


def pair_batch(pairs: Sequence[TokenPair], process: NoiseProcess) -> TokenBatch:
    """Pairs as rows of one document each, their continuations the targets; blocks are whole."""
    mask = process.mask_token_id
    rows, is_target = [], []
    for pair in pairs:
        filling = [mask] * num_filling(pair, process)  # literal masks are never counted
        rows.append([*pair.context, *pair.continuation, *filling])
        num_targets = len(pair.continuation) + len(filling)
        is_target.append([0] * len(pair.context) + [1] * num_targets)
    lengths = torch.tensor([len(row) for row in rows])
    tokens = _padded(rows, mask)
    is_valid = torch.arange(tokens.shape[1]) < lengths[:, None]
    return TokenBatch(
        tokens=tokens,
        is_valid=is_valid,
        is_target=_padded(is_target, 0).bool(),
    )


def num_filling(pair: TokenPair, process: NoiseProcess) -> int:
    """Positions behind the continuation that its last block has, where blocks see themselves
    whole.
    """
    if process.block_length is None or process.attention_mask_mode != "4d":
        return 0
    starts_anew = process.block_start is not None
    length = len(pair.continuation) + (0 if starts_anew else len(pair.context))
    return -length % process.block_length


@torch.no_grad()
def greedily_written(denoiser: Any, process: NoiseProcess, pairs: Sequence[TokenPair]) -> Tensor:
    """[B] bool: whether the continuation is what the model writes given the context where, again
    and again, the surest of the masked tokens (of each block, from the first on) is set to its
    likeliest value. False under noise that is not absorbing, which leaves no masks to fill.

    Source: how LLaDA (arXiv 2502.09992) is judged on tasks that ask for it.
    """
    kernel, process = process.kernel(), _anywhere(process)
    if not isinstance(kernel, AbsorbingKernel):
        return torch.zeros(len(pairs), dtype=torch.bool)
    batch, mask = pair_batch(pairs, process), process.mask_token_id
    if process.block_length is None:
        is_target = batch.is_target
        total = is_target.sum(1).clamp(min=1)

        def states(is_open: Tensor) -> Tensor:
            time = kernel.schedule.time(1.0 - is_open.sum(1).double() / total)
            x_t = batch.tokens.masked_fill(is_open, mask)
            return denoiser.encode(x_t, batch.is_valid, time, batch.isolated)

        group = torch.zeros_like(batch.tokens)
        return _is_greedy(denoiser.head, states, batch.tokens, is_target, group, mask)
    rows, is_target = target_rows(batch, process)

    def block_states(is_open: Tensor) -> Tensor:
        return encode_beside_clean(
            denoiser, rows, is_open, mask_token_id=mask, sight=sight_of(process)
        )

    return _is_greedy(denoiser.head, block_states, rows.tokens, is_target, rows.ordinal, mask)


def _is_greedy(
    head: Callable[[Tensor], Tensor],
    states: Callable[[Tensor], Tensor],
    tokens: Tensor,
    is_target: Tensor,
    group: Tensor,
    mask: int,
) -> Tensor:
    """[B] bool. A step waits once for what the model finds.

    Args:
        states: from which positions are masked ([B, W]) to hidden states [B, W, D].
        group: [B, W], of which masked tokens the surest is set; all groups advance together, since
            earlier ones are right as long as the row is.
    """

    def judged(logits: Tensor, targets: Tensor) -> Tensor:
        logits = without_mask(logits, mask)
        surest = logits.double().log_softmax(-1).amax(-1)
        return torch.stack([surest, is_likeliest(logits, targets).double()], dim=1)

    is_open = is_target.clone()
    is_right = torch.ones(len(tokens), dtype=torch.bool)
    while is_open.any():
        at, hidden = is_open.nonzero(as_tuple=True), states(is_open)
        there = hidden.device
        targets = sent(tokens[at], there)
        found = predict_through_head(head, hidden[sent_at(at, there)], (targets,), judged).cpu()
        confidence = torch.full(tokens.shape, -torch.inf, dtype=torch.float64)
        confidence[at] = found[:, 0]
        is_wrong = torch.zeros_like(is_open)
        is_wrong[at] = found[:, 1] == 0.0
        surest = torch.full_like(confidence, -torch.inf).scatter_reduce(
            1, group, confidence, "amax"
        )
        # Not `==`: of a model that says NaN no token would ever be set.
        is_set = is_open & ~(confidence < surest.gather(1, group))
        is_right &= ~(is_set & is_wrong).any(1)
        is_open &= ~is_set & is_right[:, None]
    return is_right


def _anywhere(process: NoiseProcess) -> NoiseProcess:
    """Contexts here are of any length, also shorter than the prompt that training left clean."""
    return replace(process, prompt_length=0)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """[B, L] int64."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])
