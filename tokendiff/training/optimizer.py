"""AdamW and a transformers learning-rate schedule; their state is plain tensors and numbers."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from tokendiff.artifacts.tensor_files import whole

if TYPE_CHECKING:
    from tokendiff.config.train import TrainConfig

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class StoredTensors(Protocol):
    """Tensors by name, somewhere."""

    def __contains__(self, name: str) -> bool: ...

    def fill(self, name: str, tensor: Tensor) -> None:
        """Write into `tensor` what it is of the one of that name."""
        ...


class Optimizer:
    """AdamW with weight decay on matrices only, stepped with its learning-rate schedule."""

    def __init__(self, model: nn.Module, config: "TrainConfig") -> None:
        from transformers import get_scheduler

        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self._parameters.values() if p.ndim >= 2]
        vectors = [p for p in self._parameters.values() if p.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        self._schedule = get_scheduler(
            config.lr_scheduler,
            self._adamw,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )

    @property
    def learning_rate(self) -> float:
        """Of the step to come."""
        return float(self._schedule.get_last_lr()[0])

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def scale_grad(self, factor: float) -> None:
        torch._foreach_mul_(self._gradients(), factor)

    def clip_grad(self, max_norm: float) -> float:
        """Scale the gradient to at most `max_norm`; returns its norm before."""
        return float(whole(nn.utils.clip_grad_norm_(self._parameters.values(), max_norm)))

    def step(self) -> None:
        self._adamw.step()
        self._schedule.step()

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's state by parameter name: `NAME.exp_avg`, `NAME.exp_avg_sq`, `NAME.step`."""
        return {
            f"{name}.{moment}": self._adamw.state[parameter][moment].contiguous()
            for name, parameter in self._parameters.items()
            if parameter in self._adamw.state
            for moment in _MOMENTS
        }

    def load(self, tensors: StoredTensors, *, step: int) -> None:
        """Stand where `step` steps lead; the learning rate is that of the schedule as it is now."""
        for name, parameter in self._parameters.items():
            if f"{name}.step" not in tensors:
                continue  # no gradient ever reached it
            # AdamW keeps its step count on the CPU and its moments beside the parameter.
            state = {
                moment: torch.zeros(()) if moment == "step" else torch.zeros_like(parameter)
                for moment in _MOMENTS
            }
            for moment, tensor in state.items():
                tensors.fill(f"{name}.{moment}", tensor.detach())
            self._adamw.state[parameter] = state
        rates = [
            base * factor(step)
            for base, factor in zip(self._schedule.base_lrs, self._schedule.lr_lambdas, strict=True)
        ]
        self._schedule.load_state_dict(
            {
                **self._schedule.state_dict(),
                "last_epoch": step,
                "_step_count": step + 1,
                "_last_lr": rates,
            }
        )
        for group, rate in zip(self._adamw.param_groups, rates, strict=True):
            group["lr"] = rate

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]
