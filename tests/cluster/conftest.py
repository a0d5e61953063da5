"""What tests of tasks and of frontiers start from: small checkpoints, and tasks of local files."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.builders import tiny_causal, token_folder
from tokendiff.artifacts.manifest import commit
from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.data.tokenizers import build_tokenizer

LENGTH = 64


@pytest.fixture(scope="session")
def tasks_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tasks")
    documents = [{"q": f"{n} and {n}", "choices": [" is", " are"], "a": n % 2} for n in range(12)]
    documents.append({"q": "too long " * 9, "choices": [" is", " are"], "a": 0})
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "target_delimiter": "",
    }
    of_task: dict[str, dict[str, Any]] = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "a",
            "metric_list": [{"metric": "acc"}],
        },
        "local_writing": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[a]}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match"}],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{q}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    for name, fields in of_task.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **fields}))
    return str(folder)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, of random weights, with its rows."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("checkpoints")
    tokenizer: Any = build_tokenizer("bytes", documents=(), vocab_size=0)[0]
    size, mask, eos = len(tokenizer), tokenizer.mask_token_id, tokenizer.eos_token_id
    text = [tokenizer(f"row {n} of some text".ljust(LENGTH))["input_ids"] for n in range(6)]
    rows = token_folder(
        folder / "rows", files=[text[:4]], heldout=text[4:], max_length=LENGTH, tokenizer=tokenizer
    )
    process = {"forward_process": "absorbing", "vocab_size": size, "mask_token_id": mask}
    blocks = {"block_length": 4, "attention_mask_mode": "4d", "eos_token_id": eos}
    bert = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=size,
        max_position_embeddings=LENGTH,
    )
    causal = tiny_causal(vocab_size=size, max_position_embeddings=LENGTH, eos_token_id=eos).float()
    made = {}
    for objective, model, fields in (
        ("mdlm", BertForMaskedLM(bert), {}),
        ("block_diffusion", causal, blocks),
        ("ar", causal, None),
        ("joint", causal, {**blocks, "predict": "next", "context_attention": "causal"}),
    ):
        made[objective] = place = folder / objective
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        if fields is not None:
            trained = "block_diffusion" if objective == "joint" else objective
            NoiseProcess(**process, max_length=LENGTH, objective=trained, **fields).save(place)
        metadata = {"run": {"objective": {"name": objective}}, "data_path": str(rows)}
        commit(place, kind="checkpoint", metadata=metadata)
    return made
