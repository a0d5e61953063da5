"""The released diffusers on our models and chances: an optional test dependency.

pip install --no-deps --target /tmp/diffusers diffusers==0.42.1
PYTHONPATH=/tmp/diffusers python -m pytest tests/samplers/test_diffusers_interop.py
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.builders import tiny_causal
from tests.samplers.test_block_decoding import MASK, V, refinement
from tests.samplers.test_decoding import completed, requests_of
from tokendiff.diffusion.kernels import UniformKernel
from tokendiff.diffusion.schedules import LogLinear
from tokendiff.models.causal import CausalModel
from tokendiff.samplers.block_refinement import BlockRefinementSampler
from tokendiff.samplers.corrector import SELECTIONS, chances
from tokendiff.verification.oracles import chi_square

diffusers = pytest.importorskip("diffusers", reason="an optional test dependency")
EOS = 2


class _WithoutMask(torch.nn.Linear):
    """An output embedding that gives the mask no probability, as it has none in training.

    The pipeline does not see to that: it counts the mask in, and where it is the likeliest token
    commits it and leaves it in the text.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).index_fill(-1, torch.tensor([MASK]), -1e9)


def model_without_mask(seed: int) -> Any:
    model = tiny_causal(vocab_size=V, seed=seed)
    head = _WithoutMask(32, V, bias=False).double()
    head.weight = model.lm_head.weight
    model.lm_head = head
    return model


def by_pipeline(model: Any, prompt: Sequence[int], sampler: BlockRefinementSampler) -> list[int]:
    pipeline: Any = diffusers.LLaDA2Pipeline(
        model=model,
        scheduler=diffusers.BlockRefinementScheduler(block_length=sampler.block_length),
    )
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        input_ids=torch.tensor([prompt]),
        gen_length=sampler.max_new_tokens,
        block_length=sampler.block_length,
        num_inference_steps=sampler.num_inference_steps,
        temperature=0.0,
        threshold=sampler.threshold,
        editing_threshold=sampler.editing_threshold,
        max_post_steps=sampler.max_post_steps,
        minimal_topk=sampler.minimal_topk,
        eos_token_id=EOS,
        mask_token_id=MASK,
        output_type="seq",
    )
    tokens: list[int] = output.sequences[0].tolist()
    return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_length": 8, "num_inference_steps": 8, "max_new_tokens": 13},
        {"num_inference_steps": 2, "threshold": 2.0},
        # The pipeline has no editing passes where a block used all its steps up.
        {"editing_threshold": 0.6, "threshold": 0.3, "num_inference_steps": 8},
    ],
)
def test_greedy_tokens_are_those_of_the_released_pipeline(fields: dict[str, Any]) -> None:
    sampler = refinement(**{"max_new_tokens": 12, "stop_token_ids": (EOS,), **fields})
    model, requests = model_without_mask(seed=1), requests_of((3, 9, 8))
    done = completed(sampler, CausalModel(model, vocab_size=V), requests)
    for request in requests:
        assert done[request.id].tokens == by_pipeline(model, request.prompt, sampler)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_corrector_is_that_of_diffusers(selection: str) -> None:
    """What its scheduler draws, against the chances and scores that ours draws from."""
    size, alpha, count = 6, 3 / 8, 40000
    generator = torch.Generator().manual_seed(5)
    tokens = torch.tensor([0, 4, 2, 5, 1])
    logits = 2.0 * torch.randn(len(tokens), size, generator=generator)
    kernel = UniformKernel(
        schedule=LogLinear(eps=1e-3), vocab_size=size, mask_token_id=0, exclude_mask=False
    )
    t = torch.full((len(tokens),), (1.0 - alpha) / (1.0 - 1e-3), dtype=torch.float64)
    loo = kernel.loo_logits(logits.double(), tokens, t)
    dense = kernel.marginal(loo.softmax(-1)[:, None], t)[:, 0]
    weight = SELECTIONS[selection](chances(kernel, loo, tokens, t)).softmax(0)

    scheduler: Any = diffusers.DiscreteDDIMScheduler(
        num_inference_steps=8, corrector_steps=1, corrector_selection=selection
    )
    output = scheduler.step_correct(
        logits.expand(count, -1, -1), 2, tokens.expand(count, -1), generator=generator
    )
    places = [
        (position, token)
        for position in range(len(tokens))
        for token in range(size)
        if token != tokens[position]
    ]
    observed = [int((output.prev_sample[:, at] == token).sum()) for at, token in places]
    expected = [float(weight[at] * dense[at, token]) * count for at, token in places]
    observed.append(count - sum(observed))  # drawn again, and the same
    expected.append(count - sum(expected))
    # The 0.01 % point of chi-square over 25 degrees of freedom is at 2.4 of each.
    assert chi_square(np.array(observed), np.array(expected)) < 2.4
