"""Generative perplexity: how likely a reference causal LM finds the samples."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokendiff.data.samples import num_alike
from tokendiff.data.tokenizers import open_tokenizer
from tokendiff.diffusion.interfaces import Figures, OnProgress, unwatched
from tokendiff.errors import InputError
from tokendiff.models.pretrained import (
    check_causal_model,
    check_weights,
    longest_input,
    open_config,
    open_weights,
)

_FIELD = "reference_model_name_or_path"
_REMEDY = "give a hub name or a folder with config.json, weights and tokenizer"
_PROBE_LENGTH = 4


@torch.inference_mode()
def generative_perplexity(
    texts: Sequence[str],
    model_name_or_path: str,
    *,
    given: Sequence[str] | None = None,
    batch_size: int,
    max_length: int,
    device: str | torch.device,
    on_progress: OnProgress = unwatched,
) -> dict[str, float]:
    """Score texts with a transformers causal LM and its own tokenizer, in float32.

    Tokens of `given` are only context: of samples it is the perplexity given their prompts. So is
    the first token of a text where the tokenizer has no BOS to put before it. A text that leaves
    nothing to score is skipped. The mean is over all scored tokens of all texts: long texts weigh
    more.

    Args:
        given: the front of each text that the model was given, "" where it was given none; by
            default none was given any.
        batch_size: texts in one forward pass; the result does not depend on it. The logits take
            batch_size * max_length * vocabulary * 4 bytes.
        max_length: tokens of a text at most, BOS included; the rest is cut off. The model's own
            limit holds where it is lower.
        on_progress: told of texts that are scored, and their tokens.

    Returns:
        generative_perplexity: exp of the next; both are absent if no token was scored.
        reference_nats_per_token
        num_scored_tokens, num_texts_cut, num_texts_skipped

    Raises:
        InputError: no such model, no weights, no tokenizer, or not a causal LM; batch_size < 1 or
            max_length < 2.
    """
    if batch_size < 1:
        raise InputError(f"generative perplexity: batch_size must be at least 1, got {batch_size}")
    if max_length < 2:
        raise InputError(f"generative perplexity: max_length must be at least 2, got {max_length}")
    model, tokenizer = _load(model_name_or_path)
    model.to(device)
    _check_causal(model, model_name_or_path, device)

    limit = min(max_length, longest_input(model.config) or max_length)
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows, fronts = (
        [prefix + ids for ids in tokenizer(list(each), add_special_tokens=False)["input_ids"]]
        if each
        else []
        for each in (texts, [""] * len(texts) if given is None else given)
    )
    # A token that begins in what was given and ends behind it is no token of what was given.
    firsts = [max(1, num_alike(row, front)) for row, front in zip(rows, fronts, strict=True)]
    # Rows of similar length share a batch: less padding, and the sum is the same.
    scored = sorted(
        ((row[:limit], at) for row, at in zip(rows, firsts, strict=True) if at < len(row[:limit])),
        key=lambda each: len(each[0]),
        reverse=True,
    )
    nats, num_texts, num_tokens = 0.0, 0, 0

    def figures() -> Figures:
        return num_texts, num_tokens

    for at in range(0, len(scored), batch_size):
        batch = scored[at : at + batch_size]
        nats += _summed_nats(model, batch, device)
        num_texts += len(batch)
        num_tokens += sum(len(row) - first for row, first in batch)
        on_progress(figures)

    counts: dict[str, float] = {
        "num_scored_tokens": num_tokens,
        "num_texts_cut": sum(len(row) > limit for row in rows),
        "num_texts_skipped": len(rows) - len(scored),
    }
    if num_tokens == 0:
        return counts
    mean = torch.tensor(nats / num_tokens, dtype=torch.float64)
    return {
        "generative_perplexity": float(mean.exp()),
        "reference_nats_per_token": float(mean),
        **counts,
    }


def check_reference(name: str) -> tuple[Any, Any]:
    """Config and tokenizer of a reference model; no weight is read.

    Raises:
        InputError: no such model, no tokenizer beside it, no weights, or not a causal LM.
    """
    config = open_config(name, field=_FIELD, remedy=_REMEDY)
    check_causal_model(config, name, field=_FIELD)
    check_weights(name, field=_FIELD)
    return config, open_tokenizer(name, field=_FIELD)


def _load(name: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM

    config, tokenizer = check_reference(name)
    # float32, since bfloat16 rounds differently at different batch sizes.
    weights = open_weights(AutoModelForCausalLM, name, config, field=_FIELD, dtype=torch.float32)
    return weights.complete().eval(), tokenizer


def _check_causal(model: nn.Module, name: str, device: str | torch.device) -> None:
    """Encoders load as causal LMs too (BERT without is_decoder); behaviour tells them apart."""
    tokens = torch.zeros(2, _PROBE_LENGTH, dtype=torch.int64, device=device)
    tokens[1, -1] = 1
    first, second = model(input_ids=tokens).logits[:, :-1]
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-4 * float(first.abs().max())):
        raise InputError(
            f"{_FIELD} {name!r} is not a causal language model: "
            "its predictions see the tokens that they predict; give a GPT-2, Qwen, Llama, ..."
        )


def _summed_nats(
    model: nn.Module, batch: list[tuple[list[int], int]], device: str | torch.device
) -> float:
    """Sum of -ln p(token | tokens before it) over rows, each from the place beside it on."""
    rows, firsts = zip(*batch, strict=True)
    tokens, attention_mask = _pad(rows)
    is_scored = attention_mask.bool()
    is_scored &= torch.arange(tokens.shape[1]) >= torch.tensor(firsts)[:, None]
    tokens, attention_mask, is_scored = (
        each.to(device) for each in (tokens, attention_mask, is_scored)
    )
    logits = model(input_ids=tokens, attention_mask=attention_mask, use_cache=False).logits
    targets = tokens[:, 1:].masked_fill(~is_scored[:, 1:], -100)
    losses = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return float(losses.double().sum())


def _pad(rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask [B, L], padded on the right, with an id that is not looked at."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    attention_mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
    return tokens, attention_mask
