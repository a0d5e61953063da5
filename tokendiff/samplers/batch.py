"""Prompts of different lengths laid out for a sampler of fixed length."""

from collections.abc import Sequence

import torch
from torch import Tensor


def prefix_batch(
    prompts: Sequence[Sequence[int]], *, seq_len: int, mask_token_id: int
) -> tuple[Tensor, Tensor]:
    """Tokens [B, seq_len] that begin with each row's prompt and are masks behind it, and where they
    are given.

    A mask token inside a prompt is a place to fill, so a prompt may leave gaps.

    Raises:
        ValueError: a prompt is longer than seq_len.
    """
    tokens = torch.full((len(prompts), seq_len), mask_token_id, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        if len(prompt) > seq_len:
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit seq_len {seq_len}")
        tokens[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
    return tokens, tokens != mask_token_id
