"""Rules of attention that are known by what each query sees: a few runs of neighbouring keys.

Which parts of an attention matrix are seen whole, in part or not at all then follows from where
runs begin and end (`tokendiff.models.masked_attention`), without asking the rule for each pair of
query and key.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class KeyRun:
    """The keys [begin, end) of each query; none where they are equal.

    Attributes:
        begin, end: [B, Q] int64.
        is_seen: [B, KV] bool, which of these keys are seen; None is all.
    """

    begin: Tensor
    end: Tensor
    is_seen: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class RunRule:
    """A rule (`attention_masks.MaskRule`), and the runs that it lets queries see.

    Attributes:
        rule: what is asked for a pair.
        runs: the same as runs that have no key in common; computed when it is called.
    """

    rule: Callable[[Tensor, Tensor, Tensor], Tensor]
    runs: Callable[[], tuple[KeyRun, ...]]

    def __call__(self, b: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return self.rule(b, q, kv)

    def within(self, window: int) -> "RunRule":
        """The rule for queries that see no further than `window` keys to either side."""

        def runs() -> tuple[KeyRun, ...]:
            narrowed = []
            for run in self.runs():
                place = torch.arange(run.begin.shape[1], device=run.begin.device)
                begin = torch.maximum(run.begin, place - window)
                end = torch.maximum(torch.minimum(run.end, place + window + 1), begin)
                narrowed.append(KeyRun(begin=begin, end=end, is_seen=run.is_seen))
            return tuple(narrowed)

        return RunRule(
            rule=lambda b, q, kv: self.rule(b, q, kv) & ((q - kv).abs() <= window), runs=runs
        )


def run_around(labels: Tensor) -> tuple[Tensor, Tensor]:
    """[B, L] each: where the run of equal labels [B, L] of each position begins and ends."""
    length = labels.shape[1]
    place = torch.arange(length, device=labels.device).expand_as(labels)
    is_start = torch.ones_like(labels, dtype=torch.bool)
    is_start[:, 1:] = labels[:, 1:] != labels[:, :-1]
    begin = place.masked_fill(~is_start, 0).cummax(dim=1).values
    is_end = is_start.roll(-1, dims=1)
    is_end[:, -1] = True
    last = place.masked_fill(~is_end, length).flip(1).cummin(dim=1).values.flip(1)
    return begin, last + 1
