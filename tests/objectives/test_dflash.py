"""The dflash objective: anchors, mask, loss and acceptance length, held against plain loops."""

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from tests.models.dflash.test_draft_model import BLOCK, MASK, V, tiny_draft, tiny_target
from tokendiff.diffusion.attention_masks import dense, dflash_blocks
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.errors import InputError
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.trainee import DraftTrainee, check_target
from tokendiff.objectives import chunked
from tokendiff.objectives.dflash import DFlash, accepted, draw_anchors
from tokendiff.objectives.draft_weights import decay_gamma_of, decay_weights, dpace_weights

LENGTH = 14
STARTS = ((0, 9), (0, 4, 5, 12), (0,))  # of the documents of each row
LENGTHS = (LENGTH, LENGTH, 9)


def some_batch() -> TokenBatch:
    tokens = torch.randint(0, V - 1, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    is_start = torch.zeros(3, LENGTH, dtype=torch.bool)
    for row, starts in enumerate(STARTS):
        is_start[row, list(starts)] = True
    return TokenBatch.of_rows(tokens, torch.tensor(LENGTHS), is_start)


def document_of(row: int, place: int) -> tuple[int, int]:
    """Where the document of a place begins and where it ends."""
    start = max(s for s in STARTS[row] if s <= place)
    return start, min([s for s in STARTS[row] if s > place] + [LENGTHS[row]])


def every_anchor() -> list[list[int]]:
    """Of each row the places with a token of their document before and behind them."""
    return [
        [
            place
            for place in range(length)
            if document_of(row, place)[0] < place < document_of(row, place)[1] - 1
        ]
        for row, length in enumerate(LENGTHS)
    ]


def as_tensors(anchors: list[list[int]]) -> tuple[Tensor, Tensor]:
    most = max(map(len, anchors))
    filled = [row + [0] * (most - len(row)) for row in anchors]
    is_anchor = torch.arange(most) < torch.tensor([len(row) for row in anchors])[:, None]
    return torch.tensor(filled), is_anchor


def tiny_trainee(**kwargs: Any) -> DraftTrainee:
    return DraftTrainee(tiny_draft().double(), tiny_target().double(), **kwargs)


def taught_trainee() -> DraftTrainee:
    """One whose draft has learnt a little of `some_batch`: it is right at some places, and wrong
    before some of them.
    """
    trainee = tiny_trainee()
    optimizer = torch.optim.Adam(trainee.model.parameters(), lr=3e-3)
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK)
    for _ in range(10):
        objective.loss_at(trainee, some_batch(), *as_tensors(every_anchor())).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trainee


def plain_hidden(trainee: DraftTrainee, tokens: list[int], anchor: int) -> Tensor:
    """Hidden states [K - 1, D] behind an anchor of a document, from a call of its own."""
    states: Any = trainee.target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    context = torch.cat([states[2], states[4]], dim=-1)[:, :anchor]
    block = torch.tensor([[tokens[anchor], *[MASK] * (BLOCK - 1)]])
    output = trainee.model(
        noise_embeds=trainee.target.model.embed_tokens(block), context_hidden_states=context
    )
    return output.last_hidden_state[0, 1:]


def plain_blocks(trainee: DraftTrainee) -> list[tuple[int, int, list[float], list[bool]]]:
    """(row, anchor, nll of each drafted token that has a target, whether it is the likeliest)."""
    batch, found = some_batch(), []
    for row, anchors in enumerate(every_anchor()):
        for anchor in anchors:
            start, end = document_of(row, anchor)
            document = batch.tokens[row, start:end].tolist()
            hidden = plain_hidden(trainee, document, anchor - start)
            log_p = trainee.target.lm_head(hidden).log_softmax(-1)
            targets = document[anchor - start + 1 : anchor - start + BLOCK]
            nll = [-log_p[k, target].item() for k, target in enumerate(targets)]
            right = [int(log_p[k].argmax()) == target for k, target in enumerate(targets)]
            found.append((row, anchor, nll, right))
    return found


def test_a_block_sees_its_own_document_before_its_anchor_and_itself() -> None:
    batch = some_batch()
    anchors, _ = as_tensors(every_anchor())
    num_queries = anchors.shape[1] * BLOCK
    mask = dense(
        dflash_blocks(batch.document, anchors, BLOCK), 3, num_queries, LENGTH + num_queries
    )
    for row in range(3):
        for block, anchor in enumerate(anchors[row].tolist()):
            first = document_of(row, anchor)[0]
            seen = [
                *[first <= place < anchor for place in range(LENGTH)],
                *[other == block for other in range(anchors.shape[1]) for _ in range(BLOCK)],
            ]
            for k in range(BLOCK):
                assert mask[row, 0, block * BLOCK + k].tolist() == seen


@pytest.mark.parametrize("kernel", ["dense", "tiles", "flex"])
@torch.no_grad()
def test_blocks_of_a_batch_are_what_each_is_alone(
    kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainee, batch = tiny_trainee(attention_kernel=kernel), some_batch()
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK)
    anchors, is_anchor = as_tensors(every_anchor())
    # flex_attention as plain arithmetic: compiling it takes a while.
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    with torch._dynamo.config.patch(disable=True):
        blocks = objective.blocks_at(batch, anchors, is_anchor)
        at = blocks.is_target.nonzero(as_tuple=True)
        hidden = objective._hidden(trainee, batch, anchors, blocks)[at]
    place = list(zip(*(index.tolist() for index in at), strict=True))
    for row, places in enumerate(every_anchor()):
        for block, anchor in enumerate(places):
            start, end = document_of(row, anchor)
            tokens = batch.tokens[row, start:end].tolist()
            alone = plain_hidden(trainee, tokens, anchor - start)[: end - anchor - 1]
            chosen = [n for n, (b, a, _) in enumerate(place) if (b, a) == (row, block)]
            torch.testing.assert_close(hidden[chosen], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [None, 0.7])
def test_loss_is_the_weighted_mean_of_a_plain_loop(gamma: float | None) -> None:
    trainee, batch = taught_trainee(), some_batch()
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK, decay_gamma=gamma)
    output = objective.loss_at(trainee, batch, *as_tensors(every_anchor()))
    loss = weights = right = total = nats = 0.0
    lengths: list[int] = []
    by_place: list[list[bool]] = [[] for _ in range(1, BLOCK)]
    for _, _, nll, is_right in plain_blocks(trainee):
        for k, one in enumerate(is_right):
            by_place[k].append(one)
        for k, value in enumerate(nll, start=1):
            weight = math.exp(-(k - 1) / (gamma or 2.0))
            loss, weights = loss + weight * value, weights + weight
        nats, right, total = nats + sum(nll), right + sum(is_right), total + len(nll)
        if len(nll) == BLOCK - 1:
            lengths.append(1 + (is_right.index(False) if False in is_right else BLOCK - 1))
    assert output.loss_sum.item() == pytest.approx(loss, rel=1e-5)
    assert output.num_tokens.item() == pytest.approx(weights, rel=1e-12)
    figures = {name: (s.item(), n.item()) for name, (s, n) in output.metrics.items()}
    assert figures["draft_nll"] == (pytest.approx(nats, rel=1e-5), total)
    assert figures["draft_accuracy"] == (right, total)
    for k, ones in enumerate(by_place, start=1):
        assert figures.pop(f"draft_accuracy_{k}") == (sum(ones), len(ones))
    assert len({len(ones) for ones in by_place}) == BLOCK - 1
    assert not [name for name in figures if name.startswith("draft_accuracy_")]
    assert figures["expected_acceptance_length"] == (sum(lengths), len(lengths))


def plain_dpace(nll: list[float], alpha: float) -> list[float]:
    """The weights of a block as sums of products."""
    smoothed = [(1 - alpha) * math.exp(-value) + alpha for value in nll]
    return [sum(math.prod(smoothed[: m + 1]) for m in range(j, len(nll))) for j in range(len(nll))]


def test_dpace_weights_are_sums_of_products_over_what_the_text_reaches() -> None:
    nll = torch.rand(7, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 4
    reach = torch.tensor([5, 5, 4, 3, 2, 1, 0])
    is_target = torch.arange(5) < reach[:, None]
    for alpha in (0.0, 0.3, 1.0):
        weights = dpace_weights(nll, is_target, alpha=alpha)
        for row, count in enumerate(reach.tolist()):
            expected = plain_dpace(nll[row, :count].tolist(), alpha)
            assert weights[row].tolist() == pytest.approx([*expected, *[0.0] * (5 - count)])
    assert weights[0].tolist() == [5.0, 4.0, 3.0, 2.0, 1.0]


def test_dpace_without_smoothing_follows_the_gradient_of_the_accepted_length() -> None:
    """That length is taken from every way in which the tokens of a block may be accepted or not."""
    nll = torch.rand(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 2
    nll.requires_grad_()
    length = nll.new_zeros(())
    for outcome in product([True, False], repeat=4):
        took = torch.tensor(outcome)
        chance = torch.where(took, torch.exp(-nll), 1 - torch.exp(-nll)).prod(-1)
        length = length + (chance * took.long().cumprod(-1).sum()).sum()
    (by_length,) = torch.autograd.grad(-length, nll)
    weights = dpace_weights(nll, torch.ones(3, 4, dtype=torch.bool), alpha=0.0)
    assert not weights.requires_grad
    torch.testing.assert_close(weights, by_length)


@pytest.mark.parametrize("most_tokens", [None, (11, 5)])
def test_dpace_loss_and_gradient_are_those_of_plain_blocks(
    most_tokens: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where logits are made of a few tokens at a time, which no block is cut by."""
    if most_tokens is not None:
        monkeypatch.setattr(chunked, "_CPU_ELEMENTS", tuple(V * count for count in most_tokens))
    trainee, batch = tiny_trainee(), some_batch()
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK, loss_type="dpace", dpace_alpha=0.3)
    output = objective.loss_at(trainee, batch, *as_tensors(every_anchor()))
    output.loss_sum.backward()
    grads = [parameter.grad.clone() for parameter in trainee.model.parameters()]  # type: ignore[union-attr]
    trainee.zero_grad()
    losses, blocks = [], plain_blocks(trainee)
    for row, anchor, values, _ in blocks:
        start, end = document_of(row, anchor)
        tokens = batch.tokens[row, start:end]
        hidden = plain_hidden(trainee, tokens.tolist(), anchor - start)[: len(values)]
        nll = torch.nn.functional.cross_entropy(
            trainee.target.lm_head(hidden),
            tokens[anchor - start + 1 :][: len(values)],
            reduction="none",
        )
        losses.append((nll * torch.tensor(plain_dpace(values, 0.3))).sum())
    assert len({len(values) for _, _, values, _ in blocks}) > 1
    total = torch.stack(losses).sum()
    total.backward()
    assert output.loss_sum.item() == pytest.approx(total.item(), rel=1e-5)
    assert output.num_tokens.item() == len(blocks)
    for grad, parameter in zip(grads, trainee.model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-5)
    fixed = DFlash(block_size=BLOCK, mask_token_id=MASK)
    others = fixed.loss_at(trainee, batch, *as_tensors(every_anchor())).metrics
    figures = {name: [float(part) for part in pair] for name, pair in output.metrics.items()}
    assert figures == {
        name: pytest.approx([float(p) for p in pair]) for name, pair in others.items()
    }


def test_gradient_reaches_every_weight_of_the_draft_and_none_of_the_target() -> None:
    trainee = tiny_trainee().train()
    assert not trainee.target.training
    before = {name: value.clone() for name, value in trainee.target.state_dict().items()}
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK)
    output = objective.loss_at(trainee, some_batch(), *as_tensors(every_anchor()))
    output.loss_sum.backward()
    assert all(p.grad is None and not p.requires_grad for p in trainee.target.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainee.model.parameters())
    assert all(torch.equal(before[name], v) for name, v in trainee.target.state_dict().items())
    # And it is the gradient of the loss: a step along it changes the loss by as much as it says.
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in trainee.model.parameters()]))  # type: ignore[misc]
    losses = []
    for step in (-1e-5, 2e-5):
        with torch.no_grad():
            for parameter in trainee.model.parameters():
                assert parameter.grad is not None
                parameter.add_(parameter.grad, alpha=step / norm)
            losses.append(
                objective.loss_at(trainee, some_batch(), *as_tensors(every_anchor())).loss_sum
            )
    assert float(losses[1] - losses[0]) / 2e-5 == pytest.approx(norm, rel=2e-2)


@pytest.mark.parametrize("loss_type", ["dflash", "dpace"])
def test_a_row_without_an_anchor_still_takes_part(loss_type: Any) -> None:
    """Every worker must reach every weight, or they wait for each other."""
    trainee = tiny_trainee()
    batch = TokenBatch.of_rows(
        torch.ones(1, 5, dtype=torch.int64), torch.tensor([5]), torch.tensor([[True] * 5])
    )
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK, loss_type=loss_type)
    generator = RowGenerator(keys=torch.tensor([1]))
    output = objective.loss(trainee, batch, generator)
    output.loss_sum.backward()
    assert (output.loss_sum.item(), output.num_tokens.item()) == (0.0, 0.0)
    for parameter in trainee.model.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_anchors_are_uniform_without_repetition_and_belong_to_the_row() -> None:
    batch, allowed = some_batch(), every_anchor()
    counts = torch.zeros(3, LENGTH)
    keys = torch.arange(3000).view(-1, 3)
    for row_keys in keys:
        anchors, is_anchor = draw_anchors(batch, RowGenerator(keys=row_keys), 3)
        for row in range(3):
            drawn = anchors[row][is_anchor[row]].tolist()
            assert drawn == sorted(set(drawn))
            assert len(drawn) == min(3, len(allowed[row]))
            assert set(drawn) <= set(allowed[row])
            counts[row, drawn] += 1
            assert not anchors[row][~is_anchor[row]].any()
    for row in range(3):
        expected = len(keys) * min(3, len(allowed[row])) / len(allowed[row])
        assert counts[row, allowed[row]].tolist() == pytest.approx(
            [expected] * len(allowed[row]), abs=5 * math.sqrt(len(keys)) / 2
        )
    # More are not asked for than there are, and a row alone draws what it draws in a batch.
    anchors, is_anchor = draw_anchors(batch, RowGenerator(keys=keys[0]), 100)
    assert [row[is_one].tolist() for row, is_one in zip(anchors, is_anchor, strict=True)] == allowed
    together, _ = draw_anchors(batch, RowGenerator(keys=keys[0]), 2)
    for row in range(3):
        part = TokenBatch(
            tokens=batch.tokens[[row]],
            is_valid=batch.is_valid[[row]],
            document=batch.document[[row]],
        )
        alone, _ = draw_anchors(part, RowGenerator(keys=keys[0, [row]]), 2)
        assert torch.equal(alone[0], together[row])


@pytest.mark.slow
def test_acceptance_is_what_transformers_accepts_of_the_target_s_own_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainee = DraftTrainee(tiny_draft(), tiny_target())
    prompt = torch.randint(0, V - 1, (1, 5), generator=torch.Generator().manual_seed(9))
    own: Any = trainee.target.generate(prompt, do_sample=False, max_new_tokens=60, pad_token_id=0)
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK, num_anchors=8)
    batch = TokenBatch(tokens=own, is_valid=torch.ones_like(own).bool())
    # A draft that has learnt a part of this text is right now and then.
    optimizer = torch.optim.Adam(trainee.model.parameters(), lr=3e-3)
    for step in range(12):
        output = objective.loss(trainee, batch, RowGenerator(keys=torch.tensor([step])))
        (output.loss_sum / output.num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    anchors: list[int] = []
    original: Any = DFlashDraftModel.forward

    def spy(self: Any, noise_embeds: Tensor, **kwargs: Any) -> Any:
        anchors.append(kwargs["position_ids"][0, -BLOCK].item())
        return original(self, noise_embeds, **kwargs)

    monkeypatch.setattr(DFlashDraftModel, "forward", spy)
    text: Any = trainee.target.generate(
        prompt,
        do_sample=False,
        max_new_tokens=60,
        pad_token_id=0,
        assistant_model=trainee.model.eval(),
        speculation_type="dflash",
    )
    monkeypatch.undo()
    assert torch.equal(text, own)
    taken = [b - a for a, b in pairwise(anchors)]
    anchors = [anchor for anchor in anchors[:-1] if anchor + BLOCK <= text.shape[1]]
    is_right, is_whole = objective.agreement(trainee, batch, *as_tensors([anchors]))
    assert is_whole.all()
    lengths = accepted(is_right)
    assert lengths[0].tolist() == taken[: len(anchors)]
    assert len(set(taken)) > 2, "one length alone would prove little"


def test_accepted_counts_the_agreeing_prefix_and_the_target_s_own_token() -> None:
    right = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 1, 0]]).bool()
    assert accepted(right).tolist() == [4, 2, 1, 3]


def test_published_gammas_and_what_cannot_be() -> None:
    assert [decay_gamma_of(size) for size in (16, 10, 8)] == [7.0, 5.0, 4.0]
    assert decay_weights(16).tolist() == pytest.approx([math.exp(-k / 7) for k in range(15)])
    for fields in (
        *({"block_size": 1}, {"num_anchors": 0}, {"decay_gamma": 0.0}),
        *({"loss_type": "pace"}, {"dpace_alpha": 1.1}, {"dpace_alpha": -0.1}),
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            DFlash(**{"block_size": 8, "mask_token_id": 0, **fields})  # type: ignore[arg-type]


def test_a_target_whose_documents_see_each_other_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainee = tiny_trainee()
    check_target(trainee, "good")
    read = DraftTrainee.read

    def deaf(self: DraftTrainee, tokens: Tensor, positions: Tensor) -> Tensor:
        return read(self, tokens, torch.arange(tokens.shape[1])[None])

    monkeypatch.setattr(DraftTrainee, "read", deaf)
    with pytest.raises(InputError, match=r"'bad'.*documents packed into a row see each other"):
        check_target(trainee, "bad")
