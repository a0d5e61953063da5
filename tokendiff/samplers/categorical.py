"""Exact draws from a model's distribution, and the filters in front of it.

Gumbel-max in float32 cuts the tail of the distribution off and so lowers the temperature silently
(arXiv 2409.02908). Here one uniform number per token is looked up in the cumulative sum, all in
float64.
"""

import torch
from torch import Tensor

# How many of the likeliest tokens top-p looks at before it sorts a whole row: 8.6 times as fast on
# peaked logits over a vocabulary of 30,000.
_NUM_LIKELIEST = 1024
# Tokens whose cumulative sums [N, V] exist at once: 12 bytes of each number, beside the logits.
_DRAWN_AT_ONCE = 512
# Rows whose sorted logits [N, V] exist at once: 36 bytes of each number, with sums in float64.
_SORTED_AT_ONCE = 128


def check_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError unless `filter_logits` can take these."""
    if not temperature >= 0.0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


def without_token(logits: Tensor, token: int | None) -> Tensor:
    """Logits [..., V] in float32, a token having no probability: a copy, since what the head gave
    is left alone. Where the token is None, or an id that the model has no logit of, a copy is made
    only of what is not float32 yet.
    """
    if token is None or token >= logits.shape[-1]:
        return logits.float()
    copy = logits.to(torch.float32, copy=True)
    copy[..., token] = -torch.inf
    return copy


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Logits after temperature, then top-k, then top-p; what is dropped gets -inf.

    Args:
        logits: [N, V]; -inf excludes a token. Not written to.
        temperature: 0 leaves the argmax alone.
        top_k: keep the k likeliest tokens, and those that tie with the k-th.
        top_p: keep the likeliest tokens until their total reaches top_p, and those that tie with
            the last of them.

    Returns:
        [N, V], not normalised.
    """
    if temperature == 0.0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter_(-1, best, 0.0)
    scaled = logits if temperature == 1.0 else logits / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None and top_p < 1.0:
        scaled = scaled.masked_fill(scaled < _smallest_in_nucleus(scaled, top_p), -torch.inf)
    return scaled


def _smallest_in_nucleus(
    logits: Tensor, top_p: float, num_likeliest: int = _NUM_LIKELIEST
) -> Tensor:
    """[N, 1]: the logit of the last token that it takes for a total of top_p."""
    num_likeliest = min(num_likeliest, logits.shape[-1])
    likeliest = logits.topk(num_likeliest).values
    probabilities = (likeliest - logits.logsumexp(-1, keepdim=True)).double().exp()
    before = probabilities.cumsum(-1) - probabilities
    smallest = likeliest.masked_fill(before >= top_p, torch.inf).amin(-1, keepdim=True)
    if num_likeliest == logits.shape[-1]:
        return smallest
    # Where not one of these is past the total, the next ones might belong to it too.
    rows = (before[:, -1] < top_p).nonzero()[:, 0]
    for some in rows.split(_SORTED_AT_ONCE) if rows.numel() else ():
        smallest[some] = _smallest_in_nucleus(logits[some], top_p, logits.shape[-1])
    return smallest


def entropy_of(log_p: Tensor) -> Tensor:
    """[N] nats, of distributions with the logarithms [N, V], which are written to: beside them, one
    more tensor of that size exists.
    """
    # 0 * -inf would be NaN.
    return -log_p.exp().mul_(log_p.clamp_(min=torch.finfo(log_p.dtype).min)).sum(-1)


def draw_by_logits(logits: Tensor, uniform: Tensor) -> Tensor:
    """[N] token ids from logits [N, V], of which -inf excludes a token, as `draw` takes them."""
    parts = zip(logits.split(_DRAWN_AT_ONCE), uniform.split(_DRAWN_AT_ONCE), strict=True)
    drawn = [draw((part - part.amax(-1, keepdim=True)).exp_(), at) for part, at in parts]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """[N] token ids from probabilities [N, V], of any total, by inverting the cumulative sum at
    `uniform` [N] in (0, 1).
    """
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # Scaling by the last sum, not assuming it to be 1, keeps rounding from pointing past the last
    # token; the first sum that reaches the target rises there, so a token of probability 0 is never
    # drawn.
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target)[:, 0].clamp(max=probabilities.shape[-1] - 1)
