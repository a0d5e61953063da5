"""Block objectives trained, resumed, saved, opened again, judged and certified; adapters too."""

import itertools
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.models.test_causal_denoiser import causal_model
from tokendiff.artifacts.checkpoint import ADAPTERS, EMA_ADAPTERS
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.evaluate import EvaluateConfig
from tokendiff.config.generate import GenerateConfig
from tokendiff.config.samplers import AncestralConfig
from tokendiff.config.train import TrainConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.data.rows import TokenData, TokenRows
from tokendiff.errors import InputError
from tokendiff.evaluation.evaluator import Evaluator
from tokendiff.models.adapters import adapter_tensors, add_adapters, merged_weights
from tokendiff.models.builtin import builtin_config
from tokendiff.models.causal_denoiser import TransformersCausalDenoiser
from tokendiff.models.checkpoints import load_for_inference
from tokendiff.models.completion import CompletionModel
from tokendiff.models.opening import load_causal_denoiser
from tokendiff.models.sampling import build_sampler
from tokendiff.objectives.autoregressive import row_nats
from tokendiff.training.run import TrainingRun, train_in_process
from tokendiff.training.world import World
from tokendiff.verification.checkpoints import verify_checkpoint

LENGTH, EOS = 24, 2
OBJECTIVES: dict[str, dict[str, Any]] = {
    "block_diffusion": {"name": "block_diffusion", "block_length": 4, "alpha_schedule": "cosine"},
    "joint": {
        "name": "block_diffusion",
        "block_length": 4,
        "ar_loss_weight": 0.7,
        "diffusion_loss_weight": 0.5,
        "predict": "next",
    },
    "uniform": {"name": "block_diffusion", "block_length": 4, "noise": "uniform"},
    "2d": {"name": "block_refinement", "block_length": 6, "prompt_length": 3, "lambda_conf": 0.5},
    "4d clean": {
        "name": "block_refinement",
        "block_length": 6,
        "attention_mask_mode": "auto",
        "clean_context": True,
    },
}


def runs_of(row: Sequence[int]) -> list[int]:
    """A row is three documents, the last of which it may cut off."""
    return [7, 9, len(row) - 16] if len(row) > 16 else [len(row)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    rows = random_rows(48, LENGTH)
    for row in rows:
        row[6] = row[15] = EOS
    rows[-1] = rows[-1][:11]
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[rows],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(10, LENGTH, seed=1),
        runs_of=runs_of,
    )
    return TokenData.open(folder, split="train")


def config(name: str, **changes: Any) -> TrainConfig:
    fields = {
        "model_name_or_path": "builtin:qwen3-tiny",
        "max_train_steps": 4,
        "global_batch_size": 6,
        "per_device_train_batch_size": 6,
        "learning_rate": 1e-3,
        "ema_decay": 0.9,
        "logging_steps": 1,
        "checkpointing_steps": 2,
        "objective": OBJECTIVES[name],
    }
    return TrainConfig.model_validate({**fields, **changes})


def losses_of(cfg: TrainConfig, data: TokenData, folder: Path) -> list[float]:
    losses: list[float] = []

    def hear(event: str, **fields: Any) -> None:
        if event == "metrics":
            losses.append(fields["loss"])

    train_in_process(cfg, data, folder, on_event=hear)
    return losses


def build_run(cfg: TrainConfig, data: TokenData, folder: Path) -> TrainingRun:
    return TrainingRun.build(cfg, data, folder, world=World.current())


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_block_objectives_train_resume_and_are_judged(
    name: str, data: TokenData, tmp_path: Path
) -> None:
    losses = losses_of(config(name), data, tmp_path / "whole")
    assert len(losses) == 4
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "cut/checkpoint-2")
    assert losses_of(config(name), data, tmp_path / "cut") == losses[2:]
    parts = config(name, per_device_train_batch_size=2)
    assert losses_of(parts, data, tmp_path / "parts") == pytest.approx(losses, rel=1e-5)

    final = tmp_path / "whole/final"
    scheduler = json.loads((final / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "BlockRefinementScheduler"
    assert scheduler["block_length"] == OBJECTIVES[name]["block_length"]
    assert scheduler["attention_mask_mode"] == ("2d" if name == "2d" else "4d")
    assert scheduler["clean_context"] == (name != "2d")
    process = load_for_inference(final)[2]
    assert process == NoiseProcess.load(final)
    assert (process.objective, process.eos_token_id) == (OBJECTIVES[name]["name"], EOS)
    # A causal model that transformers opens and runs as one.
    model = AutoModelForCausalLM.from_pretrained(final)
    tokens = torch.tensor([random_rows(1, LENGTH)[0]])
    other = tokens.clone()
    other[0, 10:] = tokens[0, 9:-1]
    with torch.no_grad():
        logits = [model(input_ids=row).logits for row in (tokens, other)]
    torch.testing.assert_close(logits[0][:, :10], logits[1][:, :10])

    heldout = TokenData.open(data.folder, split="heldout")
    evaluator = Evaluator(final, EvaluateConfig(batch_size=4), device="cpu")
    rows = heldout.read(np.zeros(10, int), np.arange(10))
    told: list[tuple[float, float]] = []
    figures = evaluator.bounds(rows, on_progress=lambda figures: told.append(figures()))
    assert told == [(count, rows.lengths[:count].sum()) for count in (4, 8, 10)]
    prompt = OBJECTIVES[name].get("prompt_length", 0)
    firsts = 3 * (name == "joint")  # of documents, which none tells
    assert set(figures["num_tokens"].tolist()) == {LENGTH - prompt - firsts}
    assert np.all(np.isfinite(figures["nats"]))
    assert np.all(figures["nats"] > 0)
    assert bool(figures["num_bytes"].sum()) == (prompt == 0)

    if name == "joint":
        _decodes_by_token_too(final, figures, rows)
    rows = data.read(np.zeros(4, int), np.arange(4))
    failed = [c for c in verify_checkpoint(final, rows.tokens, rows.lengths) if not c.passed]
    assert not failed, failed
    fitting = "canvas" if name == "uniform" else "block_refinement"
    with pytest.raises(InputError, match=f"decodes block by block; use sampler '{fitting}'"):
        build_sampler(AncestralConfig(), process)
    if name == "uniform":
        _denoises_canvases(final)
    else:
        with pytest.raises(InputError, match=r"sampler 'canvas': .* was trained with masks"):
            completion(final, {"name": "canvas"})


def completion(final: Path, sampler: Any) -> CompletionModel:
    return CompletionModel(GenerateConfig(sampler=sampler, num_samples=1), checkpoint=final)


def _denoises_canvases(final: Path) -> None:
    row = GenerationRow(id=0, prompt="abcd")
    texts = set()
    for rule in ("entropy_bound", "ddim", "ancestral"):
        sampler = {"name": "canvas", "canvas_rule": rule, "max_new_tokens": 6}
        model = completion(final, {**sampler, "num_inference_steps": 3})
        (record,) = model.sample([row])
        new = record["tokens"][record["num_prompt_tokens"] :]
        texts.add(tuple(new))
        assert len(new) == 6 or record["finish_reason"] == "stop"
        assert model.tokenizer.mask_token_id not in new
        assert record["num_model_calls"] <= 9  # canvases of 4 tokens, with the prompt in the first
    assert len(texts) > 1
    for name in ("sdar", "block_refinement"):
        with pytest.raises(InputError, match=r"trained with uniform noise.*use sampler 'canvas'"):
            completion(final, {"name": name})
    long = completion(final, {"name": "canvas", "max_new_tokens": 5000})
    with pytest.raises(InputError, match=r"in whole blocks of 4, that exceeds the"):
        long.sample([row])


def test_fields_that_have_no_effect_with_uniform_noise_are_refused() -> None:
    uniform = OBJECTIVES["uniform"]
    with pytest.raises(ValidationError, match="exact_mask_counts True has no effect with noise"):
        config("uniform", objective={**uniform, "exact_mask_counts": True})
    with pytest.raises(ValidationError, match="keep_base drafts from masks"):
        config("uniform", keep_base=True, lora_rank=2)
    # Keys of older runs stay.
    assert "noise" not in config("block_diffusion").objective.result_fields()
    assert config("uniform").objective.result_fields()["noise"] == "uniform"
    for fields, problem in (
        ({"temperature": 0.5}, "temperature 0.5 has no effect with canvas_rule 'entropy_bound'"),
        ({"canvas_rule": "ddim", "t_max": 0.5}, "t_max 0.5 has no effect with canvas_rule 'ddim'"),
        ({"canvas_rule": "ddim", "threshold": 0.5}, "threshold 0.5 has no effect with canvas_rule"),
        ({"corrector_steps": 1}, "corrector_steps 1 has no effect with canvas_rule 'entropy_bo"),
        ({"canvas_rule": "ddim", "corrector_k": 2}, "corrector_k 2 has no effect with corrector_s"),
        ({"t_min": 0.9}, "t_min 0.9 must not exceed t_max 0.8"),
    ):
        with pytest.raises(ValidationError, match=problem):
            GenerateConfig(sampler={"name": "canvas", **fields}, num_samples=1)  # type: ignore[arg-type]


@torch.no_grad()
def _decodes_by_token_too(final: Path, figures: dict[str, np.ndarray], rows: TokenRows) -> None:
    """The likelihood of transformers' own loss, and the text of its own decoding."""
    averaged = load_for_inference(final)[0].model
    averaged.set_attn_implementation("sdpa")
    tokens = torch.from_numpy(rows.tokens).long()
    ends = (rows.lengths - 1).tolist()
    for row, nats in enumerate(figures["ar_nats"]):
        starts = [*rows.is_start[row].nonzero()[0].tolist(), ends[row] + 1]
        parts = [tokens[row : row + 1, a:b] for a, b in itertools.pairwise(starts)]
        losses = [averaged(input_ids=x, labels=x).loss * (x.shape[1] - 1) for x in parts]
        assert float(sum(losses)) == pytest.approx(nats, rel=1e-4)
        assert figures["ar_tokens"][row] == sum(x.shape[1] - 1 for x in parts)
    sampler: Any = {"name": "ar", "temperature": 0.0, "max_new_tokens": 6}
    model = CompletionModel(GenerateConfig(sampler=sampler, num_samples=1), checkpoint=final)
    (record,) = model.sample([GenerationRow(id=0, prompt="abcd")])
    prompt = torch.tensor([record["tokens"][: record["num_prompt_tokens"]]])
    expected = averaged.generate(prompt, max_new_tokens=6, do_sample=False)
    assert record["tokens"] == expected[0].tolist()


def test_models_that_attend_both_ways_are_no_causal_ones(data: TokenData, tmp_path: Path) -> None:
    mdlm = {"objective": {"name": "mdlm"}, "max_train_steps": 1}
    losses_of(config("2d", **mdlm), data, tmp_path / "mdlm")
    for model in (str(tmp_path / "mdlm/final"), "builtin:bert-tiny"):
        with pytest.raises(InputError, match="this objective takes a causal language model"):
            losses_of(config("2d", model_name_or_path=model), data, tmp_path / "causal")
    too_long = {"name": "block_refinement", "prompt_length": LENGTH}
    with pytest.raises(InputError, match="prompt_length 24 leaves nothing of rows of 24 tokens"):
        losses_of(config("2d", objective=too_long), data, tmp_path / "prompt")


@pytest.mark.parametrize("padded_to", [20, 24])
def test_an_added_mask_starts_at_the_mean_where_the_embedding_was_padded_too(
    padded_to: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows that no token had were never trained: as they were drawn, or zero."""
    own, ours = letter_tokenizer(20), letter_tokenizer(20)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        builtin_config("qwen3-tiny", vocab_size=padded_to, max_length=LENGTH, tokenizer=own)
    )
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[20:] = 0.0
    mean = weight[:20].mean(0).detach()
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    ours.add_special_tokens({"mask_token": "<new mask>"})
    said: list[str] = []
    denoiser = load_causal_denoiser(
        str(tmp_path), tokenizer=ours, max_length=LENGTH, warn=said.append
    )
    torch.testing.assert_close(denoiser.model.get_input_embeddings().weight[20].detach(), mean)
    assert ours.mask_token_id == 20
    told = "the tokenizer's '<new mask>' is new to the model: its embedding starts at the mean of "
    told += (
        "the others; the embedding grows from 20 rows to 21" if padded_to == 20 else "the others"
    )
    assert said == [told]
    assert not [record for record in caplog.records if record.name.startswith("transformers")]
    assert torch.equal(denoiser.model.get_input_embeddings().weight[:20], weight[:20])


# Adapters.

LORA = {"lora_rank": 3, "lora_alpha": 6.0, "lora_dropout": 0.1}


@pytest.mark.slow
def test_adapters_resume_exactly_and_are_merged_into_what_is_saved(
    data: TokenData, tmp_path: Path
) -> None:
    cfg = config("block_diffusion", **LORA)
    losses = losses_of(cfg, data, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "cut/checkpoint-2")
    assert losses_of(cfg, data, tmp_path / "cut") == losses[2:]

    tokens = torch.tensor(random_rows(2, LENGTH))
    base = build_run(config("block_diffusion"), data, tmp_path).trainer.denoiser.model
    with_adapters = build_run(cfg, data, tmp_path)
    untrained = with_adapters.trainer.denoiser.model.eval()
    assert torch.equal(untrained(input_ids=tokens).logits, base.eval()(input_ids=tokens).logits)
    for folder, name in (("checkpoint-4", EMA_ADAPTERS), ("checkpoint-4", ADAPTERS)):
        stored = load_file(tmp_path / "whole" / folder / f"{name}.safetensors")
        for parameter, tensor in adapter_tensors(untrained).items():
            tensor.copy_(stored[parameter])
        if name == EMA_ADAPTERS:  # what final/ and sampling take
            opened = [AutoModelForCausalLM.from_pretrained(tmp_path / "whole/final")]
            opened.append(load_for_inference(tmp_path / "whole/checkpoint-4")[0].model)
        else:
            opened = [AutoModelForCausalLM.from_pretrained(tmp_path / "whole/checkpoint-4")]
        tokens[0, 3] = 1  # a mask, whose embedding was trained
        with torch.no_grad():
            expected = untrained(input_ids=tokens).logits
            for model in opened:
                assert not any("lora" in name for name in model.state_dict())
                ours = model(input_ids=tokens).logits
                # The head is tied, so that the mask's own logit has another row now.
                ours[..., 1] = expected[..., 1]
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_adapters_alone_are_trained(data: TokenData, tmp_path: Path) -> None:
    cfg = config("2d", **LORA, lora_target_modules=["q_proj", "down_proj"])
    losses_of(cfg, data, tmp_path)
    before = build_run(config("2d"), data, tmp_path).trainer.denoiser.model.state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    layers = {f"model.layers.{n}." for n in (0, 1)}
    adapted = {
        f"{at}{part}.weight" for at in layers for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert changed == adapted | {"model.embed_tokens.weight", "lm_head.weight"}
    rows = (before["model.embed_tokens.weight"] != after["model.embed_tokens.weight"]).any(1)
    assert rows.nonzero()[:, 0].tolist() == [1], "only the mask's embedding"


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "olmo2"])
def test_merged_adapters_of_other_architectures(model_type: str, tmp_path: Path) -> None:
    model = causal_model(model_type)
    tokens = torch.arange(2, 10)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft's would be on the user's terminal
        add_adapters(
            model, rank=2, alpha=4.0, dropout=0.0, target_modules=(), trained_token_id=5, seed=0
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        weights = {name: tensor.contiguous() for name, tensor in merged_weights(model)}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model.save_pretrained(tmp_path, state_dict={})
        opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        merged = opened(input_ids=tokens).logits
        ours = model.eval()(input_ids=tokens).logits
    merged[..., 5] = ours[..., 5]
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-5)


def test_adapters_that_cannot_be_are_refused(data: TokenData, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"lora_alpha 2\.0 has no effect with lora_rank"):
        config("2d", lora_alpha=2.0)
    with pytest.raises(InputError, match=r"lora_target_modules \['proj'\]: .* has no linear"):
        build_run(config("2d", lora_rank=2, lora_target_modules=["proj"]), data, tmp_path)
    assert not any(name.startswith("lora") for name in config("2d").result_fields())


@pytest.mark.slow
def test_adapters_of_a_joint_loss_are_saved_as_they_were_trained(
    data: TokenData, tmp_path: Path
) -> None:
    """The mask's logit counts there, and a tied head has the row that was trained."""
    cfg = config("joint", **{**LORA, "lora_dropout": 0.0}, ema_decay=0.0, learning_rate=0.05)
    run = build_run(cfg, data, tmp_path)
    folder = train_in_process(cfg, data, tmp_path)
    stored = load_file(tmp_path / "checkpoint-4" / f"{ADAPTERS}.safetensors")
    trained: Any = run.trainer.denoiser.eval()
    adapters = adapter_tensors(trained.model)
    for name, tensor in adapters.items():
        tensor.copy_(stored[name])
    row = next(tensor for name, tensor in adapters.items() if name.endswith(".row"))
    row += 0.5  # as a longer run would
    batch = data.read(np.zeros(4, int), np.arange(4)).batch("cpu")
    weights = {name: tensor.contiguous() for name, tensor in merged_weights(trained.model)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    opened = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert opened.config.tie_word_embeddings
    with torch.no_grad():
        here = row_nats(trained, batch)[0]
        there = row_nats(TransformersCausalDenoiser(opened, vocab_size=16), batch)[0]
    torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-4)
