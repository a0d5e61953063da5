"""Block diffusion and block refinement: enumerated languages, direct computations, a tiny model."""

import itertools
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen3Config

from tokendiff.diffusion.attention_masks import MaskRule, dense
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator, strata_of
from tokendiff.diffusion.schedules import Cosine, LogLinear, NoiseSchedule
from tokendiff.models.causal_denoiser import AttentionKernel, TransformersCausalDenoiser
from tokendiff.objectives.block_diffusion import BlockDiffusion, encode_beside_clean
from tokendiff.objectives.block_refinement import BlockRefinement
from tokendiff.objectives.blocks import BlockRows, BlockSight, block_rows

V, MASK, EOS = 12, 0, 1  # of the tiny model


class VisibleTable:
    """The exact belief about each position given what the rule lets it see, and no more.

    What a position sees of tokens that are not the mask is one condition on the language; states
    are the logarithms of its conditional distribution. A rule that lets too much through makes a
    bound fall below the entropy, one that hides too much makes it rise.
    """

    def __init__(self, table: np.ndarray) -> None:
        self.table = table
        self._known: dict[tuple[Any, ...], Tensor] = {}

    def encode(self, tokens: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
        batch, length = tokens.shape
        seen = dense(rule, batch, length, length)[:, 0].tolist()
        states = []
        for row, place, sees in zip(tokens.tolist(), positions.tolist(), seen, strict=True):
            known = [(key, (place[key], row[key])) for key in range(length) if row[key] != MASK]
            for query in range(length):
                condition = {fact for key, fact in known if sees[query][key]}
                states.append(self._belief(place[query], tuple(sorted(condition))))
        return torch.stack(states).view(batch, length, -1)

    def head(self, hidden: Tensor) -> Tensor:
        return hidden

    def _belief(self, at: int, condition: tuple[tuple[int, int], ...]) -> Tensor:
        if (at, condition) not in self._known:
            table = self.table
            for axis, token in condition:
                only = np.zeros(table.shape[axis])
                only[token] = 1.0
                table = table * only.reshape([-1 if a == axis else 1 for a in range(table.ndim)])
            belief = table.sum(axis=tuple(a for a in range(table.ndim) if a != at))
            with np.errstate(divide="ignore"):
                logs = np.log(belief / belief.sum())
            self._known[at, condition] = torch.from_numpy(logs)
        return self._known[at, condition]


def whole_rows(tokens: Tensor) -> TokenBatch:
    return TokenBatch(tokens=tokens, is_valid=torch.ones_like(tokens, dtype=torch.bool))


def tiny_model(kernel: AttentionKernel | None = None) -> TransformersCausalDenoiser:
    config = Qwen3Config(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return TransformersCausalDenoiser(model.eval(), vocab_size=V, attention_kernel=kernel)


def packed_batch() -> TokenBatch:
    """Two rows of packed documents, the second one padded; most documents end with EOS."""
    tokens = torch.randint(2, V, (2, 16), generator=torch.Generator().manual_seed(3))
    runs = [[7, 5, 4], [3, 10]]
    document = torch.full((2, 16), -1)
    for row, lengths in enumerate(runs):
        stops = np.cumsum(lengths)
        for index, (length, stop) in enumerate(zip(lengths, stops, strict=True)):
            document[row, stop - length : stop] = index
            if (row, index) != (0, 2):  # which the row cuts off
                tokens[row, stop - 1] = EOS
    return TokenBatch(tokens=tokens, is_valid=document >= 0, document=document)


# Rows in blocks.


@pytest.mark.parametrize("block_length", [1, 3, 4, 20])
def test_documents_are_filled_up_to_whole_blocks(block_length: int) -> None:
    batch = packed_batch()
    rows = block_rows(batch, block_length=block_length, fill_token_id=EOS)
    for row in range(2):
        expected = []  # (token, document, position, source)
        for document in range(int(batch.document[row].max()) + 1):
            places = (batch.document[row] == document).nonzero()[:, 0].tolist()
            found = [(int(batch.tokens[row, place]), place) for place in places]
            while found[-1][0] == EOS and len(found) % block_length:
                found.append((EOS, -1))
            expected += [(t, document, at, source) for at, (t, source) in enumerate(found)]
        columns = (rows.tokens, rows.document, rows.position, rows.source)
        ours = list(zip(*(column[row].tolist() for column in columns), strict=True))
        assert ours[: len(expected)] == expected
        assert all(entry[1] == -1 for entry in ours[len(expected) :])
        blocks = [(entry[1], entry[2] // block_length) for entry in expected]
        numbers = {block: index for index, block in enumerate(dict.fromkeys(blocks))}
        assert rows.ordinal[row, : len(blocks)].tolist() == [numbers[block] for block in blocks]
        assert rows.block[row, : len(blocks)].tolist() == [block for _, block in blocks]


def test_without_a_filling_rows_stay_as_they_are() -> None:
    batch = packed_batch()
    rows = block_rows(batch, block_length=4, fill_token_id=None)
    assert torch.equal(rows.tokens, batch.tokens)
    assert torch.equal(rows.is_text, batch.is_valid)
    assert torch.equal(rows.is_valid, batch.is_valid)


# Block diffusion.


CORPUS = torch.tensor(
    [
        *([1, 2, 3, 1], [1, 2, 3, 1], [1, 2, 1, 1], [3, 2, 1, 1], [3, 3, 3, 2], [3, 3, 3, 3]),
        *([2, 1, 3, 1], [2, 1, 2, 3], [1, 2, 1, 1], [2, 2, 2, 2]),
    ]
)  # all that the language says, each row as often as it stands here


def empirical(corpus: Tensor) -> np.ndarray:
    table = np.zeros([4] * corpus.shape[1])
    np.add.at(table, tuple(corpus.T.numpy()), 1.0 / len(corpus))
    return table


def entropy_nats(corpus: Tensor) -> float:
    p = empirical(corpus).flatten()
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


@pytest.mark.parametrize(
    ("schedule", "block_length", "num_nodes"),
    # Under the log-linear schedule the integrand is a polynomial in t.
    [(LogLinear(eps=1e-9), length, 2) for length in (1, 2, 3, 4)] + [(Cosine(eps=1e-9), 2, 8)],
)
def test_the_bound_of_an_exact_model_is_the_entropy(
    schedule: NoiseSchedule, block_length: int, num_nodes: int
) -> None:
    objective = BlockDiffusion(
        kernel=AbsorbingKernel(schedule=schedule, mask_token_id=MASK),
        block_length=block_length,
        eos_token_id=None,
        min_time=1e-12,
    )
    model: Any = VisibleTable(empirical(CORPUS))
    rows = block_rows(whole_rows(CORPUS), block_length=block_length, fill_token_id=None)
    nodes, shares = np.polynomial.legendre.leggauss(num_nodes)
    total = 0.0
    for start in range(0, 4, block_length):
        places = range(start, min(start + block_length, 4))
        for chosen in itertools.chain.from_iterable(
            itertools.combinations(places, count) for count in range(1, len(places) + 1)
        ):
            is_masked = torch.zeros(CORPUS.shape, dtype=torch.bool)
            is_masked[:, list(chosen)] = True
            for node, share in zip(nodes, shares, strict=True):
                t = torch.full(CORPUS.shape, 0.5 * (node + 1.0), dtype=torch.float64)
                alpha = float(schedule.alpha(t[0, 0]))
                chance = (1.0 - alpha) ** len(chosen) * alpha ** (len(places) - len(chosen))
                output = objective.loss_at(model, rows, is_masked, t)
                total += 0.5 * share * chance * float(output.loss_sum)
    assert total / len(CORPUS) == pytest.approx(entropy_nats(CORPUS), rel=1e-6)


def test_draws_estimate_the_bound_and_times_are_stratified_by_block() -> None:
    count = 1024
    objective = BlockDiffusion(
        kernel=AbsorbingKernel(schedule=LogLinear(eps=1e-9), mask_token_id=MASK),
        block_length=2,
        eos_token_id=None,
        min_time=1e-9,
    )
    rows = CORPUS[torch.arange(count) % len(CORPUS)]
    strata = strata_of(0, torch.arange(count), count)
    generator = RowGenerator.for_rows(1, torch.arange(count), strata=strata)
    model: Any = VisibleTable(empirical(CORPUS))
    output = objective.loss(model, whole_rows(rows), generator)
    assert int(output.num_tokens) == rows.numel()
    assert float(output.loss_sum) / count == pytest.approx(entropy_nats(CORPUS), rel=0.05)

    seen: list[Tensor] = []

    class Spy(BlockDiffusion):
        def loss_at(self, model: Any, rows: BlockRows, is_masked: Tensor, t: Tensor) -> Any:
            seen.append(t)

    fields = {name: getattr(objective, name) for name in ("kernel", "block_length", "min_time")}
    Spy(eos_token_id=None, **fields).loss(model, whole_rows(rows), generator)
    for block in (0, 2):
        assert torch.equal(seen[0][:, block], seen[0][:, block + 1])
        assert torch.equal((seen[0][:, block] * count).long().sort().values, torch.arange(count))


@pytest.mark.slow
@pytest.mark.parametrize("block_length", [2, 4])
def test_exact_mask_counts_estimate_the_same_bound_with_less_variance(block_length: int) -> None:
    count, keys = 4 * len(CORPUS), 40
    rows = whole_rows(CORPUS.repeat(4, 1))
    model: Any = VisibleTable(empirical(CORPUS))
    nats: dict[bool, list[float]] = {}
    for exact in (False, True):
        objective = BlockDiffusion(
            kernel=AbsorbingKernel(schedule=LogLinear(eps=1e-9), mask_token_id=MASK),
            block_length=block_length,
            eos_token_id=None,
            exact_mask_counts=exact,
            min_time=1e-9,
        )
        nats[exact] = []
        for key in range(keys):
            strata = strata_of(key, torch.arange(count), count)
            generator = RowGenerator.for_rows(key, torch.arange(count), strata=strata)
            loss = objective.loss(model, rows, generator)
            nats[exact].append(float(loss.loss_sum) / count)
    error = np.std(nats[True]) / np.sqrt(keys)
    assert np.mean(nats[True]) == pytest.approx(entropy_nats(CORPUS), abs=4 * error)
    assert error < 0.03
    assert np.std(nats[True]) < 0.6 * np.std(nats[False])


def test_the_probability_of_a_block_says_nothing_of_its_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []

    def loss_at(_: Any, model: Any, rows: Any, is_masked: torch.Tensor) -> None:
        seen.append(is_masked)

    monkeypatch.setattr(BlockRefinement, "loss_at", loss_at)
    count = 600
    batch = whole_rows(torch.full((count, 8), EOS))
    generator = RowGenerator.for_rows(0, torch.arange(count))
    objective = BlockRefinement(mask_token_id=MASK, block_length=4, eos_token_id=EOS)
    objective.loss(tiny_model(), batch, generator)
    shares = seen[0].double().mean(0)
    assert shares.tolist() == pytest.approx([0.5] * 8, abs=0.08)


@pytest.mark.parametrize(("exact", "share"), [(False, 0.5), (True, 1.0)])
def test_weights_are_clipped_however_masks_are_drawn(exact: bool, share: float) -> None:
    """All of them are at least 1 here, 1/t or n/l; times from `min_time` on are a share of all."""
    objective = BlockDiffusion(
        kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK),
        block_length=4,
        eos_token_id=EOS,
        exact_mask_counts=exact,
        min_time=0.5,
        max_loss_weight=1.0,
    )
    generator = RowGenerator.for_rows(0, torch.arange(2), strata=torch.tensor([0.2, 0.7]))
    output = objective.loss(tiny_model(), packed_batch(), generator)
    nats = share * float(output.metrics["masked_nll"][0])
    assert float(output.loss_sum.detach()) == pytest.approx(nats, rel=1e-5)
    assert float(output.metrics["elbo"][0]) > 1.1 * nats


@pytest.mark.parametrize("kernel", ["tiles", "dense"])
def test_a_later_block_changes_no_bit_of_an_earlier_one(kernel: AttentionKernel) -> None:
    model = tiny_model(kernel)
    tokens = torch.randint(1, V, (2, 16), generator=torch.Generator().manual_seed(0))
    is_masked = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    other, other_masks = tokens.clone(), is_masked.clone()
    other[:, 8:] = other[:, 8:].flip(1) % (V - 1) + 1
    other_masks[:, 8:] ^= True
    logits = []
    for row, masks in ((tokens, is_masked), (other, other_masks)):
        rows = block_rows(whole_rows(row), block_length=4, fill_token_id=None)
        with torch.no_grad():
            states = encode_beside_clean(model, rows, masks, mask_token_id=MASK, sight=BlockSight())
            logits.append(model.head(states))
    assert torch.equal(logits[0][:, :8], logits[1][:, :8])
    assert not torch.equal(logits[0][:, 8:], logits[1][:, 8:])


def test_blocks_of_one_token_are_the_autoregressive_likelihood() -> None:
    """Asked of the model itself: the clean tokens before, and a mask at the next position."""
    model = tiny_model().double()
    tokens = torch.randint(1, V, (3, 7), generator=torch.Generator().manual_seed(0))
    expected = 0.0
    for row in tokens:
        for at in range(7):
            query = torch.cat([row[:at], torch.tensor([MASK])])[None]
            with torch.no_grad():
                logits = model.model(input_ids=query).logits[0, -1]
            logits[MASK] = -torch.inf
            expected -= float(logits.log_softmax(-1)[row[at]])
    objective = BlockDiffusion(
        kernel=AbsorbingKernel(schedule=LogLinear(eps=1e-12), mask_token_id=MASK),
        block_length=1,
        eos_token_id=None,
        min_time=1e-12,
    )
    rows = block_rows(whole_rows(tokens), block_length=1, fill_token_id=None)
    t = torch.ones(tokens.shape, dtype=torch.float64)  # where everything is masked
    output = objective.loss_at(model, rows, torch.ones_like(tokens).bool(), t)
    assert float(output.loss_sum.detach()) == pytest.approx(expected, rel=1e-9)


OBJECTIVES: dict[str, Any] = {
    "block_diffusion, exact counts": BlockDiffusion(
        kernel=AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK),
        block_length=4,
        eos_token_id=EOS,
        exact_mask_counts=True,
    ),
    "block_diffusion": BlockDiffusion(
        kernel=AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK),
        block_length=4,
        eos_token_id=EOS,
        lambda_conf=0.7,
        conf_temperature=0.5,
    ),
    **{
        f"block_refinement {mode}{' clean' * clean}": BlockRefinement(
            mask_token_id=MASK,
            block_length=4,
            eos_token_id=EOS,
            attention_mask_mode=mode,
            clean_context=clean,
            prompt_length=2,
            lambda_conf=0.7,
            conf_temperature=0.5,
        )
        for mode in ("2d", "4d")
        for clean in (False, True)
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    """What a row with another second document gives in its first is the same, bit for bit."""
    objective, model = OBJECTIVES[name], tiny_model()
    batch = packed_batch()
    tokens = batch.tokens.clone()
    tokens[0, 7:11] = (tokens[0, 7:11] - 1) % (V - 2) + 2
    states: list[Tensor] = []

    class Recorder:
        def encode(self, tokens: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
            states.append(model.encode(tokens, positions, rule))
            return states[-1]

        head = staticmethod(model.head)

    generator = RowGenerator.for_rows(0, torch.arange(2))
    for content in (batch.tokens, tokens):
        objective.loss(Recorder(), replace(batch, tokens=content), generator)
    # Where the second and the third begin, and where that ends: filled up to blocks of 4, or not.
    second, third, stop = (8, 16, 20) if states[0].shape[1] % 16 else (7, 12, 16)
    changed = states[0][0] != states[1][0]
    assert not bool(changed[:second].any())
    assert not bool(changed[third:stop].any())
    assert bool(changed[second:third].any())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_does_not_depend_on_how_rows_are_spread(name: str) -> None:
    objective, model = OBJECTIVES[name], tiny_model().double()
    first = packed_batch()
    tokens, is_valid, document = (
        torch.cat([field, field.roll(1, 0)])
        for field in (first.tokens, first.is_valid, first.document)
    )
    batch = TokenBatch(tokens=tokens, is_valid=is_valid, document=document)
    strata = strata_of(5, torch.arange(4), 4)
    generator = RowGenerator.for_rows(0, torch.arange(4), strata=strata)

    def results(parts: list[list[int]]) -> list[Any]:
        model.zero_grad(set_to_none=True)
        total: list[Tensor] = []
        for part in map(torch.tensor, parts):
            fields = ("tokens", "is_valid", "document")
            some = TokenBatch(**{field: getattr(batch, field)[part] for field in fields})
            output = objective.loss(model, some, generator.select(part))
            output.loss_sum.backward()
            pairs = [pair for _, pair in sorted(output.metrics.items())]
            sums = [output.loss_sum, output.num_tokens, *itertools.chain.from_iterable(pairs)]
            total = sums if not total else [a + b for a, b in zip(total, sums, strict=True)]
        gradients = [parameter.grad for parameter in model.parameters()]
        return [*(value.detach().double() for value in total), *gradients]

    whole = results([[0, 1, 2, 3]])
    for parts in ([[0, 2], [1, 3]], [[0], [1], [2], [3]]):
        for ours, theirs in zip(results(parts), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


# Block refinement.


@pytest.mark.parametrize("clean_context", [False, True])
@pytest.mark.parametrize("mode", ["2d", "4d"])
def test_each_token_is_a_target_once_and_the_prompt_is_never_touched(
    mode: Literal["2d", "4d"], clean_context: bool
) -> None:
    objective = BlockRefinement(
        mask_token_id=MASK,
        block_length=4,
        eos_token_id=EOS,
        attention_mask_mode=mode,
        clean_context=clean_context,
        prompt_length=5,
    )
    batch = packed_batch()
    batch.tokens[0, 9] = MASK  # a literal one is context
    inputs: list[Tensor] = []

    class Recorder:
        def encode(self, tokens: Tensor, positions: Tensor, rule: MaskRule) -> Tensor:
            inputs.append(tokens)
            return torch.zeros(*tokens.shape, V)

        @staticmethod
        def head(hidden: Tensor) -> Tensor:
            return hidden

    model: Any = Recorder()
    shares = []
    for seed in range(40):
        generator = RowGenerator.for_rows(seed, torch.arange(2))
        output = objective.loss(model, batch, generator)
        rows = objective.rows(batch)
        views = inputs[-1][:, : rows.tokens.shape[1]] == MASK
        first, second = views[:2], views[2:]
        is_prompt = rows.is_text & (rows.source < 5)
        is_literal = rows.tokens == MASK
        is_target = rows.is_valid & ~is_prompt & ~is_literal
        assert torch.equal(first ^ second, is_target)
        assert bool((first & second)[is_literal].all())
        assert not bool((first | second)[is_prompt].any())
        assert (
            int(output.num_tokens) == int((is_target & rows.is_text).sum()) == 16 + 13 - 2 * 5 - 1
        )
        assert rows.tokens.shape[1] == (16 if mode == "2d" else 20)
        shares.append(float(first[is_target].double().mean()))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "refinement" in name])
def test_cap_is_what_dense_logits_give_and_so_are_its_gradients(name: str) -> None:
    """Two forward passes over all positions, [B, W, V] logits, means taken by hand."""
    objective, model = OBJECTIVES[name], tiny_model().double()
    batch = packed_batch()
    rows = objective.rows(batch)
    is_masked = torch.rand(rows.tokens.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    is_causal = "2d" in name
    seen = torch.zeros(2, 1, *rows.tokens.shape[1:] * 2, dtype=torch.bool)
    width = rows.tokens.shape[1]
    for row, q, kv in itertools.product(range(2), range(width), range(width)):
        same = rows.document[row, q] == rows.document[row, kv]
        block_q, block_kv = (int(rows.position[row, at]) // 4 for at in (q, kv))
        seen[row, 0, q, kv] = same and (kv <= q if is_causal else block_kv <= block_q)
    is_prompt = rows.is_text & (rows.source < 2)
    is_target = rows.is_valid & ~is_prompt
    nll, entropy, correct, count = [torch.zeros(2, dtype=torch.float64) for _ in range(4)]
    for masks in (is_target & is_masked, is_target & ~is_masked):
        logits = torch.zeros(2, width, V, dtype=torch.float64)
        if "clean" in name:
            for row in range(2):  # each block by itself, after the clean ones before it
                for document in range(int(rows.document[row].max()) + 1):
                    places = (rows.document[row] == document).nonzero()[:, 0]
                    for at in range(0, len(places), 4):
                        upto = places[: at + 4]
                        block = places[at : at + 4]
                        x = rows.tokens[row, upto].clone()
                        x[at:][masks[row, block]] = MASK
                        own = seen[row : row + 1, :, upto][:, :, :, upto]
                        logits[row, block] = model.model(
                            input_ids=x[None], attention_mask=own
                        ).logits[0, at:]
        else:
            x = rows.tokens.masked_fill(masks, MASK)
            logits = model.model(
                input_ids=x, position_ids=rows.position, attention_mask=seen
            ).logits
        logits = logits.index_fill(-1, torch.tensor([MASK]), -1e30)
        nll = nll + (
            functional.cross_entropy(
                logits.flatten(0, 1), rows.tokens.flatten(), reduction="none"
            ).view(2, -1)
            * masks
        ).sum(1)
        tempered = torch.distributions.Categorical(logits=logits / 0.5).entropy()
        is_right = masks & (logits.argmax(-1) == rows.tokens)
        entropy = entropy + (tempered * is_right).sum(1)
        correct = correct + is_right.sum(1)
        count = count + masks.sum(1)
    expected = (nll + 0.7 * count * entropy / correct.clamp(min=1)).sum()
    assert bool((correct > 0).any())
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    output = objective.loss_at(model, rows, is_masked)
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-9, atol=0)
    output.loss_sum.backward()
    # transformers normalises in float32, whatever the weights are.
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"block_length": 0}, "block_length must be at least 1, got 0"),
        ({"attention_mask_mode": "3d"}, "attention_mask_mode must be '2d' or '4d', got '3d'"),
        ({"prompt_length": -1}, "prompt_length must not be negative, got -1"),
        ({"lambda_conf": -0.1}, "lambda_conf must not be negative, got -0.1"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        BlockRefinement(**{"mask_token_id": 0, "block_length": 4, "eos_token_id": 1, **fields})
