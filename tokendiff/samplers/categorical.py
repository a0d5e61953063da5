"""Exact draws from a model's distribution, and the filters in front of it.

Gumbel-max in float32 cuts the tail of the distribution off and so lowers the temperature silently
(arXiv 2409.02908). Here one uniform number per token is looked up in the cumulative sum, all in
float64.
"""

import torch
from torch import Tensor


def filtered_probabilities(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Probabilities after temperature, then top-k, then top-p.

    Args:
        logits: [N, V]; -inf excludes a token. Not written to.
        temperature: above 0.
        top_k: keep the k likeliest tokens (more where they tie with the k-th).
        top_p: keep the smallest set of likeliest tokens whose total reaches top_p.

    Returns:
        [N, V] float64, rows sum to 1.
    """
    scaled = logits.double() / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        smallest_kept = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest_kept, -torch.inf)
    probabilities = scaled.softmax(-1)
    if top_p is not None and top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        is_past = ordered.cumsum(-1) - ordered >= top_p
        dropped = torch.zeros_like(is_past).scatter(-1, order, is_past)
        probabilities = probabilities.masked_fill(dropped, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """[N] token ids from probabilities [N, V], by inverting the cumulative sum at `uniform` [N] in
    (0, 1).
    """
    cumulative = probabilities.double().cumsum(-1)
    # Scaling by the last sum, not assuming it to be 1, keeps rounding from pointing past the last
    # token; the first sum that reaches the target rises there, so a token of probability 0 is never
    # drawn.
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def choose_tokens(
    logits: Tensor, uniform: Tensor, *, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """[N] token ids: the argmax at temperature 0, else a draw from the filtered distribution."""
    if temperature == 0.0:
        return logits.argmax(-1)
    return draw(
        filtered_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p), uniform
    )
