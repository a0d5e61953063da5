"""Requests of tasks as tokens: what a text without a context begins with, and long texts."""

from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM

from tokendiff.artifacts.noise_process import NoiseProcess
from tokendiff.config.generate import GenerateConfig
from tokendiff.data.tokenizers import build_tokenizer
from tokendiff.errors import InputError
from tokendiff.evaluation.tasks.requests import TaskRequest
from tokendiff.evaluation.tasks.setup import TaskSetup

LENGTH = 16


def setup_of(folder: Path, *, predict: str, sampler: Any = "ancestral") -> TaskSetup:
    """Of a checkpoint of whole rows; its tokenizer has EOS and no BOS."""
    tokenizer: Any = build_tokenizer("bytes", documents=(), vocab_size=0)[0]
    size = len(tokenizer)
    bert = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=size,
        max_position_embeddings=LENGTH,
    )
    BertForMaskedLM(bert).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    NoiseProcess(
        forward_process="absorbing",
        vocab_size=size,
        mask_token_id=tokenizer.mask_token_id,
        max_length=LENGTH,
        predict=predict,
        objective="mdlm",
    ).save(folder)
    config = GenerateConfig.model_validate({"sampler": sampler})
    return TaskSetup.of(config, folder)


@pytest.mark.parametrize(("predict", "num_before"), [("own", 0), ("next", 1)])
def test_a_model_of_the_next_token_has_one_before_the_first(
    predict: str, num_before: int, tmp_path: Path
) -> None:
    """Every token of a text is scored once, each with a token before it where it needs one."""
    setup = setup_of(tmp_path, predict=predict)
    eos = [setup.tokenizer.eos_token_id]
    (pair,) = setup.pairs(TaskRequest(kind="loglikelihood", context="", continuation="abc"))
    ids = setup.tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert (pair.context, pair.continuation) == (eos * num_before, ids)
    text = "a long text of many windows, that is"
    pairs = setup.pairs(TaskRequest(kind="loglikelihood_rolling", continuation=text))
    assert len(pairs) > 2
    ids = setup.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [token for pair in pairs for token in pair.continuation] == ids
    before = [*eos, *ids]
    for pair in pairs:
        assert len(pair.context) >= num_before
        assert len(pair.context) + len(pair.continuation) <= LENGTH
    if num_before:
        begins = [sum(len(p.continuation) for p in pairs[:at]) for at in range(len(pairs))]
        assert [pair.context[-1] for pair in pairs] == [before[begin] for begin in begins]


def test_a_tokenizer_that_has_no_token_to_begin_with(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, predict="next")
    setup.tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no context"):
        setup.pairs(TaskRequest(kind="loglikelihood", context="", continuation="abc"))


def test_blockwise_writes_answers(tmp_path: Path) -> None:
    setup = setup_of(tmp_path, predict="own", sampler={"name": "blockwise", "block_size": 4})
    settings = {"until": ["."], "max_gen_toks": 4, "temperature": 0.0}
    row = setup.row(TaskRequest(kind="generate_until", context="abc", settings=settings))
    assert row.prompt == "abc"
