"""The card of final/: what hubs read of it, and that it is a function of the run alone."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from jobs import cli, generate
from pipelines.builders import train_stage
from tests.builders import letter_tokenizer, random_rows, token_folder
from tests.tracking.test_hub import FakeApi
from tokendiff.artifacts.manifest import load_manifest, verify
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.pipeline import Config
from tokendiff.config.train import TrainConfig
from tokendiff.data.rows import TokenData
from tokendiff.errors import InputError
from tokendiff.tracking.run_log import RunLog
from tokendiff.training.identity import run_identity
from tokendiff.training.model_card import CARD_NAME, model_card
from tokendiff.training.run import train_in_process

LENGTH = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[random_rows(16, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
        heldout=random_rows(6, LENGTH, seed=1),
    )
    return TokenData.open(folder, split="train")


def config(**changes: Any) -> TrainConfig:
    fields = {
        **({} if "target_model_id" in changes else {"model_name_or_path": "builtin:bert-tiny"}),
        "max_train_steps": 2,
        "global_batch_size": 4,
        "checkpointing_steps": 1,
        "eval_steps": 1,
        "max_eval_rows": 4,
    }
    return TrainConfig.model_validate({**fields, **changes})


def card_of(cfg: TrainConfig, data: TokenData, process: NoiseProcess | None = None) -> str:
    metadata = {"run": run_identity(cfg, data), "step": cfg.max_train_steps}
    return model_card(metadata, process=process, heldout=None)


def front_matter(text: str) -> dict[str, Any]:
    fields: dict[str, Any] = ModelCard(text).data.to_dict()
    return fields


@pytest.mark.slow
def test_a_resumed_run_leaves_the_same_card(data: TokenData, tmp_path: Path) -> None:
    straight = train_in_process(config(), data, tmp_path / "straight")
    folder = tmp_path / "resumed"
    train_in_process(config(), data, folder)
    for later in ("final", "checkpoint-2"):
        shutil.rmtree(folder / later)
    resumed = train_in_process(config(gradient_checkpointing=True), data, folder)

    card = (straight / CARD_NAME).read_bytes()
    assert (resumed / CARD_NAME).read_bytes() == card
    assert CARD_NAME in load_manifest(straight).files
    assert CARD_NAME not in load_manifest(straight.parent / "checkpoint-2").files
    verify(straight)
    text = card.decode()
    assert data.fingerprint in text
    assert re.search(r"Held-out rows \| \d\.\d{4} ± \d\.\d{4} nats per token", text)
    assert str(tmp_path) not in text
    loaded = front_matter(text)
    assert loaded["library_name"] == "tokendiff"
    assert "base_model" not in loaded
    assert set(loaded["tags"]) >= {"diffusion", "mdlm"}


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"model_name_or_path": "bert-base-uncased"}, "bert-base-uncased"),
        ({"model_name_or_path": "GSAI-ML/LLaDA-8B-Base"}, "GSAI-ML/LLaDA-8B-Base"),
        ({"model_name_or_path": "GSAI-ML/LLaDA-8B-Base@v1"}, "GSAI-ML/LLaDA-8B-Base"),
        ({"model_name_or_path": "bert-base-uncased", "from_scratch": True}, None),
        (
            {
                "objective": {"name": "dflash"},
                "target_model_id": "Qwen/Qwen3-8B",
            },
            "Qwen/Qwen3-8B",
        ),
    ],
)
def test_hubs_find_the_base_model(
    data: TokenData, changes: dict[str, Any], base: str | None
) -> None:
    assert front_matter(card_of(config(**changes), data)).get("base_model") == base
    if base is not None:
        validate_repo_id(base)


def test_local_weights_give_their_license_and_no_path(data: TokenData, tmp_path: Path) -> None:
    folder = tmp_path / "own-weights"
    folder.mkdir()
    (folder / CARD_NAME).write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n\n# Own\n")
    text = card_of(config(model_name_or_path=str(folder)), data)
    assert front_matter(text)["license"] == "apache-2.0"
    assert str(tmp_path) not in text
    in_no_front_matter = "# Own\n\nlicense: mit\n\n---\n\nMore.\n"
    for text in (in_no_front_matter, f"---\nlanguage: en\n---\n\n{in_no_front_matter}"):
        (folder / CARD_NAME).write_text(text)
        assert "license" not in front_matter(card_of(config(model_name_or_path=str(folder)), data))


def test_adapters_are_told_with_their_rank(data: TokenData) -> None:
    lora = {"lora_rank": 8, "lora_alpha": 32.0, "lora_target_modules": ["query", "value"]}
    said = "LoRA of rank 8 in `query`, `value` (lora_alpha 32.0, lora_dropout 0.0), merged into the"
    assert f"| Adapters | {said} weights |" in card_of(config(**lora), data)
    blocks = {"objective": {"name": "block_diffusion", "block_length": 4}}
    kept = card_of(config(**blocks, lora_rank=4, keep_base=True), data)
    assert "LoRA of rank 4 (" in kept
    assert "beside the weights of the base model" in kept
    assert "LoRA" not in card_of(config(), data)


@pytest.mark.parametrize("block_length", [None, 4])
def test_the_command_on_a_card_is_one_that_the_job_takes(
    data: TokenData, block_length: int | None
) -> None:
    process = NoiseProcess(
        forward_process="absorbing", vocab_size=16, mask_token_id=15, max_length=LENGTH
    )
    if block_length is not None:
        process = dataclasses.replace(
            process,
            block_length=block_length,
            attention_mask_mode="4d",
            clean_context=True,
            eos_token_id=1,
        )
    dflash = {"objective": {"name": "dflash"}, "target_model_id": "Qwen/Qwen3-8B"}
    cards = [card_of(config(), data, process)]
    cards += [card_of(config(**changes), data) for changes in ({}, dflash)]
    known = {flag for a in cli.parser_of(generate.main)._actions for flag in a.option_strings}
    for card in cards:
        (line,) = (line for line in card.splitlines() if line.startswith("tokendiff generate "))
        assert set(re.findall(r"--\w+", line)) <= known
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        for statement in code.splitlines():
            if statement.startswith("from "):
                exec(statement)


def test_a_card_says_how_a_model_of_chats_is_asked(data: TokenData) -> None:
    process = NoiseProcess(
        forward_process="absorbing",
        vocab_size=16,
        mask_token_id=15,
        max_length=LENGTH,
        block_length=4,
        attention_mask_mode="4d",
        clean_context=True,
        eos_token_id=1,
    )
    assert "--use_chat_template" not in card_of(config(), data, process)
    of_chats = dataclasses.replace(process, block_start="answer")
    card = card_of(config(), data, of_chats)
    assert "--use_chat_template --add_generation_prompt" in card
    known = {flag for a in cli.parser_of(generate.main)._actions for flag in a.option_strings}
    assert set(re.findall(r"--\w+", card)) <= known


def test_a_finished_run_that_is_made_longer_asks_for_the_token_first(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes no more steps does not: what cannot be pushed is said behind its result."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    short = config(push_to_hub="me/model")
    train_in_process(short, data, tmp_path / "run")
    stages = [
        train_stage(Config(train=section), folder=str(tmp_path / "run"), data_path=data.folder)
        for section in (short, config(push_to_hub="me/model", max_train_steps=3))
    ]
    assert all(stage.is_done for stage in stages)
    stages[0].check(stages[0])
    with pytest.raises(InputError, match="HF_TOKEN is not set"):
        stages[1].check(stages[1])


@pytest.mark.parametrize("fails", [False, True])
def test_the_train_stage_pushes_its_card_and_survives_a_failure(
    data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """The stage as a pipeline runs it, training in this process and a hub that is a stand-in."""
    api = FakeApi(fails=fails)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: api)
    monkeypatch.setenv("HF_TOKEN", "hunter2")

    def train(cfg: TrainConfig, cluster: Any, **kwargs: Any) -> Path:
        return train_in_process(cfg, data, kwargs["output_dir"], on_event=kwargs["on_event"])

    monkeypatch.setattr("tokendiff.cluster.train.train", train)
    section = config(push_to_hub="me/model", eval_steps=None, max_eval_rows=256)
    folder = tmp_path / "run"
    stage = train_stage(Config(train=section), folder=str(folder), data_path=data.folder)
    stage.check(stage)
    with RunLog(stage.log_path) as log:
        stage.action(stage, log)
        stage.action(stage, log)
    assert stage.is_done
    assert api.num_commits == (0 if fails else 1)
    result = stage.result(stage)
    assert result.get("pushed_to") == (None if fails else "https://hub.example/me/model/1")
    if not fails:
        assert set(api.repositories["me/model"]) >= {CARD_NAME, "model.safetensors"}
