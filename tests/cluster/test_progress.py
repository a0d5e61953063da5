"""What a driver tells of a job: what is whole, and what workers say of the rest."""

import time
from pathlib import Path
from typing import Any

import pytest

from tokendiff.cluster import progress as progress_module
from tokendiff.cluster.progress import JobProgress, Reporter, _Board

Told = list[dict[str, Any]]


def watched() -> tuple[JobProgress, Told]:
    told: Told = []
    return JobProgress(lambda event, **fields: told.append({"event": event, **fields})), told


def places(told: Told) -> list[tuple[float, float]]:
    return [(fields["done"], fields["tokens"]) for fields in told]


def test_what_is_under_way_is_counted_until_it_is_whole() -> None:
    progress, told = watched()
    with progress:
        progress.begin("rows", total=100, done=40, errors=0)
        progress._hear({(1, 3): (0, 0)})
        progress._hear({(1, 0): (2.5, 250), (1, 3): (1.5, 150)})
        progress._hear({(1, 0): (2.5, 250), (1, 3): (1.5, 150)})  # nothing new, nothing told
        progress.finish(0, (10, 1000), errors=2)
        progress._hear({(1, 0): (9.9, 990), (1, 3): (2.0, 200)})  # of a unit that is whole
        progress.finish(3, (50, 5000))
    assert places(told) == [
        *((40, 0), (40, 0), (44, 400)),
        *((51.5, 1150), (52, 1200)),
        (100, 6000),
    ]
    assert [fields["errors"] for fields in told] == [0, 0, 0, 2, 2, 2]
    assert {(fields["event"], fields["unit"], fields["total"]) for fields in told} == {
        ("progress", "rows", 100)
    }


def test_another_thing_is_counted_from_its_beginning() -> None:
    progress, told = watched()
    with progress:
        progress.begin("bytes", total=1000, tokens_per_row=128)
        progress._hear({(1, 0): (500, 300), (1, 1): (0, 0)})
        progress.finish(0, (500, 310), rows=3)
        progress._hear({(1, 1): (500, 150)})
        progress.begin("checks", total=71)
        progress._hear({(1, 0): (600, 400), (2, 0): (7, 0)})  # the first is of what is over
        progress.end()
        progress._hear({(2, 0): (8, 0)})
    assert [fields.get("rows") for fields in told] == [0, 2, 3, 4, None, None, None]
    assert places(told) == [(0, 0), (500, 300), (500, 310), (1000, 460), (0, 0), (7, 0), (71, 0)]


def test_a_worker_is_asked_once_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it calls: figures may cost something, a wait for the GPU say."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    sent: list[Any] = []

    class Board(_Board):
        def write(self, *args: Any) -> None:
            sent.append(args)

    tell = Reporter(board=Board(), phase=2).of(7)
    assert sent == [((2, 7), (0, 0))]
    asked: list[float] = []
    for call in range(50):
        now[0] = 100.0 + call / 10

        def figures(at: float = now[0]) -> tuple[float, float]:
            asked.append(at)
            return at, 1.0

        tell(figures)
    assert asked == pytest.approx([100.0, 101.0, 102.0, 103.0, 104.0])
    assert [unit for unit, _ in sent] == [(2, 7)] * 6


@pytest.mark.ray
def test_a_worker_is_heard_before_it_is_done(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(progress_module, "_SECONDS", 0.05)
    heard = tmp_path / "heard"

    @ray.remote(num_cpus=0)
    def work(reporter: Reporter) -> None:
        reporter.of(0)(lambda: (0.5, 10))
        deadline = time.monotonic() + 60
        while not heard.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    told: Told = []

    def on_event(event: str, **fields: Any) -> None:
        told.append(fields)
        if fields["done"] == 0.5:
            heard.touch()

    with JobProgress(on_event) as progress:
        progress.begin("rows", total=1)
        ray.get(work.remote(progress.reporter))
        progress.finish(0, (1, 20))
    assert places(told)[-2:] == [(0.5, 10), (1, 20)]
    assert places(told)[0] == (0, 0)
