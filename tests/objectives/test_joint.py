"""One pass over `[x_t ; x_0]` that carries two losses: each is that of its own objective."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objectives.test_block_objectives import EOS, MASK, V, tiny_model, whole_rows
from tests.objectives.test_targets import block_process, chats, draws, talks
from tokendiff.diffusion.interfaces import LossOutput, TokenBatch
from tokendiff.diffusion.kernels import AbsorbingKernel
from tokendiff.diffusion.random import RowGenerator
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.evaluation.block_bound import block_row_bounds, sight_of
from tokendiff.models.causal_denoiser import TransformersCausalDenoiser
from tokendiff.objectives.autoregressive import Autoregressive, row_nats
from tokendiff.objectives.block_diffusion import BlockDiffusion
from tokendiff.objectives.blocks import BlockSight, block_rows

KERNEL = AbsorbingKernel(schedule=LogLinear(), mask_token_id=MASK)
BATCHES = {"text": lambda: replace(chats(), is_target=chats().is_valid), "chats": chats}
BATCHES |= {"talks": talks}


def blocks(**changes: Any) -> BlockDiffusion:
    fields = {"kernel": KERNEL, "block_length": 4, "eos_token_id": EOS}
    return BlockDiffusion(**{**fields, **changes})


def gradients(
    objective: Any, batch: TokenBatch, model: TransformersCausalDenoiser
) -> tuple[LossOutput, list[Tensor]]:
    output = objective.loss(model, batch, draws(len(batch.tokens)))
    parameters = list(model.parameters())
    found = torch.autograd.grad(output.loss_sum, parameters, allow_unused=True)
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    return output, [z if g is None else g for g, z in zip(found, zeros, strict=True)]


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("name", BATCHES)
def test_the_next_token_loss_alone_is_that_of_ar_as_it_is_weighted(
    name: str, weight: float
) -> None:
    batch, model = BATCHES[name](), tiny_model()
    ours, here = gradients(blocks(ar_loss_weight=weight, diffusion_loss_weight=0.0), batch, model)
    theirs, there = gradients(Autoregressive(), batch, model)
    assert torch.equal(ours.loss_sum, weight * theirs.loss_sum)
    assert torch.equal(ours.num_tokens, theirs.num_tokens)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one, weight * other)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("predicts_next", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_both_losses_are_added_as_they_are_weighted(
    name: str, predicts_next: bool, restarts: bool
) -> None:
    """The clean half costs what `ar` says of the rows; what is left depends on the weight of the
    blocks alone.
    """
    batch, model = BATCHES[name](), tiny_model().double()
    fields = {"predicts_next": predicts_next, "restarts_at_answers": restarts}
    following, of_following = gradients(Autoregressive(), batch, model)
    outputs, found = [], []
    for weights in ((1.0, 1.0), (0.7, 0.3)):
        joint = blocks(ar_loss_weight=weights[0], diffusion_loss_weight=weights[1], **fields)
        output, grads = gradients(joint, batch, model)
        rest = output.loss_sum - weights[0] * following.loss_sum
        outputs.append(rest / weights[1])
        found.append(
            [(g - weights[0] * f) / weights[1] for g, f in zip(grads, of_following, strict=True)]
        )
        nats, count = output.metrics["ar_nll"]
        torch.testing.assert_close(nats.double(), following.loss_sum.detach().double())
        assert int(count) == int(following.num_tokens)
        torch.testing.assert_close(output.metrics["elbo"][0].double(), outputs[-1].detach())
    torch.testing.assert_close(*outputs)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.7, 0.3)])
@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("predicts_next", [False, True])
@pytest.mark.parametrize("name", BATCHES)
@torch.no_grad()
def test_the_loss_is_that_of_each_document_and_block_by_itself(
    name: str, predicts_next: bool, restarts: bool, weights: tuple[float, float]
) -> None:
    """Held against transformers, with one pass for each document and for each block of it."""
    batch, model = BATCHES[name](), tiny_model().double()
    objective = blocks(
        ar_loss_weight=weights[0],
        diffusion_loss_weight=weights[1],
        predicts_next=predicts_next,
        restarts_at_answers=restarts,
    )
    generator = draws(len(batch.tokens))
    rows = block_rows(batch, block_length=4, fill_token_id=EOS, restarts_at_answers=restarts)
    spread = generator.stratified()[:, None] + rows.ordinal * ((math.sqrt(5.0) - 1.0) / 2.0)
    t = objective.min_time + (1.0 - objective.min_time) * torch.remainder(spread, 1.0)
    is_noise = generator.uniform(rows.tokens.shape[1]) < 1.0 - KERNEL.alpha(t)
    weight = (1.0 - objective.min_time) * KERNEL.masked_loss_weight(t)
    has_loss = rows.is_target & (rows.tokens != MASK)
    plain = copy.deepcopy(model.model)
    plain.set_attn_implementation("sdpa")

    def logits_of(tokens: Tensor, positions: Tensor, is_seen: Tensor) -> Tensor:
        output = plain(
            input_ids=tokens[None], position_ids=positions[None], attention_mask=is_seen[None, None]
        )
        logits: Tensor = output.logits[0]
        return logits

    expected = 0.0
    for row in range(len(batch.tokens)):
        for document in range(int(batch.document[row].max()) + 1):
            own = (batch.document[row] == document).nonzero()[:, 0]
            text, place = batch.tokens[row, own], torch.arange(len(own))
            told = logits_of(text, place, place[:, None] >= place).log_softmax(-1)
            is_next = batch.is_target[row, own[1:]]
            nll = -told[:-1].gather(1, text[1:, None])[:, 0]
            expected += weights[0] * float(nll[is_next].sum())
            here = (rows.document[row] == document).nonzero()[:, 0]
            for block in rows.block[row, here].unique().tolist():
                own = here[rows.block[row, here] == block]
                before = here[(rows.block[row, here] < block) & rows.is_text[row, here]]
                is_masked = (is_noise & has_loss)[row, own]
                if predicts_next:
                    is_masked = is_masked & (rows.position[row, own] > 0)
                both = torch.cat([before, own])
                tokens = rows.tokens[row, both].clone()
                tokens[len(before) :][is_masked] = MASK
                at, of = torch.arange(len(both)), rows.block[row, both]
                is_seen = at[:, None] >= at if weights[0] else of[:, None] >= of
                is_seen[len(before) :] = True
                logits = logits_of(tokens, rows.position[row, both], is_seen)
                logits[:, MASK] = -torch.inf
                by = (torch.arange(len(own)) + len(before) - int(predicts_next)).clamp(min=0)
                nll = -logits.log_softmax(-1)[by, rows.tokens[row, own]] * weight[row, own]
                expected += weights[1] * float(nll[is_masked].sum())
    found = objective.loss(model, batch, generator).loss_sum
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", BATCHES)
def test_blocks_of_one_token_that_are_told_by_the_one_before_are_the_ar_likelihood(
    name: str,
) -> None:
    """A mask that the clean token before it predicts is no mask that anything sees."""
    model, batch = tiny_model().double(), BATCHES[name]()
    process = block_process(
        block_length=1, eos_token_id=None, context_attention="causal", predict="next"
    )
    generator = RowGenerator.for_rows(0, torch.arange(len(batch.tokens)))
    bound, count = block_row_bounds(model, batch, generator, process=process, num_mask_samples=3)
    unmasked = _WithoutMask(model)
    nats, of_tokens = row_nats(unmasked, batch)
    torch.testing.assert_close(bound, nats, rtol=1e-6, atol=1e-6)
    assert torch.equal(count, of_tokens)


class _WithoutMask:
    """A model whose mask has no probability."""

    def __init__(self, model: TransformersCausalDenoiser) -> None:
        self._model = model
        self.encode = model.encode

    def head(self, hidden: Tensor) -> Tensor:
        return self._model.head(hidden).index_fill(-1, torch.tensor([MASK]), -torch.inf)


def test_the_first_token_of_a_document_is_told_by_none() -> None:
    batch = whole_rows(torch.randint(2, V, (2, 9), generator=torch.Generator().manual_seed(0)))
    output = blocks(predicts_next=True).loss(tiny_model(), batch, draws())
    assert int(output.num_tokens) == 2 * 8


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ar_loss_weight": -1.0}, "none negative"),
        ({"diffusion_loss_weight": 0.0}, "one loss weight must be positive"),
    ],
)
def test_weights_that_cannot_be_are_refused(fields: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        blocks(**fields)


def test_a_process_says_what_decoding_lets_positions_see() -> None:
    process = block_process()
    assert sight_of(process) == BlockSight()
    assert sight_of(replace(process, context_attention="causal")) == BlockSight(
        context_is_causal=True
    )
    assert sight_of(replace(process, predict="next")) == BlockSight(predicts_next=True)
    assert sight_of(replace(process, attention_mask_mode="2d")) == BlockSight(is_causal=True)
