"""What passes take, and what they say of speculative decoding."""

import re
from typing import Any

import pytest
from torch import Tensor

from tests.builders import tiny_causal
from tokendiff.evaluation import pass_times
from tokendiff.evaluation.pass_times import num_passes, outlook_tables, pass_seconds
from tokendiff.models.causal import CausalModel


class Clocked(CausalModel):
    """Its passes take a second for each row, and half a second for each token of a row; its head a
    hundredth for each state.
    """

    now = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[int, int, int]] = []

    def encode(
        self, tokens: Tensor, num_tokens: Tensor, cache: Any, *args: Any, **kwargs: Any
    ) -> Tensor:
        self.seen.append((*tokens.shape, int(cache.lengths.max())))
        Clocked.now += tokens.shape[0] + tokens.shape[1] / 2
        hidden: Tensor = super().encode(tokens, num_tokens, cache, *args, **kwargs)
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        Clocked.now += len(hidden) / 100
        return super().head(hidden)


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    monkeypatch.setattr(pass_times, "_now", lambda device: Clocked.now)
    return Clocked(tiny_causal(max_position_embeddings=512), vocab_size=48)


@pytest.mark.slow
def test_passes_of_all_kinds_are_timed_behind_the_same_text(clocked: Clocked) -> None:
    done: list[int] = []
    found = pass_seconds(clocked, on_pass=lambda: done.append(1))
    assert len(found) == num_passes() == len(done)
    for name, seconds in found.items():
        batch, width = map(int, re.findall(r"\d+", name))
        predicting = {20: 7, 72: 15, 272: 31}.get(width, width)  # of 2 K - 1
        assert seconds == pytest.approx(batch + width / 2 + batch * predicting / 100)
    contexts = {context for _, width, context in clocked.seen if width != 240}
    assert contexts == {240}, "512 positions, less the widest pass of 16 + 16 * 16"


@pytest.mark.slow
def test_the_outlook_is_the_ratio_of_passes(clocked: Clocked) -> None:
    needed, gained = outlook_tables(pass_seconds(clocked))
    by_place = {(row[0], row[1]): row for row in needed[2]}
    # One token: 1.51 s; nine: 5.59 s; 72, of which 15 predict: 37.15 s.
    row = dict(zip(needed[1], by_place[1, 8], strict=True))
    assert by_place[1, 8][2:5] == ["1510.0", "5590.0", "37150.0"]
    assert row["a draft"] == f"{5.59 / 1.51 - 1:.1f}"
    assert row["self_speculation"] == f"{2 * 5.59 / 1.51 - 2:.1f}"
    assert row["draft_ahead"] == f"never ({37.15 / 1.51 - 1:.1f})"
    best = dict(zip(gained[1], gained[2][1], strict=True))
    assert (best["batch"], best["K"]) == (1, 8)
    assert best["a draft"] == f"{8 * 1.51 / 5.59:.2f}"
    assert best["self_speculation"] == f"{9 * 1.51 / 11.18:.2f}"
    assert outlook_tables({"nats_per_token": 1.0}) == []


@pytest.mark.parametrize(("length", "widest"), [(300, 272), (100, 72)])
def test_a_short_model_is_timed_behind_what_fits(length: int, widest: int) -> None:
    model = Clocked(tiny_causal("gpt2", n_positions=length).float(), vocab_size=48)
    found = pass_seconds(model)
    assert max(width + context for _, width, context in model.seen) == length
    assert max(width for _, width, _ in model.seen) == widest
    needed, _ = outlook_tables(found)
    shown = dict(zip(needed[1], needed[2][2], strict=True))
    assert shown["K"] == 16
    assert (shown["draft_ahead"] == "-") == (length == 100)
