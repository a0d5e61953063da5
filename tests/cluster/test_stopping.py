"""What stops a driver that waits for Ray, and what a driver that is stopped says."""

import signal
import sys
import threading
import time
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock

import pytest

from jobs import cli
from pipelines.attempts import StageTimeout, deadline
from tests.starts import STARTERS, started_by
from tokendiff.cluster.session import ray_session as session
from tokendiff.cluster.stopping import (
    is_stop_requested,
    saving_first,
    sigterm_held,
    sigterm_stops,
)
from tokendiff.config.cluster import ClusterConfig


@pytest.mark.ray
def test_sigterm_and_a_deadline_reach_a_driver_that_waits_in_a_call_into_ray(
    ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which drops what the interrupt says, and whatever is no KeyboardInterrupt."""
    import ray

    never = ray.remote(num_cpus=0)(lambda: time.sleep(600)).remote()

    def main(argv: Any) -> None:
        threading.Timer(0.3, signal.pthread_kill, (threading.get_ident(), signal.SIGTERM)).start()
        ray.get(never, timeout=20)

    with started_by("whoever blocks all"):
        assert cli.entry_point(main)([]) == 143
        assert capsys.readouterr().err == "stopped by SIGTERM\n"
        with pytest.raises(StageTimeout), deadline(0.3, what="x"):
            ray.get(never, timeout=20)
    ray.cancel(never, force=True)


@pytest.mark.ray
@pytest.mark.parametrize("starter", ["a shell", "a script, with &"])
def test_an_interrupted_training_ends_its_workers_and_leaves_ctrl_c_as_it_is(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, starter: str
) -> None:
    """Ray Train would do so on Ctrl-C alone, in the background too, and exit with code 0."""
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.controller.controller import TrainController

    from tokendiff.cluster.train_workers import _Trainer

    class Controller:
        async def abort(self) -> None:
            ray.actor.exit_actor()

        async def answer(self) -> None:
            pass

    controller: Any = ray.remote(num_cpus=0)(Controller).remote()
    assert callable(TrainController.abort)
    assert callable(TorchTrainer._register_sigint_handler)  # type: ignore[attr-defined]

    def fit(trainer: Any) -> None:
        trainer._register_sigint_handler(controller)
        assert signal.getsignal(signal.SIGINT) is before
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    with started_by(starter):
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            _Trainer(print).fit()
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(controller.answer.remote(), timeout=10)


@pytest.mark.parametrize("starter", STARTERS)
def test_sigterm_while_ray_starts_has_the_same_exit_code(
    monkeypatch: pytest.MonkeyPatch, starter: str
) -> None:
    import ray

    def init(**kwargs: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))  # as Ray's does
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        time.sleep(10)

    def main(argv: Any) -> None:
        with session(ClusterConfig(address="local")):
            pass

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    before = signal.getsignal(signal.SIGTERM)
    with started_by(starter):
        assert cli.entry_point(main)([]) == 143
    assert is_stop_requested()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("is_held", [False, True])
def test_sigterm_does_after_a_training_what_it_did_before(
    monkeypatch: pytest.MonkeyPatch, is_held: bool
) -> None:
    import ray

    context = Mock(get_node_id=lambda: "0" * 56)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    for name in ("remote", "kill"):
        monkeypatch.setattr(ray, name, Mock())
    stopped = []
    with sigterm_stops(), sigterm_held() if is_held else nullcontext():
        with saving_first(print):
            signal.raise_signal(signal.SIGTERM)
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            stopped.append(True)
    assert bool(stopped) != is_held
