"""Causal models under explicit masks: against transformers' own call, and kernel against kernel."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from tests.models.test_models import LENGTH, VOCAB, tiny_config
from tokendiff.diffusion.attention_masks import (
    block_diffusion,
    causal,
    dense,
    positions_in_document,
)
from tokendiff.models.causal_denoiser import AttentionKernel, TransformersCausalDenoiser
from tokendiff.models.denoiser import attend_without_window
from tokendiff.models.families import CAUSAL_TYPES
from tokendiff.models.masked_attention import best_kernel
from tokendiff.models.tiled_attention import tiled_attention, tiles_of

DOCUMENT = torch.tensor([[0] * 5 + [1] * (LENGTH - 5), [0] * (LENGTH - 2) + [-1] * 2])


def causal_model(model_type: str) -> Any:
    """Every weight is random, so that nothing hides behind a zero."""
    config = tiny_config(model_type)
    attend_without_window(config)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def some_tokens() -> Tensor:
    return torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def denoiser(model_type: str, kernel: AttentionKernel | None = None) -> TransformersCausalDenoiser:
    return TransformersCausalDenoiser(
        causal_model(model_type), vocab_size=VOCAB, attention_kernel=kernel
    )


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_the_causal_rule_is_what_the_model_does_by_itself(model_type: str) -> None:
    tokens, position = some_tokens(), positions_in_document(DOCUMENT)
    ours = denoiser(model_type)
    with torch.no_grad():
        logits = ours.head(ours.encode(tokens, position, causal(DOCUMENT)))
        for row, start, stop in ((0, 0, 5), (0, 5, LENGTH), (1, 0, LENGTH - 2)):
            alone = causal_model(model_type)(input_ids=tokens[row : row + 1, start:stop]).logits
            torch.testing.assert_close(
                logits[row, start:stop], alone[0, :, :VOCAB], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
def test_tiles_and_dense_attention_give_the_same_numbers_and_gradients(model_type: str) -> None:
    tokens = torch.cat([some_tokens(), some_tokens().flip(1)], dim=1)
    position = positions_in_document(DOCUMENT)
    rule = block_diffusion(DOCUMENT, position // 3)
    results = []
    for kernel in ("tiles", "dense"):
        model = denoiser(model_type, kernel).double()
        states = model.encode(tokens, position.repeat(1, 2), rule)
        model.head(states).square().mean().backward()
        results.append([states, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tile_size", [1, 3, 4, 100])
def test_tiles_of_any_size_give_what_the_whole_mask_gives(tile_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(2, 1, 11, 13, generator=generator) < 0.15
    mask[..., :11, :11] |= torch.eye(11, dtype=torch.bool)
    query = torch.randn(2, 4, 11, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 13, 8, generator=generator, dtype=torch.float64)
    tiles = tiles_of(mask, tile_size=tile_size)
    module = torch.nn.Module()
    ours, _ = tiled_attention(module, query, key, value, None, scaling=0.3, tiles=tiles)
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_tiles_leave_out_what_block_diffusion_never_sees() -> None:
    document = torch.zeros(1, 256, dtype=torch.long)
    block = torch.arange(256)[None] // 32
    mask = dense(block_diffusion(document, block), 1, 512, 512)
    computed = sum(
        (tile.stop - tile.start) * sum(last - first for first, last in tile.key_runs)
        for tile in tiles_of(mask, tile_size=32)
    )
    assert computed == int(mask.sum()) < 512 * 512 / 3


@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
def test_flex_attention_gives_the_same_numbers(stance: Any) -> None:
    """Compiled as well, which takes most of a minute: the kernel is written and built first."""
    model = denoiser("qwen3")
    tokens = torch.cat([some_tokens(), some_tokens().flip(1)], dim=1)
    position = positions_in_document(DOCUMENT)
    rule = block_diffusion(DOCUMENT, position // 3)
    states = []
    with torch.no_grad(), torch.compiler.set_stance(stance):
        for kernel in ("flex", "dense"):
            other = TransformersCausalDenoiser(
                copy.deepcopy(model.model), vocab_size=VOCAB, attention_kernel=kernel
            )
            states.append(other.encode(tokens, position.repeat(1, 2), rule))
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "kernel"), [(8, "tiles"), (16, "flex")])
def test_flex_attention_is_for_heads_that_its_kernels_on_cuda_take(width: int, kernel: str) -> None:
    for config in (
        tiny_config("qwen3", head_dim=width),  # which need not add up to the hidden size
        tiny_config("modernbert", hidden_size=2 * width),
    ):
        model = AutoModel.from_config(config)
        assert best_kernel(model, torch.device("cuda")) == kernel
        assert best_kernel(model, torch.device("cpu")) == "tiles"
