"""Attention of many blocks at once, held against a mask of every query by every key."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

from tests.models.dflash.test_draft_model import BLOCK, MASK, V, tiny_draft, tiny_target
from tokendiff.diffusion.attention_masks import AnchoredBlocks, dense, dflash_blocks, mask_mod
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.models.dflash import block_attention, trainee
from tokendiff.models.dflash.block_attention import block_mask_of, tiles_of_blocks
from tokendiff.models.dflash.trainee import DraftTrainee
from tokendiff.models.tiled_attention import tiled_attention
from tokendiff.objectives.dflash import DFlash, draw_anchors


def some_rows(length: int, starts: tuple[tuple[int, ...], ...], lengths: list[int]) -> TokenBatch:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, V - 1, (len(starts), length), generator=generator)
    is_start = torch.zeros(len(starts), length, dtype=torch.bool)
    for row, places in enumerate(starts):
        is_start[row, list(places)] = True
    return TokenBatch.of_rows(tokens, torch.tensor(lengths), is_start)


def some_blocks(block_size: int, *, num_anchors: int = 60, length: int = 500) -> AnchoredBlocks:
    """Rows of one document and of several; the last has room for a few anchors only."""
    starts = ((0,), (0, 130, 140, 300), (0, 40))
    batch = some_rows(length, starts, [length, length, 52])
    generator = RowGenerator(keys=torch.arange(3))
    anchors, is_anchor = draw_anchors(batch, generator, num_anchors)
    assert not is_anchor.all()
    return dflash_blocks(batch.document, anchors, block_size)


def sizes_of(blocks: AnchoredBlocks) -> tuple[int, int, int]:
    """Rows, queries, keys."""
    num_rows, num_anchors = blocks.begin.shape
    num_queries = num_anchors * blocks.block_size
    return num_rows, num_queries, blocks.length + num_queries


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [4, 10, 16, 128])
def test_the_block_mask_is_the_one_that_asking_for_each_pair_finds(block_size: int) -> None:
    """Also tiles that are seen whole, which flex_attention does not ask the rule about."""
    blocks = some_blocks(block_size)
    num_rows, num_queries, num_keys = sizes_of(blocks)
    found = block_mask_of(blocks)
    asked = create_block_mask(mask_mod(blocks), num_rows, None, num_queries, num_keys, device="cpu")
    assert found.shape == asked.shape
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, others = (getattr(mask, f"{kind}_num_blocks") for mask in (found, asked))
        assert torch.equal(counts, others)
        index, other_index = (getattr(mask, f"{kind}_indices") for mask in (found, asked))
        counted = torch.arange(index.shape[-1]) < counts[..., None]
        assert torch.equal(index[counted], other_index[counted])
    assert found.full_kv_num_blocks is not None
    assert found.full_kv_num_blocks.any() == (block_size > 4)


@pytest.mark.parametrize("tile_queries", [1, 40, 256, 10**6])
@pytest.mark.parametrize("block_size", [4, 10])
def test_tiles_give_the_numbers_and_gradients_of_the_whole_mask(
    block_size: int, tile_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "_TILE_QUERIES", tile_queries)
    blocks = some_blocks(block_size)
    num_rows, num_queries, num_keys = sizes_of(blocks)
    generator = torch.Generator().manual_seed(1)

    def states(heads: int, count: int) -> Tensor:
        shape = (num_rows, heads, count, 8)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = states(4, num_queries), states(2, num_keys), states(2, num_keys)
    mask = dense(blocks, num_rows, num_queries, num_keys)
    whole = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    tiles = tiles_of_blocks(blocks, dtype=torch.float64)
    ours, _ = tiled_attention(torch.nn.Module(), query, key, value, None, tiles=tiles)
    torch.testing.assert_close(ours, whole)
    along = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    grads = [torch.autograd.grad(out, (query, key, value), along) for out in (ours, whole)]
    for ours, whole in zip(*grads, strict=True):
        torch.testing.assert_close(ours, whole)


def test_tiles_have_no_keys_for_anchors_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_attention, "_TILE_QUERIES", 40)

    def context_of(batch: TokenBatch) -> list[tuple[tuple[int, int], ...]]:
        anchors, _ = draw_anchors(batch, RowGenerator(keys=torch.arange(2)), 60)
        blocks = dflash_blocks(batch.document, anchors, 4)
        return [tile.key_runs[:-1] for tile in tiles_of_blocks(blocks, dtype=torch.float64)]

    # The short row's last anchors are filled up with 0, which its neighbour's do not see.
    ((begin, end),) = context_of(some_rows(500, ((0, 250), (0,)), [500, 30]))[-1]
    assert 250 <= begin < end <= 500
    assert context_of(some_rows(20, ((0,), (0,)), [1, 1])) == [()]  # rows without an anchor


def test_the_kernel_is_chosen_by_device_dropout_and_how_many_scores_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("compile_module", "compile_layers"):
        monkeypatch.setattr(trainee, name, lambda module: None)
    gpu, cpu, few, many = torch.device("cuda"), torch.device("cpu"), 2**20, 2**22 + 1
    sizes: dict[str, Any] = {"head_dim": 16}

    def kernel(
        device: torch.device, num_scores: int, *, compiled: bool = False, **fields: Any
    ) -> str:
        pair = DraftTrainee(tiny_draft(**sizes, **fields), tiny_target())
        if compiled:
            pair.compile_encoder()
        return pair.kernel_for(device, num_scores)

    assert [kernel(gpu, few), kernel(gpu, few + 1), kernel(cpu, many)] == ["dense", "flex", "tiles"]
    # flex_attention knows no dropout, and the edges of tiles differ by batch.
    assert kernel(gpu, many, attention_dropout=0.1) == "tiles"
    assert kernel(cpu, many, compiled=True) == "dense"
    assert kernel(cpu, many - 1) == "dense"


@pytest.mark.slow
def test_many_anchors_take_no_mask_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 of them in a row: loss and gradient are those under the whole mask, which is not made."""
    batch = some_rows(600, ((0,), (0, 200)), [600, 580])
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK, num_anchors=512)
    made: list[int] = []
    plain = trainee.tiles_of_blocks

    def spy(blocks: AnchoredBlocks, **kwargs: Any) -> Any:
        tiles = plain(blocks, **kwargs)
        made.append(sum(tile.mask.numel() for tile in tiles if tile.mask is not None))
        return tiles

    def loss_and_gradient(kernel: Any, **context: Any) -> list[Tensor]:
        pair = DraftTrainee(tiny_draft().float(), tiny_target().float(), attention_kernel=kernel)
        with torch.autocast("cpu", dtype=torch.bfloat16, **context):
            output = objective.loss(pair, batch, RowGenerator(keys=torch.arange(2)))
        output.loss_sum.backward()
        return [output.loss_sum.detach(), *(p.grad for p in pair.model.parameters())]  # type: ignore[list-item]

    expected = loss_and_gradient("dense", enabled=False)
    monkeypatch.setattr(trainee, "tiles_of_blocks", spy)
    monkeypatch.setattr(trainee, "dense", lambda *args: pytest.fail("the whole mask was made"))
    for ours, theirs in zip(loss_and_gradient(None, enabled=False), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))
    (num_entries,) = made
    assert num_entries < 0.35 * 2 * 512 * BLOCK * (600 + 512 * BLOCK)
    in_bf16 = loss_and_gradient(None, enabled=True)[0]
    assert float(in_bf16) == pytest.approx(float(expected[0]), rel=2e-2)
