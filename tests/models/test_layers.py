"""The layers of a model: which they are, their states, and how they are compiled."""

import functools
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests.builders import tiny_causal
from tests.models.test_models import tiny_model
from tokendiff.diffusion.attention_masks import causal_by_position
from tokendiff.models import layers
from tokendiff.models.causal import CausalModel
from tokendiff.models.denoiser import TransformersDenoiser


@pytest.mark.parametrize("takes_indices", [True, False])
def test_states_after_chosen_layers(takes_indices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if takes_indices and not layers._takes_indices():
        pytest.skip("this version of transformers cannot")
    monkeypatch.setattr(layers, "_takes_indices", lambda: takes_indices)
    model = CausalModel(tiny_causal(), vocab_size=48)
    tokens, rows = torch.arange(12).view(2, 6), torch.arange(2)
    with torch.no_grad():
        every = model.model(tokens, output_hidden_states=True).hidden_states
        _, found = model.encode_layers(
            tokens,
            torch.tensor([6, 6]),
            model.new_cache(2),
            rows,
            causal_by_position,
            layers=(1, -1, 0),
        )
    for layer, states in zip((1, -1, 0), found, strict=True):
        torch.testing.assert_close(states, every[layer + 1])


def test_a_cache_is_given_by_the_name_that_a_model_knows() -> None:
    class Old(torch.nn.Module):
        def forward(self, tokens: Any, past_key_values: Any = None) -> Any:
            return past_key_values

    class New(torch.nn.Module):
        def forward(self, tokens: Any, cache: Any = None) -> Any:
            return cache

    class Renamed(torch.nn.Module):
        """As transformers marks what it has renamed."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            assert "past_key_values" not in kwargs
            return kwargs["cache"]

    functools.update_wrapper(Renamed.forward, New.forward)
    for kind in (Old, New, Renamed):
        model, cache = kind(), object()
        assert model(None, **layers.cache_argument(model, cache)) is cache


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3", "bert"])
def test_layers_are_compiled_once_for_all_of_them(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    sizes = {"num_hidden_layers": 5, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"hidden_size": 16, "head_dim": 8, "intermediate_size": 16, "vocab_size": 20}
    config = AutoConfig.for_model(model_type, **sizes, use_cache=False)
    model = AutoModel.from_config(config).eval()
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        compilations = torch._dynamo.utils.counters["stats"]
        compilations.clear()
        layers.compile_layers(model)
        found = model(tokens).last_hidden_state
    assert compilations["unique_graphs"] == 1
    torch.testing.assert_close(found, expected)


def test_layers_that_are_not_known_are_compiled_with_the_rest() -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
    albert = AutoModel.from_config(AutoConfig.for_model("albert", **sizes))
    layers.compile_layers(albert)
    assert [module for module in albert.modules() if module._compiled_call_impl] == [albert]


@pytest.mark.slow
def test_flex_attention_is_compiled_for_all_that_a_training_gives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole rows and windows, other numbers of rows and lengths, with gradient and without. What
    exceeds the limit is not compiled, and holds all scores in memory.
    """
    flex = "torch.nn.attention.flex_attention"
    monkeypatch.setattr(f"{flex}._validate_device", lambda *states: None)  # no gradient on a CPU
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    # The one that another test of this process may have compiled.
    wrapped = "transformers.integrations.flex_attention.WrappedFlexAttention"
    monkeypatch.setattr(f"{wrapped}._instance", None)
    monkeypatch.setattr(f"{wrapped}._is_flex_compiled", False)
    model = tiny_model("modernbert", layer_types=["full_attention", "sliding_attention"])
    denoiser = TransformersDenoiser(model, vocab_size=30, attention_kernel="flex")

    def encode(size: int, length: int) -> torch.Tensor:
        tokens = torch.arange(length).expand(size, -1) % 30
        is_valid = torch.ones_like(tokens, dtype=torch.bool)
        return denoiser.encode(
            tokens, is_valid, torch.zeros(size), torch.arange(length) // 5 + 0 * tokens
        )

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        for size, length in ((4, 32), (3, 32), (1, 32), (4, 40)):
            encode(size, length).sum().backward()
        with torch.no_grad():
            encode(4, 32)
    torch.compiler.reset()
