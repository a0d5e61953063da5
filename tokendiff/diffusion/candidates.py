"""Which of the likeliest tokens of a drafted block follow each other: the selector of DFlash 2.

A draft that fills a block in one pass says of each place what stands there, whatever stands before.
The selector walks over the C likeliest tokens of each place from left to right. Behind token p,
candidate c scores

    score(p -> c) = u_c + <a_p * f, b_c>

with u_c the draft's own logit of c, a and b a vector for each token as the one before and as the
one behind, and f [R] a projection of the draft's hidden state at that place. The first p is the
anchor, which is known; each next one is the token that was chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The candidates of N blocks of D drafted tokens.

    Attributes:
        tokens: [N, D, C] int64.
        logits: [N, D, C] the draft's own, of these tokens.
        features: [N, D, R] f of each place.
        predecessors, successors: [V, R], a and b.
        vocab_size: how many of V tokens can be drawn.
    """

    tokens: Tensor
    logits: Tensor
    features: Tensor
    predecessors: Tensor
    successors: Tensor
    vocab_size: int

    def scores(self, place: int, before: Tensor) -> Tensor:
        """[N, C] in float32 or better, of a place's candidates behind the tokens `before` [N]."""
        logits = self.logits[:, place]
        return logits + pair_scores(
            self.predecessors[before] * self.features[:, place],
            self.successors[self.tokens[:, place]],
        ).to(logits.dtype)

    def likeliest(self, anchors: Tensor) -> Tensor:
        """[N, D]: the path that takes the best candidate behind each token, from `anchors` [N]."""
        before, path = anchors, []
        for place in range(self.tokens.shape[1]):
            best = self.scores(place, before).argmax(-1, keepdim=True)
            before = self.tokens[:, place].gather(-1, best)[:, 0]
            path.append(before)
        return torch.stack(path, dim=1)


def pair_scores(left: Tensor, right: Tensor) -> Tensor:
    """<a_p * f, b_c>: [n, C] in float32 or better, of left [n, R] = a_p * f and right [n, C, R]."""
    exact = torch.promote_types(left.dtype, torch.float32)
    # No product of matrices, which autocast would round.
    return (left.to(exact)[:, None] * right.to(exact)).sum(-1)
