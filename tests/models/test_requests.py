"""What is known to be wrong with a generation before a weight is read: every weight here is
damaged.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, Qwen3Config, Qwen3NextConfig

from tests.builders import letter_tokenizer, tiny_causal
from tokendiff.artifacts.manifest import commit
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.generate import GenerateConfig
from tokendiff.errors import InputError
from tokendiff.models.dflash.planning import new_draft_config
from tokendiff.models.requests import check_generation

V = 30


def without_mask() -> Any:
    """One token per letter, and an EOS token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["[EOS]", *"abcdefgh", "[UNK]"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[EOS]", unk_token="[UNK]")


def saved(folder: Path, config: Any, tokenizer: Any = None) -> Path:
    config.save_pretrained(folder)
    (tokenizer or letter_tokenizer(V)).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def checkpoint(folder: Path, config: Any, *, tokenizer: Any = None, **process: Any) -> Path:
    fields: dict[str, Any] = {
        "forward_process": "absorbing",
        "vocab_size": V,
        "mask_token_id": 1,
        "max_length": 16,
        "objective": "mdlm",
    }
    saved(folder, config, tokenizer)
    NoiseProcess(**{**fields, **process}).save(folder)
    commit(folder, kind="checkpoint", metadata={})
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertConfig(**sizes, vocab_size=V, intermediate_size=16, max_position_embeddings=32)
    causal = tiny_causal(vocab_size=V, max_position_embeddings=64, num_hidden_layers=6).config
    saved(folder / "causal", causal)
    saved(folder / "maskless", causal, without_mask())
    saved(folder / "bert", bert)
    linear = Qwen3NextConfig(**sizes, vocab_size=V, layer_types=["linear_attention"] * 2)
    saved(folder / "linear", linear)
    saved(folder / "larger", causal, letter_tokenizer(V + 4))
    saved(folder / "empty", causal)
    (folder / "empty" / "model.safetensors").unlink()
    Qwen3Config(**sizes).save_pretrained(folder / "no-tokenizer")
    draft = new_draft_config(
        causal, target_model_id="t", num_layers=2, block_size=4, mask_token_id=1
    )
    for name in ("draft", "bare-draft"):
        saved(folder / name, draft)
    (folder / "bare-draft" / "model.safetensors").unlink()
    checkpoint(folder / "mdlm", bert)
    checkpoint(folder / "short", bert, max_length=64)
    checkpoint(folder / "mixed", bert, tokenizer=letter_tokenizer(V + 1))
    blocks = {"block_length": 4, "attention_mask_mode": "2d", "objective": "block_refinement"}
    checkpoint(folder / "blocks", causal, **blocks)
    return folder


AR = {"name": "ar", "max_new_tokens": 8}
DFLASH = {"name": "dflash", "max_new_tokens": 8}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model_id": "causal", "sampler": AR}, None),
        ({"model_id": "causal", "sampler": "sdar"}, "exceeds the 64 that the model takes"),
        ({"model_id": "maskless", "sampler": "sdar"}, "names a mask token"),
        ({"model_id": "maskless", "sampler": "block_refinement"}, "names a mask token"),
        ({"model_id": "maskless", "sampler": AR}, None),
        ({"model_id": "/nowhere", "sampler": AR}, "^model_id '/nowhere' cannot be opened"),
        ({"model_id": "bert", "sampler": AR}, "^model_id .* 'bert', not a causal language model"),
        ({"model_id": "linear", "sampler": AR}, "'qwen3_next' has layers of linear_attention"),
        ({"model_id": "empty", "sampler": AR}, "^model_id .*: a config but no weights"),
        ({"model_id": "no-tokenizer", "sampler": AR}, "^model_id .* holds no tokenizer"),
        ({"model_id": "draft", "sampler": AR}, "is a DFlash draft; give the model it drafts for"),
        ({"model_id": "larger", "sampler": AR, "prompt": ["ad"]}, None),
        (
            {"model_id": "larger", "sampler": AR, "prompt": ["a~"]},
            r"holds the token '~' \(id 33\), but .* has embeddings for ids below 30 only",
        ),
        ({"model_id": "causal", "sampler": AR, "prompt": ["a" * 60]}, "has 60 tokens; with 8 new"),
        ({"model_id": "causal", "sampler": AR, "use_chat_template": True}, "no chat template"),
        ({"checkpoint_path": "mdlm"}, None),
        ({"checkpoint_path": "mdlm", "seq_len": 17}, None),  # a warning: it has the positions
        ({"checkpoint_path": "mdlm", "prompt": ["a" * 17]}, "it must fit seq_len 16"),
        ({"checkpoint_path": "mdlm", "sampler": AR}, "is a denoiser of whole rows"),
        ({"checkpoint_path": "mixed"}, "one of the two belongs to another model"),
        ({"checkpoint_path": "short"}, "^checkpoint_path .* takes at most 32 tokens; max_length"),
        ({"checkpoint_path": "blocks"}, "which decodes block by block; use sampler"),
        (
            {"checkpoint_path": "blocks", "sampler": "sdar"},
            "needs a model whose blocks see",
        ),
        ({"checkpoint_path": "/nowhere"}, "checkpoint_path /nowhere: no such folder"),
        ({}, "give either a checkpoint_path or a model_id"),
        ({"target_model_id": "causal", "draft_model_id": "draft", "sampler": DFLASH}, None),
        ({"target_model_id": "causal", "sampler": DFLASH}, "needs target_model_id, .*and draft_m"),
        (
            {"target_model_id": "bert", "draft_model_id": "draft", "sampler": DFLASH},
            "^target_model_id .* 'bert', not a causal",
        ),
        (
            {"target_model_id": "causal", "draft_model_id": "bare-draft", "sampler": DFLASH},
            "^draft_model_id .*: a config but no weights",
        ),
    ],
)
def test_what_is_wrong_is_said_before_a_weight_is_read(
    fields: dict[str, Any], says: str | None, models: Path
) -> None:
    names = ("model_id", "checkpoint_path", "target_model_id", "draft_model_id")
    places = {
        name: str(models / fields[name])
        for name in names
        if name in fields and not fields[name].startswith("/")
    }
    given = {"prompt": ["abc"], **fields, **places}
    path = given.pop("checkpoint_path", None)
    config = GenerateConfig.model_validate(given)
    if says is None:
        check_generation(config, checkpoint_path=path)
        return
    with pytest.raises(InputError, match=says):
        check_generation(config, checkpoint_path=path)


def test_prompts_of_files_are_not_read(models: Path, tmp_path: Path) -> None:
    """There may be millions; those that cannot be used are counted when they are sampled."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": 5}) + "\n")
    config = GenerateConfig.model_validate(
        {"prompts": [str(tmp_path / "p.jsonl")], "model_id": str(models / "causal"), "sampler": AR}
    )
    check_generation(config, checkpoint_path=None)
