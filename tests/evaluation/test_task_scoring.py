"""Log-likelihoods of answers given prompts, against enumeration and one row at a time."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.builders import TableDenoiser, tiny_causal
from tests.objectives.test_block_objectives import CORPUS, VisibleTable, empirical
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.evaluation.tasks.scoring import (
    TokenPair,
    bounded_nats,
    exact_nats,
    greedily_written,
    num_filling,
)
from tokendiff.models.causal import CausalModel

MASK = 0


def process_of(block_length: int | None, mode: str = "4d", **fields: Any) -> NoiseProcess:
    blocks = fields if block_length is None else {"attention_mask_mode": mode, **fields}
    return NoiseProcess(
        forward_process="absorbing",
        vocab_size=4,
        mask_token_id=MASK,
        max_length=4,
        alpha_schedule="cosine",
        block_length=block_length,
        **blocks,
    )


def exact_nats_of(row: Tensor, begin: int, stop: int) -> float:
    """-ln p(row[begin:stop] | row[:begin]), by adding up the language."""
    is_prompt = (CORPUS[:, :begin] == row[:begin]).all(1)
    is_both = is_prompt & (CORPUS[:, begin:stop] == row[begin:stop]).all(1)
    return math.log(int(is_prompt.sum()) / int(is_both.sum()))


CASES = {
    "whole": process_of(None),
    "whole, next token": process_of(None, predict="next"),
    "blocks of 1": process_of(1),
    "blocks of 2": process_of(2),
    "one block": process_of(4),
    "one block, causal": process_of(4, "2d"),
    "blocks at answers": process_of(2, block_start="answer"),
    # A prompt that training never noised is no reason to leave an answer out.
    "behind a longer prompt": process_of(2, prompt_length=3),
}


def estimates(process: NoiseProcess, pair: TokenPair, *, seed: int, copies: int) -> np.ndarray:
    model: Any = VisibleTable(empirical(CORPUS))
    if process.block_length is None:
        model = TableDenoiser(torch.from_numpy(empirical(CORPUS)), MASK)
    pairs = [
        TokenPair(context=pair.context, continuation=pair.continuation, noise_id=copy)
        for copy in range(copies)
    ]
    nats = bounded_nats(model, process, pairs, key=seed, num_mask_samples=1)
    return nats.numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("begin", "stop"), [(0, 2), (1, 3), (1, 4), (2, 3)])
def test_the_conditional_bound_of_an_enumerated_language(case: str, begin: int, stop: int) -> None:
    """Also of answers that something follows: in a block it is masked, and not counted."""
    process = CASES[case]
    row = CORPUS[2]
    pair = TokenPair(context=row[:begin].tolist(), continuation=row[begin:stop].tolist())
    if stop + num_filling(pair, process) > 4 or (process.block_length is None and stop < 4):
        pytest.skip("the language has texts of four tokens")
    nats = estimates(process, pair, seed=0, copies=200)
    error = nats.std(ddof=1) / math.sqrt(len(nats))
    exact = exact_nats_of(row, begin, stop)
    assert exact > 0.1
    if process.attention_mask_mode == "2d":  # beliefs that do not see what stands behind them
        assert nats.mean() >= exact - 3 * error - 1e-6
    else:
        assert nats.mean() == pytest.approx(exact, abs=3 * error + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["whole", "one block"])
def test_the_standard_error_covers_in_95_of_100_seeds(case: str) -> None:
    row, begin, stop = CORPUS[2], 1, 4
    pair = TokenPair(context=row[:begin].tolist(), continuation=row[begin:stop].tolist())
    exact, covered = exact_nats_of(row, begin, stop), 0
    for seed in range(100):
        nats = estimates(CASES[case], pair, seed=seed, copies=64)
        assert nats.std() > 0.01
        covered += abs(nats.mean() - exact) <= 1.96 * nats.std(ddof=1) / math.sqrt(len(nats))
    assert 90 <= covered <= 99


def test_one_estimate_depends_on_neither_batch_nor_place() -> None:
    model: Any = VisibleTable(empirical(CORPUS))
    rows = CORPUS[:6].tolist()
    pairs = [
        TokenPair(context=row[:at], continuation=row[at:], noise_id=number)
        for number, (row, at) in enumerate(zip(rows, (1, 2, 3, 1, 2, 0), strict=True))
    ]

    def nats(chosen: list[TokenPair]) -> list[float]:
        found = bounded_nats(model, CASES["blocks of 2"], chosen, key=0, num_mask_samples=2)
        return found.tolist()

    together = nats(pairs)
    assert [nats([pair])[0] for pair in pairs] == pytest.approx(together, rel=1e-12)
    assert nats(pairs[::-1])[::-1] == pytest.approx(together, rel=1e-12)


@pytest.mark.parametrize(
    ("process", "context", "answer", "filling"),
    [
        (process_of(None), 1, 2, 0),
        (process_of(4), 1, 2, 1),
        (process_of(4), 2, 2, 0),
        (process_of(4, "2d"), 1, 2, 0),
        (process_of(4, block_start="answer"), 1, 2, 2),
    ],
)
def test_blocks_are_whole(process: NoiseProcess, context: int, answer: int, filling: int) -> None:
    pair = TokenPair(context=[1] * context, continuation=[2] * answer)
    assert num_filling(pair, process) == filling


def test_exact_nats_are_those_of_one_row_at_a_time() -> None:
    transformer = tiny_causal(vocab_size=20)
    chance = np.random.default_rng(0)
    pairs = [
        TokenPair(
            context=chance.integers(0, 20, size=1 + number).tolist(),
            continuation=chance.integers(0, 20, size=6 - number).tolist(),
        )
        for number in range(6)
    ]
    with torch.no_grad():
        for number in (1, 4):  # two whose answer is the greedy one
            row = list(pairs[number].context)
            for _ in range(3):
                row.append(int(transformer(torch.tensor([row])).logits[0, -1].argmax()))
            context = pairs[number].context
            pairs[number] = TokenPair(context=context, continuation=row[len(context) :])
        expected = []
        for pair in pairs:
            row = [*pair.context, *pair.continuation]
            logs = transformer(torch.tensor([row])).logits[0].log_softmax(-1)
            places = range(len(pair.context), len(row))
            expected.append(-sum(float(logs[at - 1, row[at]]) for at in places))
    nats, is_greedy = exact_nats(CausalModel(transformer, vocab_size=20), pairs)
    assert nats.tolist() == pytest.approx(expected, rel=1e-9)
    assert is_greedy.tolist() == [number in (1, 4) for number in range(6)]


def written_by_hand(model: TableDenoiser, context: list[int], length: int) -> list[int]:
    """The surest masked token is set, and the model asked again."""
    row = torch.tensor([[*context, *[MASK] * length]])
    while (row == MASK).any():
        logs = model.encode(row, row >= 0, torch.zeros(1))[0]
        best, token = logs.max(-1)
        at = int(best.masked_fill(row[0] != MASK, -torch.inf).argmax())
        row[0, at] = token[at]
    return row[0, len(context) :].tolist()


@pytest.mark.parametrize("block_length", [None, 4])
def test_what_is_written_greedily(block_length: int | None) -> None:
    table = np.random.default_rng(0).random((4, 4, 4, 4)) ** 4
    table[0], table[:, 0], table[:, :, 0], table[..., 0] = 0.0, 0.0, 0.0, 0.0
    whole = TableDenoiser(torch.from_numpy(table), MASK)
    model: Any = whole if block_length is None else VisibleTable(table)
    process = CASES["whole" if block_length is None else "one block"]
    pairs, expected = [], []
    for first in (1, 2, 3):
        written = written_by_hand(whole, [first], 3)
        for change in (None, 0, 1, 2):
            answer = list(written)
            if change is not None:
                answer[change] = answer[change] % 3 + 1
            pairs.append(TokenPair(context=[first], continuation=answer))
            expected.append(change is None)
    assert greedily_written(model, process, pairs).tolist() == expected


def test_a_model_that_says_nan_writes_nothing_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has an answer too: of a model that diverged, the other figures are to be seen."""
    model, calls = TableDenoiser(torch.ones(4, 4, 4, 4, dtype=torch.float64), MASK), 0
    encode = model.encode

    def diverged(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        assert calls <= 3, "asked for ever"
        return encode(*args) * torch.nan

    monkeypatch.setattr(model, "encode", diverged)
    pairs = [TokenPair(context=[1], continuation=[2, 3, 1])]
    assert greedily_written(model, CASES["whole"], pairs).tolist() == [False]


def test_under_uniform_noise_nothing_is_said_to_be_written_greedily() -> None:
    process = NoiseProcess(
        forward_process="uniform", vocab_size=4, mask_token_id=MASK, max_length=4
    )
    assert not isinstance(process.kernel(), AbsorbingKernel)
    pairs = [TokenPair(context=[1], continuation=[2, 3, 1])]
    assert greedily_written(None, process, pairs).tolist() == [False]


def test_a_first_token_that_nothing_predicts_is_not_free() -> None:
    pair = TokenPair(context=[], continuation=[1, 2, 3, 1])
    with pytest.raises(ValueError, match="needs a context"):
        estimates(CASES["whole, next token"], pair, seed=0, copies=2)
