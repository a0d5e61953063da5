"""Folders of others that count without a manifest, and our own that do not."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.builders import letter_tokenizer, tiny_causal
from tokendiff.artifacts.checkpoint import find_checkpoint
from tokendiff.artifacts.model_folders import is_foreign, is_plain_causal
from tokendiff.artifacts.noise_process import objective_of
from tokendiff.errors import InputError
from tokendiff.models.checkpoints import check_autoregressive, load_autoregressive


def folder_of(path: Path, **changes: Any) -> Path:
    tiny_causal(vocab_size=16, **changes).float().save_pretrained(path)
    letter_tokenizer().save_pretrained(path)
    return path


def test_a_causal_model_as_transformers_saves_it_counts(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    (folder / "trainer_state.json").write_text("{}")  # as transformers' Trainer leaves one
    assert is_plain_causal(folder)
    assert is_foreign(folder)
    assert objective_of(folder) == "ar"
    assert find_checkpoint(folder) == folder.resolve()
    assert check_autoregressive(folder) == 16
    assert load_autoregressive(folder)[0].vocab_size == 16


@pytest.mark.parametrize("lost", ["manifest", "weights"])
def test_ours_does_not_count_without_its_manifest(lost: str, tmp_path: Path) -> None:
    final = folder_of(tmp_path / "out" / "final")
    if lost == "manifest":
        (tmp_path / "out" / "run").mkdir()
    else:
        next(final.glob("*.safetensors")).unlink()
    assert not is_plain_causal(final)
    with pytest.raises(InputError, match="no committed checkpoint there"):
        find_checkpoint(final)
    checkpoint = folder_of(tmp_path / "checkpoint-4")
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors")
    assert not is_plain_causal(checkpoint)


def test_a_published_block_model_is_no_autoregressive_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    config = folder / "config.json"
    text = config.read_text().replace('"qwen3"', '"sdar"')
    config.write_text(text.replace("Qwen3ForCausalLM", "SDARForCausalLM"))
    with pytest.raises(InputError, match="of type 'sdar', which is no model that predicts text"):
        check_autoregressive(folder)
