"""The bound of block-wise decoding against enumeration and the autoregressive likelihood."""

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from tests.objectives.test_block_objectives import (
    CORPUS,
    EOS,
    MASK,
    V,
    VisibleTable,
    empirical,
    entropy_nats,
    packed_batch,
    tiny_model,
    whole_rows,
)
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.evaluation.block_bound import block_row_bounds, target_rows
from tokendiff.objectives.blocks import mask_exactly


def process(block_length: int, mode: Literal["2d", "4d"] = "4d", **fields: Any) -> NoiseProcess:
    return NoiseProcess(
        forward_process="absorbing",
        vocab_size=V,
        mask_token_id=MASK,
        max_length=16,
        block_length=block_length,
        attention_mask_mode=mode,
        **fields,
    )


@pytest.mark.parametrize("block_length", [1, 2, 4])
def test_the_estimate_of_an_exact_model_is_the_entropy(block_length: int) -> None:
    rows = CORPUS.repeat(40, 1)
    generator = RowGenerator.for_rows(0, torch.arange(len(rows)))
    nats, num_tokens = block_row_bounds(
        VisibleTable(empirical(CORPUS)),
        whole_rows(rows),
        generator,
        process=process(block_length),
        num_mask_samples=2,
    )
    assert num_tokens.tolist() == [4] * len(rows)
    error = float(nats.std()) / len(rows) ** 0.5
    # The likelihood of a row differs, so the mean over whole copies of the corpus is compared.
    assert float(nats.mean()) == pytest.approx(entropy_nats(CORPUS), abs=3 * error)
    if block_length == 1:
        assert float(nats.mean()) == pytest.approx(entropy_nats(CORPUS), rel=1e-12)


@pytest.mark.parametrize("mode", ["2d", "4d"])
def test_blocks_of_one_token_give_the_autoregressive_likelihood(mode: Literal["2d", "4d"]) -> None:
    """Of each packed document by itself, with no draw in it."""
    model = tiny_model().double()
    batch = packed_batch()
    expected = [0.0, 0.0]
    for row in range(2):
        for document in range(int(batch.document[row].max()) + 1):
            tokens = batch.tokens[row, batch.document[row] == document]
            for at in range(len(tokens)):
                query = torch.cat([tokens[:at], torch.tensor([MASK])])[None]
                with torch.no_grad():
                    logits = model.model(input_ids=query).logits[0, -1]
                logits[MASK] = -torch.inf
                expected[row] -= float(logits.log_softmax(-1)[tokens[at]])
    for seed in (0, 1):
        generator = RowGenerator.for_rows(seed, torch.arange(2))
        nats, num_tokens = block_row_bounds(
            model,
            batch,
            generator,
            process=process(1, mode, eos_token_id=EOS),
            num_mask_samples=3,
        )
        assert nats.tolist() == pytest.approx(expected, rel=1e-6)
        assert num_tokens.tolist() == [16, 13]


@pytest.mark.parametrize("mode", ["2d", "4d"])
def test_the_mean_estimate_is_the_mean_over_all_sets_of_masks(mode: Literal["2d", "4d"]) -> None:
    """Of three tokens and EOS in a block of five, whose filling counts in nats and is no token."""
    model = tiny_model().double()
    tokens = torch.tensor([[5, 7, 3, EOS]])
    shown = torch.tensor([5, 7, 3, EOS, EOS] if mode == "4d" else [5, 7, 3, EOS])
    size = len(shown)
    mask = torch.ones(size, size, dtype=torch.bool)
    mask = mask if mode == "4d" else mask.tril()
    expected = 0.0
    for count in range(1, size + 1):
        sets = list(itertools.combinations(range(size), count))
        for chosen in sets:
            x_t = shown.clone()
            x_t[list(chosen)] = MASK
            with torch.no_grad():
                logits = model.model(
                    input_ids=x_t[None],
                    attention_mask=mask[None, None],
                    position_ids=torch.arange(size)[None],
                ).logits[0]
            logits[:, MASK] = -torch.inf
            nll = -logits.log_softmax(-1)[torch.arange(size), shown]
            expected += float(nll[list(chosen)].sum()) * size / count / len(sets) / size
    copies = 4000
    generator = RowGenerator.for_rows(0, torch.arange(copies))
    nats, num_tokens = block_row_bounds(
        model,
        whole_rows(tokens.expand(copies, -1).contiguous()),
        generator,
        process=process(5, mode, eos_token_id=EOS),
        num_mask_samples=1,
    )
    error = float(nats.std()) / copies**0.5
    assert error < 0.02 * expected
    assert float(nats.mean()) == pytest.approx(expected, abs=4 * error)
    assert set(num_tokens.tolist()) == {4}


def test_exactly_as_many_are_masked_in_each_block_as_were_drawn() -> None:
    rows, is_target = target_rows(packed_batch(), process(3, eos_token_id=EOS, prompt_length=4))
    counts: Counter[tuple[int, int]] = Counter()
    for seed in range(200):
        generator = RowGenerator.for_rows(seed, torch.arange(2))
        level = rows.block_uniform(generator)
        noise = generator.uniform(rows.tokens.shape[1])
        is_masked, weight = mask_exactly(rows, is_target, level, noise)
        assert not bool((is_masked & ~is_target).any())
        for row, ordinal in itertools.product(range(2), range(int(rows.ordinal.max()) + 1)):
            places = (rows.ordinal[row] == ordinal) & is_target[row]
            size, masked = int(places.sum()), int(is_masked[row, places].sum())
            if size:
                assert masked == 1 + int(float(level[row, places][0]) * size)
                assert set(weight[row, places].tolist()) == {size / masked}
                counts[size, masked] += 1
    shares = [counts[3, masked] / sum(counts[3, m] for m in (1, 2, 3)) for masked in (1, 2, 3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.05)


def test_a_row_gets_the_same_estimate_in_any_batch() -> None:
    batch, model = packed_batch(), tiny_model().double()
    generator = RowGenerator.for_rows(0, torch.arange(2))
    options: dict[str, Any] = {"process": process(4, eos_token_id=EOS), "num_mask_samples": 2}
    together, _ = block_row_bounds(model, batch, generator, **options)
    for row in range(2):
        fields = ("tokens", "is_valid", "document")
        alone = TokenBatch(**{name: getattr(batch, name)[row : row + 1] for name in fields})
        rows = torch.tensor([row])
        nats, _ = block_row_bounds(model, alone, generator.select(rows), **options)
        assert float(nats[0]) == pytest.approx(float(together[row]), rel=1e-9)


def test_a_mask_that_stands_in_the_text_is_given() -> None:
    batch = packed_batch()
    tokens = batch.tokens.clone()
    tokens[0, 5] = tokens[1, 0] = MASK
    rows, is_target = target_rows(replace(batch, tokens=tokens), process(4, eos_token_id=EOS))
    assert bool((rows.tokens == MASK).any())
    assert bool(((rows.tokens != MASK) & rows.is_valid)[is_target].all())
    assert int((rows.is_target & ~is_target).sum()) == 2
