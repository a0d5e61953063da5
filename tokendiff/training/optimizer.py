"""AdamW, or Muon with AdamW beside it, and the learning rate of each step; their state is plain
tensors and numbers.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from tokendiff.artifacts.tensor_files import whole
from tokendiff.models.layers import find_layers
from tokendiff.training.muon import Muon
from tokendiff.training.schedules import lr_factor

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig

# What each keeps of a parameter. AdamW's number of steps is its only number that is no tensor of
# the parameter's shape.
_STEP = "step"
_KEPT: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", _STEP),
    Muon: ("momentum_buffer",),
}


class StoredTensors(Protocol):
    """Tensors by name, somewhere."""

    def __contains__(self, name: str) -> bool: ...

    def fill(self, name: str, tensor: Tensor) -> None:
        """Write into `tensor` what it is of the one of that name."""
        ...


class Optimizer:
    """What trains a model, stepped with its learning-rate schedule.

    AdamW decays matrices only. With `optimizer: muon` the matrices of the layers are Muon's, and
    AdamW has the rest: embeddings, head, norms and biases.

    Args:
        model: of transformers, its parameters whole or in parts.

    Raises:
        InputError: `muon`, and it is not known which modules of the model are its layers.
    """

    def __init__(self, model: nn.Module, config: "TrainConfig") -> None:
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        hidden = hidden_matrices(model) if config.optimizer == "muon" else []
        of_muon = {id(parameter) for parameter in hidden}
        rest = [p for p in self._parameters.values() if id(p) not in of_muon]
        adamw = torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        self._optimizers: list[torch.optim.Optimizer] = [adamw]
        if hidden:
            muon = Muon(
                hidden,
                lr=config.muon_learning_rate,
                momentum=config.muon_momentum,
                weight_decay=config.weight_decay,
            )
            self._optimizers.append(muon)
        self._schedule = partial(
            lr_factor,
            config.lr_scheduler,
            warmup_steps=config.lr_warmup_steps,
            total_steps=config.max_train_steps,
        )
        self.stand_at(0)

    @property
    def learning_rate(self) -> float:
        """AdamW's, of the step to come."""
        return float(self._optimizers[0].param_groups[0]["lr"])

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def scale_grad(self, factor: Tensor) -> None:
        """Multiply the gradient by a scalar, which stays on its device."""
        for dtype, gradients in self._local_gradients().items():
            torch._foreach_mul_(gradients, factor.to(dtype))

    def clip_grad(self, max_norm: float) -> Tensor:
        """Scale the gradient to at most `max_norm`; returns its norm before, a scalar.

        It is `torch.nn.utils.clip_grad_norm_`, but that each worker scales what it holds without
        asking for each tensor how that lies on the others.
        """
        norm = whole(nn.utils.get_total_norm(self._gradients()))
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradients in self._local_gradients().values():
            torch._foreach_mul_(gradients, factor)
        return norm

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()
        self.stand_at(self._step + 1)

    def tensors(self) -> dict[str, Tensor]:
        """The state by parameter name: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step` of AdamW, and
        `NAME.momentum_buffer` of Muon.
        """
        return {
            f"{name}.{kept}": optimizer.state[parameter][kept].contiguous()
            for name, parameter, optimizer in self._places()
            if parameter in optimizer.state
            for kept in _KEPT[type(optimizer)]
        }

    def load(self, tensors: StoredTensors, *, step: int) -> None:
        """Stand where `step` steps lead; the learning rate is that of the schedule as it is now."""
        for name, parameter, optimizer in self._places():
            kept = _KEPT[type(optimizer)]
            if f"{name}.{kept[0]}" not in tensors:
                optimizer.state.pop(parameter, None)
                continue  # no gradient ever reached it
            state = {
                each: torch.zeros((), device=parameter.device)
                if each == _STEP
                else torch.zeros_like(parameter, requires_grad=False)
                for each in kept
            }
            for each, tensor in state.items():
                tensors.fill(f"{name}.{each}", tensor)
            optimizer.state[parameter] = state
        self.stand_at(step)

    def stand_at(self, step: int) -> None:
        """Give the steps from here on the learning rates of steps `step`, `step` + 1, ..."""
        self._step = step
        for optimizer in self._optimizers:
            rate = optimizer.defaults["lr"]
            for group in optimizer.param_groups:
                group["lr"] = rate * self._schedule(step, rate=rate)

    def _places(self) -> Iterator[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
        """Each parameter with its name and what trains it, in the order of the model."""
        owners = {
            id(parameter): optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for name, parameter in self._parameters.items():
            yield name, parameter, owners[id(parameter)]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]

    @torch.no_grad()
    def _local_gradients(self) -> dict[torch.dtype, list[Tensor]]:
        """What this worker holds of the gradient, to be written to, by dtype."""
        from torch.distributed.tensor import DTensor

        found: dict[torch.dtype, list[Tensor]] = {}
        for gradient in self._gradients():
            held = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            found.setdefault(gradient.dtype, []).append(held)
        return found


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trained matrices of a model's layers.

    Raises:
        InputError: it is not known which modules are its layers.
    """
    return [
        parameter
        for layer in find_layers(model, field="optimizer muon")
        for parameter in layer.parameters()
        if parameter.requires_grad and parameter.ndim == 2
    ]
