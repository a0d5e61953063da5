"""What a config says of its objective reaches the objective."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from tests.builders import letter_tokenizer
from tokendiff.config.train import TrainConfig
from tokendiff.models.families import family_of
from tokendiff.training.building import _build_dflash, make_objective

CONFIDENCE = {"lambda_conf": 0.5, "conf_temperature": 0.7}
WEIGHTED = {**CONFIDENCE, "min_time": 0.02, "max_loss_weight": 9.0}
JOINT = {"ar_loss_weight": 0.4, "diffusion_loss_weight": 0.6, "block_length": 8}
STARTS = {"restarts_at_answers": True, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("fields", "besides"),
    [
        ({"name": "mdlm", **WEIGHTED}, {"predicts_next": True}),
        ({"name": "udlm", **WEIGHTED}, {"predicts_next": True}),
        ({"name": "hybrid", "loss_type": "cross_entropy"}, {"predicts_next": True}),
        (
            {"name": "block_diffusion", **JOINT, **WEIGHTED, "predict": "next"},
            {"predicts_next": True, **STARTS},
        ),
        ({"name": "block_diffusion", "exact_mask_counts": True}, {}),
        (
            {"name": "block_diffusion", "noise": "uniform", **JOINT, **WEIGHTED, "predict": "next"},
            {"predicts_next": True, "loss_type": "elbo", **STARTS},
        ),
        (
            {
                "name": "block_refinement",
                "block_length": 8,
                "attention_mask_mode": "4d",
                "clean_context": True,
                **CONFIDENCE,
            },
            STARTS,
        ),
        ({"name": "block_refinement", "prompt_length": 3}, {}),
    ],
    ids=str,
)
def test_no_field_of_an_objective_is_lost(fields: dict[str, Any], besides: dict[str, Any]) -> None:
    """Each is set to another value than its default, or it could be left out unnoticed."""
    config: Any = TrainConfig.model_validate({"objective": fields})
    data: Any = SimpleNamespace(max_length=64, train_on="answers")
    objective, process = make_objective(
        config, letter_tokenizer(), data, predict="next", family=family_of("bert")
    )
    assert process is not None
    defaults = {field.name: field.default for field in dataclasses.fields(objective)}  # type: ignore[arg-type]
    expected = {**{n: v for n, v in fields.items() if n in defaults}, **besides}
    assert {name: getattr(objective, name) for name in expected} == expected
    changed = {name for name, value in expected.items() if value != defaults[name]}
    assert changed | {"loss_type"} >= expected.keys()


def test_a_base_that_is_kept_and_random_tokens_are_told_to_the_objective() -> None:
    data: Any = SimpleNamespace(max_length=64, train_on="all")
    kept = TrainConfig.model_validate(
        {
            "objective": {"name": "block_diffusion"},
            "model_name_or_path": "some/model",
            "keep_base": True,
            "lora_rank": 2,
        }
    )
    objective: Any
    objective, process = make_objective(
        kept, letter_tokenizer(), data, predict="own", family=family_of("qwen3")
    )
    assert objective.keeps_base
    assert process is not None
    assert process.context_attention == "causal"
    canvas = TrainConfig.model_validate(
        {"objective": {"name": "block_diffusion", "noise": "uniform", "ar_loss_weight": 1.0}}
    )
    family = family_of("diffusion_gemma")
    objective, process = make_objective(
        canvas, letter_tokenizer(), data, predict="own", family=family
    )
    assert process is not None
    assert process.prediction == family.prediction
    assert objective.loss_type == {"loo": "elbo", "posterior": "cross_entropy"}[family.prediction]


@pytest.mark.parametrize(
    "fields",
    [{"num_anchors": 3, "decay_gamma": 2.5}, {"loss_type": "dpace", "dpace_alpha": 0.3}],
    ids=str,
)
def test_no_field_of_a_drafts_objective_is_lost(fields: dict[str, Any]) -> None:
    objective = {"name": "dflash", **fields}
    config: Any = TrainConfig.model_validate({"objective": objective, "target_model_id": "some/m"})
    draft: Any = SimpleNamespace(block_size=4, mask_token_id=7)
    built: Any = _build_dflash(config.objective, draft)
    assert (built.block_size, built.mask_token_id) == (4, 7)
    assert {name: getattr(built, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("wanted", "train_on", "recorded"),
    [
        (None, "all", None),
        (None, "answers", "answer"),
        (None, "last_answer", "last_answer"),
        ("answer", "answers", "answer"),
        ("document", "answers", None),
    ],
)
def test_blocks_start_where_the_config_and_the_rows_say(
    wanted: str | None, train_on: str, recorded: str | None
) -> None:
    fields = {"name": "block_diffusion", "block_start": wanted}
    config = TrainConfig.model_validate({"objective": fields})
    data: Any = SimpleNamespace(max_length=64, train_on=train_on)
    objective: Any
    objective, process = make_objective(
        config, letter_tokenizer(), data, predict="own", family=family_of("qwen3")
    )
    assert process is not None
    assert process.block_start == recorded
    assert objective.restarts_at_answers == (recorded is not None)
