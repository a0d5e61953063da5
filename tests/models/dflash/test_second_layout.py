"""Drafts of the second layout (DFlash 2): convolutions, selector, windows, files; against loops."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AutoModel
from transformers.masking_utils import sliding_window_overlay

from tests.models.dflash.test_block_attention import some_blocks, some_rows
from tests.models.dflash.test_draft_model import BLOCK, MASK, PUBLISHED, D, V, tiny_target
from tests.models.dflash.test_new_draft import a_target, config_of
from tokendiff.artifacts.model_folders import is_draft_folder
from tokendiff.diffusion.attention_masks import dense, mask_mod
from tokendiff.diffusion.candidates import Candidates
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.errors import InputError
from tokendiff.models.dflash.block_attention import block_mask_of
from tokendiff.models.dflash.config import DFlashDraftConfig
from tokendiff.models.dflash.model import DFlash2DraftModel, DFlashDraftModel
from tokendiff.models.dflash.planning import load_draft, new_draft_config, open_draft_config
from tokendiff.models.dflash.second_layout import CandidateSelector, DynamicConvolution
from tokendiff.models.dflash.trainee import DraftTrainee, new_draft
from tokendiff.objectives.dflash import DFlash, _Selecting, accepted, draw_anchors
from tokendiff.objectives.draft_weights import dpace_weights

TAPS, GROUP, RANK, TOP_K = 2, 8, 6, 5
SECOND: dict[str, Any] = {
    **PUBLISHED,
    "architectures": ["DFlash2DraftModel"],
    "dflash_config": {
        "block_size": BLOCK,
        "conv_kernel_size": TAPS,
        "conv_group_size": GROUP,
        "selector_rank": RANK,
        "selector_top_k": TOP_K,
        "mask_token_id": MASK,
        "target_layer_ids": [1, 3],
    },
    "is_causal": False,
    "layer_types": ["sliding_attention"] * 2,
    "sliding_window": 2048,
}
del SECOND["block_size"]


def second_config(*, own: dict[str, Any] | None = None, **fields: Any) -> DFlashDraftConfig:
    both = {**SECOND["dflash_config"], **(own or {})}
    return DFlashDraftConfig.from_dict({**SECOND, **fields, "dflash_config": both})


def tiny_second(**fields: Any) -> DFlash2DraftModel:
    """One whose convolutions and selector say something."""
    torch.manual_seed(1)
    draft = DFlash2DraftModel(second_config(**{"initializer_range": 0.3, **fields}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.2)
        assert draft.candidate_selector is not None
        draft.candidate_selector.successor_codebook.mul_(6.0)
    return draft.eval()


def trainee_of(draft: DFlashDraftModel, **kwargs: Any) -> DraftTrainee:
    return DraftTrainee(draft.double(), tiny_target().double(), **kwargs)


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_a_convolution_is_a_loop_over_places_and_taps_of_a_block(taps: int) -> None:
    torch.manual_seed(0)
    conv = DynamicConvolution(second_config(own={"conv_kernel_size": taps})).double()
    base, weight = (torch.randn_like(p) for p in conv.parameters())
    conv.load_state_dict({"base_kernel": base, "kernel_projection.weight": weight})
    h, x = torch.randn(2, 2, 3 * BLOCK, D, dtype=torch.float64)
    groups = D // GROUP
    for side in (0, 1):
        output = conv(x, conv.deltas(h)[side], side=side)
        for row in range(2):
            for i in range(3 * BLOCK):
                for c in (0, GROUP - 1, GROUP, D - 1):
                    expected = 0.0
                    for t in range(min(taps, i % BLOCK + 1)):
                        line = (side * taps + t) * groups + c // GROUP
                        kernel = float(base[side, t, c] + weight[line] @ h[row, i])
                        expected += kernel * float(x[row, i - t, c])
                    assert output[row, i, c].item() == pytest.approx(expected)
    delta = conv.deltas(h[:, :2])[1]
    front = conv(x[:, :2], delta, side=1)
    torch.testing.assert_close(front, conv(x, conv.deltas(h)[1], side=1)[:, :2])
    assert conv(x.bfloat16(), conv.deltas(h)[0], side=0).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=f"{BLOCK + 1} positions are not blocks"):
        conv(x[:, : BLOCK + 1], conv.deltas(h[:, : BLOCK + 1])[0], side=0)


def test_a_layer_convolves_around_attention_and_mlp() -> None:
    """Written out with plain steps; attention and MLP are those of the first layout."""
    draft = tiny_second().double()
    block, context = torch.randn(1, BLOCK, D).double(), torch.randn(1, 5, 2 * D).double()
    output = draft(block, context).last_hidden_state
    weights = draft.state_dict()
    assert draft.rotary_emb is not None
    rotation = draft.rotary_emb(block, torch.arange(5 + BLOCK)[None])
    normed_context = draft.hidden_norm(draft.fc(context))

    def conv(name: str, h: Tensor, x: Tensor, side: int) -> Tensor:
        projected = h @ weights[f"{name}.kernel_projection.weight"].T
        kernels = projected.view(BLOCK, 2, TAPS, D // GROUP).repeat_interleave(GROUP, dim=-1)
        kernels = kernels[:, side] + weights[f"{name}.base_kernel"][side]
        before = torch.cat([torch.zeros(1, D).double(), x[:-1]])
        return kernels[:, 0] * x + kernels[:, 1] * before

    x = block[0]
    for n, layer in enumerate(draft.layers):
        at: Any = layer
        h = at.input_layernorm(x)
        inner = conv(f"layers.{n}.attention_conv", h, h, 0)
        inner = at.self_attn(inner[None], normed_context, rotation, None, None)[0]
        x = x + conv(f"layers.{n}.attention_conv", h, inner, 1)
        h = at.post_attention_layernorm(x)
        inner = at.mlp(conv(f"layers.{n}.mlp_conv", h, h, 0))
        x = x + conv(f"layers.{n}.mlp_conv", h, inner, 1)
    torch.testing.assert_close(output[0], draft.norm(x), rtol=1e-4, atol=1e-5)


def test_scores_and_paths_are_those_of_a_loop() -> None:
    torch.manual_seed(3)
    blocks, places, size = 4, 3, 9
    tokens = torch.stack([torch.randperm(size)[:TOP_K] for _ in range(blocks * places)]).view(
        blocks, places, TOP_K
    )
    logits, features = torch.randn(blocks, places, TOP_K), torch.randn(blocks, places, RANK)
    a, b = torch.randn(2, size, RANK)
    anchors = torch.randint(0, size, (blocks,))
    path = Candidates(
        tokens=tokens,
        logits=logits,
        features=features,
        predecessors=a,
        successors=b,
        vocab_size=size,
    ).likeliest(anchors)
    plain = []
    for n in range(blocks):
        before, line = int(anchors[n]), []
        for k in range(places):
            score = {
                int(c): float(logits[n, k, j])
                + sum(float(a[before, r] * features[n, k, r] * b[c, r]) for r in range(RANK))
                for j, c in enumerate(tokens[n, k])
            }
            before = max(score, key=score.__getitem__)
            line.append(before)
        plain.append(line)
    assert path.tolist() == plain
    assert path.tolist() != tokens.gather(-1, logits.argmax(-1, keepdim=True))[..., 0].tolist()


# Windows.


@pytest.mark.parametrize("window", [1, 3, 100, 10**4])
@pytest.mark.parametrize("block_size", [4, 16])
def test_a_window_in_every_form_of_mask(window: int, block_size: int) -> None:
    blocks = dataclasses.replace(some_blocks(block_size), window=window)
    (num_rows, num_anchors), length = blocks.begin.shape, blocks.length
    num_queries = num_anchors * block_size
    mask = dense(blocks, num_rows, num_queries, length + num_queries)
    is_in = sliding_window_overlay(window)  # of transformers
    for row, block in ((0, 0), (1, num_anchors // 2), (1, num_anchors - 1)):
        first, anchor = int(blocks.begin[row, block]), int(blocks.end[row, block])
        for k in (0, block_size - 1):
            seen = [first <= at < anchor and is_in(0, 0, anchor + k, at) for at in range(length)]
            assert mask[row, 0, block * block_size + k, :length].tolist() == seen
    found = block_mask_of(blocks)
    asked = create_block_mask(
        mask_mod(blocks), num_rows, None, num_queries, length + num_queries, device="cpu"
    )
    for kind in ("kv", "full_kv"):
        counts, others = (getattr(one, f"{kind}_num_blocks") for one in (found, asked))
        assert torch.equal(counts, others)
        index, other = (getattr(one, f"{kind}_indices") for one in (found, asked))
        counted = torch.arange(index.shape[-1]) < counts[..., None]
        assert torch.equal(index[counted], other[counted])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [["sliding_attention"] * 2, ["full_attention", "sliding_attention"]]
)
def test_kernels_agree_on_windows_and_with_a_block_alone(
    kinds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = tiny_second(layer_types=kinds, sliding_window=5)
    batch = some_rows(40, ((0,), (0, 20)), [40, 36])
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK, num_anchors=6)
    anchors, is_anchor = draw_anchors(batch, RowGenerator(keys=torch.arange(2)), 6)
    blocks = objective.blocks_at(batch, anchors, is_anchor)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    found = {}
    with torch._dynamo.config.patch(disable=True), torch.no_grad():
        for kernel in ("dense", "tiles", "flex"):
            trainee = trainee_of(draft, attention_kernel=kernel)
            found[kernel] = objective._hidden(trainee, batch, anchors, blocks)
        for kernel in ("tiles", "flex"):
            torch.testing.assert_close(found[kernel], found["dense"], rtol=1e-4, atol=1e-5)
        # Alone, with the window cut out of positions in the model itself.
        for block, anchor in enumerate(anchors[0].tolist()):
            row = batch.tokens[:1, :anchor]
            positions = torch.arange(anchor + BLOCK)[None]
            tokens = torch.tensor([[int(batch.tokens[0, anchor]), *[MASK] * (BLOCK - 1)]])
            alone = draft(
                trainee.target.get_input_embeddings()(tokens),
                trainee.read(row, positions[:, :anchor]),
            ).last_hidden_state[0, 1:]
            torch.testing.assert_close(alone, found["dense"][0, block], rtol=1e-4, atol=1e-5)
    wide = objective._hidden(trainee_of(tiny_second(sliding_window=2048)), batch, anchors, blocks)
    assert not torch.allclose(wide, found["dense"], rtol=1e-2)


# Training.


def plain_loss(
    trainee: DraftTrainee, batch: TokenBatch, anchors: Tensor, is_anchor: Tensor, objective: DFlash
) -> tuple[Tensor, list[list[bool]], tuple[int, int]]:
    """Loss by plain autograd; what of each block is right along its path; places, and found."""
    blocks = objective.blocks_at(batch, anchors, is_anchor)
    hidden = objective._hidden(trainee, batch, anchors, blocks)
    logits, selector = trainee.head(hidden), trainee.selector
    assert selector is not None
    loss, right, places, num_found = logits.new_zeros(()), [], 0, 0
    for row, block in is_anchor.nonzero().tolist():
        chosen = before = int(batch.tokens[row, anchors[row, block]])
        line: list[bool] = []
        targets, is_target = blocks.targets[row, block], blocks.is_target[row, block]
        nll = -logits[row, block].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        weights = [math.exp(-k / 2.0) for k in range(BLOCK - 1)]
        if objective.loss_type == "dpace":
            weights = dpace_weights(nll, is_target, alpha=objective.dpace_alpha).tolist()
        for k in range(BLOCK - 1):
            if not is_target[k]:
                break
            target, one, weight = int(targets[k]), logits[row, block, k], weights[k]
            loss = loss + weight * nll[k]
            best = one.topk(TOP_K).indices.tolist()
            feature = selector.hidden_projection(hidden[row, block, k])

            def scores(p: int, best: Any = best, one: Any = one, f: Any = feature) -> Tensor:
                a, b = selector.predecessor_codebook, selector.successor_codebook
                return torch.stack([one[c] + (a[p] * f * b[c]).sum() for c in best])

            places += 1
            if target in best:
                num_found += 1
                loss = loss - weight * scores(before).log_softmax(-1)[best.index(target)]
            chosen, before = best[int(scores(chosen).argmax())], target
            line.append(chosen == target)
        right.append(line)
    return loss, right, (places, num_found)


@pytest.mark.parametrize("loss_type", ["dflash", "dpace"])
def test_loss_gradient_and_figures_are_those_of_plain_blocks(loss_type: Any) -> None:
    trainee = trainee_of(tiny_second(own={"output_multiplier": 0.7}, final_logit_softcapping=3.0))
    batch = some_rows(30, ((0,), (0, 12)), [30, 27])
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK, num_anchors=12, loss_type=loss_type)
    anchors = draw_anchors(batch, RowGenerator(keys=torch.arange(2)), 12)
    every = trainee_of(tiny_second(own={"selector_top_k": V}))
    recall = objective.loss_at(every, batch, *anchors).metrics["selector_recall"]
    num_targets = objective.blocks_at(batch, *anchors).is_target.sum()
    assert all(figure == num_targets for figure in recall)  # no place beyond the text's end
    optimizer = torch.optim.Adam(trainee.model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):  # so that something is right
        output = objective.loss_at(trainee, batch, *anchors)
        (output.loss_sum / output.num_tokens).backward()
        losses.append(float(output.loss_sum.detach()))
        optimizer.step()
        optimizer.zero_grad()
    output = objective.loss_at(trainee, batch, *anchors)
    assert float(output.loss_sum.detach()) < 0.8 * losses[0]
    output.loss_sum.backward()
    grads = {name: p.grad.clone() for name, p in trainee.model.named_parameters()}  # type: ignore[union-attr]
    trainee.zero_grad()
    loss, right, (places, num_found) = plain_loss(trainee, batch, *anchors, objective)
    loss.backward()
    assert output.loss_sum.item() == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in trainee.model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-6)
        assert grads[name].any(), name
    figures = {name: (s.item(), n.item()) for name, (s, n) in output.metrics.items()}
    assert 0 < num_found < places
    assert figures["selector_recall"] == (num_found, places)
    assert figures["draft_accuracy"] == (sum(map(sum, right)), places)
    whole = [line for line in right if len(line) == BLOCK - 1]
    lengths = [1 + [*line, False].index(False) for line in whole]
    assert len(set(lengths)) > 1
    assert figures["expected_acceptance_length"] == (sum(lengths), len(lengths))
    is_right, is_whole = objective.agreement(trainee, batch, *anchors)
    assert accepted(is_right)[is_whole].tolist() == lengths


@pytest.mark.slow
def test_gradients_of_a_selector_do_not_depend_on_which_thread_is_first() -> None:
    """Many places behind few tokens, so that threads would add to the same rows."""
    generator = torch.Generator().manual_seed(0)
    selector = CandidateSelector(second_config(own={"selector_rank": 256}))
    states = torch.randn(20_000, D, generator=generator)
    before = torch.randint(0, V, (20_000,), generator=generator)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(8):
            selecting = _Selecting(selector, states, before)
            selecting.columns[1].copy_(states.sum(1, keepdim=True))
            selector.zero_grad()
            selecting.gradient_alone().backward()
            assert selector.predecessor_codebook.grad is not None
            found.append(selector.predecessor_codebook.grad.clone())
    finally:
        torch.set_num_threads(threads)
    assert found[0].any()
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("loss_type", ["dflash", "dpace"])
def test_a_new_draft_begins_as_one_of_the_first_layout(loss_type: Any) -> None:
    """To the bit: hidden states, and so figures and what is proposed."""
    target = a_target(is_tied=False, row_length=3.0)
    head = target.get_output_embeddings().weight
    first = config_of(target)
    second = new_draft_config(
        target.config,
        target_model_id="t",
        num_layers=2,
        block_size=BLOCK,
        mask_token_id=first.mask_token_id,
        layout="dflash2",
    )
    own = second.dflash_config
    assert own is not None
    assert (own["conv_kernel_size"], own["conv_group_size"]) == (2, 16)
    assert (own["selector_rank"], own["selector_top_k"], own["block_size"]) == (256, 16, BLOCK)
    assert (second.sliding_window, second.layer_types) == (2048, ["sliding_attention"] * 2)
    tokens = torch.randint(8, 500, (3, 40), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens=tokens, is_valid=torch.ones_like(tokens).bool())
    objective = DFlash(
        block_size=BLOCK, mask_token_id=first.mask_token_id, loss_type=loss_type, num_anchors=9
    )
    anchors = draw_anchors(batch, RowGenerator(keys=torch.arange(3)), 9)
    found = []
    for config in (first, second):
        trainee = DraftTrainee(new_draft(config, seed=4, head=head), target)
        blocks = objective.blocks_at(batch, *anchors)
        hidden = objective._hidden(trainee, batch, anchors[0], blocks)
        output = objective.loss_at(trainee, batch, *anchors)
        found.append((hidden, output.metrics, objective.agreement(trainee, batch, *anchors)[0]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2])
    for name, pair in found[0][1].items():
        assert [float(x) for x in pair] == [float(x) for x in found[1][1][name]]


# Files.


def test_names_and_shapes_are_the_published_ones_and_files_open_again(tmp_path: Path) -> None:
    draft = tiny_second()
    draft.save_pretrained(tmp_path / "draft")
    weights = load_file(tmp_path / "draft" / "model.safetensors")
    plain = {name for name in weights if "_conv" not in name and "selector" not in name}
    assert plain == set(DFlashDraftModel(DFlashDraftConfig.from_dict(PUBLISHED)).state_dict())
    shapes = {name: tuple(weights[name].shape) for name in weights.keys() - plain}
    expected: dict[str, tuple[int, ...]] = {
        "candidate_selector.hidden_projection.weight": (RANK, D),
        "candidate_selector.predecessor_codebook": (V, RANK),
        "candidate_selector.successor_codebook": (V, RANK),
    }
    for conv in (f"layers.{n}.{part}_conv" for n in range(2) for part in ("attention", "mlp")):
        expected[f"{conv}.base_kernel"] = (2, TAPS, D)
        expected[f"{conv}.kernel_projection.weight"] = (2 * TAPS * D // GROUP, D)
    assert shapes == expected
    fields = json.loads((tmp_path / "draft" / "config.json").read_text())
    for name in ("architectures", "dflash_config", "is_causal", "layer_types", "sliding_window"):
        assert fields[name] == SECOND[name]
    assert is_draft_folder(tmp_path / "draft")
    block, context = torch.randn(1, BLOCK, D), torch.randn(1, 5, 2 * D)
    before = draft(block, context).last_hidden_state
    for opened in (
        AutoModel.from_pretrained(tmp_path / "draft"),
        DFlashDraftModel.from_pretrained(tmp_path / "draft"),
        load_draft(str(tmp_path / "draft")),
    ):
        assert type(opened) is DFlash2DraftModel
        assert torch.equal(opened.eval()(block, context).last_hidden_state, before)
        assert opened.candidate_selector is not None
        for name, value in opened.candidate_selector.state_dict().items():
            assert torch.equal(value, weights[f"candidate_selector.{name}"])
    moved = {**weights, "candidate_selector.successor_codebook": torch.ones(V, RANK + 1)}
    save_file(moved, tmp_path / "draft" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="successor_codebook"):
        load_draft(str(tmp_path / "draft"))
    del moved["candidate_selector.successor_codebook"]
    save_file(moved, tmp_path / "draft" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing \['candidate_selector.successor_codebook'\]"):
        load_draft(str(tmp_path / "draft"))


@pytest.mark.parametrize(
    ("own", "fields", "message"),
    [
        ({"selector_rank": None}, {}, "selector_rank None"),
        ({"selector_top_k": 0}, {}, "selector_top_k 0"),
        ({"selector_top_k": V + 1}, {}, f"selector_top_k {V + 1}: there are {V} tokens"),
        ({"conv_group_size": 5}, {}, f"conv_group_size 5 does not divide hidden_size {D}"),
        ({"block_size": 8}, {"block_size": 4}, "block_size 4 contradicts dflash_config's 8"),
        ({"output_multiplier": 2.0}, {"output_multiplier": 3.0}, "output_multiplier 3.0 contrad"),
        ({"final_logit_softcapping": -1.0}, {}, "final_logit_softcapping -1.0 must be positive"),
        ({"new_field": 1}, {}, "new_field"),
        ({"attention_mode": "mla"}, {}, "attention_mode 'mla': this version implements gqa alone"),
        ({}, {"sliding_window": None}, "sliding_window None"),
        ({}, {"sliding_window": 0}, "sliding_window 0: .* need the number of positions"),
        ({}, {"is_causal": True}, "is_causal true"),
        ({}, {"layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(
    own: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    both = {**SECOND["dflash_config"], **own}
    (tmp_path / "config.json").write_text(json.dumps({**SECOND, **fields, "dflash_config": both}))
    with pytest.raises(InputError, match=message):
        open_draft_config(str(tmp_path))


def test_scalars_stand_in_either_place() -> None:
    for config in (
        second_config(own={"output_multiplier": 2.0, "final_logit_softcapping": 3.0}),
        second_config(output_multiplier=2.0, final_logit_softcapping=3.0),
    ):
        logits = torch.tensor([[-4.0, 0.0, 1.5]])
        expected = [3.0 * math.tanh(2.0 * x / 3.0) for x in logits[0].tolist()]
        assert config.shaped(logits)[0].tolist() == pytest.approx(expected)
    logits = torch.tensor([[-4.0, 0.0, 1.5]])
    capped = second_config(own={"final_logit_softcapping": 3.0}).shaped(logits.bfloat16())
    torch.testing.assert_close(capped, 3.0 * torch.tanh(logits / 3.0))  # in float32
    uncapped = second_config(own={"attention_mode": "gqa", "final_logit_softcapping": 0.0})
    assert torch.equal(uncapped.shaped(logits), logits)
    draft = tiny_second(own={"input_embedding_scale": 2.0})
    plain = tiny_second()
    block, context = torch.randn(1, BLOCK, D), torch.randn(1, 3, 2 * D)
    torch.testing.assert_close(
        draft(block, context).last_hidden_state, plain(2 * block, context).last_hidden_state
    )
