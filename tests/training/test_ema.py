"""Averaged weights in the place of weights: to the bit, and without a copy of them all."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokendiff.training.ema import WeightAverage


def a_model() -> nn.Module:
    """With a shared weight, a frozen one, and numbers that do not survive arithmetic."""
    torch.manual_seed(0)
    layers = [nn.Linear(7, 5), nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 2)]
    layers[2].weight = layers[0].weight
    layers[3].weight.requires_grad_(False)
    with torch.no_grad():
        layers[0].bias[:4] = torch.tensor([torch.nan, -0.0, torch.inf, 1e-42])
    return nn.Sequential(*layers)


def averaged(model: nn.Module) -> WeightAverage:
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        for tensor in average.tensors.values():
            tensor.add_(torch.randn_like(tensor))
        average.tensors["1.bias"][:3] = torch.tensor([1e30, -0.0, torch.nan])
    return average


def bits(tensors: Any) -> dict[str, Tensor]:
    return {name: each.detach().clone().view(torch.int32) for name, each in dict(tensors).items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class _Copies(TorchDispatchMode):
    """The most bytes of copies that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._alive = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy):
            self._alive += found.nbytes
            self.most = max(self.most, self._alive)
            weakref.finalize(found, self._gone, found.nbytes)
        return found

    def _gone(self, size: int) -> None:
        self._alive -= size


def test_weights_and_averages_change_places_and_back_to_the_bit() -> None:
    model = a_model()
    average = averaged(model)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    weights, averages = bits(model.named_parameters()), bits(average.tensors)
    with average.in_place_of_weights():
        inside = bits(model.named_parameters())
        assert_same({name: inside[name] for name in averages}, averages)
        assert torch.equal(inside["3.weight"], weights["3.weight"])
    assert_same(bits(model.named_parameters()), weights)
    assert_same(bits(average.tensors), averages)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places


def test_no_more_than_one_tensor_is_copied_at_a_time() -> None:
    model = a_model()
    average = averaged(model)
    with _Copies() as copies, average.in_place_of_weights():
        pass
    assert copies.most == max(tensor.nbytes for tensor in average.tensors.values())


@pytest.mark.parametrize("number", [0, 2, 3])
def test_what_fails_in_the_midst_leaves_all_as_it_was(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = a_model()
    average = averaged(model)
    weights, averages = bits(model.named_parameters()), bits(average.tensors)
    names, swap = list(average.tensors), average._swap

    def without_room(name: str) -> None:
        if name == names[number]:
            monkeypatch.undo()
            raise torch.OutOfMemoryError("out of memory")
        swap(name)

    monkeypatch.setattr(average, "_swap", without_room)
    with pytest.raises(torch.OutOfMemoryError), average.in_place_of_weights():
        raise AssertionError("not reached")
    assert_same(bits(model.named_parameters()), weights)
    assert_same(bits(average.tensors), averages)
    with pytest.raises(ValueError, match="inside"), average.in_place_of_weights():
        raise ValueError("inside")
    assert_same(bits(model.named_parameters()), weights)
    assert_same(bits(average.tensors), averages)
