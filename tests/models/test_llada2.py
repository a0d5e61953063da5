"""LLaDA2.x: opened without its code, sampled, trained, saved as it came."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING

from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.models.published import (
    EMBEDDINGS,
    LLADA2_CONFIG,
    MASK,
    V,
    llada2,
    llada2_logits,
    llada2_shapes,
)
from tests.training.distributed import assert_same_weights, run_distributed
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.diffusion.attention_masks import block_causal_by_position
from tokendiff.errors import InputError
from tokendiff.models.completion import CompletionModel, CompletionSetup
from tokendiff.models.decoding import open_causal
from tokendiff.models.default_sampler import default_sampler
from tokendiff.models.opening import load_causal_denoiser
from tokendiff.models.pretrained import open_config
from tokendiff.training.inputs import check_inputs, check_model
from tokendiff.training.memory import plan_memory
from tokendiff.training.run import train_in_process
from tokendiff.verification.checkpoints import verify_checkpoint

LENGTH, K = 12, 4


def some_tokens() -> Tensor:
    tokens = torch.tensor(random_rows(2, LENGTH))
    tokens[:, 5:7] = MASK
    return tokens


def sees_its_block(length: int) -> Tensor:
    block = torch.arange(length) // K
    return block[:, None] >= block


def expected(folder: Path, fields: dict[str, Any], tokens: Tensor) -> Tensor:
    weights = load_file(folder / "model.safetensors")
    is_seen = sees_its_block(tokens.shape[1])
    rows = [llada2_logits(weights, fields, row, is_seen)[:, :V] for row in tokens]
    return torch.stack(rows)


def decoded(folder: Path, tokens: Tensor, **fields: Any) -> Tensor:
    """Logits of a decoder whose positions see their block and those before it."""
    model, _ = open_causal(str(folder), **fields)
    every, lengths = torch.arange(len(tokens)), torch.full((len(tokens),), tokens.shape[1])
    rule = block_causal_by_position(K)
    with torch.no_grad():
        return model.head(model.encode(tokens, lengths, model.new_cache(2), every, rule)).float()


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"num_shared_experts": 2, "routed_scaling_factor": 1.0}),
        (torch.float32, {"num_experts_per_tok": 1, "topk_group": 1}),  # not scaled up to 1
        (torch.float32, {"norm_topk_prob": False, "n_group": 1, "topk_group": 1}),  # scaled so
        (torch.float32, {"tie_word_embeddings": True, "partial_rotary_factor": 0.25}),
        (torch.float32, {"first_k_dense_replace": 0, "num_key_value_heads": 4}),
    ],
)
def test_llada2_computes_what_its_formulas_say(
    dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path
) -> None:
    fields, tokens = llada2(tmp_path, dtype=dtype, **changes), some_tokens()
    wanted = expected(tmp_path, fields, tokens)
    torch.testing.assert_close(decoded(tmp_path, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_the_choice_of_experts_stays_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    llada2(tmp_path, dtype=torch.bfloat16)
    model, _ = open_causal(str(tmp_path), dtype=torch.bfloat16)
    bias = model.model.model.layers[1].mlp.gate.e_score_correction_bias
    there = load_file(tmp_path / "model.safetensors")["model.layers.1.mlp.gate.expert_bias"]
    assert torch.equal(bias, there)
    assert bias.dtype == there.dtype == torch.float32
    assert model.model.config._experts_implementation != "eager"  # which loops over experts


@pytest.mark.parametrize("gen_length", [9, 7])  # whole blocks; a last one that is cut
def test_greedy_samples_fill_one_by_one_what_the_formulas_say(
    gen_length: int, tmp_path: Path
) -> None:
    fields = llada2(tmp_path)
    assert default_sampler(str(tmp_path)) == "block_refinement"
    sampler = {
        "name": "block_refinement",
        "gen_length": gen_length,
        "block_length": K,
        "num_inference_steps": K,
        "threshold": 2.0,
        "eos_early_stop": False,
    }
    config = GenerateConfig.model_validate({"model_id": str(tmp_path), "sampler": sampler})
    (record,) = CompletionModel(config).sample([GenerationRow(id=0, prompt="abc")])
    tokens = torch.full((1, 12), MASK)
    tokens[0, :3] = torch.tensor([4, 5, 6])
    for end in (4, 8, 12):
        while (tokens[0, :end] == MASK).any():
            probs = expected(tmp_path, fields, tokens[:, :end])[0]
            probs[:, MASK] = -torch.inf
            best = probs.softmax(-1).max(-1)
            confidence = best.values.masked_fill(tokens[0, :end] != MASK, -1.0)
            place = int(confidence.argmax())
            tokens[0, place] = best.indices[place]
    assert record["tokens"] == tokens[0, : 3 + gen_length].tolist()


# Training.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[random_rows(40, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(V),
    )
    return TokenData.open(folder, split="train")


def train_config(folder: Path, **changes: Any) -> TrainConfig:
    fields = {
        "model_name_or_path": str(folder),
        "max_train_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "objective": {"name": "block_diffusion", "block_length": K},
    }
    return TrainConfig.model_validate({**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 2, "ema_decay": 0.5},
        {"objective": {"name": "block_refinement", "attention_mask_mode": "4d"}},
    ],
)
def test_what_is_trained_is_saved_in_the_layout_that_it_came_in(
    changes: dict[str, Any], data: TokenData, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    fields = llada2(source)
    (source / "modeling_llada2_moe.py").write_text("raise RuntimeError('never run')\n")
    cfg = train_config(source, **changes)
    check_inputs(cfg, data)
    final = Path(train_in_process(cfg, data, tmp_path / "run"))
    before, after = (load_file(folder / "model.safetensors") for folder in (source, final))
    assert {name: tuple(t.shape) for name, t in after.items()} == llada2_shapes(fields)
    assert all(tensor.isfinite().all() for tensor in after.values())
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert "model.layers.1.mlp.gate.expert_bias" in kept
    assert "model.layers.1.attention.query_key_value.weight" not in kept
    saved = json.loads((final / "config.json").read_text())
    assert saved == fields | {"torch_dtype": "float32"}
    assert (final / "modeling_llada2_moe.py").is_file()
    # What another reads from those names is what the trained model computes.
    tokens = some_tokens()
    denoiser = load_causal_denoiser(
        str(final), tokenizer=letter_tokenizer(V), max_length=LENGTH, allow_new_weights=False
    ).eval()
    with torch.no_grad():
        states = denoiser.encode(
            tokens, torch.arange(LENGTH).expand(2, -1), block_causal_by_position(K)
        )
        ours = denoiser.head(states)
    torch.testing.assert_close(ours, expected(final, fields, tokens), rtol=1e-4, atol=1e-4)


def test_an_untrained_step_writes_every_weight_back(data: TokenData, tmp_path: Path) -> None:
    """Each published tensor comes back from the pieces that it was opened in, to the bit."""
    llada2(tmp_path / "source", dtype=torch.bfloat16)
    cfg = train_config(tmp_path / "source", learning_rate=1e-30)
    final = Path(train_in_process(cfg, data, tmp_path / "run"))
    before, after = (load_file(f / "model.safetensors") for f in (tmp_path / "source", final))
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_published_names(data: TokenData, tmp_path: Path) -> None:
    llada2(tmp_path / "source")
    fields = {"checkpointing_steps": 1, "lr_scheduler": "constant", "ema_decay": 0.5}
    cfg, short = (
        train_config(tmp_path / "source", **fields, max_train_steps=steps) for steps in (2, 1)
    )
    whole = train_in_process(cfg, data, tmp_path / "whole")
    train_in_process(short, data, tmp_path / "cut")
    cut = train_in_process(cfg, data, tmp_path / "cut")
    files = [load_file(Path(folder) / "model.safetensors") for folder in (whole, cut)]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_from_scratch_has_the_layout_too(data: TokenData, tmp_path: Path) -> None:
    fields = llada2(tmp_path / "source")
    cfg = train_config(tmp_path / "source", from_scratch=True)
    final = Path(train_in_process(cfg, data, tmp_path / "run"))
    shapes = llada2_shapes(fields | {"vocab_size": V})
    after = load_file(final / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in after.items()} == shapes


def test_a_certificate_is_made_in_float64(data: TokenData, tmp_path: Path) -> None:
    llada2(tmp_path / "source")
    final = Path(train_in_process(train_config(tmp_path / "source"), data, tmp_path / "run"))
    rows = np.array(random_rows(4, LENGTH))
    checks = list(verify_checkpoint(final, rows, np.full(4, LENGTH)))
    assert checks
    assert not [check for check in checks if check.error or not check.passed]


def test_a_model_is_checked_before_its_rows_are_made(tmp_path: Path) -> None:
    llada2(tmp_path)
    check_model(train_config(tmp_path), max_length=LENGTH)
    with pytest.raises(InputError, match="objective 'ar' would make another model"):
        check_model(train_config(tmp_path, objective={"name": "ar"}), max_length=LENGTH)
    with pytest.raises(InputError, match="takes at most 64 tokens; max_length is 65"):
        check_model(train_config(tmp_path), max_length=65)


def test_memory_is_planned_without_weights(data: TokenData, tmp_path: Path) -> None:
    fields = llada2(tmp_path)
    plan = plan_memory(
        train_config(tmp_path),
        letter_tokenizer(V),
        max_length=LENGTH,
        num_workers=1,
        replica_size=None,
        device=torch.device("cpu"),
    )
    shapes = {n: s for n, s in llada2_shapes(fields).items() if "expert_bias" not in n}
    assert plan.weights == 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    assert plan.activations > 0


# What does not go.


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_bias": True}, "use_bias True"),
        ({"use_qkv_bias": True}, "use_qkv_bias True"),
        ({"use_qk_norm": False}, "use_qk_norm False"),
        ({"score_function": "softmax"}, "score_function 'softmax'"),
        ({"moe_router_enable_expert_bias": False}, "enable_expert_bias False"),
        ({"router_dtype": "bf16"}, "router_dtype 'bf16'"),
        ({"norm_head": True}, "norm_head True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling .*yarn"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters .*yarn"),
        ({"use_sliding_window": True}, "use_sliding_window True"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers 1"),
        ({"num_shared_experts": None}, "must have num_shared_experts, a whole number"),
        ({"num_experts": "many"}, "must have num_experts, a whole number, got 'many'"),
        ({"n_group": 5}, "num_experts 12, n_group 5 and topk_group 2; the groups must be equal"),
        ({"topk_group": 9}, "topk_group 9; the groups"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7, and the chosen groups have 6"),
    ],
)
def test_a_llada2_that_is_no_glm_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLADA2_CONFIG | changes))
    with pytest.raises(InputError, match=rf"^model_id '.*' cannot be opened \(.*{says}.*; give"):
        open_config(str(tmp_path), field="model_id", remedy="give another")


def test_where_its_weights_cannot_be_converted_it_names_the_transformers_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokendiff.models.llada_moe import LLADA2_TYPE

    monkeypatch.delitem(CONFIG_MAPPING._extra_content, LLADA2_TYPE, raising=False)  # as before 5.20
    (tmp_path / "config.json").write_text(json.dumps(LLADA2_CONFIG))
    with pytest.raises(InputError, match=r"'llada2_moe' need transformers 5\.20 or newer; 5\."):
        open_config(str(tmp_path), field="model_id", remedy="give another")


def test_fields_may_be_as_transformers_5_writes_them(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"rope_theta": None, "partial_rotary_factor": None}
    rope = {"rope_type": "default", "rope_theta": 6000.0, "partial_rotary_factor": 0.5}
    fields = llada2(tmp_path, **changes, rope_parameters=rope)
    tokens = some_tokens()
    wanted = expected(tmp_path, fields | rope, tokens)
    torch.testing.assert_close(decoded(tmp_path, tokens), wanted, rtol=1e-4, atol=1e-4)


def test_the_mask_of_the_family_is_known_where_nothing_names_it(tmp_path: Path) -> None:
    llada2(tmp_path, mask_token_id=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text().replace('"mask_token": "[MASK]",', "")
        (tmp_path / name).write_text(text.replace("[MASK]", "[HOLE]"))
    config = GenerateConfig.model_validate(
        {"model_id": str(tmp_path), "sampler": "block_refinement"}
    )
    with pytest.raises(InputError, match="its mask token has id 156895, but its tokenizer has"):
        CompletionSetup.of(config, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"objective": {"name": "ar"}}, "objective 'ar' would make another model of one of type"),
        ({"objective": {"name": "mdlm"}}, "a denoiser of blocks; train it with .*block_diff"),
        ({"objective": {"name": "block_refinement"}}, "would make another .*mode '4d'"),
        ({"objective": {"name": "block_diffusion", "noise": "uniform"}}, "would make another"),
        ({"objective": {"name": "block_diffusion", "predict": "next"}}, "would make another"),
        ({"objective": {"name": "block_diffusion", "ar_loss_weight": 1.0}}, "would make another"),
        ({"keep_base": True, "lora_rank": 2}, "would make another model"),
        ({"optimizer": "muon"}, "optimizer 'muon' with a model of type 'llada2_moe': its experts"),
    ],
)
def test_what_could_not_be_saved_is_not_trained(
    changes: dict[str, Any], says: str, data: TokenData, tmp_path: Path
) -> None:
    llada2(tmp_path)
    with pytest.raises(InputError, match=says):
        check_inputs(train_config(tmp_path, **changes), data)


def test_another_mask_than_that_of_the_rows_is_refused(data: TokenData, tmp_path: Path) -> None:
    llada2(tmp_path, mask_token_id=5)
    with pytest.raises(InputError, match=r"its mask is id 5, .* is '\[MASK\]', id 1; preprocess"):
        check_inputs(train_config(tmp_path), data)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    llada2(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for kind in ("gate", "up", "down"):
        del tensors[f"model.layers.1.mlp.shared_experts.{kind}_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"has no weights for model\.layers\.1\.mlp\.shared_exp"):
        open_causal(str(tmp_path))
    llada2(tmp_path, vocab_size=EMBEDDINGS + 1)
    (tmp_path / "config.json").write_text(json.dumps(LLADA2_CONFIG))
    with pytest.raises(InputError, match="have another shape than its config says"):
        open_causal(str(tmp_path))


@pytest.mark.slow
def test_workers_that_share_the_model_write_what_one_does(data: TokenData, tmp_path: Path) -> None:
    llada2(tmp_path / "source")
    fields: dict[str, Any] = {"checkpointing_steps": 1, "learning_rate": 1e-4}
    one = train_config(tmp_path / "source", **fields)
    train_in_process(one, data, tmp_path / "one")
    both = train_config(tmp_path / "source", **fields, sharding="full")
    run_distributed([(both, tmp_path / "two")], data, 2)
    shutil.rmtree(tmp_path / "two/final")
    shutil.rmtree(tmp_path / "two/checkpoint-2")
    run_distributed([(both, tmp_path / "two")], data, 2)  # from checkpoint-1
    assert_same_weights(tmp_path / "two/final", tmp_path / "one/final")
