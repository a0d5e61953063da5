"""Flex attention's masks from runs of keys, held against asking the rule for each pair."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.device_reads import count_waits, emulated_device
from tokendiff.diffusion.attention_masks import (
    block_causal,
    block_diffusion,
    causal,
    mask_mod,
    positions_in_document,
    whole_documents,
)
from tokendiff.diffusion.interfaces import TokenBatch
from tokendiff.diffusion.key_runs import RunRule
from tokendiff.models.block_masks import block_mask_of_runs
from tokendiff.objectives.blocks import BlockRows, block_rows

LENGTH, EOS = 300, 1


def some_rows(block_length: int, *, restarts_at_answers: bool) -> BlockRows:
    """Documents of one token and of more than two tiles; the second row is padded."""
    runs = [[1, 40, 259], [270, 9]]
    document = torch.full((2, LENGTH), -1)
    for row, lengths in enumerate(runs):
        document[row, : sum(lengths)] = torch.arange(len(lengths)).repeat_interleave(
            torch.tensor(lengths)
        )
    tokens = torch.full((2, LENGTH), EOS)
    is_target = (positions_in_document(document) % 37 > 20) & (document >= 0)
    batch = TokenBatch(
        tokens=tokens, is_valid=document >= 0, document=document, is_target=is_target
    )
    return block_rows(
        batch,
        block_length=block_length,
        fill_token_id=EOS,
        restarts_at_answers=restarts_at_answers,
    )


def rules_of(rows: BlockRows) -> dict[str, RunRule]:
    columns = (rows.document, rows.block)
    found = {
        "whole": whole_documents(rows.document),
        "causal": causal(rows.document),
        "block_causal": block_causal(*columns, rows.text_to_see),
        "block_diffusion": block_diffusion(*columns, rows.text_to_see),
        "causal inside": block_diffusion(*columns, rows.text_to_see, is_causal=True),
        "causal context": block_diffusion(*columns, rows.text_to_see, context_is_causal=True),
    }
    rules = {}
    for name, rule in found.items():
        assert isinstance(rule, RunRule)
        rules[name] = rule
    return rules | {"window": rules["whole"].within(20), "wide": rules["causal"].within(150)}


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("block_length", [4, 150])
def test_the_mask_is_the_one_that_asking_for_each_pair_finds(
    block_length: int, restarts: bool
) -> None:
    rows = some_rows(block_length, restarts_at_answers=restarts)
    assert (rows.text_to_see is not None) == restarts
    for name, rule in rules_of(rows).items():
        is_double = "block_diffusion" in name or name in ("causal inside", "causal context")
        size = rows.tokens.shape[1] * (2 if is_double else 1)
        found = block_mask_of_runs(rule, size)
        asked = create_block_mask(mask_mod(rule), 2, None, size, size, device="cpu")
        assert found.shape == asked.shape
        for kind in ("kv", "full_kv", "q", "full_q"):
            counts, others = (getattr(mask, f"{kind}_num_blocks") for mask in (found, asked))
            assert torch.equal(counts, others), (name, kind)
            index, other_index = (getattr(mask, f"{kind}_indices") for mask in (found, asked))
            counted = torch.arange(index.shape[-1]) < counts[..., None]
            assert torch.equal(index[counted], other_index[counted]), (name, kind)
        assert found.full_kv_num_blocks is not None
        if name == "whole" or (block_length == 150 and name.startswith("block")):
            assert found.full_kv_num_blocks.any(), "a tile that is seen whole is not asked about"


def test_nothing_is_asked_of_the_device() -> None:
    rows = some_rows(4, restarts_at_answers=True)
    device = emulated_device()
    with count_waits() as waits:
        there = rows.to(device)
        for rule in rules_of(there).values():
            size = rule.runs()[0].begin.shape[1]
            mask = block_mask_of_runs(rule, size)
            kept: Tensor = mask.kv_indices
            assert kept.device == device
    assert not waits.places()
