"""Which tokens of a drafted block a target model accepts, so that the text stays the target's.

Each drafted token is judged under the target's distribution given the tokens before it, the drafted
ones among them, so a token counts only where all before it were accepted. Behind the accepted
tokens stands one token of the target's own, so a block always gains at least one.

Two rules, both exact for any draft, however bad (D drafted tokens a block, the target's
distribution p and the draft's q at a position):

- `accept_own` draws the target's own token at every position, as if there were no draft, and keeps
  the longest prefix that agrees. The text is the one that the target alone draws from the same
  random numbers (or its argmax), whatever the draft; a draft's argmax is accepted with probability
  p(argmax q). Source: the published decoder of DFlash (arXiv 2602.06036).
- `accept_drawn` judges a token that was drawn from q: it is accepted with probability
  min(1, p/q), and behind a refusal the target's token is drawn from max(p - q, 0), renormalised.
  That accepts with probability sum min(p, q), the most that is possible for tokens drawn from q
  and more than p(argmax q) where p is flat. The text has the target's distribution, but another
  draft gives another text.
  Source: speculative sampling (arXiv 2211.17192), algorithm 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.samplers.categorical import draw


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a block comes to.

    Attributes:
        num_accepted: [B] int64 in 0..D, drafted tokens that are kept.
        next_token: [B] int64, the target's own token behind them.
    """

    num_accepted: Tensor
    next_token: Tensor


def accept_own(drafted: Tensor, own: Tensor) -> Verdict:
    """Keep the longest prefix of the draft that agrees with the target's own tokens.

    Args:
        drafted: [B, D] int64.
        own: [B, D + 1] int64: the target's argmax or draw at every drafted place, given the drafted
            tokens before it, and behind the last.
    """
    num_accepted = _length_of_prefix(drafted == own[:, :-1])
    return Verdict(num_accepted=num_accepted, next_token=_at(own, num_accepted))


def accept_drawn(
    drafted: Tensor,
    *,
    draft_logits: Tensor,
    target_logits: Tensor,
    judge: Tensor,
    redraw: Tensor,
) -> Verdict:
    """Speculative sampling of drafted tokens, each drawn from its logits, which may depend on the
    drafted tokens to its left and on none to its right.

    Args:
        drafted: [B, D] int64.
        draft_logits: [B, D, V] what each drafted token was drawn from, after temperature and
            filters; need not be normalised.
        target_logits: [B, D + 1, V] likewise, given the drafted tokens before each place.
        judge: [B, D] uniform in (0, 1).
        redraw: [B, D + 1] uniform in (0, 1), independent of `judge`.
    """
    num_drafted = drafted.shape[1]
    log_p = _log_probability(target_logits[:, :num_drafted], drafted)
    log_q = _log_probability(draft_logits, drafted)
    num_accepted = _length_of_prefix(judge.log() < log_p - log_q)
    p = _at(target_logits, num_accepted).double().softmax(-1)
    q = _at(draft_logits, num_accepted.clamp(max=num_drafted - 1)).double().softmax(-1)
    is_refused = num_accepted < num_drafted
    residual = (p - q * is_refused[:, None]).clamp(min=0.0)
    # A refusal means q > p somewhere, so p > q elsewhere; but for rounding, where the two agree.
    has_rest = residual.sum(-1, keepdim=True) > 0.0
    return Verdict(
        num_accepted=num_accepted,
        next_token=draw(torch.where(has_rest, residual, p), _at(redraw, num_accepted)),
    )


def _length_of_prefix(is_kept: Tensor) -> Tensor:
    """[B] how many at the front of [B, D] are kept before the first that is not."""
    return is_kept.long().cumprod(1).sum(1)


def _log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """[B, D] float64: ln of each token's probability under [B, D, V]."""
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return chosen.double() - logits.logsumexp(-1).double()


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values[b, index[b]] of every row."""
    return values[torch.arange(len(values), device=values.device), index]
