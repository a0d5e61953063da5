"""The workers of one training run, seen from one of them; without torch.distributed, a world of
one.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """
    Attributes:
        local_size: workers on the node of this one; ranks on a node follow one another.
    """

    rank: int
    size: int
    device: torch.device
    local_size: int = 1

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> "World":
        """The process group that was set up by whoever started this process, if any.

        Its GPU becomes the current one: barriers of NCCL and events are of that, and a process that
        sees all GPUs of its node would take the first.
        """
        device = torch.device(device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        if dist.is_available() and dist.is_initialized():
            size = dist.get_world_size()
            return cls(
                rank=dist.get_rank(),
                size=size,
                device=device,
                # As torchrun and Ray Train set it.
                local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
            )
        return cls(rank=0, size=1, device=device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all workers; every worker gets it, and every worker must ask for it."""
        values = values.clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sizes_of_nodes(self) -> list[int]:
        """Workers on each node, in the order of their ranks; every worker must ask for them."""
        found = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        found[self.rank] = self.local_size
        sizes, rank = self.sum(found).tolist(), 0
        nodes = []
        while rank < self.size:
            nodes.append(sizes[rank])
            rank += sizes[rank]
        return nodes

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()
