"""How a model lies on the workers of a run. Objectives, samplers and the loop do not know of it.

    none       every worker holds everything; gradients are summed (DistributedDataParallel)
    gradients  gradients and optimiser state lie in parts on the workers; weights do too between
               steps, and are whole from the first pass of a step to its last (ZeRO-2)
    full       weights lie in parts, and each layer is gathered for its part of a pass (FSDP2)
    hybrid     as full within each node, and every node holds a replica

Embeddings, final norm and head are one group beside the layers. It is gathered once a pass and not
for each chunk of logits, since `reduce_through_head` takes the head's gradient inside the forward
pass, where no hook of a module of its own may run. For the same reason tied embeddings need nothing
special: both ends are in that group.

In one process there is nothing to take apart, and every way is `none`.
"""

import ctypes
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokendiff.errors import InputError
from tokendiff.models.dflash.trainee import DraftTrainee
from tokendiff.models.diffusion_gemma import EncoderDecoderDenoiser
from tokendiff.models.layers import compile_module, find_layers, to_float32
from tokendiff.training.world import World

if TYPE_CHECKING:
    from tokendiff.models.denoiser import ModelInTwoParts

Sharding = Literal["none", "gradients", "full", "hybrid"]
Result = TypeVar("Result")
_M_MMAP_THRESHOLD = -3  # of malloc.h


class _InOneForward(nn.Module):
    """A model that is given its work, so that what wraps it sees encoder and head in one forward
    pass. What the work returns must be tensors, or tuples and dicts of them: hooks look for those.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[[Any], Result]) -> Result:
        return work(self.model)


class SpreadModel:
    """A model on the workers of a run, and how a step's passes over it are made.

    Args:
        model: on the CPU. Its parameters become DTensors where they are taken apart.
        sharding: see above.
        is_compiled: compile the encoder.

    Raises:
        InputError: the layers of such a model are not known, or `hybrid` does not go with so many
            workers on these nodes.
    """

    def __init__(
        self,
        model: "ModelInTwoParts | DraftTrainee",
        world: World,
        *,
        sharding: Sharding = "none",
        is_compiled: bool = False,
    ) -> None:
        self.model = model
        self.world = world
        self.sharding: Sharding = sharding if world.size > 1 else "none"
        self._module: nn.Module = _InOneForward(model)
        if self.is_sharded:
            self._take_apart(is_compiled=is_compiled)
            model.to(world.device)  # what was not taken apart
            return
        model.to(world.device)
        if is_compiled:
            model.compile_encoder()
        if world.size > 1:
            self._module = DistributedDataParallel(
                self._module, gradient_as_bucket_view=True, **_buffers_stay()
            )

    @property
    def is_sharded(self) -> bool:
        return self.sharding != "none"

    @property
    def replica_size(self) -> int | None:
        """Workers that hold all of the model between them; None where each does."""
        return replica_size(self.sharding, self.world)

    def num_passes(self, num_rows: int, rows_per_pass: int) -> int:
        """Passes over `num_rows` rows that are dealt to the workers one by one. Where weights are
        gathered in each pass every worker makes as many, whether it has rows left or not.
        """
        size, first = self.world.size, 0 if self.is_sharded else self.world.rank
        mine = math.ceil((num_rows - first) / size)
        return math.ceil(mine / rows_per_pass)

    @contextmanager
    def micro_batch(
        self, *, is_last: bool
    ) -> Iterator[Callable[[Callable[[Any], Result]], Result]]:
        """Forward and backward of one pass of a step; what is yielded gives the model its work.

        Without sharding, the workers' gradients are summed in the last pass of a step alone; with
        `hybrid`, so are those of the nodes. Within a replica they are summed in each pass, since
        keeping them whole until the last one would take the memory that sharding saves.
        """
        module: Any = self._module
        wait: Any = nullcontext()
        if self.is_sharded:
            module.set_reshard_after_backward(is_last or self.sharding != "gradients")
            module.set_requires_all_reduce(is_last)
        elif self.world.size > 1 and not is_last:
            wait = module.no_sync()
        with wait:
            yield module

    @torch.no_grad()
    def judge(self, work: Callable[[Any], Result]) -> Result:
        """What `work(model)` gives; with sharding every worker must ask for it."""
        if not self.is_sharded:
            return work(self.model)
        try:
            return self._module(work)
        finally:
            # Without a backward pass some stay gathered, as they are now.
            for module in self._module.modules():
                if reshard := getattr(module, "reshard", None):
                    reshard()

    def _take_apart(self, *, is_compiled: bool) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.world.device.type == "cpu":
            _return_what_is_freed()
        mesh, frees = _mesh(self.world, self.sharding), self.sharding != "gradients"
        elsewhere: set[nn.Parameter] = set()
        for layer in self._layers():
            to_float32(layer)  # one at a time, where they came from files
            if is_compiled:
                compile_module(layer)
            # In float32: autocast leaves norms in it, whose gains are too near 1 for bfloat16.
            fully_shard(layer, mesh=mesh, reshard_after_forward=frees)
            elsewhere.update(layer.parameters())  # a tied layer is found below its half as well
        to_float32(self.model.model)
        if isinstance(self.model, DraftTrainee):
            elsewhere |= self._take_target_apart(self.model.target, mesh if frees else None)
        fully_shard(self._module, mesh=mesh, reshard_after_forward=False, ignored_params=elsewhere)

    def _layers(self) -> list[nn.Module]:
        if isinstance(self.model, EncoderDecoderDenoiser):  # whose halves have the same weights
            return list(self.model.layers)
        return find_layers(self.model.model, field="sharding")

    def _take_target_apart(self, target: Any, mesh: Any) -> set[nn.Parameter]:
        """The layers of a frozen target, where weights lie in parts at all; returns what stays
        whole. Its embedding and head are read for each block, and may have another dtype than the
        draft.
        """
        from torch.distributed.fsdp import fully_shard

        layers = find_layers(target, field="sharding") if mesh is not None else []
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        apart = {id(parameter) for layer in layers for parameter in layer.parameters()}
        return {parameter for parameter in target.parameters() if id(parameter) not in apart}


def replica_size(sharding: Sharding, world: World) -> int | None:
    """Workers that hold all of a model between them; None where each does."""
    if sharding == "none" or world.size == 1:
        return None
    return world.local_size if sharding == "hybrid" else world.size


def _mesh(world: World, sharding: Sharding) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    kind = world.device.type
    if sharding != "hybrid":
        return init_device_mesh(kind, (world.size,))
    sizes = world.sizes_of_nodes()
    if len(set(sizes)) > 1:
        raise InputError(
            f"sharding hybrid: the {world.size} workers do not divide evenly among the nodes, "
            f"which have {', '.join(map(str, sizes))}; set num_workers to a multiple of the nodes, "
            "or sharding to full"
        )
    return init_device_mesh(kind, (len(sizes), sizes[0]), mesh_dim_names=("nodes", "workers"))


def _buffers_stay() -> dict[str, Any]:
    """What has no worker send its buffers in every pass; torch 2.13 renamed it, and warns."""
    names = inspect.signature(DistributedDataParallel).parameters
    new = "forward_sync_buffers"
    return {new if new in names else "broadcast_buffers": False}


def _return_what_is_freed() -> None:
    """Have glibc return blocks to the system when they are freed: at the threshold that it starts
    with, and then raises. Above it, freed memory stays in pieces that gathered layers do not fit
    into: two processes that shared a model took 1.3 times what two that did not took; so 0.53.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**17)
