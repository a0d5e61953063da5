"""What a new draft says before it has learnt anything."""

import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.models.dflash.config import DFlashDraftConfig
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import DraftPlan, new_draft_config
from tokendiff.models.dflash.trainee import DraftTrainee, load_trainee
from tokendiff.objectives.dflash import DFlash

V, WIDTH, BLOCK, MASK = 500, 64, 4, 7


def a_target(*, is_tied: bool, row_length: float) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.02,
        tie_word_embeddings=is_tied,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0.0, row_length / math.sqrt(WIDTH))
    return model


def config_of(target: LlamaForCausalLM) -> DFlashDraftConfig:
    sizes = {"num_layers": 2, "block_size": BLOCK, "mask_token_id": MASK}
    return new_draft_config(target.config, target_model_id="t", **sizes)  # type: ignore[arg-type]


def first_nll(trainee: DraftTrainee) -> float:
    tokens = torch.randint(8, V, (4, 40), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens=tokens, is_valid=torch.ones_like(tokens).bool())
    objective = DFlash(block_size=BLOCK, mask_token_id=MASK)
    nats, count = objective.loss(trainee, batch, RowGenerator(keys=torch.arange(4))).metrics[
        "draft_nll"
    ]
    return float(nats / count)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("row_length", [1.0, 6.0])
def test_it_holds_all_tokens_for_about_as_likely_under_any_head(
    is_tied: bool, row_length: float, tmp_path: Path
) -> None:
    target = a_target(is_tied=is_tied, row_length=row_length)
    target.save_pretrained(tmp_path)
    plan = DraftPlan(
        draft=config_of(target),
        target=target.config,
        target_model_id=str(tmp_path),
        draft_model_id=None,
    )
    trainees, state = [], torch.get_rng_state()
    for seed in (1, 1, 2):
        trainees.append(load_trainee(plan, device=torch.device("cpu"), seed=seed))
    assert torch.equal(torch.get_rng_state(), state), "what is drawn elsewhere is drawn as before"
    same, other = (
        [torch.equal(a, b) for a, b in zip(trainees[0].model.parameters(), pair, strict=True)]
        for pair in (trainees[1].model.parameters(), trainees[2].model.parameters())
    )
    assert all(same)
    assert not all(other)
    for trainee in trainees:
        # Independent logits of standard deviation 1 cost half a nat more than equal ones.
        assert math.log(V) + 0.25 < first_nll(trainee) < math.log(V) + 0.8
    torch.manual_seed(1)
    plain = DraftTrainee(DFlashDraftModel(config_of(target)), target)
    assert row_length == 1.0 or first_nll(plain) > math.log(V) + 10.0
