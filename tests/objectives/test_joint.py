"""One pass over `[x_t ; x_0]` that carries two losses: each is that of its own objective."""

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
from tokendiff.objectives.blocks import BlockSight

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


@pytest.mark.parametrize("name", BATCHES)
def test_the_next_token_loss_alone_is_that_of_ar(name: str) -> None:
    batch, model = BATCHES[name](), tiny_model()
    ours, here = gradients(blocks(ar_loss_weight=1.0, diffusion_loss_weight=0.0), batch, model)
    theirs, there = gradients(Autoregressive(), batch, model)
    assert torch.equal(ours.loss_sum, theirs.loss_sum)
    assert torch.equal(ours.num_tokens, theirs.num_tokens)
    assert all(map(torch.equal, here, there))


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


def test_without_a_next_token_loss_nothing_changes() -> None:
    batch, model = chats(), tiny_model()
    ours, here = gradients(blocks(ar_loss_weight=0.0, diffusion_loss_weight=1.0), batch, model)
    theirs, there = gradients(blocks(), batch, model)
    assert torch.equal(ours.loss_sum, theirs.loss_sum)
    assert ours.metrics.keys() == theirs.metrics.keys()
    assert all(map(torch.equal, here, there))


@pytest.mark.parametrize("name", BATCHES)
def test_blocks_of_one_token_that_are_told_by_the_one_before_are_the_ar_likelihood(
    name: str,
) -> None:
    """A mask that the clean token before it tells is no mask that anything sees."""
    model, batch = tiny_model().double(), BATCHES[name]()
    # The mask itself is no candidate here, and one there.
    with torch.no_grad():
        model.model.get_input_embeddings().weight[MASK] *= 0.0
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
