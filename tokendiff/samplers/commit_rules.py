"""Which of a block's candidates are committed in a step: pure functions, a row's result depending
on that row alone.

Ties go to the position further left. A position that is not masked is never chosen.

Sources: LLaDA (arXiv 2502.09992), SDAR (arXiv 2510.06303), EB-Sampler (arXiv 2505.24857),
LLaDA2.1 for editing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokendiff.samplers.categorical import entropy_of


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The token that the model would put at each position, [n, K] each.

    All three are 0 at positions that were not predicted, such as those already committed.

    Attributes:
        confidence: the token's probability under the model, before temperature and filters, the
            mask having none.
        entropy: nats, of that whole distribution.
    """

    tokens: Tensor
    confidence: Tensor
    entropy: Tensor

    @classmethod
    def none(cls, like: Tensor) -> "Candidates":
        """None yet, for tokens of the shape [n, K] of `like`."""
        zeros = torch.zeros_like(like, dtype=torch.float32)
        return cls(tokens=torch.zeros_like(like), confidence=zeros, entropy=zeros.clone())

    def put(self, at: tuple[Tensor, Tensor], tokens: Tensor, logits: Tensor) -> None:
        """Write tokens [N] that were drawn at places `at`, with what logits [N, V] say of them.
        They come from the device of the logits in one copy.
        """
        log_p = logits.log_softmax(-1)
        confidence = log_p.gather(-1, tokens[:, None])[:, 0].exp()
        entropy = entropy_of(log_p)
        if self.tokens.device != tokens.device:  # float64 holds all three as they are
            columns = [column.double() for column in (tokens, confidence, entropy)]
            found = torch.stack(columns).to(self.tokens.device)
            tokens, confidence, entropy = found[0].long(), found[1].float(), found[2].float()
        self.tokens[at], self.confidence[at], self.entropy[at] = tokens, confidence, entropy


@dataclass(frozen=True, kw_only=True)
class CommitRule:
    """A strategy by its name, with the numbers that it goes by.

    Attributes:
        strategy: "sequential", "low_confidence_static", "low_confidence_dynamic" or
            "entropy_bounded".
        confidence_threshold: of low_confidence_dynamic.
        entropy_threshold: of entropy_bounded, nats.
    """

    strategy: str
    confidence_threshold: float
    entropy_threshold: float

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"remasking_strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}"
            )
        if not self.confidence_threshold >= 0.0:
            raise ValueError(
                f"confidence_threshold must not be negative, got {self.confidence_threshold}"
            )
        if not self.entropy_threshold >= 0.0:
            raise ValueError(
                f"entropy_threshold must not be negative, got {self.entropy_threshold}"
            )

    def __call__(self, candidates: Candidates, is_masked: Tensor, quota: Tensor) -> Tensor:
        """[n, K] bool: which candidates a step commits, of those at masks; about `quota` [n]."""
        return STRATEGIES[self.strategy](self, is_masked, candidates, quota)


def quotas(block_length: int, num_steps: int) -> Tensor:
    """[num_steps] int64: the block spread over the steps, the remainder over the first ones.

    Steps beyond the block's length get 1 all the same: a step that commits nothing would be the
    same again.
    """
    if block_length < 1 or num_steps < 1:
        raise ValueError(
            f"a block of {block_length} tokens cannot be spread over {num_steps} steps"
        )
    step = torch.arange(num_steps)
    return (block_length // num_steps + (step < block_length % num_steps).long()).clamp(min=1)


def commit_leftmost(is_masked: Tensor, quota: Tensor) -> Tensor:
    """The leftmost masked positions.

    Args:
        is_masked: [n, K] bool.
        quota: [n] int64, positions at most.

    Returns:
        [n, K] bool.
    """
    return is_masked & (is_masked.cumsum(1) <= quota[:, None])


def commit_most_confident(confidence: Tensor, is_masked: Tensor, quota: Tensor) -> Tensor:
    """The masked positions of most confidence [n, K], `quota` [n] of them or all there are."""
    return is_masked & (_rank(-confidence, is_masked) < quota[:, None])


def commit_confident(
    confidence: Tensor, is_masked: Tensor, quota: Tensor, *, threshold: float
) -> Tensor:
    """Every masked position with confidence above `threshold`, and never fewer than `quota` [n]."""
    is_confident = is_masked & (confidence > threshold)
    return is_confident | commit_most_confident(confidence, is_masked, quota)


def commit_entropy_bounded(entropy: Tensor, is_masked: Tensor, *, bound: float) -> Tensor:
    """The masked positions of least entropy, as many as have a summed entropy of at most `bound`,
    the largest of them not counted: always one at least.

    What is left out bounds from above how much the tokens that are committed together depend on
    each other (EB-Sampler, eq. 6).

    Args:
        entropy: [n, K] nats, of the whole predictive distribution of a position.
    """
    rank = _rank(entropy, is_masked)
    # Where ranks of masked positions are 0..m-1, sorting by rank is what makes a running sum.
    by_rank = torch.zeros_like(entropy).scatter(1, rank, entropy.masked_fill(~is_masked, 0.0))
    before = (by_rank.cumsum(1) - by_rank).gather(1, rank)
    return is_masked & ((rank == 0) | (before <= bound))


def edit_confident(
    confidence: Tensor, candidates: Tensor, tokens: Tensor, is_editable: Tensor, *, threshold: float
) -> Tensor:
    """[n, K] bool: committed tokens that a candidate of confidence above `threshold` replaces."""
    return is_editable & (candidates != tokens) & (confidence > threshold)


def _rank(cost: Tensor, is_masked: Tensor) -> Tensor:
    """[n, K] int64: 0 for the masked position of least cost; those not masked come last."""
    order = cost.masked_fill(~is_masked, torch.inf).argsort(dim=1, stable=True)
    # A masked position of infinite cost must still come before those that are not masked.
    order = order.gather(1, (~is_masked).gather(1, order).long().argsort(dim=1, stable=True))
    return order.argsort(dim=1)


# The closed table behind `remasking_strategy`.
STRATEGIES: dict[str, Callable[[CommitRule, Tensor, Candidates, Tensor], Tensor]] = {
    "sequential": lambda rule, is_masked, candidates, quota: commit_leftmost(is_masked, quota),
    "low_confidence_static": lambda rule, is_masked, candidates, quota: commit_most_confident(
        candidates.confidence, is_masked, quota
    ),
    "low_confidence_dynamic": lambda rule, is_masked, candidates, quota: commit_confident(
        candidates.confidence, is_masked, quota, threshold=rule.confidence_threshold
    ),
    "entropy_bounded": lambda rule, is_masked, candidates, quota: commit_entropy_bounded(
        candidates.entropy, is_masked, bound=rule.entropy_threshold
    ),
}
