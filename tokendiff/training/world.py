"""The workers of one training run, seen from one of them; without torch.distributed, a world of
one.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> "World":
        """The process group that was set up by whoever started this process, if any."""
        if dist.is_available() and dist.is_initialized():
            return cls(
                rank=dist.get_rank(), size=dist.get_world_size(), device=torch.device(device)
            )
        return cls(rank=0, size=1, device=torch.device(device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all workers; every worker gets it, and every worker must ask for it."""
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
