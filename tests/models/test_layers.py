"""States after chosen layers, whatever the version of transformers makes of the wish."""

import pytest
import torch

from tests.builders import tiny_causal
from tokendiff.diffusion.attention_masks import causal_by_position
from tokendiff.models import layers
from tokendiff.models.causal import CausalModel


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
