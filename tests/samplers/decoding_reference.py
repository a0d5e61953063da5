"""What block decoders must give, one row at a time, without a cache, in plain Python.

Written from the published decoders: SDAR's generate.py and diffusers' LLaDA2Pipeline. Imports
nothing that it judges.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """A position of the active block, and the model's greedy candidate for it."""

    index: int
    token: int
    confidence: float
    entropy: float


CommitLoop = Callable[[list[Place], int], set[int]]  # (masked places, step) -> indices


def spread(block_length: int, num_steps: int) -> list[int]:
    """Commits per step."""
    steps = [block_length // num_steps] * num_steps
    for step in range(block_length % num_steps):
        steps[step] += 1
    return [max(count, 1) for count in steps]


def leftmost(masked: list[Place], count: int) -> set[int]:
    return {place.index for place in masked[:count]}


def most_confident(masked: list[Place], count: int) -> set[int]:
    left = list(masked)
    chosen: set[int] = set()
    while left and len(chosen) < count:
        best = left[0]
        for place in left:
            if place.confidence > best.confidence:
                best = place
        chosen.add(best.index)
        left.remove(best)
    return chosen


def confident(masked: list[Place], count: int, threshold: float) -> set[int]:
    above = {place.index for place in masked if place.confidence > threshold}
    return above if len(above) >= count else most_confident(masked, count)


def entropy_bounded(masked: list[Place], bound: float) -> set[int]:
    rising = sorted(masked, key=lambda place: (place.entropy, place.index))
    chosen: set[int] = set()
    total = 0.0
    for place in rising:
        if chosen and total > bound:
            break
        chosen.add(place.index)
        total += place.entropy
    return chosen


def decode(
    model: Any,
    prompt: Sequence[int],
    *,
    num_new: int,
    block_length: int,
    mask: int,
    stops: Sequence[int],
    commit: CommitLoop,
    is_causal: bool = False,
    hides_tail: bool = False,
    editing_threshold: float | None = None,
    max_post_steps: int = 0,
    block_starts: Sequence[int] = (),
    context_is_causal: bool = False,
    predicts_next: bool = False,
) -> tuple[list[int], int]:
    """The greedy continuation, and the forward passes that it takes where each is over the whole
    text and none is for the cache alone.

    Args:
        is_causal: attention; else blocks see themselves whole.
        hides_tail: nothing sees what is beyond the last new token.
        block_starts: where blocks are counted anew.
        context_is_causal: attention of all before the block.
        predicts_next: logits of a position are for the one behind it.
    """
    limit = len(prompt) + num_new
    blocks: list[int] = []  # which block each position is in
    while len(blocks) < limit or blocks.count(blocks[-1]) < block_length:
        is_first = not blocks or len(blocks) in block_starts
        is_new = is_first or blocks.count(blocks[-1]) == block_length
        blocks.append((blocks[-1] + 1 if blocks else 0) if is_new else blocks[-1])
    x = [*prompt, *[mask] * (len(blocks) - len(prompt))]
    num_calls = 0
    for block in range(blocks[len(prompt)], blocks[-1] + 1):
        begin = blocks.index(block)
        end, step, post_steps = begin + block_length, 0, 0
        while True:
            places = _places(
                model,
                x[:end],
                begin,
                mask,
                blocks,
                is_causal,
                limit if hides_tail else end,
                context_is_causal,
                predicts_next,
            )
            num_calls += 1
            is_open = {i for i in range(max(begin, len(prompt)), end) if x[i] == mask}
            post_steps += not is_open
            chosen = commit([place for place in places if place.index in is_open], step)
            edits = set()
            if editing_threshold is not None:
                edits = {
                    place.index
                    for place in places
                    if place.index >= len(prompt)
                    and place.index not in is_open
                    and place.token != x[place.index]
                    and place.confidence > editing_threshold
                }
            for place in places:
                if place.index in chosen | edits:
                    x[place.index] = place.token
            step += 1
            for index in range(len(prompt), min(end, limit)):
                if x[index] == mask:
                    break
                if x[index] in stops:
                    return x[len(prompt) : index + 1], num_calls
            if editing_threshold is None and mask not in x[len(prompt) : limit]:
                return x[len(prompt) : limit], num_calls
            if mask in x[max(begin, len(prompt)) : end]:
                continue
            if editing_threshold is None or max_post_steps == 0:
                break
            if not is_open and (not edits or post_steps >= max_post_steps):
                break
    return x[len(prompt) : limit], num_calls


def _places(
    model: Any,
    x: Sequence[int],
    begin: int,
    mask: int,
    blocks: Sequence[int],
    is_causal: bool,
    limit: int,
    context_is_causal: bool,
    predicts_next: bool,
) -> list[Place]:
    position = torch.arange(len(x))
    number = position if is_causal else torch.tensor(blocks[: len(x)])
    is_seen = number[None] <= number[:, None]
    if context_is_causal:
        is_seen[:begin] = position[None] <= position[:begin, None]
    is_seen &= (position < limit)[None]
    with torch.no_grad():
        logits = model(torch.tensor([x]), attention_mask=is_seen[None, None]).logits[0]
    logits[:, mask] = -torch.inf
    found = []
    for index in range(begin, len(x)):
        told_by = index - 1 if predicts_next and index > 0 else index
        p = logits[told_by].softmax(-1).tolist()
        token = int(logits[told_by].argmax())
        entropy = -sum(value * math.log(value) for value in p if value > 0)
        found.append(Place(index, token, p[token], entropy))
    return found
