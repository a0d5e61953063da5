"""Reading parts of a row beside keys and values that are kept of the rest."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import tiny_causal
from tokendiff.models.denoiser import TransformersDenoiser, attend_both_ways
from tokendiff.models.families import CAUSAL_TYPES

V, LENGTH = 24, 11
Kept = list[tuple[Tensor, Tensor]]  # keys and values [L, heads, D] of each layer


def denoiser_of(model_type: str, *, predicts_next: bool, **changes: Any) -> TransformersDenoiser:
    model = tiny_causal(model_type, vocab_size=V, **changes)
    attend_both_ways(model.config)
    model = type(model)(model.config).double().eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
    return TransformersDenoiser(model, vocab_size=V, predicts_next=predicts_next)


def some_rows() -> tuple[Tensor, Tensor]:
    """Two rows, the second with padding."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, V, (2, LENGTH), generator=generator)
    is_valid = torch.ones_like(tokens).bool()
    is_valid[1, 8:] = False
    return tokens, is_valid


@pytest.mark.parametrize("predicts_next", [False, True])
@pytest.mark.parametrize("model_type", CAUSAL_TYPES)
@torch.no_grad()
def test_a_window_of_what_has_not_changed_is_that_part_of_the_row(
    model_type: str, predicts_next: bool
) -> None:
    denoiser = denoiser_of(model_type, predicts_next=predicts_next)
    tokens, is_valid = some_rows()
    whole = denoiser.encode(tokens, is_valid, torch.zeros(2))
    memory, rows = denoiser.new_memory(2), torch.arange(2)
    every = torch.arange(LENGTH).expand(2, -1)
    read = denoiser.encode_window(tokens, every, is_valid, memory, rows)
    torch.testing.assert_close(read[is_valid], whole[is_valid])
    windows = torch.tensor([[3, 4, 5, 6], [0, 1, 2, 3]])
    part = denoiser.encode_window(tokens, windows, is_valid, memory, rows)
    torch.testing.assert_close(part, whole.gather(1, windows[..., None].expand_as(part)))
    alone = torch.tensor([[5, 6, 7]])
    part = denoiser.encode_window(tokens[1:], alone, is_valid[1:], memory, rows[1:])
    torch.testing.assert_close(part, whole[1:, 5:8])


def rotated(states: Tensor, positions: Tensor, theta: float) -> Tensor:
    """[n, heads, D] turned by their positions [n], pair (j, j + D / 2) by theta^(-2j / D)."""
    half = states.shape[-1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    left, right = states[..., :half], states[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def reference(model: Any, tokens: Tensor, positions: Tensor, num_seen: int, kept: Kept) -> Tensor:
    """Hidden states [n, hidden] of a Llama that reads one row's tokens [n] at `positions` and sees
    the first `num_seen` keys of each layer's store, in which their own are written first.
    """
    config = model.config
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    theta = config.rope_parameters["rope_theta"]

    def normed(states: Tensor, norm: Any) -> Tensor:
        scale = (states.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return states * scale * norm.weight

    x = model.model.embed_tokens.weight[tokens]
    for layer, (keys, values) in zip(model.model.layers, kept, strict=True):
        attention, y = layer.self_attn, normed(x, layer.input_layernorm)
        query = rotated(
            (y @ attention.q_proj.weight.T).unflatten(-1, (heads, -1)), positions, theta
        )
        keys[positions] = rotated(
            (y @ attention.k_proj.weight.T).unflatten(-1, (shared, -1)), positions, theta
        )
        values[positions] = (y @ attention.v_proj.weight.T).unflatten(-1, (shared, -1))
        outputs = []
        for head in range(heads):
            group = head // (heads // shared)
            scores = query[:, head] @ keys[:num_seen, group].T / math.sqrt(query.shape[-1])
            outputs.append(scores.softmax(-1) @ values[:num_seen, group])
        x = x + torch.cat(outputs, dim=-1) @ attention.o_proj.weight.T
        y, mlp = normed(x, layer.post_attention_layernorm), layer.mlp
        gate = torch.nn.functional.silu(y @ mlp.gate_proj.weight.T)
        x = x + (gate * (y @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    return normed(x, model.model.norm)


@pytest.mark.parametrize("predicts_next", [False, True])
@torch.no_grad()
def test_a_window_sees_the_keys_and_values_that_were_stored(predicts_next: bool) -> None:
    """Of two layers, after tokens have changed in the window and outside of it: what is stored
    outside is what the first pass computed, at every layer, from the tokens that it saw.
    """
    denoiser = denoiser_of("llama", predicts_next=predicts_next)
    tokens, is_valid = some_rows()
    memory, rows = denoiser.new_memory(2), torch.arange(2)
    every = torch.arange(LENGTH).expand(2, -1)
    empty = torch.zeros(LENGTH, 2, 8, dtype=torch.float64)
    stores: list[Kept] = [[(empty.clone(), empty.clone()) for _ in range(2)] for _ in range(2)]
    denoiser.encode_window(tokens, every, is_valid, memory, rows)
    for row, kept in enumerate(stores):
        reference(denoiser.model, tokens[row], every[row], int(is_valid[row].sum()), kept)
    shift = int(predicts_next)
    for windows in (torch.tensor([[4, 5, 6], [1, 2, 3]]), torch.tensor([[7, 8, 9], [4, 5, 6]])):
        tokens = (tokens + 1 + every) % V
        read = denoiser.encode_window(tokens, windows, is_valid, memory, rows)
        fresh = denoiser.encode(tokens, is_valid, torch.zeros(2))
        for row, kept in enumerate(stores):
            window = torch.arange(int(windows[row, 0]) - shift, int(windows[row, -1]) + 1)
            expected = reference(
                denoiser.model, tokens[row, window], window, int(is_valid[row].sum()), kept
            )
            expected = expected[: len(windows[row])]
            torch.testing.assert_close(read[row], expected, rtol=1e-5, atol=1e-5)
            assert float((fresh[row, windows[row]] - expected).abs().max()) > 0.01
