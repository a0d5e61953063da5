"""A model that stays what it was, with adapters that draft beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.training.test_block_training import build_run, losses_of
from tokendiff.artifacts.checkpoint import ADAPTERS, DRAFT_ADAPTERS, EMA_ADAPTERS
from tokendiff.artifacts.manifest import commit, load_manifest
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData
from tokendiff.diffusion.attention_masks import block_diffusion, causal, causal_up_to
from tokendiff.errors import CorruptFileError, InputError
from tokendiff.evaluation.evaluator import Evaluator
from tokendiff.models.checkpoints import load_for_inference
from tokendiff.models.completion import CompletionModel
from tokendiff.models.decoding import open_causal
from tokendiff.models.kept_base import read_as_base
from tokendiff.models.layers import cache_argument
from tokendiff.models.opening import load_causal_denoiser
from tokendiff.models.pretrained import dtype_in_files
from tokendiff.objectives.autoregressive import row_nats
from tokendiff.training.inputs import check_inputs, check_training
from tokendiff.verification.checkpoints import verify_checkpoint

LENGTH, V, BLOCK = 24, 16, 4
LORA = {"lora_rank": 3, "lora_alpha": 6.0}


def known_tokenizer() -> Any:
    """The letters' own, without a mask: that is token V once it is added."""
    from transformers import PreTrainedTokenizerFast

    full = letter_tokenizer(V)
    return PreTrainedTokenizerFast(
        tokenizer_object=full.backend_tokenizer,
        **{name: getattr(full, name) for name in ("pad_token", "eos_token") if getattr(full, name)},
    )


def with_mask() -> Any:
    tokenizer = known_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<new mask>"})
    return tokenizer


BASES = {"its own rows": "next", "padded": "own", "tied": "own", "bfloat16": "next"}


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V + (6 if request.param == "padded" else 0),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=request.param == "tied",
        bos_token_id=None,
        eos_token_id=None,
    )
    dtype = torch.bfloat16 if request.param == "bfloat16" else torch.float32
    model: Any = LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(folder)
    known_tokenizer().save_pretrained(folder)
    (folder / "predict").write_text(BASES[request.param])  # what it is trained with
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[random_rows(24, LENGTH)],
        max_length=LENGTH,
        tokenizer=with_mask(),
        heldout=random_rows(6, LENGTH, seed=1),
    )
    return TokenData.open(folder, split="train")


def config(base: Path, objective: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    blocks = {"name": "block_diffusion", "block_length": BLOCK, **(objective or {})}
    fields = {
        "model_name_or_path": str(base),
        "objective": blocks,
        "keep_base": True,
        "max_train_steps": 4,
        "per_device_train_batch_size": 6,
        "learning_rate": 0.03,
        "ema_decay": 0.5,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        **LORA,
    }
    return TrainConfig.model_validate({**fields, **changes})


@pytest.fixture(scope="module")
def trained(base: Path, data: TokenData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    losses_of(config(base, {"predict": (base / "predict").read_text()}), data, folder)
    return folder


def recommit(folder: Path) -> None:
    """Of a folder whose files were changed."""
    metadata = load_manifest(folder).metadata
    (folder / "MANIFEST.json").unlink()
    commit(folder, kind="checkpoint", metadata=metadata)


def texts(name: str, **fields: Any) -> dict[int, list[int]]:
    generate = GenerateConfig.model_validate(
        {"sampler": {"name": name, "max_new_tokens": 9}, "batch_size": 3, **fields}
    )
    checkpoint = Path(path) if (path := fields.get("checkpoint_path")) else None
    model = CompletionModel(generate, checkpoint=checkpoint)
    rows = [GenerationRow(id=n, prompt=text) for n, text in enumerate(("cdef", "g", "hijklm"))]
    return {record["id"]: record["tokens"] for record in model.sample(rows)}


def test_a_new_mask_starts_at_the_mean_of_all_tokens(
    base: Path, data: TokenData, tmp_path: Path
) -> None:
    model: Any = build_run(config(base), data, tmp_path).trainer.denoiser.model
    known = load_file(base / "model.safetensors")["model.embed_tokens.weight"][:V]
    row = model.get_input_embeddings()(torch.tensor([V]))[0]
    torch.testing.assert_close(row.detach(), known.float().mean(0))


@pytest.mark.slow
def test_the_weights_are_those_of_the_base_model_to_the_bit(trained: Path, base: Path) -> None:
    expected = load_file(base / "model.safetensors")
    for name in ("final", "checkpoint-2", "checkpoint-4"):
        found = load_file(trained / name / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    tokens = torch.tensor(random_rows(2, LENGTH))
    opened = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, trained / "final")]
    with torch.no_grad():
        logits = [model.eval()(input_ids=tokens).logits for model in opened]
    assert torch.equal(*logits)
    assert logits[0].dtype == next(iter(expected.values())).dtype


def test_its_likelihood_is_that_of_the_base_model_to_the_bit(
    trained: Path, base: Path, data: TokenData
) -> None:
    adapted, _, process = load_for_inference(trained / "final")
    assert process.keeps_base
    plain = load_causal_denoiser(
        str(base), tokenizer=letter_tokenizer(V), max_length=LENGTH, keeps_base=True
    ).eval()
    batch = data.read_group(0).take(torch.arange(6).numpy()).batch("cpu")
    with torch.no_grad():
        ours, theirs = (row_nats(model, batch)[0] for model in (adapted, plain))
        assert torch.equal(ours, theirs)
    held = TokenData.open(data.folder, split="heldout")
    evaluator = Evaluator(trained / "final", EvaluateConfig(num_mask_samples=1), device="cpu")
    figures = evaluator.bounds(held.read_group(0))
    of_base = row_nats(plain, held.read_group(0).batch("cpu"))[0]
    assert torch.equal(torch.as_tensor(figures["ar_nats"]), of_base.detach())
    # A mask that stands in the text is no target: the base model has no logit of it.
    rows = held.read_group(0)
    rows.tokens[2, 5] = V
    found = evaluator.bounds(rows)
    is_other = np.arange(len(rows)) != 2
    assert np.array_equal(found["ar_nats"][is_other], figures["ar_nats"][is_other])
    assert (figures["ar_tokens"] - found["ar_tokens"]).tolist() == [0, 0, 1, 0, 0, 0]
    assert np.isfinite(found["ar_nats"]).all()


@torch.no_grad()
def test_adapters_count_in_noisy_blocks_alone(trained: Path) -> None:
    """Held against transformers: the base model writes the cache, the model with all its adapters
    reads the block behind it.
    """
    adapted, _, process = load_for_inference(trained / "final")
    mask, model = process.mask_token_id, adapted.model
    clean = torch.tensor(random_rows(1, 12, seed=3))
    noisy = clean.clone()
    noisy[0, [4, 6, 7, 9]] = mask
    document = torch.zeros_like(clean)
    block = torch.arange(12)[None] // BLOCK
    both, position = torch.cat([noisy, clean], 1), torch.arange(12).repeat(2)[None]
    rule = block_diffusion(document, block, context_is_causal=True)
    is_draft = torch.arange(24)[None] < 12
    states = adapted.encode(both, position, rule, is_draft=is_draft)
    model.set_attn_implementation("sdpa")
    adapted._current = None
    for begin in range(0, 12, BLOCK):
        cache, here = DynamicCache(config=model.config), slice(begin, begin + BLOCK)
        if begin:
            adapted.draft_adapters.count_at(None)
            model(input_ids=clean[:, :begin], **cache_argument(model, cache))
        adapted.draft_adapters.count_at(torch.ones(1, BLOCK, dtype=torch.bool))
        told = model.base_model(
            input_ids=noisy[:, here],
            position_ids=torch.arange(begin, begin + BLOCK)[None],
            attention_mask=torch.ones(1, 1, BLOCK, begin + BLOCK, dtype=torch.bool),
            **cache_argument(model.base_model, cache),
        ).last_hidden_state
        torch.testing.assert_close(states[:, here], told, rtol=1e-4, atol=1e-4)
    adapted.draft_adapters.count_at(None)
    alone = model.base_model(input_ids=clean).last_hidden_state
    torch.testing.assert_close(states[:, 12:], alone, rtol=1e-4, atol=1e-4)
    assert (states[:, :BLOCK] - alone[:, :BLOCK]).abs().max() > 0.1


@pytest.mark.parametrize("way", [{}, {"draft_ahead": True}, {"draft_steps": 2}])
def test_its_samplers_write_the_text_of_the_base_model(
    trained: Path, base: Path, way: dict[str, Any]
) -> None:
    final = {"checkpoint_path": str(trained / "final")}
    expected = texts("ar", model_id=str(base))
    assert texts("ar", **final) == expected
    sampler = {"name": "self_speculation", "max_new_tokens": 9, "draft_temperature": 0.0, **way}
    assert texts("", **final, sampler=sampler) == expected


def test_blocks_are_decoded_by_the_adapters(trained: Path, base: Path) -> None:
    """Each token that sampler sdar writes alone is the likeliest one of a pass over all of it."""
    adapted, _, process = load_for_inference(trained / "final")
    sampler = {"name": "sdar", "max_new_tokens": 8, "temperature": 0.0, "denoising_steps": BLOCK}
    sampler["remasking_strategy"] = "sequential"
    found = texts("", checkpoint_path=str(trained / "final"), sampler=sampler)
    of_base = 0
    for tokens, prompt in zip(found.values(), ("cdef", "g", "hijklm"), strict=True):
        for place in range(len(prompt), len(tokens)):
            begin = place // BLOCK * BLOCK
            masks = [process.mask_token_id] * (begin + BLOCK - place)
            told = torch.tensor([[*tokens[:place], *masks]])
            is_draft = torch.arange(begin + BLOCK)[None] >= begin
            position = torch.arange(begin + BLOCK)[None]
            rule = causal_up_to(torch.tensor([begin]))
            logits = []
            for drafts in (is_draft, None):
                states = adapted.encode(told, position, rule, is_draft=drafts)
                logits.append(adapted.head(states)[0, place - (process.predict == "next")])
            assert int(logits[0].argmax()) == tokens[place]
            of_base += int(logits[1].argmax()) == tokens[place]
    assert of_base < sum(map(len, found.values())) - 11


def test_what_drafts_is_what_was_trained(trained: Path, data: TokenData) -> None:
    """The bound of a checkpoint is that of the adapters, averaged, and falls as they learn."""
    stored = load_file(trained / "checkpoint-4" / f"{EMA_ADAPTERS}.safetensors")
    final = load_file(trained / "final" / f"{ADAPTERS}.safetensors")
    assert stored.keys() == final.keys()
    assert all(torch.equal(stored[name], final[name]) for name in stored)
    nats = {}
    for name in ("final", "checkpoint-4", "untrained"):
        folder = trained / name
        if name == "untrained":
            shutil.copytree(trained / "final", folder)
            zeros = {n: v * ("lora_B" not in n) for n, v in final.items()}
            save_file(zeros, folder / f"{ADAPTERS}.safetensors")
            recommit(folder)
        held = TokenData.open(data.folder, split="heldout").read_group(0)
        evaluator = Evaluator(folder, EvaluateConfig(num_mask_samples=4), device="cpu")
        nats[name] = float(evaluator.bounds(held)["nats"].sum())
    shutil.rmtree(trained / "untrained")
    assert nats["final"] == nats["checkpoint-4"]
    assert nats["final"] < nats["untrained"]


@pytest.mark.slow
def test_it_resumes_exactly_and_goes_on_from_its_adapters(
    trained: Path, base: Path, data: TokenData, tmp_path: Path
) -> None:
    objective = {"predict": NoiseProcess.load(trained / "final").predict}
    whole = losses_of(config(base, objective), data, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "cut/checkpoint-2")
    assert losses_of(config(base, objective), data, tmp_path / "cut") == whole[2:]
    fields = {"max_train_steps": 1, "learning_rate": 1e-9, "ema_decay": 0.0}
    warm = config(base, objective, warm_start_from=str(trained / "final"), **fields)
    losses_of(warm, data, tmp_path / "warm")
    before = load_file(trained / "final" / f"{ADAPTERS}.safetensors")
    after = load_file(tmp_path / "warm/final" / f"{ADAPTERS}.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_checkpoint_is_certified(trained: Path, data: TokenData) -> None:
    rows = data.read(np.zeros(4, int), np.arange(4))
    checks = verify_checkpoint(trained / "final", rows.tokens, rows.lengths)
    assert checks
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_rank": None, "lora_alpha": 16.0}, r"keep_base trains adapters .* set lora_rank"),
        ({"objective": {"name": "ar"}}, "keep_base goes with objective block_diffusion, not with"),
        (
            {"objective": {"name": "block_diffusion", "ar_loss_weight": 1.0}},
            r"ar_loss_weight 1\.0 has no effect with keep_base",
        ),
        ({"from_scratch": True}, "from_scratch True has no effect with keep_base"),
    ],
)
def test_configs_that_contradict_it_are_refused(changes: dict[str, Any], says: str) -> None:
    objective = changes.pop("objective", {"name": "block_diffusion"})
    with pytest.raises(ValidationError, match=says):
        TrainConfig.model_validate({"objective": objective, "keep_base": True, **LORA, **changes})


def test_models_that_cannot_stay_as_they_are_are_refused(
    trained: Path, base: Path, data: TokenData, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"keep_base: .*starts from new weights"):
        check_inputs(config(base, model_name_or_path="builtin:qwen3-tiny"), data)
    final = str(trained / "final")
    started: dict[str, Any] = {"warm_start_from": final}
    with pytest.raises(InputError, match=r"holds other adapters .*theirs have rank 3"):
        check_inputs(config(base, **started, lora_rank=2), data)
    plain = config(base, **started, keep_base=False, lora_rank=None, lora_alpha=16.0)
    with pytest.raises(InputError, match="set keep_base to train them on, or give it as model_na"):
        check_inputs(plain, data)
    tokenizer = with_mask()
    tokenizer.add_tokens(["<one more>"])
    folder = token_folder(
        tmp_path / "data", files=[random_rows(6, LENGTH)], max_length=LENGTH, tokenizer=tokenizer
    )
    with pytest.raises(InputError, match=r"does not know 2 tokens .* only the mask may be new"):
        check_inputs(config(base), TokenData.open(folder, split="train"))


def test_a_mask_that_the_base_model_knows_keeps_its_own_embedding(
    base: Path, tmp_path: Path
) -> None:
    """Where text is read; what is trained counts where blocks are drafted."""
    shutil.copytree(base, tmp_path / "base")
    letter_tokenizer(V).save_pretrained(tmp_path / "base")
    folder = token_folder(
        tmp_path / "data",
        files=[random_rows(12, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(V),
    )
    here = TokenData.open(folder, split="train")
    cfg = config(tmp_path / "base", learning_rate=0.3, max_train_steps=2)
    losses_of(cfg, here, tmp_path / "out")
    adapted, _, process = load_for_inference(tmp_path / "out" / "final")
    plain = load_causal_denoiser(
        str(base), tokenizer=letter_tokenizer(V), max_length=LENGTH, keeps_base=True
    ).eval()
    tokens = torch.tensor(random_rows(2, 9))
    tokens[:, 4] = process.mask_token_id
    position, rule = torch.arange(9).expand(2, 9), causal(torch.zeros_like(tokens))
    everywhere = torch.ones_like(tokens, dtype=torch.bool)
    with torch.no_grad():
        ours, theirs = (m.encode(tokens, position, rule) for m in (adapted, plain))
        drafted = adapted.encode(tokens, position, rule, is_draft=everywhere)
    assert torch.equal(ours, theirs)
    assert (drafted - ours).abs().max() > 0.1
    assert adapted.vocab_size == V


def test_a_base_model_with_a_window_is_refused(base: Path, data: TokenData, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    config_file = tmp_path / "base" / "config.json"
    fields = json.loads(config_file.read_text())
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config_file.write_text(json.dumps({**fields, **mistral, "sliding_window": 8}))
    with pytest.raises(InputError, match=r"keep_base: .* see a window of 8 tokens"):
        check_inputs(config(tmp_path / "base"), data)


def test_a_run_that_nobody_checked_is_refused_too(
    trained: Path, base: Path, data: TokenData, tmp_path: Path
) -> None:
    """As a notebook starts one; adapters of a warm start would be lost without a word."""
    plain: dict[str, Any] = {"keep_base": False, "lora_rank": None, "lora_alpha": 16.0}
    warm = config(base, warm_start_from=str(trained / "final"), **plain)
    new = config(base, model_name_or_path="builtin:qwen3-tiny")
    for cfg, says in ((warm, "set keep_base to train them on"), (new, "starts from new weights")):
        with pytest.raises(InputError, match=says):
            build_run(cfg, data, tmp_path)


def test_folders_that_lost_a_part_are_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "final", tmp_path / "a")
    (tmp_path / "a" / DRAFT_ADAPTERS).unlink()
    recommit(tmp_path / "a")
    with pytest.raises(InputError, match="does not say what adapters draft beside the base model"):
        load_for_inference(tmp_path / "a")
    shutil.copytree(trained / "final", tmp_path / "b")
    file = tmp_path / "b" / f"{ADAPTERS}.safetensors"
    stored = load_file(file)
    stored.pop(next(iter(stored)))
    save_file(stored, file)
    recommit(tmp_path / "b")
    with pytest.raises(CorruptFileError, match="has no tensor"):
        CompletionModel(
            GenerateConfig.model_validate({"sampler": {"name": "self_speculation"}}),
            checkpoint=tmp_path / "b",
        )
    scheduler = tmp_path / "b" / "scheduler_config.json"
    fields = json.loads(scheduler.read_text())
    scheduler.write_text(json.dumps({**fields, "context_attention": "block"}))
    with pytest.raises(InputError, match="keeps_base needs a block_length, and context_attention"):
        NoiseProcess.load(tmp_path / "b")


def test_the_objective_refuses_a_weight_without_effect() -> None:
    from tests.objectives.test_joint import blocks

    with pytest.raises(ValueError, match="keeps_base leaves ar_loss_weight"):
        blocks(keeps_base=True, ar_loss_weight=1.0)
    assert blocks(keeps_base=True).sight.context_is_causal


def test_what_is_off_is_the_layer_that_it_was(trained: Path) -> None:
    adapted, _, _ = load_for_inference(trained / "final")
    layer = adapted.model.model.layers[0].self_attn.q_proj
    hidden = torch.randn(2, 3, 32)
    is_draft = torch.tensor([[True, False, False], [False, False, True]])
    with torch.no_grad():
        adapted.draft_adapters.count_at(None)
        assert layer.forward == layer.base_layer.forward
        off = layer(hidden)
        adapted.draft_adapters.count_at(is_draft)
        on = layer(hidden)
        adapted.draft_adapters.count_at(None)
        assert torch.equal(layer(hidden), off)
    assert torch.equal((on != off).any(-1), is_draft)


def test_it_is_served_with_the_library_that_its_adapters_need(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow.pyfunc

    from tokendiff.tracking.registry import save_model

    given: list[list[str]] = []
    monkeypatch.setattr(
        mlflow.pyfunc, "save_model", lambda **fields: given.append(fields["pip_requirements"])
    )
    for name in ("final", "checkpoint-4"):
        save_model(tmp_path / name, trained / name, sampling={}, trained_on=[])
    shutil.copytree(trained / "final", tmp_path / "merged")
    (tmp_path / "merged" / DRAFT_ADAPTERS).unlink()
    save_model(tmp_path / "other", tmp_path / "merged", sampling={}, trained_on=[])
    names = [{line.partition("==")[0] for line in lines} for lines in given]
    assert [("peft" in found, "torch" in found) for found in names] == [
        (True, True),
        (True, True),
        (False, True),
    ]


def test_a_base_model_in_several_files_keeps_its_dtype_too(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, and a model of the hub that is on this machine."""
    model = AutoModelForCausalLM.from_pretrained(base)
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    model.save_pretrained(snapshot, max_shard_size="10KB")
    assert len(list(snapshot.glob("model-*.safetensors"))) > 1
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    assert dtype_in_files(str(snapshot)) == model.dtype
    assert dtype_in_files("some/model") == model.dtype


def test_what_cannot_be_kept_is_refused_before_there_are_rows(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    config_file = tmp_path / "base" / "config.json"
    fields = json.loads(config_file.read_text())
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config_file.write_text(json.dumps({**fields, **mistral, "sliding_window": 8}))
    for name, says in ((str(tmp_path / "base"), "a window of 8"), ("builtin:qwen3-tiny", "new we")):
        with pytest.raises(InputError, match=says):
            check_training(
                config(base, model_name_or_path=name),
                data_path=tmp_path / "nowhere",
                output_dir=None,
                num_workers=1,
                planned_length=LENGTH,
            )


def test_read_as_the_base_model_it_has_the_logits_of_that(trained: Path) -> None:
    """Of a padded one too, whose embedding has a row for the mask that it does not know."""
    model, _ = open_causal(str(trained / "final"), field="checkpoint_path")
    read_as_base(model, trained / "final")
    assert model.vocab_size == V
    assert model.draft_adapters is None
