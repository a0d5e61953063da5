"""One process of a run, and its device."""

import pytest
import torch

from tokendiff.training.world import World


def test_its_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert World.current("cuda:1").device == torch.device("cuda:1")
    World.current("cuda")  # which the current one is already
    World.current("cpu")
    assert chosen == [torch.device("cuda:1")]
