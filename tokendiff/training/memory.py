"""How much memory a worker will need, told before it needs it.

Weights, gradients, optimiser state and averages are counted. Activations are computed: the encoder
runs once on tensors that have shapes and no memory, and what it would keep for its backward pass is
added up. Left out is what lasts no longer than one operation, and what the libraries take for
themselves.
"""

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokendiff.errors import InputError
from tokendiff.models.denoiser import ModelInTwoParts
from tokendiff.models.layers import find_layers
from tokendiff.models.masked_attention import IMPLEMENTATIONS
from tokendiff.models.tiled_attention import register, tiles_of
from tokendiff.objectives.chunked import most_logits
from tokendiff.training.building import model_without_weights
from tokendiff.training.world import World

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig

_FLOAT, _HALF = 4, 2  # bytes
_MARGIN = 1.1  # plans were up to a tenth above what was measured
MiB, GiB = 2**20, 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one worker at the peak of a step.

    Attributes:
        weights: the worker's part of them, and what is gathered at a time.
        gradients: the worker's part, and those of what is gathered; where nothing is added up they
            take the place of activations, and only what they take beyond that is counted.
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
        return f"{_shown(self.total)} at the peak of a step ({parts}; activations are computed)"


def plan_memory(
    config: "TrainConfig",
    tokenizer: Any,
    *,
    max_length: int,
    num_workers: int,
    replica_size: int | None,
    device: torch.device,
) -> MemoryPlan | None:
    """What a worker of a run will need; None for a draft, whose encoder takes other inputs.

    Args:
        replica_size: workers that hold all of the model between them; None where each does.
    """
    if config.objective.name == "dflash":
        return None
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
    is_added_up = num_workers > 1 or config.rows_per_step > config.per_device_train_batch_size
    if not is_added_up:
        gradients = max(0, gradients - kept)
    return MemoryPlan(
        weights=weights,
        gradients=gradients,
        optimizer=_FLOAT * (2 * (num_trained - num_hidden) + num_hidden) // parts,
        average=_FLOAT * num_trained // parts if config.ema_decay > 0.0 else 0,
        activations=kept + again,
        logits=logits,
    )


def check_memory(config: "TrainConfig", plan: MemoryPlan, world: World) -> None:
    """Raise InputError where a worker will need more memory than its device has, by more than the
    plan may be wrong.
    """
    there = _memory_of(world)
    if plan.total <= _MARGIN * there:
        return
    remedies = [
        remedy
        for is_open, remedy in (
            (config.sharding == "none" and world.size > 1, "set sharding to full"),
            (not config.gradient_checkpointing, "set gradient_checkpointing to true"),
            (config.per_device_train_batch_size > 1, "lower per_device_train_batch_size"),
            (True, "give the run more workers, or workers with more memory"),
        )
        if is_open
    ]
    raise InputError(
        f"a worker needs {plan.describe()}, and {world.device} has {_shown(there)} for it; "
        f"{', or '.join(remedies)}"
    )


def activation_bytes(
    config: "TrainConfig", model: Any, rows: int, length: int, device: torch.device
) -> tuple[int, int]:
    """What a forward pass of the encoder keeps for the backward pass; and what one layer keeps
    when it computes that again, where layers do.

    Args:
        model: of transformers, on the meta device.
        rows, length: of the tokens that it encodes.
    """
    if not config.gradient_checkpointing:
        return _kept_bytes(config, model, rows, length, device), 0
    again = copy.deepcopy(model)
    ModelInTwoParts(again, vocab_size=1).recompute_activations()
    num_layers = len(find_layers(model, field="gradient_checkpointing"))
    of_a_layer = _kept_bytes(config, model, rows, length, device) // num_layers
    return _kept_bytes(config, again, rows, length, device), of_a_layer


def _kept_bytes(
    config: "TrainConfig", model: Any, rows: int, length: int, device: torch.device
) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    encoder = copy.deepcopy(model)
    # Packed rows have no padding to mask, and flex attention keeps no mask.
    attention: dict[str, Any] = {"attention_mask": None}
    has_tiles = config.objective.is_causal and device.type == "cpu"
    if has_tiles:
        register()
        encoder.set_attn_implementation(IMPLEMENTATIONS["tiles"])  # as in training on a CPU
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool).tril()
        attention = {"attention_mask": mask, "tiles": tiles_of(mask)}
    kept: dict[int, tuple[int, Tensor]] = {}  # tensors too, or their places would be used again
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder = encoder.to_empty(device="cpu").train()
        own = {p.untyped_storage()._cdata for p in encoder.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        tokens = torch.zeros(rows, length, dtype=torch.int64)
        inputs: dict[str, Any] = {"position_ids": tokens}
        if config.objective.is_causal:
            inputs["use_cache"] = False
        if getattr(model.config, "is_time_conditioned", False):
            inputs = {"time": torch.zeros(rows)}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16"),
        ):
            encoder.base_model(input_ids=tokens, **inputs, **attention)
    return sum(size for size, _ in kept.values())


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


def _memory_of(world: World) -> int:
    """Bytes that a worker of this node may use."""
    if world.device.type == "cuda":
        return int(torch.cuda.get_device_properties(world.device).total_memory)
    import psutil

    return int(psutil.virtual_memory().available) // world.local_size


def _shown(size: int) -> str:
    return f"{size / GiB:.1f} GiB" if size >= GiB else f"{size / MiB:.0f} MiB"
