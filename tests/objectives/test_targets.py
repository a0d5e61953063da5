"""Losses of answers given their prompts, for every objective: what is noised, what is counted, what
has a gradient; and against enumerated tables over (prompt, answer).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.builders import AnswerDenoiser
from tests.models.test_models import tiny_denoiser
from tests.objectives import test_dflash as drafts
from tests.objectives.test_block_objectives import EOS, MASK, V, packed_batch, tiny_model
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.diffusion.attention_masks import (
    block_causal_by_begin,
    causal_by_position,
    causal_up_to,
)
from tokendiff.diffusion.interfaces import Request, TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel, ForwardKernel, HybridKernel, UniformKernel
from tokendiff.diffusion.random import RowGenerator, strata_of
from tokendiff.diffusion.schedules import Cosine, LogLinear
from tokendiff.diffusion.splitmix import key_from
from tokendiff.evaluation.bound import row_bounds
from tokendiff.models.causal import CausalModel
from tokendiff.objectives.autoregressive import Autoregressive, row_nats
from tokendiff.objectives.block_diffusion import BlockDiffusion, encode_beside_clean
from tokendiff.objectives.block_refinement import BlockRefinement
from tokendiff.objectives.block_uniform import UniformBlockDiffusion
from tokendiff.objectives.blocks import BlockSight, block_rows
from tokendiff.objectives.dflash import DFlash, draw_anchors
from tokendiff.objectives.draft_weights import decay_weights
from tokendiff.objectives.mdlm import MDLM
from tokendiff.objectives.token_noise import TokenNoiseDiffusion
from tokendiff.samplers.block_refinement import BlockRefinementSampler
from tokendiff.verification.block_checkpoints import LoadedBlockCheckpoint, block_rules
from tokendiff.verification.oracles import entropy, toy_language

ABSORBING = AbsorbingKernel(schedule=Cosine(), mask_token_id=MASK)
UNIFORM = UniformKernel(schedule=Cosine(), vocab_size=V, mask_token_id=MASK)
HYBRID = HybridKernel(vocab_size=V, mask_token_id=MASK, p_uniform=0.2, gamma=1.0)
BLOCKS: dict[str, Any] = {"block_length": 4, "eos_token_id": EOS}
WHOLE_ROWS: dict[str, Any] = {
    "mdlm": MDLM(kernel=ABSORBING),
    "mdlm, confidence": MDLM(kernel=ABSORBING, lambda_conf=0.5),
    "udlm": TokenNoiseDiffusion(kernel=UNIFORM),
    "hybrid": TokenNoiseDiffusion(kernel=HYBRID, lambda_conf=0.5),
    "hybrid, cross-entropy": TokenNoiseDiffusion(kernel=HYBRID, loss_type="cross_entropy"),
}
BY_BLOCKS: dict[str, Any] = {
    "block_refinement 2d": BlockRefinement(mask_token_id=MASK, lambda_conf=0.5, **BLOCKS),
    "block_refinement 4d": BlockRefinement(
        mask_token_id=MASK, attention_mask_mode="4d", clean_context=True, **BLOCKS
    ),
    "block_diffusion": BlockDiffusion(kernel=ABSORBING, **BLOCKS),
    "block_diffusion, exact": BlockDiffusion(kernel=ABSORBING, exact_mask_counts=True, **BLOCKS),
    "block_diffusion, next": BlockDiffusion(kernel=ABSORBING, predicts_next=True, **BLOCKS),
    "block_diffusion, joint": BlockDiffusion(
        kernel=ABSORBING, ar_loss_weight=0.7, diffusion_loss_weight=0.3, **BLOCKS
    ),
    "block_diffusion, joint, next": BlockDiffusion(
        kernel=ABSORBING, ar_loss_weight=0.7, predicts_next=True, lambda_conf=0.2, **BLOCKS
    ),
}
BY_BLOCKS |= {
    f"{name}, from answers": replace(objective, restarts_at_answers=True)
    for name, objective in BY_BLOCKS.items()
}
OBJECTIVES = {**WHOLE_ROWS, **BY_BLOCKS, "ar": Autoregressive()}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def chats() -> TokenBatch:
    """Two rows of packed documents; some answers lie in the middle of a document, one runs over a
    block's end, and of the documents that are filled up one ends with an answer and one does not.
    """
    batch = packed_batch()
    is_target = torch.zeros_like(batch.is_valid)
    is_target[0, 2:7] = is_target[0, 9] = is_target[0, 14:] = True
    is_target[1, 5:9] = True  # its last document, of 10 tokens, ends without one
    return replace(batch, is_target=is_target)


def talks() -> TokenBatch:
    """Two rows of two documents, in which questions and answers of 2 to 8 tokens take turns."""
    rng = np.random.default_rng(0)
    tokens = torch.tensor(rng.integers(2, V, (2, 60)))
    is_target, document = torch.zeros(2, 60, dtype=torch.bool), torch.zeros(2, 60).long()
    for row, first in enumerate((32, 20)):
        document[row, first:] = 1
        tokens[row, first - 1] = EOS
        place, is_answer = 0, False
        while place < 60:
            stop = min(place + int(rng.integers(2, 9)), 60 if place >= first else first)
            is_target[row, place:stop] = is_answer
            place, is_answer = stop, stop != first and not is_answer
    is_valid = torch.ones_like(is_target)
    return TokenBatch(tokens=tokens, is_valid=is_valid, document=document, is_target=is_target)


def draws(num_rows: int = 2) -> RowGenerator:
    ids = torch.arange(num_rows)
    return RowGenerator.for_rows(key_from(4), ids, strata=strata_of(key_from(4), ids, num_rows))


@dataclass
class Watched:
    """A model whose hidden states can be asked for their gradient."""

    model: Any

    def encode(self, tokens: Tensor, *args: Any) -> Tensor:
        self.tokens = tokens
        self.states: Tensor = self.model.encode(tokens, *args).detach().requires_grad_()
        return self.states

    def head(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.model.head(hidden)
        return logits


def block_process(**changes: Any) -> NoiseProcess:
    fields: dict[str, Any] = {
        "forward_process": "absorbing",
        "vocab_size": V,
        "mask_token_id": MASK,
        "max_length": 64,
        "block_length": 4,
        "attention_mask_mode": "4d",
        "clean_context": True,
        "eos_token_id": EOS,
    }
    return NoiseProcess(**{**fields, **changes})


def model_for(name: str) -> Any:
    return tiny_denoiser("bert", vocab_size=V) if name in WHOLE_ROWS else tiny_model()


def may_be_counted(name: str, batch: TokenBatch) -> Tensor:
    """[B, W] by plain loops: where states may have a gradient, W being as long as the objective
    makes its rows.
    """
    if name == "ar":
        shifted = torch.zeros_like(batch.is_target)
        shifted[:, :-1] = batch.is_target[:, 1:] & (batch.document[:, 1:] == batch.document[:, :-1])
        return shifted
    if name in WHOLE_ROWS or "2d" in name:
        return batch.is_target
    if "from answers" in name:
        rows = [[place.is_target for place in row] for row in answer_places(batch)]
    else:
        rows = []
        for row in range(len(batch.tokens)):
            expected: list[bool] = []
            for index in range(int(batch.document[row].max()) + 1):
                places = (batch.document[row] == index).nonzero()[:, 0].tolist()
                of_text = [bool(batch.is_target[row, place]) for place in places]
                is_filled = int(batch.tokens[row, places[-1]]) == EOS
                expected += of_text + [of_text[-1]] * (-len(places) % 4 if is_filled else 0)
            rows.append(expected)
    width = max(map(len, rows))
    return torch.tensor([row + [False] * (width - len(row)) for row in rows])


def may_tell(name: str, batch: TokenBatch, may: Tensor) -> Tensor:
    """[B, 2 W] by plain loops: which states of `[x_t ; x_0]` tell a token that `may` [B, W] be
    counted, of a block or behind clean text.
    """
    rows = block_rows(
        batch, block_length=4, fill_token_id=EOS, restarts_at_answers="from answers" in name
    )
    width = may.shape[1]
    tells = torch.zeros(len(may), 2 * width, dtype=torch.bool)
    for row, place in may.nonzero().tolist():
        is_text, position = bool(rows.is_text[row, place]), int(rows.position[row, place])
        if "next" not in name:
            tells[row, place] = True
        elif position > 0:
            is_first = int(rows.ordinal[row, place]) != int(rows.ordinal[row, place - 1])
            tells[row, place - 1 + width * is_first] = True
        if "joint" in name and is_text and position > 0:
            tells[row, width + place - 1] = True
    return tells


@dataclass(frozen=True)
class Place:
    token: int
    document: int
    position: int
    block: int
    source: int
    is_target: bool


def answer_places(batch: TokenBatch, *, block_length: int = 4) -> list[list[Place]]:
    """By plain loops: rows whose blocks start anew at each answer and behind it, answers that end
    in the row filled up.
    """
    rows = []
    for row in range(len(batch.tokens)):
        found: list[Place] = []
        for document in range(int(batch.document[row].max()) + 1):
            places = (batch.document[row] == document).nonzero()[:, 0].tolist()
            block, in_block, was_target = -1, block_length, None
            for at, place in enumerate(places):
                is_target, token = bool(batch.is_target[row, place]), int(batch.tokens[row, place])
                if is_target != was_target or in_block == block_length:
                    block, in_block, was_target = block + 1, 0, is_target
                found.append(Place(token, document, at, block, place, is_target))
                in_block += 1
                is_last = at + 1 == len(places)
                if not is_target or (not is_last and batch.is_target[row, places[at + 1]]):
                    continue
                if not is_last or token == EOS:
                    for behind in range(1, block_length - in_block + 1):
                        found.append(Place(EOS, document, at + behind, block, -1, True))
        rows.append(found)
    return rows


@pytest.mark.parametrize("block_length", [1, 3, 4, 20])
def test_blocks_start_anew_at_each_answer_and_behind_it(block_length: int) -> None:
    batch = chats()
    rows = block_rows(batch, block_length=block_length, fill_token_id=EOS, restarts_at_answers=True)
    unfilled = block_rows(
        batch, block_length=block_length, fill_token_id=None, restarts_at_answers=True
    )
    assert torch.equal(unfilled.tokens, batch.tokens)
    for row, expected in enumerate(answer_places(batch, block_length=block_length)):
        for found, kept in ((rows, expected), (unfilled, [p for p in expected if p.source >= 0])):
            names = ("tokens", "document", "position", "block", "source", "is_target")
            columns = [getattr(found, name)[row].tolist() for name in names]
            ours = [Place(*entry) for entry in zip(*columns, strict=True)]
            assert ours[: len(kept)] == kept
            assert all(place.document == -1 and not place.is_target for place in ours[len(kept) :])
            blocks = [(place.document, place.block) for place in kept]
            numbers = {block: index for index, block in enumerate(dict.fromkeys(blocks))}
            assert found.ordinal[row, : len(kept)].tolist() == [numbers[b] for b in blocks]


def test_blocks_of_text_are_the_same_wherever_answers_would_start_anew() -> None:
    for batch in (packed_batch(), replace(packed_batch(), is_target=packed_batch().is_valid)):
        for fill in (None, EOS):
            one, other = (
                block_rows(batch, block_length=4, fill_token_id=fill, restarts_at_answers=restarts)
                for restarts in (True, False)
            )
            for name, column in vars(one).items():
                if isinstance(column, Tensor):
                    assert torch.equal(column, getattr(other, name)), name


SIGHTS: dict[str, dict[str, bool]] = {
    "2d": {"is_causal": True},
    "4d": {},
    "4d, causal context": {"context_is_causal": True},
    "4d, next": {"predicts_next": True},
    "4d, causal context, next": {"context_is_causal": True, "predicts_next": True},
}


@pytest.mark.parametrize("name", SIGHTS)
@torch.no_grad()
def test_an_answer_is_trained_on_as_decoding_meets_it(name: str) -> None:
    """The first pass over each block of an answer, behind a prompt with earlier answers: the same
    greedy tokens, and the same confidence, as a pass over `[x_t ; x_0]` gives where the block is
    all masks.
    """
    mode, sight = name[:2], BlockSight(**SIGHTS[name])
    batch, denoiser = talks(), tiny_model()
    decoder = AutoModelForCausalLM.from_config(denoiser.model.config, attn_implementation="sdpa")
    decoder.load_state_dict(denoiser.model.state_dict())
    model = CausalModel(decoder.eval(), vocab_size=V)
    denoiser = tiny_model()  # the config was shared
    fill = EOS if mode == "4d" else None
    rows = block_rows(batch, block_length=4, fill_token_id=fill, restarts_at_answers=True)
    sampler = BlockRefinementSampler(
        mask_token_id=MASK,
        block_length=4,
        max_new_tokens=3,  # the rest of a block is there all the same
        num_inference_steps=1,
        threshold=0.0,
        temperature=0.0,
        attention_mask_mode=mode,
        sees_tail=True,
        context_is_causal=sight.context_is_causal,
        predicts_next=sight.predicts_next,
    )
    num_compared = num_behind_answers = 0
    for row, places in enumerate(answer_places(batch)):
        for document, block in dict.fromkeys((p.document, p.block) for p in places if p.is_target):
            text = [p for p in places if p.document == document and p.source >= 0]
            before = [p for p in text if p.block < block]
            own = [p for p in text if p.block == block]
            if not before or (mode == "2d" and len(own) < 4):
                continue
            edges = [
                b.position for a, b in itertools.pairwise(before) if a.is_target != b.is_target
            ]
            if not before[-1].is_target:
                edges.append(len(before))
            prompt = tuple(p.token for p in before)
            request = Request(id=0, prompt=prompt, block_starts=tuple(edges))
            (done,) = sampler.complete(model, [request], key=0, num_slots=1)
            is_own = (rows.document[row] == document) & (rows.block[row] == block)
            is_masked = torch.zeros_like(rows.is_valid)
            is_masked[row] = is_own
            hidden = encode_beside_clean(
                denoiser,
                rows,
                is_masked,
                mask_token_id=MASK,
                sight=sight,
            )
            own_block = rows.tokens[row, is_own]
            if len(own_block) < 4:  # cut off by the row
                continue
            logits = denoiser.head(hidden[row, is_own])
            expected = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf).argmax(-1)
            assert done.tokens == expected.tolist()[:3], (row, document, block)
            # And all logits, of the prompt and a block of masks.
            x_t = torch.tensor([[*prompt, *[MASK] * len(own_block)]])
            begins = request.block_begins(4, x_t.shape[1])[None]
            rule = causal_by_position if mode == "2d" else block_causal_by_begin(begins)
            if sight.context_is_causal:
                rule = causal_up_to(torch.tensor([len(prompt)]))
            cache, first = model.new_cache(1), torch.zeros(1, dtype=torch.int64)
            count = torch.tensor([x_t.shape[1]])
            states = model.encode(x_t, count, cache, first, rule)[0]
            told_by = len(prompt) - int(sight.predicts_next)
            states = states[told_by : told_by + len(own_block)]
            torch.testing.assert_close(model.head(states), logits, rtol=1e-4, atol=1e-4)
            num_compared += 1
            num_behind_answers += any(p.is_target for p in before)
    assert num_compared >= 8
    assert num_behind_answers >= 6


@pytest.mark.parametrize("context", ["block", "causal"])
@pytest.mark.parametrize("predict", ["own", "next"])
@pytest.mark.parametrize(
    "noise",
    [
        {},
        {"forward_process": "uniform", "alpha_schedule": "cosine"},
        {"forward_process": "uniform", "prediction": "posterior"},
    ],
)
def test_the_certificate_holds_for_chats_of_several_answers(
    context: str, predict: str, noise: dict[str, str]
) -> None:
    process = block_process(
        block_start="answer", context_attention=context, predict=predict, **noise
    )
    model = tiny_model().double()
    loaded = LoadedBlockCheckpoint(process=process, model=model, batch=talks())
    for check in block_rules(process):
        assert check.figure(loaded) <= check.tolerance, check


@every_objective
def test_states_of_prompt_tokens_have_no_gradient_and_prompts_stay_clean(name: str) -> None:
    batch, objective = chats(), OBJECTIVES[name]
    watched = Watched(model_for(name))
    output = objective.loss(watched, batch, draws())
    (gradient,) = torch.autograd.grad(output.loss_sum, watched.states)
    may = may_be_counted(name, batch)
    if "refinement" in name:
        may = may.repeat(2, 1)  # both views
    rows, width = may.shape
    has_gradient = gradient.ne(0.0).any(-1)
    tells = torch.zeros_like(has_gradient)  # of the clean half, where there is one, nothing does
    tells[:, :width] = may
    if "joint" in name or "next" in name:
        tells = may_tell(name, batch, may)
        assert bool(has_gradient[:, width:].any())
    assert not bool((has_gradient & ~tells).any())
    assert bool(has_gradient[:, :width].any())
    if name != "ar":
        clean = batch.tokens
        if name in BY_BLOCKS and "2d" not in name:
            clean = block_rows(
                batch,
                block_length=4,
                fill_token_id=EOS,
                restarts_at_answers="from answers" in name,
            ).tokens
        clean = clean.repeat(rows // 2, 1)
        assert torch.equal(watched.tokens[:, :width][~may], clean[~may])
        assert bool((watched.tokens[:, :width] != clean)[may].any())


@every_objective
def test_an_answer_is_noised_as_it_is_where_all_is_a_target(name: str) -> None:
    """The same numbers, drawn in the same order; how many tokens are masked exactly is another
    matter, since it depends on how many there are, and so do blocks that start with an answer.
    """
    if name == "ar" or "exact" in name or "from answers" in name:
        pytest.skip("nothing is drawn, or what is drawn is a number of targets")
    batch, objective, watched = chats(), OBJECTIVES[name], Watched(model_for(name))
    may = may_be_counted(name, batch)
    noisy = []
    for each in (batch, replace(batch, is_target=batch.is_valid)):
        objective.loss(watched, each, draws())
        noisy.append(watched.tokens[: len(may), : may.shape[1]])
    assert torch.equal(noisy[0][may], noisy[1][may])
    assert not torch.equal(noisy[0], noisy[1])


@every_objective
def test_the_loss_of_a_row_is_that_of_its_targets_and_of_no_targets_is_nothing(name: str) -> None:
    batch, objective, model = chats(), OBJECTIVES[name], model_for(name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    only_first = batch.is_target.clone()
    only_first[1] = False
    generator = draws()
    both = objective.loss(model, replace(batch, is_target=only_first), generator)
    alone = TokenBatch(
        tokens=batch.tokens[:1],
        is_valid=batch.is_valid[:1],
        document=batch.document[:1],
        is_target=batch.is_target[:1],
    )
    expected = objective.loss(model, alone, generator.select(torch.tensor([0])))
    torch.testing.assert_close(both.loss_sum, expected.loss_sum, rtol=1e-4, atol=1e-5)
    assert int(both.num_tokens) == int(expected.num_tokens)
    none = objective.loss(model, replace(batch, is_target=torch.zeros_like(only_first)), generator)
    assert float(none.loss_sum.detach()) == 0.0
    assert float(none.num_tokens) == 0.0
    gradients = torch.autograd.grad(none.loss_sum, parameters, materialize_grads=True)
    assert all(bool((gradient == 0.0).all()) for gradient in gradients)


@every_objective
def test_isolated_documents_are_told_to_the_denoiser(name: str) -> None:
    """In rows of isolated documents neither loss nor bound depends on a neighbour; otherwise a
    denoiser's does.
    """
    if name not in WHOLE_ROWS:
        pytest.skip("a causal model isolates documents whatever the rows say")
    batch, objective, model = chats(), OBJECTIVES[name], model_for(name)
    is_target = batch.is_target & (batch.document == 0)
    other = torch.where(batch.document > 0, 2 + batch.tokens % (V - 2), batch.tokens)
    for isolates in (True, False):
        ours, theirs = (
            replace(batch, tokens=tokens, is_target=is_target, isolates_documents=isolates)
            for tokens in (batch.tokens, other)
        )
        losses = [objective.loss(model, each, draws()).loss_sum.detach() for each in (ours, theirs)]
        assert torch.equal(losses[0], losses[1]) == isolates
        bounds = [
            row_bounds(model, each, draws(), kernel=objective.kernel, num_mask_samples=1)[0]
            for each in (ours, theirs)
        ]
        assert torch.equal(bounds[0], bounds[1]) == isolates


BY_TIME: dict[str, Any] = {
    **WHOLE_ROWS,
    "udlm, cross-entropy": TokenNoiseDiffusion(kernel=UNIFORM, loss_type="cross_entropy"),
    "block_diffusion": BlockDiffusion(kernel=ABSORBING, **BLOCKS),
    "block_uniform": UniformBlockDiffusion(kernel=UNIFORM, **BLOCKS),
    "block_uniform, cross-entropy": UniformBlockDiffusion(
        kernel=UNIFORM, loss_type="cross_entropy", **BLOCKS
    ),
}


@pytest.mark.parametrize("name", BY_TIME)
def test_no_time_before_the_least_is_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, seen = replace(BY_TIME[name], min_time=0.95), []

    def loss_at(
        _: Any, model: Any, rows: Any, x_t: Tensor, t: Tensor, *__: Any, **___: Any
    ) -> None:
        seen.append(t)

    monkeypatch.setattr(type(objective), "loss_at", loss_at)
    objective.loss(model_for(name), chats(), draws())
    (t,) = seen
    assert 0.95 <= float(t.min()) < float(t.max()) <= 1.0


# Enumerated tables over (answer, prompt, answer).

KERNELS: dict[str, Callable[[], tuple[ForwardKernel, Any]]] = {
    "absorbing": lambda: _of(AbsorbingKernel(schedule=LogLinear(), mask_token_id=2), MDLM),
    "uniform": lambda: _of(
        UniformKernel(schedule=LogLinear(), vocab_size=4, mask_token_id=2), TokenNoiseDiffusion
    ),
    "hybrid": lambda: _of(
        HybridKernel(vocab_size=4, mask_token_id=2, p_uniform=0.2, gamma=1.0), TokenNoiseDiffusion
    ),
}


def _of(kernel: Any, objective: Any) -> tuple[ForwardKernel, Any]:
    return kernel, objective(kernel=kernel, min_time=1e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_loss_and_bound_of_the_exact_denoiser_are_the_conditional_entropy(name: str) -> None:
    """The prompt stands between the two tokens of its answer."""
    kernel, objective = KERNELS[name]()
    table = toy_language(4, 3, 2, seed=1, concentration=2.0)
    exact = entropy(table) - entropy(table.sum((0, 2)))
    rows = torch.tensor(np.argwhere(table > 0))
    weight = torch.tensor(table[table > 0])
    copies = 800
    tokens = rows.repeat_interleave(copies, 0)
    is_target = torch.tensor([True, False, True]).expand_as(tokens)
    batch = TokenBatch(tokens=tokens, is_valid=torch.ones_like(tokens).bool(), is_target=is_target)
    generator = RowGenerator.for_rows(0, torch.arange(len(tokens)))
    model = AnswerDenoiser(table, kernel)
    nats, num_tokens = row_bounds(model, batch, generator, kernel=kernel, num_mask_samples=8)
    assert set(num_tokens.tolist()) == {2}
    drawn = nats.view(len(rows), copies)
    error = float((weight**2 * drawn.var(1) / copies).sum().sqrt())
    assert error < 0.02 * exact
    mean = float((weight * drawn.mean(1)).sum())
    assert abs(mean - exact) < 4 * error + 0.001 * exact
    assert abs(mean - entropy(table)) > 20 * error  # which a prompt that counts would give

    chosen = torch.multinomial(weight, 20000, True, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(len(chosen))
    spread = RowGenerator.for_rows(key_from(0), ids, strata=strata_of(key_from(1), ids, len(ids)))
    drawn_batch = TokenBatch(
        tokens=rows[chosen],
        is_valid=torch.ones(len(ids), 3, dtype=torch.bool),
        is_target=is_target[: len(ids)],
    )
    loss = objective.loss(model, drawn_batch, spread)
    assert int(loss.num_tokens) == 2 * len(ids)
    assert float(loss.loss_sum / len(ids)) == pytest.approx(exact, rel=0.05)


def test_ar_is_the_likelihood_of_the_answers() -> None:
    """Each document by itself through the transformers model, summed by plain loops."""
    batch, denoiser = chats(), tiny_model()
    nats, num_tokens = row_nats(denoiser, batch)
    for row in range(2):
        expected, count = 0.0, 0
        for index in range(int(batch.document[row].max()) + 1):
            places = (batch.document[row] == index).nonzero()[:, 0]
            with torch.no_grad():
                logits = tiny_model().model(input_ids=batch.tokens[row, places][None]).logits[0]
            log_p = logits.double().log_softmax(-1)
            for at in range(1, len(places)):
                if batch.is_target[row, places[at]]:
                    expected -= float(log_p[at - 1, batch.tokens[row, places[at]]])
                    count += 1
        assert float(nats[row]) == pytest.approx(expected, rel=1e-5)
        assert int(num_tokens[row]) == count


# Drafts.


def draft_chats() -> TokenBatch:
    batch = drafts.some_batch()
    is_target = torch.zeros_like(batch.is_valid)
    is_target[0, 3:6] = is_target[0, 7:9] = is_target[0, 12:] = True
    is_target[1, 0] = is_target[1, 2] = is_target[1, 7:12] = True
    return replace(batch, is_target=is_target)


def allowed_anchors(batch: TokenBatch) -> list[list[int]]:
    """Those with a target behind them."""
    return [
        [place for place in places if batch.is_target[row, place + 1]]
        for row, places in enumerate(drafts.every_anchor())
    ]


def test_anchors_lie_where_a_target_follows() -> None:
    batch = draft_chats()
    anchors, is_anchor = draw_anchors(batch, RowGenerator.for_rows(0, torch.arange(3)), 64)
    drawn = [row[chosen].tolist() for row, chosen in zip(anchors, is_anchor, strict=True)]
    assert drawn == allowed_anchors(batch)
    assert drawn[2] == []  # a row without targets


def test_a_drafts_loss_ends_with_the_answer_that_its_block_is_in() -> None:
    trainee, batch = drafts.tiny_trainee(), draft_chats()
    objective = DFlash(block_size=drafts.BLOCK, mask_token_id=drafts.MASK)
    output = objective.loss_at(trainee, batch, *drafts.as_tensors(allowed_anchors(batch)))
    weights = decay_weights(drafts.BLOCK).tolist()
    expected, total, count = 0.0, 0.0, 0
    for row, anchor, nll, _ in drafts.plain_blocks(trainee):
        if anchor not in allowed_anchors(batch)[row]:
            continue
        for k, value in enumerate(nll):
            if not batch.is_target[row, anchor + 1 + k]:
                break
            expected += weights[k] * value
            total, count = total + weights[k], count + 1
    assert float(output.loss_sum.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(output.num_tokens) == pytest.approx(total)
    assert int(output.metrics["draft_accuracy"][1]) == count
    none = replace(batch, is_target=torch.zeros_like(batch.is_target))
    nothing = objective.loss(trainee, none, RowGenerator.for_rows(0, torch.arange(3)))
    assert float(nothing.loss_sum.detach()) == float(nothing.num_tokens) == 0.0
