"""What is known to be wrong with a training run before anything of it starts."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from tests.builders import letter_tokenizer, random_rows, tiny_causal, token_folder
from tests.training.test_training import config, run
from tokendiff.data.rows import TokenData
from tokendiff.errors import InputError
from tokendiff.training.inputs import check_model, check_training, filling_notes

LENGTH = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = token_folder(
        tmp_path_factory.mktemp("tokens") / "data",
        files=[random_rows(16, LENGTH)],
        max_length=LENGTH,
        tokenizer=letter_tokenizer(),
    )
    return TokenData.open(folder, split="train")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models whose weights would be read last: they are damaged."""
    folder = tmp_path_factory.mktemp("models")
    bert: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 16,
    }
    configs = {
        "encoder": BertConfig(**bert),
        "short": BertConfig(**bert, max_position_embeddings=8),
        "causal": tiny_causal(vocab_size=16).config,
        "albert": _albert(bert),
        "vision": _vision(),
        "other": BertConfig(**bert),
    }
    for name, model_config in configs.items():
        model_config.save_pretrained(folder / name)
        letter_tokenizer().save_pretrained(folder / name)
        (folder / name / "model.safetensors").write_bytes(b"")
    letter_tokenizer(18).save_pretrained(folder / "other")
    BertConfig(**bert).save_pretrained(folder / "bare")
    return folder


def _albert(fields: dict[str, Any]) -> Any:
    from transformers import AlbertConfig

    return AlbertConfig(**fields, embedding_size=16)


def _vision() -> Any:
    from transformers import ViTConfig

    return ViTConfig(hidden_size=16, num_hidden_layers=1)


BLOCKS = {"name": "block_refinement"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_name_or_path": "/nowhere"}, "model_name_or_path '/nowhere' cannot be opened"),
        ({"warm_start_from": "/nowhere"}, "warm_start_from '/nowhere' cannot be opened"),
        ({"model_name_or_path": "bare"}, "a config but no weights; from_scratch"),
        ({"model_name_or_path": "short"}, "takes at most 8 tokens; max_length is 12"),
        ({"model_name_or_path": "vision"}, "'vit', which is no language model"),
        ({"model_name_or_path": "encoder", "objective": BLOCKS}, "'bert', and no causal one"),
        ({"model_name_or_path": "other"}, "not made with the tokenizer of model_name_or_path"),
        ({"warm_start_from": "other"}, "not made with the tokenizer of warm_start_from"),
        ({"objective": {**BLOCKS, "prompt_length": 12}}, "prompt_length 12 leaves nothing"),
        (
            {"model_name_or_path": "albert", "gradient_checkpointing": True},
            "gradient_checkpointing: transformers has none for models of type 'albert'",
        ),
        (
            {
                "model_name_or_path": "causal",
                "objective": BLOCKS,
                "lora_rank": 2,
                "lora_target_modules": ["no_proj"],
            },
            "lora_target_modules .'no_proj'.: a qwen3 model has no linear layers .*; it has .*k_",
        ),
        ({"global_batch_size": 2}, "a step of 2 rows cannot be shared by 3 workers"),
    ],
)
def test_what_is_wrong_is_said_before_a_weight_is_read(
    changes: dict[str, Any], says: str, data: TokenData, models: Path, tmp_path: Path
) -> None:
    if "lora_rank" in changes:
        pytest.importorskip("peft")
    if "objective" in changes and "model_name_or_path" not in changes:
        changes = {**changes, "model_name_or_path": "builtin:qwen3-tiny"}
    places = {
        name: str(models / value)
        for name, value in changes.items()
        if name in ("model_name_or_path", "warm_start_from") and (models / value).is_dir()
    }
    with pytest.raises(InputError, match=says):
        check_training(
            config(**{**changes, **places}),
            data_path=data.folder,
            output_dir=tmp_path,
            num_workers=3,
        )


@pytest.mark.parametrize("name", ["encoder", "causal"])
def test_what_can_be_trained_passes(
    name: str, data: TokenData, models: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"model_name_or_path": str(models / name)}
    if name == "causal":
        changes |= {"objective": BLOCKS, "gradient_checkpointing": True}
    check_training(config(**changes), data_path=data.folder, output_dir=tmp_path, num_workers=1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_name_or_path": "/nowhere"}, "'/nowhere' cannot be opened"),
        ({"model_name_or_path": "builtin:bert-giant"}, "no such built-in model; there are"),
        ({"model_name_or_path": "short"}, "takes at most 8 tokens; max_length is 12"),
        ({"model_name_or_path": "encoder", "objective": BLOCKS}, "'bert', and no causal one"),
        ({"model_name_or_path": "bare"}, "a config but no weights"),
        ({"objective": {"name": "dflash"}, "target_model_id": "encoder"}, "'bert', not a causal"),
        ({"objective": {"name": "dflash"}}, "set target_model_id"),
    ],
)
def test_a_model_is_looked_at_before_its_rows_are_made(
    changes: dict[str, Any], says: str, models: Path, tmp_path: Path
) -> None:
    places = {
        name: str(models / value)
        for name, value in changes.items()
        if isinstance(value, str) and (models / value).is_dir()
    }
    fields = {"model_name_or_path": "builtin:bert-mini", **changes, **places}
    cfg = config(**{"objective": "mdlm", **fields})
    with pytest.raises(InputError, match=says):
        check_model(cfg, max_length=LENGTH)
    with pytest.raises(InputError, match=says):
        check_training(
            cfg,
            data_path=tmp_path / "not yet",
            output_dir=tmp_path,
            num_workers=1,
            planned_length=LENGTH,
        )
    with pytest.raises(InputError, match="no committed token shards there"):
        check_training(cfg, data_path=tmp_path / "no", output_dir=tmp_path, num_workers=1)


def test_a_folder_with_another_run_is_refused_at_once(data: TokenData, tmp_path: Path) -> None:
    few = {"max_train_steps": 2, "checkpointing_steps": 1, "lr_warmup_steps": 0}
    run(config(**few), data, tmp_path)
    options: dict[str, Any] = {"data_path": data.folder, "output_dir": tmp_path, "num_workers": 1}
    check_training(config(**few), **options)
    check_training(config(**{**few, "max_train_steps": 3}), **options)
    with pytest.raises(InputError, match=r"run of another configuration \(seed: 0 there, 1 here"):
        check_training(config(**few, seed=1), **options)
    with pytest.raises(InputError, match="a run of 2 steps already; max_train_steps 1 is fewer"):
        check_training(config(**{**few, "max_train_steps": 1}), **options)
    for folder in tmp_path.iterdir():  # what is damaged is passed over by the run itself
        (folder / "MANIFEST.json").write_text("{")
    check_training(config(**few, seed=1), **options)


def test_new_weights_are_said_when_a_run_begins_and_not_when_it_goes_on(
    data: TokenData, tmp_path: Path
) -> None:
    bert: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(**bert, vocab_size=16, intermediate_size=16))
    encoder.save_pretrained(tmp_path / "encoder")
    cfg = config(model_name_or_path=str(tmp_path / "encoder"), max_train_steps=2, lr_warmup_steps=0)

    def said(cfg: Any, out: str) -> list[str]:
        _, events = run(cfg, data, tmp_path / out)
        assert [e["event"] for e in events].index("start") == sum(
            e["event"] in ("warning", "resume") for e in events
        ), "said before the first step"
        return [event["message"] for event in events if event["event"] == "warning"]

    new, unused = said(cfg, "run")
    assert "has no weights for cls.predictions" in new
    assert "start new and random" in new
    assert "pooler.dense.bias" in unused
    onward = cfg.model_copy(update={"max_train_steps": 3})
    assert said(onward, "run") == []
    # What was trained is whole, where another run starts from it too.
    warm = config(
        warm_start_from=str(tmp_path / "run" / "final"), max_train_steps=1, lr_warmup_steps=0
    )
    assert said(warm, "warm") == []


@pytest.mark.parametrize(
    ("objective", "is_filled", "says"),
    [
        ("ar", True, "filled up with EOS, which is learnt too; ar .* fill_answers false"),
        ("block_diffusion", True, "block_diffusion does without.* fill_answers false"),
        ("mdlm", False, "are not filled up; mdlm learns from that .* fill_answers true"),
        ("ar", False, None),
        ("mdlm", True, None),
    ],
)
def test_answers_filled_up_for_another_objective_are_told(
    objective: str, is_filled: bool, says: str | None, data: TokenData
) -> None:
    cfg = config(objective={"name": objective})

    def said(**asked_for: bool) -> list[str]:
        chats = {"train_on": "answers", "fills_answers": is_filled}
        metadata = {**data.metadata, "chats": chats, "config": asked_for}
        return filling_notes(cfg, replace(data, metadata=metadata))

    assert len(said()) == (says is not None)
    assert says is None or re.search(says, said()[0])
    assert said(fill_answers=is_filled) == []  # as the user wants it
    assert filling_notes(cfg, data) == []  # text


def test_what_is_told_of_filled_answers_reaches_the_log(data: TokenData, tmp_path: Path) -> None:
    metadata = {**data.metadata, "chats": {"train_on": "answers", "fills_answers": False}}
    cfg = config(max_train_steps=1, lr_warmup_steps=0)
    _, events = run(cfg, replace(data, metadata=metadata), tmp_path / "run")
    (message,) = [event["message"] for event in events if event["event"] == "warning"]
    assert "are not filled up" in message
