"""How much memory a worker will need, told before it needs it.

Weights, gradients, optimiser state and averages are counted, activations computed (`activations`).
Left out is what lasts no longer than one operation, and what the libraries take for
themselves.
"""

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from tokendiff.errors import InputError
from tokendiff.models.dflash.model import DFlashDraftModel
from tokendiff.models.dflash.planning import plan_draft
from tokendiff.models.dflash.trainee import DraftTrainee
from tokendiff.models.layers import find_layers
from tokendiff.objectives.chunked import most_logits
from tokendiff.training.activations import (
    activation_bytes,
    draft_activation_bytes,
    selector_bytes,
)
from tokendiff.training.building import model_without_weights
from tokendiff.training.world import World

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig

_FLOAT, _HALF = 4, 2  # bytes
_MARGIN = 1.1  # plans were up to a tenth above what was measured
_GIVEN_BACK_SECONDS = 30  # by when a process that has ended has given back its part of a GPU
MiB, GiB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one worker at the peak of a step.

    Attributes:
        weights: the worker's part of them, and what is gathered at a time.
        gradients: the worker's part, and those of what is gathered; where nothing is added up they
            take the place of activations, and only what they take beyond that is counted.
        activations: 0 where they are not known.
        logits: of a chunk, and the gradient of the head's weights.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def describe(self) -> str:
        parts = ", ".join(f"{name} {_shown(size)}" for name, size in asdict(self).items() if size)
        found = "computed" if self.activations else "not known and not counted"
        return f"{_shown(self.total)} at the peak of a step ({parts}; activations are {found})"


def plan_memory(
    config: "TrainConfig",
    tokenizer: Any,
    *,
    max_length: int,
    num_workers: int,
    replica_size: int | None,
    device: torch.device,
) -> MemoryPlan:
    """What a worker of a run will need.

    Args:
        replica_size: workers that hold all of the model between them; None where each does.
    """
    if config.objective.name == "dflash":
        return _plan_draft_memory(
            config,
            tokenizer,
            max_length=max_length,
            num_workers=num_workers,
            replica_size=replica_size,
            device=device,
        )
    model = model_without_weights(config, tokenizer, max_length=max_length)
    rows = min(config.per_device_train_batch_size, -(-config.rows_per_step // num_workers))
    rows, length = config.objective.encoded_shape(rows, max_length)
    parts, is_bf16 = replica_size or 1, config.mixed_precision == "bf16"
    num_all = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_hidden = _hidden_numbers(model) if config.optimizer == "muon" else 0
    weights, gradients = _FLOAT * num_all // parts, _FLOAT * num_trained // parts
    if replica_size is not None:
        whole, apart = _gathered(config, model)
        weights, gradients = weights + whole, gradients + apart
    head = model.get_output_embeddings()
    is_head_trained = head is not None and head.weight.requires_grad
    chunk = min(most_logits(device), rows * length * len(tokenizer))
    logits = chunk * (_HALF if is_bf16 else _FLOAT)
    logits += _FLOAT * head.weight.numel() if is_head_trained else 0
    kept, again = activation_bytes(config, model, rows, length, device)
    if not _is_added_up(config, num_workers):
        gradients = max(0, gradients - kept)
    return MemoryPlan(
        weights=weights,
        gradients=gradients,
        optimizer=_FLOAT * (2 * (num_trained - num_hidden) + num_hidden) // parts,
        average=_FLOAT * num_trained // parts if config.ema_decay > 0.0 else 0,
        activations=kept + again,
        logits=logits,
    )


def _plan_draft_memory(
    config: "TrainConfig",
    tokenizer: Any,
    *,
    max_length: int,
    num_workers: int,
    replica_size: int | None,
    device: torch.device,
) -> MemoryPlan:
    """A draft in float32 beside its frozen target."""
    from transformers import AutoModelForCausalLM

    plan = plan_draft(config, tokenizer=tokenizer, max_length=max_length)
    with torch.device("meta"):
        draft: Any = DFlashDraftModel(plan.draft)
        target: Any = AutoModelForCausalLM.from_config(plan.target)
    rows = min(config.per_device_train_batch_size, -(-config.rows_per_step // num_workers))
    parts = replica_size or 1
    # On CUDA the target is in bfloat16, as are its logits then.
    of_target = _HALF if device.type == "cuda" else _FLOAT
    num_trained, num_frozen = (sum(p.numel() for p in m.parameters()) for m in (draft, target))
    weights, gradients = _FLOAT * num_trained // parts, _FLOAT * num_trained // parts
    if replica_size is not None:
        whole, apart = _gathered(config, draft)
        weights, gradients = weights + whole, gradients + apart
    if replica_size is None or config.sharding == "gradients":
        frozen = num_frozen
    else:  # its layers lie in parts, and one is gathered while another is computed with
        layers = find_layers(target, field="sharding")
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
        frozen = num_frozen - sum(sizes) + sum(sizes) // parts + 2 * max(sizes)
    objective, size = config.objective, plan.draft.block_size
    assert objective.name == "dflash"
    assert size is not None
    num_drafted = rows * min(objective.num_anchors, max_length) * (size - 1)
    kept, again = draft_activation_bytes(
        config, DraftTrainee(draft, target), rows, max_length, device
    )
    kept += selector_bytes(plan.draft, num_drafted)
    if not _is_added_up(config, num_workers):
        gradients = max(0, gradients - kept)
    num_hidden = _hidden_numbers(draft) if config.optimizer == "muon" else 0
    return MemoryPlan(
        weights=weights + of_target * frozen,
        gradients=gradients,
        optimizer=_FLOAT * (2 * (num_trained - num_hidden) + num_hidden) // parts,
        average=_FLOAT * num_trained // parts if config.ema_decay > 0.0 else 0,
        activations=kept + again,
        logits=of_target * min(most_logits(device), num_drafted * plan.draft.vocab_size),
    )


def _is_added_up(config: "TrainConfig", num_workers: int) -> bool:
    """Whether gradients of several passes, or workers, are added up."""
    return num_workers > 1 or config.rows_per_step > config.per_device_train_batch_size


def check_memory(config: "TrainConfig", plan: MemoryPlan, world: World) -> None:
    """Raise InputError where a worker will need more memory than its device has for it, by more
    than the plan may be wrong.
    """
    there, taken = _memory_of(world)
    is_room_in_all = plan.total <= _MARGIN * (there + taken)
    for _ in range(_GIVEN_BACK_SECONDS if is_room_in_all else 0):
        if plan.total <= _MARGIN * there:
            break
        time.sleep(1.0)
        there, taken = _memory_of(world)
    if plan.total <= _MARGIN * there:
        return
    remedies = [
        remedy
        for is_open, remedy in (
            (is_room_in_all, "end the processes that use it"),
            (config.sharding == "none" and world.size > 1, "set sharding to full"),
            (not config.gradient_checkpointing, "set gradient_checkpointing to true"),
            (config.per_device_train_batch_size > 1, "lower per_device_train_batch_size"),
            (True, "give the run more workers, or workers with more memory"),
        )
        if is_open
    ]
    by_others = f" (other processes have taken {_shown(taken)})" if taken else ""
    raise InputError(
        f"a worker needs {plan.describe()}, and {world.device} has {_shown(there)} for it"
        f"{by_others}; {', or '.join(remedies)}"
    )


def _gathered(config: "TrainConfig", model: Any) -> tuple[int, int]:
    """Weights that are whole at a time, and gradients of those, in bytes."""
    layers = find_layers(model, field="sharding")
    of_layers = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    rest = sum(p.numel() for p in model.parameters()) - sum(of_layers)
    # One layer is gathered while another is computed with.
    at_a_time = sum(of_layers) if config.sharding == "gradients" else 2 * max(of_layers)
    return _FLOAT * (rest + at_a_time), _FLOAT * (rest + max(of_layers))


def _hidden_numbers(model: Any) -> int:
    layers = find_layers(model, field="optimizer muon")
    return sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim == 2)


def _memory_of(world: World) -> tuple[int, int]:
    """Bytes that a worker of this node may use, and those of its GPU that others have taken."""
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        there = free + torch.cuda.memory_reserved(world.device)  # what this process has is its own
        taken = total - there  # what CUDA takes for this process counts among it
        return there, taken if taken > GiB else 0
    import psutil

    return int(psutil.virtual_memory().available) // world.local_size, 0


def _shown(size: int) -> str:
    return f"{size / GiB:.1f} GiB" if size >= GiB else f"{size / MiB:.0f} MiB"
