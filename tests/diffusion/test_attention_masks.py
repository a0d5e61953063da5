"""Attention rules against loops in plain Python that spell out who sees whom."""

import itertools

import pytest
import torch
from torch import Tensor

from tokendiff.diffusion.attention_masks import (
    MaskRule,
    block_causal,
    block_diffusion,
    causal,
    dense,
    mask_mod,
    positions_in_document,
)

DOCUMENT = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0, -1, -1, -1]])
PLACES = [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]]
BLOCK = torch.tensor(PLACES) // 2


def spelled_out(size: int, sees: object) -> Tensor:
    assert callable(sees)
    mask = torch.zeros(2, 1, size, size, dtype=torch.bool)
    for row, q, kv in itertools.product(range(2), range(size), range(size)):
        mask[row, 0, q, kv] = sees(row, q, kv)
    return mask


def same_document(row: int, q: int, kv: int) -> bool:
    return bool(DOCUMENT[row, q] == DOCUMENT[row, kv])


def test_positions_start_anew_with_each_document() -> None:
    assert positions_in_document(DOCUMENT).tolist() == PLACES


def test_causal_and_block_causal_stay_in_their_document() -> None:
    expected = spelled_out(10, lambda row, q, kv: same_document(row, q, kv) and kv <= q)
    assert torch.equal(dense(causal(DOCUMENT), 2, 10, 10), expected)
    expected = spelled_out(
        10,
        lambda row, q, kv: (
            same_document(row, q, kv) and PLACES[row][kv] // 2 <= PLACES[row][q] // 2
        ),
    )
    assert torch.equal(dense(block_causal(DOCUMENT, BLOCK), 2, 10, 10), expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_noisy_block_sees_itself_and_the_clean_blocks_before_it(is_causal: bool) -> None:
    def sees(row: int, q: int, kv: int) -> bool:
        (half_q, place_q), (half_kv, place_kv) = divmod(q, 10), divmod(kv, 10)
        if not same_document(row, place_q, place_kv):
            return False
        block_q, block_kv = PLACES[row][place_q] // 2, PLACES[row][place_kv] // 2
        if block_q == block_kv:
            return half_q == half_kv and not (is_causal and place_kv > place_q)
        return half_kv == 1 and block_kv < block_q

    rule = block_diffusion(DOCUMENT, BLOCK, is_causal=is_causal)
    assert torch.equal(dense(rule, 2, 20, 20), spelled_out(20, sees))


@pytest.mark.parametrize("name", ["causal", "block_causal", "block_diffusion"])
def test_every_position_sees_itself_and_flex_attention_reads_the_same_rule(name: str) -> None:
    from torch.nn.attention.flex_attention import create_mask

    rules: dict[str, MaskRule] = {
        "causal": causal(DOCUMENT),
        "block_causal": block_causal(DOCUMENT, BLOCK),
        "block_diffusion": block_diffusion(DOCUMENT, BLOCK),
    }
    size = 20 if name == "block_diffusion" else 10
    mask = dense(rules[name], 2, size, size)
    assert mask.diagonal(dim1=2, dim2=3).all(), "softmax over nothing is NaN"
    of_flex = create_mask(mask_mod(rules[name]), 2, 1, size, size, device="cpu")
    assert torch.equal(of_flex, mask)
