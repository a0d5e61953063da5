"""Weights that are held in bfloat16 for sampling, against float32 under the same autocast."""

import copy
from typing import Any

import pytest
import torch

from tests.models.test_models import tiny_denoiser
from tokendiff.models.layers import round_for_autocast

V = 40


@pytest.mark.parametrize("model_type", ["bert", "tokendiff_dit", "llama"])
def test_logits_are_those_of_float32_weights_to_the_bit(model_type: str) -> None:
    whole: Any = tiny_denoiser(model_type, vocab_size=V).float().eval()
    rounded = copy.deepcopy(whole)
    round_for_autocast(rounded)
    linear = [m.weight.dtype for m in rounded.modules() if isinstance(m, torch.nn.Linear)]
    assert linear.count(torch.bfloat16) >= len(linear) - 1, "all but a head that is tied"
    embedding = rounded.model.get_input_embeddings().weight
    assert embedding.dtype == torch.float32
    tokens = torch.randint(2, V, (2, 12), generator=torch.Generator().manual_seed(0))
    is_valid = torch.ones_like(tokens, dtype=torch.bool)
    is_valid[1, 9:] = False

    def logits(model: Any) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.encode(tokens, is_valid, torch.full((2,), 0.5))
            found: torch.Tensor = model.head(hidden[is_valid])
        return found

    assert torch.equal(logits(rounded), logits(whole))
    with torch.no_grad():
        in_full = whole.head(whole.encode(tokens, is_valid, torch.full((2,), 0.5))[is_valid])
    assert not torch.equal(logits(whole), in_full), "autocast rounds something"
