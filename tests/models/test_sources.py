"""What a row begins with that samplers of one length fill in."""

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, LlamaConfig

from tests.builders import TableDenoiser
from tests.models.published import EOS, MASK, V, dream, llada
from tokendiff.config.generate import GenerateConfig
from tokendiff.data.prompts import GenerationRow
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.random import RowGenerator
from tokendiff.errors import InputError
from tokendiff.evaluation.bound import row_bounds
from tokendiff.models.denoiser import attend_both_ways
from tokendiff.models.sampling import PromptCheck, SamplingModel

TOKENS, ROWS = (5, 6, 7), 3000


class _NextTable(TableDenoiser):
    """Knows what a state before a token tells; of the first, as after training, nothing."""

    def _marginals(self, row: tuple[int, ...]) -> Tensor:
        told: Tensor = super()._marginals(row)
        told[0] = 0.0
        return told


def language() -> Tensor:
    """[V, V, V] where what begins a row decides what goes on."""
    table = torch.zeros(V, V, V, dtype=torch.float64)
    weights = torch.tensor([[5.0, 1.0, 2.0], [1.0, 0.5, 3.0], [2.0, 4.0, 1.5]])
    for first, scale in ((EOS, 1.0), (9, 2.0)):
        for a, row in zip(TOKENS, weights**scale, strict=True):
            for b, weight in zip(TOKENS, row.tolist(), strict=True):
                table[first, a, b] = weight
    return table / table.sum()


def config_of(folder: Path, **changes: Any) -> GenerateConfig:
    fields = {"model_id": str(folder), "seq_len": 3, "num_samples": 1, "batch_size": ROWS}
    return GenerateConfig.model_validate({**fields, "sampler": "first_hitting", **changes})


def test_samples_without_a_prompt_are_distributed_as_the_bound_says(tmp_path: Path) -> None:
    dream(tmp_path)
    model = SamplingModel(None, config_of(tmp_path), device="cpu")
    denoiser = _NextTable(language(), MASK)
    model._denoiser = denoiser
    records = list(model.samples(GenerationRow(id=n, prompt=None) for n in range(ROWS)))
    counts = Counter(tuple(record["tokens"]) for record in records)
    rows = [(EOS, a, b) for a in TOKENS for b in TOKENS]
    assert set(counts) <= set(rows)
    tokens = torch.tensor(rows)
    nats, num_told = row_bounds(
        denoiser,
        TokenBatch.of_rows(tokens, torch.full((9,), 3), torch.zeros_like(tokens).bool()),
        RowGenerator.for_rows(3, torch.arange(9)),
        kernel=model.process.kernel(),
        predicts_next=True,
        num_mask_samples=400,
    )
    assert num_told.tolist() == [2] * 9
    shares = torch.tensor([counts[row] / ROWS for row in rows])
    given = language()[EOS] / language()[EOS].sum()
    expected = torch.tensor([given[a, b] for _, a, b in rows])
    assert float((shares - expected).abs().max()) < 4 * math.sqrt(0.25 / ROWS)
    torch.testing.assert_close(torch.exp(-nats), expected.double(), rtol=0.15, atol=0.0)
    assert {record["num_prompt_tokens"] for record in records} == {1}


def test_what_rows_begin_with(tmp_path: Path) -> None:
    check = {}
    for name, write in (("llada", llada), ("dream", dream)):
        write(tmp_path / name)
        check[name] = PromptCheck.of(None, config_of(tmp_path / name))
    mask = check["dream"].encoder.tokenizer.mask_token
    for prompt, own, following in (
        (None, [], [EOS]),
        (mask + "a", [MASK, 4], [EOS, MASK, 4]),
        ("a" + mask, [4, MASK], [4, MASK]),
    ):
        row = GenerationRow(id=0, prompt=prompt)
        assert (check["llada"].request(row), check["dream"].request(row)) == (own, following)
    source = check["dream"].source
    source.tokenizer.add_special_tokens({"bos_token": "d"})
    bos = source.tokenizer.bos_token_id
    assert source.begun([]) == [bos]
    assert dataclasses.replace(source, checkpoint=tmp_path).begun([]) == [EOS]
    source.tokenizer.bos_token = source.tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"no first token.*; give a prompt"):
        check["dream"].request(GenerationRow(id=0, prompt=None))


@pytest.mark.parametrize(
    ("model_type", "both_ways", "says"),
    [
        ("bert", True, "; give a checkpoint_path, whose noise process is known"),
        ("llama", True, "; give a checkpoint_path, whose noise process is known"),
        ("llama", False, "; use sampler 'ar', which goes with this one"),
    ],
)
def test_a_sampler_is_advised_where_it_goes_with_the_model(
    model_type: str, both_ways: bool, says: str, tmp_path: Path
) -> None:
    config: Any = BertConfig()
    if model_type == "llama":
        config = LlamaConfig()
        if both_ways:
            attend_both_ways(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=says):
        PromptCheck.of(None, config_of(tmp_path))
