"""How often work on an accelerator makes the CPU wait: counted, and named by the line that asks.

An accelerator computes while Python runs ahead. Whoever asks for a value of the device (`.item()`,
`bool(x.any())`, `x[mask]`, whose size is a value) waits until all that was asked before is done,
and the device is idle until the next work arrives. So does a copy that is not `non_blocking`; who
reads what such a copy brings must wait for an event, which is not counted.

    with count_waits() as waits:
        step()
    print(waits.reads, waits.sends, waits.places())

Where no accelerator is at hand, `emulated_device()` is one: tensors on it are tensors of the CPU
that say they are elsewhere. They mix with those of the CPU as little as those of a GPU do, and
results are those of the CPU to the bit. It has no autocast, and its speed says nothing.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "emulated"
_aten = torch.ops.aten
# What answers with a value, or with a tensor whose size is one.
_READS = {
    _aten._local_scalar_dense,
    _aten._unique2,
    _aten.bincount,
    _aten.equal,
    _aten.masked_select,
    _aten.nonzero,
    _aten.unique_consecutive,
    _aten.unique_dim,
}
_COPIES = {_aten._to_copy, _aten.copy_}
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_}


@dataclass
class Waits:
    """Where the CPU waited: `file:line operation` for each time.

    Attributes:
        read: for values of the device, copies to the CPU among them.
        sent: for copies to the device, those of indices of the CPU among them.
    """

    read: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    @property
    def reads(self) -> int:
        return len(self.read)

    @property
    def sends(self) -> int:
        return len(self.sent)

    def places(self) -> dict[str, int]:
        """How often each line waited, the most frequent first."""
        return dict(Counter([*self.read, *self.sent]).most_common())


@contextmanager
def count_waits() -> Iterator[Waits]:
    """Count what happens inside this block on any device but the CPU, emulated or not. It slows
    everything down: what is counted is not to be timed.
    """
    waits = Waits()
    with ExitStack() as modes:
        if _Hook.is_set_up:
            _Hook.is_on = True
            modes.callback(_turn_off)
            modes.enter_context(_Factories())
            modes.enter_context(mock.patch.object(nn.Module, "_apply", _apply_keeping_ties))
            # Threads of backward passes are started once, for the devices that there are then.
            modes.enter_context(torch.autograd.set_multithreading_enabled(False))
        modes.enter_context(_Counted(waits))
        yield waits


def emulated_device() -> torch.device:
    """A device of its own in the memory of the CPU; tensors are made on it inside `count_waits`."""
    if not _Hook.is_set_up:
        from torch.utils import backend_registration

        set_up = backend_registration._setup_privateuseone_for_python_backend
        set_up(NAME, backend_module=_Backend(), hook=_Hook())
        _Hook.is_set_up = True
    return torch.device(NAME, 0)


class _Hook(torch._C._acc.PrivateUse1Hooks):
    """Tells torch of the device, inside `count_waits` alone: else it would be the accelerator of
    everything in this process.
    """

    is_set_up = False
    is_on = False

    def is_available(self) -> bool:
        return _Hook.is_on

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


_apply = nn.Module._apply


def _apply_keeping_ties(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """A model that is moved has tied parameters then too, as it has on a GPU."""
    places = [
        (part, name, id(parameter))
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if parameter is not None
    ]
    _apply(module, fn, recurse)
    moved: dict[int, Any] = {}
    for part, name, was in places:
        part._parameters[name] = moved.setdefault(was, part._parameters[name])
    return module


def _turn_off() -> None:
    _Hook.is_on = False


class _Backend:
    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return _Hook.is_on

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return int(_Hook.is_on)  # elsewhere `torch.random.fork_rng` looks at every device there is

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class _Elsewhere(Tensor):
    """A tensor of the CPU that says it is on the emulated device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "_Elsewhere":
        made: _Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:  # which torch does for no subclass
            return args[0].to("cpu").tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _emulated(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{NAME}({self.held})"


class _Factories(TorchFunctionMode):
    """torch.tensor(..., device=...) is made on the CPU and sent, as it is with a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_sent = func in (torch.tensor, torch.as_tensor) and _is_emulated(kwargs.get("device"))
        if is_sent and not isinstance(args[0], Tensor):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class _Counted(TorchDispatchMode):
    supports_higher_order_operators = True  # flex attention is one; what it runs is counted

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not hasattr(func, "overloadpacket"):
            return func(*args, **kwargs)
        if (kept := self._kept_by(func, args, kwargs)) is not None:
            kept.append(f"{_place()} {func.overloadpacket.__name__}")
        return _emulated(func, args, kwargs) if _Hook.is_set_up else func(*args, **kwargs)

    def _kept_by(self, func: Any, args: Any, kwargs: Any) -> list[str] | None:
        """The list that a call belongs in; None for one that nobody waits for."""
        name, tensors = func.overloadpacket, tensors_in((*args, *kwargs.values()))
        if name in _COPIES:
            source = args[1] if name is _aten.copy_ else args[0]
            target = torch.device(
                args[0].device if name is _aten.copy_ else kwargs.get("device") or source.device
            )
            is_waited_for = not (
                kwargs.get("non_blocking") or (name is _aten.copy_ and len(args) > 2 and args[2])
            )
            if target.type == source.device.type or not is_waited_for:
                return None
            return self._waits.read if target.type == "cpu" else self._waits.sent
        if not any(tensor.device.type != "cpu" for tensor in tensors):
            return None
        if name in _INDEXED and any(
            index is not None and index.device.type == "cpu" for index in args[1]
        ):
            return self._waits.sent
        return self._waits.read if asks_for_a_value(func, args, kwargs) else None


def asks_for_a_value(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation of torch answers with a value of its tensors, or with a tensor whose
    size is one.
    """
    name = func.overloadpacket
    is_sized = name is _aten.repeat_interleave and kwargs.get("output_size") is None
    return name in _READS or is_sized or (name in _INDEXED and _is_by_mask(name, args))


def _is_by_mask(name: Any, args: Any) -> bool:
    is_by_mask = any(index is not None and index.dtype == torch.bool for index in args[1])
    # One value into the places of one mask is a masked_fill.
    return is_by_mask and not (name is not _aten.index and args[2].numel() == 1)


def _emulated(func: Any, args: Any, kwargs: Any) -> Any:
    """The call on the tensors that are held; what it gives is on the emulated device where its
    tensors are, or where the call says so.
    """
    device = kwargs.get("device")
    tensors = tensors_in((*args, *kwargs.values()))
    is_elsewhere = any(isinstance(tensor, _Elsewhere) for tensor in tensors)
    if not is_elsewhere and not _is_emulated(device):
        return func(*args, **kwargs)
    if is_elsewhere and func.overloadpacket not in _COPIES:
        for tensor in tensors:  # as torch: a number of the CPU may be mixed in, and an index
            is_index = func.overloadpacket in _INDEXED
            if not isinstance(tensor, _Elsewhere) and tensor.dim() and not is_index:
                raise RuntimeError(f"{func}: tensors on the CPU and on {NAME}")
    held = {name: mapped(_held, value) for name, value in kwargs.items()}
    found = func(*mapped(_held, args), **held)
    if func.overloadpacket is _aten.copy_ and not isinstance(args[0], _Elsewhere):
        return args[0]
    if device is not None and not _is_emulated(device):
        return found
    moved = mapped(lambda x: _Elsewhere(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(func, args, kwargs, moved)


def _held(value: Any) -> Any:
    if isinstance(value, _Elsewhere):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and _is_emulated(value) else value


def _is_emulated(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among values, and in the lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Of a value, or of all that lists and tuples hold: what operations of torch take and give.
    (`torch.utils._pytree` does the same, and took half of the time of an emulated operation.)
    """
    if isinstance(value, list | tuple):
        return type(value)(mapped(change, each) for each in value)
    return change(value)


def _place() -> str:
    """The innermost line outside torch and this file."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and "/torch/" not in name:
            return f"{'/'.join(name.split('/')[-3:])}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
