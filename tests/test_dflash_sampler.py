"""Drafted blocks: the acceptance rules against exact enumeration, and decoding against the target
alone.
"""

import itertools
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from tokendiff.samplers.acceptance import accept_drawn, accept_own
from tokendiff.samplers.categorical import draw

# The target over three tokens, given the last two; eighths, so that every threshold that a uniform
# number is compared with is a multiple of 1/120, and midpoints of that grid integrate exactly.
_TARGET = (
    torch.tensor(
        [
            [[4, 2, 2], [1, 6, 1], [0, 3, 5]],
            [[2, 2, 4], [5, 0, 3], [1, 1, 6]],
            [[6, 1, 1], [3, 4, 1], [2, 5, 1]],
        ],
        dtype=torch.float64,
    )
    / 8
)
# The draft's beliefs at two places, given the last token: no belief of the target's, and at places
# exact zeros where the target has none.
_DRAFT = (
    torch.tensor(
        [
            [[2, 1, 1], [1, 2, 1]],
            [[1, 1, 2], [2, 0, 2]],
            [[0, 2, 2], [1, 1, 2]],
        ],
        dtype=torch.float64,
    )
    / 4
)
V, D, N = 3, 2, 4
_GRID = (torch.arange(120, dtype=torch.float64) + 0.5) / 120


def target_rows(last: int, anchor: int, drafted: Tensor) -> Tensor:
    """[B, D + 1, V]: the target behind the anchor and behind each drafted token [B, D]."""
    before = torch.tensor([last, anchor]).expand(len(drafted), 2)
    tokens = torch.cat([before, drafted], dim=1)
    return torch.stack([_TARGET[tokens[:, k], tokens[:, k + 1]] for k in range(D + 1)], dim=1)


def block_law(rule: str, last: int, anchor: int) -> dict[tuple[int, ...], float]:
    """Probability of everything that one block may append, integrated exactly over drafted tokens
    and uniform numbers by running the rule on all of them.
    """
    drafted = torch.tensor(list(itertools.product(range(V), repeat=D)))
    q = _DRAFT[anchor]
    if rule == "own":
        drafted = q.argmax(-1)[None]  # what a draft proposes where it does not draw
        weight = torch.ones(1, dtype=torch.float64)
        own = torch.tensor(list(itertools.product(range(V), repeat=D + 1)))
        drafted, own = drafted.repeat(len(own), 1), own
        p = target_rows(last, anchor, drafted)
        weight = p.gather(-1, own[..., None])[..., 0].prod(-1)
        verdict = accept_own(drafted, own)
    else:
        weight = q[0, drafted[:, 0]] * q[1, drafted[:, 1]]
        # An acceptance threshold p/q is a multiple of 1/4 or of 1/2; the residual's of 1/1..1/8.
        judge = torch.tensor(list(itertools.product(_GRID[5::10].tolist(), repeat=D)))
        judge = judge.double()
        index = torch.cartesian_prod(
            torch.arange(len(drafted)), torch.arange(len(judge)), torch.arange(len(_GRID))
        )
        drafted, weight = drafted[index[:, 0]], weight[index[:, 0]] / (len(judge) * len(_GRID))
        verdict = accept_drawn(
            drafted,
            draft_logits=q.log().expand(len(drafted), D, V),
            target_logits=target_rows(last, anchor, drafted).log(),
            judge=judge[index[:, 1]],
            redraw=_GRID[index[:, 2]],
        )
    law: dict[tuple[int, ...], float] = defaultdict(float)
    for row, count, token, mass in zip(
        drafted.tolist(),
        verdict.num_accepted.tolist(),
        verdict.next_token.tolist(),
        weight.tolist(),
        strict=True,
    ):
        law[(*row[:count], token)] += mass
    return law


@pytest.mark.parametrize("rule", ["own", "drawn"])
def test_every_continuation_has_the_targets_probability(rule: str) -> None:
    """Blocks are appended until there are N tokens, and what is over is cut off, as in decoding."""
    last, anchor = 0, 1
    blocks = {(a, b): block_law(rule, a, b) for a in range(V) for b in range(V)}
    done: dict[tuple[int, ...], float] = defaultdict(float)
    open_texts: dict[tuple[int, ...], float] = {(last, anchor): 1.0}
    while open_texts:
        longer: dict[tuple[int, ...], float] = defaultdict(float)
        for text, mass in open_texts.items():
            for block, share in blocks[text[-2], text[-1]].items():
                grown = text + block
                if len(grown) >= N + 2:
                    done[grown[2 : N + 2]] += mass * share
                else:
                    longer[grown] += mass * share
        open_texts = longer
    for continuation in itertools.product(range(V), repeat=N):
        text = (last, anchor, *continuation)
        expected = torch.tensor(
            [float(_TARGET[text[k], text[k + 1], text[k + 2]]) for k in range(N)]
        )
        assert done[continuation] == pytest.approx(float(expected.double().prod()), abs=1e-9)


def test_drawn_tokens_are_accepted_as_often_as_the_distributions_overlap() -> None:
    law = block_law("drawn", 0, 1)
    first = torch.minimum(_TARGET[0, 1], _DRAFT[1, 0]).sum()
    longer = sum(mass for block, mass in law.items() if len(block) > 1)
    assert longer == pytest.approx(float(first), abs=1e-9)


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, D + 1, 50, dtype=torch.float64)
    uniform = torch.rand(64, D, dtype=torch.float64)
    drafted = draw(logits[:, :D].reshape(-1, 50).softmax(-1), uniform.reshape(-1)).reshape(64, D)
    verdict = accept_drawn(
        drafted,
        draft_logits=logits[:, :D],
        target_logits=logits,
        judge=torch.rand(64, D, dtype=torch.float64),
        redraw=torch.rand(64, dtype=torch.float64),
    )
    assert verdict.num_accepted.tolist() == [D] * 64
