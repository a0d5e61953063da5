"""torch's Muon, also on matrices that lie in parts on several workers.

The step of a matrix is computed from the whole of it, so it is the same however the matrix lies:
parts would be multiplied in another order, which shows in bfloat16. The workers take turns: of as
many matrices as there are workers each computes one, and tells the others.

Source: Keller Jordan, kellerjordan.github.io/posts/muon; `torch.optim.Muon`.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokendiff.artifacts.tensor_files import local_part, whole


class Muon(torch.optim.Muon):
    """As `torch.optim.Muon`; its state is what that one's is, in parts where the matrices are."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not any(_is_apart(p) for group in self.param_groups for p in group["params"]):
            return super().step(closure)
        for group in self.param_groups:
            waiting = iter([p for p in group["params"] if p.grad is not None])
            while matrices := list(islice(waiting, dist.get_world_size())):
                self._step_together(matrices, group)
        return None

    def _step_together(self, matrices: Sequence[Tensor], group: dict[str, Any]) -> None:
        own: Tensor | None = None
        for rank, matrix in enumerate(matrices):
            full = whole(self._with_momentum(matrix, group["momentum"]))
            own = full if rank == dist.get_rank() else own
        # Behind all gathering, which would wait for it.
        mine = None if own is None else _direction(own, group)
        for rank, matrix in enumerate(matrices):
            if rank == dist.get_rank() and mine is not None:
                change = mine
            else:
                change = torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
            dist.broadcast(change, src=rank)
            local, part = local_part(matrix)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(change if part is None else change[part])

    def _with_momentum(self, matrix: Tensor, momentum: float) -> Tensor:
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


def _direction(update: Tensor, group: dict[str, Any]) -> Tensor:
    """What torch's Muon adds to a matrix of zeros whose gradient is `update`, without momentum."""
    matrix = torch.zeros_like(update, requires_grad=True)
    matrix.grad = update
    settings = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps")}
    torch.optim.Muon(
        [matrix],
        **settings,
        adjust_lr_fn=group["adjust_lr_fn"],
        momentum=0.0,
        nesterov=False,
        weight_decay=0.0,
    ).step()
    return matrix.detach()


def _is_apart(parameter: Tensor) -> bool:
    return local_part(parameter)[1] is not None
