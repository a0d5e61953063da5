"""Whether speculative decoding would pay on this machine, told before anything is trained for it.

It pays where a pass over the tokens of a block takes little longer than a pass over one, and where
enough of what is drafted is accepted. Passes are timed; how much is accepted nobody knows yet. So
the speed-up is told as a function of it. With a of the K - 1 drafted tokens of a block accepted,
and t_n the seconds of a pass over n tokens of each row:

    a draft that costs nothing               (a + 1) t_1 / t_(K+1)
    self_speculation                         (a + 2) t_1 / (2 t_(K+1))
    self_speculation with draft_ahead        (a + 1) t_1 / t_(K+K^2)

Passes over K tokens are taken for passes over K + 1. A draft model, and adapters that draft, cost
time too, which is not in these figures: they are the most that can be gained.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tokendiff.diffusion.attention_masks import causal_by_position
from tokendiff.models.causal import CausalModel
from tokendiff.models.cuda_graphs import RECORDED_AT

BATCHES, BLOCKS = (1, 8), (4, 8, 16)
_CONTEXT, _REPEATS = 256, 5  # tokens that a row has read before; passes of each kind
_AT_ONCE = 256  # states whose logits exist at once
_PREFIX = "pass_seconds"

# By the name of a way: the tokens that a block of K gives beside the accepted ones, and what it
# costs, by the seconds t of a pass.
_WAYS: dict[str, tuple[int, Callable[[Callable[[int], float], int], float]]] = {
    "a draft": (1, lambda t, k: t(k + 1)),
    "self_speculation": (2, lambda t, k: 2.0 * t(k + 1)),
    "draft_ahead": (1, lambda t, k: t(k + k * k)),
}


def num_passes() -> int:
    """The number of kinds of passes that `pass_seconds` times."""
    return len(BATCHES) * len(_widths())


@torch.no_grad()
def pass_seconds(
    model: CausalModel, *, on_pass: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Median seconds of decoding passes behind 256 tokens, or as many as the model takes, by
    figure: `pass_seconds_batch_B_tokens_N` for N tokens in each of B rows. Passes that the model is
    too short for are left out.
    """
    found, most = {}, model.max_length or sys.maxsize
    widths = [width for width in _widths() if width < most]
    context = min(_CONTEXT, most - max(widths))
    for batch in BATCHES:
        rows, cache = torch.arange(batch, device=model.device), model.new_cache(batch)
        _read(model, cache, rows, context)
        cache.extend(rows, torch.full_like(rows, context))
        for width in widths:
            seconds = []
            for _ in range(RECORDED_AT + 1 + _REPEATS):  # the first do what is done once
                begun = _now(model.device)
                hidden = _read(model, cache, rows, width)
                for states in hidden[:, : _num_predicting(width)].flatten(0, 1).split(_AT_ONCE):
                    model.head(states)
                seconds.append(_now(model.device) - begun)
            found[_name(batch, width)] = statistics.median(seconds[-_REPEATS:])
            on_pass()
    return found


def outlook_tables(
    metrics: Mapping[str, Any],
) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Two tables for the report and the terminal; none where no passes were timed."""
    if _name(BATCHES[0], 1) not in metrics:
        return []
    needed, gained = [], []
    for batch in BATCHES:

        def seconds(width: int, batch: int = batch) -> float:
            return float(metrics.get(_name(batch, width), math.nan))

        for block in BLOCKS:
            times = [1e3 * seconds(width) for width in (1, block + 1, block + block * block)]
            least: list[Any] = []
            most: list[Any] = []
            for own, cost in _WAYS.values():
                ratio = cost(seconds, block) / seconds(1)
                least.append(_least_accepted(ratio - own, block))
                most.append(_shown((block - 1 + own) / ratio, 2))
            needed.append([batch, block, *(_shown(value, 1) for value in times), *least])
            gained.append([batch, block, *most])
    sizes = ["ms for 1", "for K + 1", "for K + K^2"]
    return [
        (
            "Drafted tokens of a block that must be accepted for speculative decoding to pay",
            ["batch", "K", *sizes, *_WAYS],
            needed,
        ),
        ("Speed-up where all of a block is accepted", ["batch", "K", *_WAYS], gained),
    ]


def _least_accepted(accepted: float, block: int) -> str:
    shown = _shown(max(accepted, 0.0), 1)  # of what is not known, max gives its first
    return f"never ({shown})" if accepted > block - 1 else shown


def _shown(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _num_predicting(width: int) -> int:
    """How many states of a pass tell a token: with `draft_ahead` those that are verified, and those
    of one of the K blocks.
    """
    ahead = {k + k * k: 2 * k - 1 for k in BLOCKS}
    return ahead.get(width, width)


def _widths() -> list[int]:
    return sorted({1, *(k + 1 for k in BLOCKS), *(k + k * k for k in BLOCKS)})


def _name(batch: int, width: int) -> str:
    return f"{_PREFIX}_batch_{batch}_tokens_{width}"


def _read(model: CausalModel, cache: Any, rows: torch.Tensor, width: int) -> torch.Tensor:
    tokens = torch.arange(width, device=rows.device).expand(len(rows), width) % model.vocab_size
    counts = torch.full_like(rows, width)
    return model.encode(tokens, counts, cache, rows, causal_by_position)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
