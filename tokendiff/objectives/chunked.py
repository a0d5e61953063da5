"""Losses through the head in chunks of tokens, so that no [B, L, V] tensor ever exists.

A loss that is a sum over tokens has its gradient taken chunk by chunk as it is computed: the logits
of a chunk are dropped before those of the next are made, and never computed twice. What is kept is
the gradient with respect to the hidden states and the head's weights. Within a chunk, which is as
large as matrix products want it, the loss is taken in parts that are as small as caches want them.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Most logits per chunk, and per part of it.
_CPU_ELEMENTS, _GPU_ELEMENTS = (8 * 2**20, 2**19), (2**27, 2**25)
# Operations whose backward pass does not read what they gave: the gradient may take its place.
_PRODUCTS, _VIEWS = ("AddmmBackward0", "MmBackward0"), ("SliceBackward0", "ViewBackward0")

# Maps logits [n, V] (not to be written to) and n rows of each column to (loss, metrics [M]), sums
# over the n tokens.
ChunkLoss = Callable[..., tuple[Tensor, Tensor]]


def reduce_through_head(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    columns: tuple[Tensor, ...],
    loss_of: ChunkLoss,
    *,
    chunk_tokens: int | None = None,
    group: int = 1,
) -> tuple[Tensor, Tensor]:
    """Sum of a loss over N tokens, and of its metrics.

    Args:
        head: logits [n, V] of hidden states [n, D].
        hidden: [N, D]; N may be 0.
        columns: what the loss needs to know of each token, each [N, ...].
        chunk_tokens: by default as many as fit the device.
        group: so many tokens in a row belong together: `loss_of` is given them at once. N is a
            multiple of it.

    Returns:
        (loss, a scalar whose gradient is known already and may be asked for once; metrics [M],
        without gradient).
    """
    leaves: list[Tensor] = []
    grads: list[Tensor] = []
    hidden_grads: list[Tensor] = []
    loss_sum, metric_sum = None, None
    for states, *chunk in _chunks(head, hidden, columns, chunk_tokens, group):
        states = states.detach().requires_grad_(hidden.requires_grad)
        logits = head(states)
        by_logits = None
        if logits.requires_grad:
            is_spent = _is_product(logits)
            by_logits = logits.detach() if is_spent else torch.empty_like(logits)
        for loss, metrics in _parts(logits.detach(), chunk, loss_of, by_logits, group):
            loss_sum = loss if loss_sum is None else loss_sum + loss
            metric_sum = metrics if metric_sum is None else metric_sum + metrics
        if by_logits is not None:
            leaves = leaves or [leaf for leaf in _leaves(logits) if leaf is not states]
            wanted = [states, *leaves] if states.requires_grad else leaves
            new = list(torch.autograd.grad(logits, wanted, by_logits))
            if states.requires_grad:
                hidden_grads.append(new.pop(0))
            grads = [a.add_(b) for a, b in zip(grads, new, strict=True)] if grads else new
    assert loss_sum is not None, "an empty tensor is one empty chunk"
    assert metric_sum is not None
    if hidden_grads:
        leaves, grads = [hidden, *leaves], [torch.cat(hidden_grads), *grads]
    if leaves:
        loss_sum = _KnownGradient.apply(loss_sum, grads, *leaves)
    return loss_sum, metric_sum


def _parts(
    logits: Tensor,
    columns: Sequence[Tensor],
    loss_of: ChunkLoss,
    by_logits: Tensor | None,
    group: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Loss and metrics of each part of a chunk; its gradient is written to `by_logits` [n, V],
    which may be the logits themselves.
    """
    _, most = _most_elements(logits.device)
    num_tokens = max(1, most // logits.shape[-1] // group) * group
    by_parts = by_logits.split(num_tokens) if by_logits is not None else itertools.repeat(None)
    parts = zip(*(column.split(num_tokens) for column in (logits, *columns)), strict=True)
    for (part, *chunk), by_part in zip(parts, by_parts, strict=False):
        part.requires_grad_(by_part is not None)
        loss, metrics = loss_of(part, *chunk)
        if by_part is not None:
            by_part.copy_(torch.autograd.grad(loss, part)[0])
        yield loss.detach(), metrics.detach()


@torch.no_grad()
def predict_through_head(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    columns: tuple[Tensor, ...],
    predict: Callable[..., Tensor],
    *,
    chunk_tokens: int | None = None,
) -> Tensor:
    """What `predict(logits [n, V], *columns)` gives for each of N tokens, without gradient."""
    return torch.cat(
        [
            predict(head(states), *chunk)
            for states, *chunk in _chunks(head, hidden, columns, chunk_tokens)
        ]
    )


def _chunks(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    columns: tuple[Tensor, ...],
    chunk_tokens: int | None,
    group: int = 1,
) -> Iterator[tuple[Tensor, ...]]:
    if chunk_tokens is None:
        with torch.no_grad():
            vocab_size = head(hidden[:0]).shape[-1]
        most, _ = _most_elements(hidden.device)
        num_chunks = max(1, math.ceil(len(hidden) * vocab_size / most))
        chunk_tokens = max(1, math.ceil(len(hidden) / num_chunks))  # none much smaller than others
    chunk_tokens = math.ceil(chunk_tokens / group) * group
    yield from zip(*(column.split(chunk_tokens) for column in (hidden, *columns)), strict=True)


def most_logits(device: torch.device) -> int:
    """Numbers of a chunk of logits, at most."""
    return _most_elements(device)[0]


def _most_elements(device: torch.device) -> tuple[int, int]:
    """Of a chunk's logits, and of a part's."""
    return _CPU_ELEMENTS if device.type == "cpu" else _GPU_ELEMENTS


def _is_product(logits: Tensor) -> bool:
    """Whether logits, or what they are a part of, are the product of a matrix multiplication."""
    node = logits.grad_fn
    while node is not None and node.name() in _VIEWS:
        node = node.next_functions[0][0]
    return node is not None and node.name() in _PRODUCTS


def _leaves(logits: Tensor) -> list[Tensor]:
    """The weights that logits were computed from."""
    found: dict[int, Tensor] = {}
    nodes, seen = [logits.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        nodes += [following for following, _ in node.next_functions]
    return list(found.values())


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("the gradient of a loss through the head can be taken once only")
        return (None, None, *(known.mul_(grad) for known in grads))


# What objectives do with a chunk of logits.


def without_mask(logits: Tensor, mask_token_id: int) -> Tensor:
    """SUBS: a copy in which the mask has probability 0, in float32 or better. A model may have no
    logit of the mask, where that is the last id.
    """
    return _WithoutMask.apply(logits, mask_token_id)


class _WithoutMask(torch.autograd.Function):
    """What is a function of the softmax has no gradient at -inf; none need be taken out again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mask_token_id: int) -> Tensor:
        copy = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
        if mask_token_id < copy.shape[-1]:
            copy[..., mask_token_id] = -torch.inf
        ctx.dtype = logits.dtype
        return copy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits, targets, reduction="none")


def is_likeliest(logits: Tensor, targets: Tensor) -> Tensor:
    """[n] whether the target has a larger logit than any other token; a tie is none.

    Without the index that `argmax` looks for it is several times as fast on a CPU.

    Args:
        logits: [n, V] from `without_mask`: written to, and restored.
    """
    logits, targets = logits.detach(), targets[:, None]
    of_targets = logits.gather(-1, targets)
    best_other = logits.scatter_(-1, targets, -torch.inf).amax(-1)
    logits.scatter_(-1, targets, of_targets)
    return of_targets[:, 0] > best_other


def tempered_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Entropy [n] in nats of softmax(logits / temperature)."""
    log_p = functional.log_softmax(logits / temperature, dim=-1)
    # 0 * -inf at the mask would be NaN in the value and in the gradient.
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


def confidence_weights(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    row: Tensor,
    row_tokens: Tensor,
    *,
    mask_token_id: int,
    chunk_tokens: int | None = None,
) -> Tensor:
    """What the entropy of each token counts in the confidence term: [N].

    The term is, per row, the mean entropy over its correctly predicted tokens; a row weighs as many
    tokens as it has. A mean over all correct tokens of the batch would depend on how its rows are
    spread over workers and micro-batches. Which tokens are correct takes a pass of its own.

    Args:
        hidden, targets, row: [N, D], [N] and [N]: states, clean tokens, and the row they are in.
        row_tokens: [B] tokens of each row.
    """

    def is_correct(logits: Tensor, targets: Tensor) -> Tensor:
        return is_likeliest(without_mask(logits, mask_token_id), targets)

    chosen = predict_through_head(
        head, hidden, (targets,), is_correct, chunk_tokens=chunk_tokens
    ).double()
    counts = torch.zeros(len(row_tokens), dtype=chosen.dtype, device=chosen.device)
    counts.index_add_(0, row, chosen)
    return chosen * (row_tokens / counts.clamp(min=1.0))[row]
