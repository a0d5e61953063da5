"""Whole rows in flight against the same rows, each sampled alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tokendiff.diffusion.interfaces import Figures
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import Cosine
from tokendiff.samplers.blockwise import BlockwiseSampler
from tokendiff.samplers.continuous import ContinuousSampler, FilledRow, RowToFill
from tokendiff.samplers.first_hitting import FirstHittingSampler

V, MASK, STOP, KEY = 30, 29, 0, 77
FIELDS: dict[str, Any] = {"kernel": AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK)}
BLOCKS: dict[str, Any] = {"block_size": 3, "num_inference_steps": 2, **FIELDS}
ANSWERS: dict[str, Any] = {"begins_at_answer": True, "stop_token_ids": (STOP, 7), **BLOCKS}
DYNAMIC: dict[str, Any] = {
    "remasking_strategy": "low_confidence_dynamic",
    "confidence_threshold": 0.3,
}
SAMPLERS: dict[str, ContinuousSampler] = {
    "first hitting": FirstHittingSampler(**FIELDS),
    "guided": FirstHittingSampler(guidance_scale=1.6, **FIELDS),
    "blocks": BlockwiseSampler(**BLOCKS),
    "answers": BlockwiseSampler(**ANSWERS),
    "answers by rule": BlockwiseSampler(**ANSWERS, **DYNAMIC),
}


class RaggedDenoiser:
    """Random weights through which a position depends on all valid ones of its row, and on the
    time. Counts its passes.
    """

    def __init__(self, *, is_time_conditioned: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(V, 8, generator=generator).double()
        self.mixing = torch.randn(64, 64, generator=generator).double()
        self.output = 2.0 * torch.randn(8, V, generator=generator).double()
        self.is_time_conditioned = is_time_conditioned
        self.num_passes = 0

    def encode(
        self, tokens: Tensor, is_valid: Tensor, time: Tensor, document: Tensor | None = None
    ) -> Tensor:
        self.num_passes += 1
        length = tokens.shape[1]
        states = self.embedding[tokens] * is_valid[..., None]
        mixed = self.mixing[:length, :length] @ states
        return torch.tanh(mixed + (time[:, None, None] if self.is_time_conditioned else 0.0))

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.output


def rows_of(count: int) -> list[RowToFill]:
    """Rows of 6 to 17 tokens behind prompts of 0 to 5, some with gaps; the third is given."""
    rows = []
    for number in range(count):
        length = 6 + number * 5 % 12
        tokens = torch.arange(length) * (number + 3) % 27 + 1
        is_given = torch.arange(length) < number * 7 % 6
        is_given[(number % 4) + 1] = number % 2 == 0
        is_given |= torch.tensor(number == 2)
        rows.append(RowToFill(id=100 + 3 * number, tokens=tokens, is_given=is_given))
    return rows


def streamed(
    sampler: ContinuousSampler, model: Any, rows: Any, *, num_slots: int, **fields: Any
) -> Iterator[list[FilledRow]]:
    options: dict[str, Any] = {"key": KEY}
    options |= {"on_step": lambda figures: None, **fields}
    return sampler.stream(model, rows, num_slots=num_slots, **options)


def test_a_row_shorter_than_a_block_is_refused_in_flight_too() -> None:
    sampler = BlockwiseSampler(**{**BLOCKS, "block_size": 7})
    with pytest.raises(ValueError, match="block_size 7 must not exceed seq_len 6"):
        list(streamed(sampler, RaggedDenoiser(), rows_of(2), num_slots=2))


@pytest.mark.parametrize("is_time_conditioned", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_row_in_flight_is_what_it_is_alone(name: str, is_time_conditioned: bool) -> None:
    sampler, rows = SAMPLERS[name], rows_of(14)
    model = RaggedDenoiser(is_time_conditioned=is_time_conditioned)
    told: list[Figures] = []
    stream = streamed(
        sampler, model, rows, num_slots=3, on_step=lambda figures: told.append(figures())
    )
    found = {row.id: row for finished in stream for row in finished}
    assert set(found) == {row.id for row in rows}
    assert all(0.0 < rows_told <= 3 and tokens > 0 for rows_told, tokens in told)
    for row in rows:
        alone = sampler.sample(
            model, row.tokens[None], row.is_given[None],
            RowGenerator.for_rows(KEY, torch.tensor([row.id])),
        )  # fmt: skip
        assert found[row.id].tokens == alone.tokens[0].tolist()
        assert found[row.id].num_model_calls == int(alone.num_model_calls)
        assert MASK not in found[row.id].tokens
    if "answers" in name:
        assert any(row.tokens[-1] == STOP and STOP in row.tokens[:-1] for row in found.values())


def open_rows(*lengths: int) -> list[RowToFill]:
    return [
        RowToFill(id=i, tokens=torch.ones(n, dtype=torch.int64), is_given=torch.zeros(n).bool())
        for i, n in enumerate(lengths)
    ]


def test_a_row_that_is_done_leaves_its_place_at_once() -> None:
    """Two places, a pass per token: one row of 8 tokens beside four of 2, one after the other."""
    model = RaggedDenoiser()
    lengths = (8, 2, 2, 2, 2)
    rounds = list(streamed(SAMPLERS["first hitting"], model, open_rows(*lengths), num_slots=2))
    assert [sorted(row.id for row in finished) for finished in rounds] == [[1], [2], [3], [0, 4]]
    assert model.num_passes == 8  # 8 + 2 + 2 in batches of two


def test_what_was_read_of_an_earlier_row_is_forgotten() -> None:
    """Also where the last pass over it saw the very tokens that the next one begins with."""
    tokens = torch.arange(5) + 1
    rows = [RowToFill(id=i, tokens=tokens, is_given=torch.arange(5) != 3) for i in range(3)]
    rounds = list(streamed(SAMPLERS["first hitting"], RaggedDenoiser(), rows, num_slots=1))
    assert [row.num_model_calls for finished in rounds for row in finished] == [1, 1, 1]


def test_rows_are_taken_as_places_become_free() -> None:
    taken: list[int] = []

    def endless() -> Iterator[RowToFill]:
        for number in range(10**9):
            taken.append(number)
            (row,) = open_rows(2 + number % 3)
            yield RowToFill(id=number, tokens=row.tokens, is_given=row.is_given)

    stream = streamed(SAMPLERS["first hitting"], RaggedDenoiser(), endless(), num_slots=3)
    for _ in range(5):
        before = len(taken)
        finished = next(stream)
        assert len(taken) - before <= 3
        assert {row.id for row in finished} <= set(taken)
    assert list(streamed(SAMPLERS["blocks"], RaggedDenoiser(), [], num_slots=3)) == []
