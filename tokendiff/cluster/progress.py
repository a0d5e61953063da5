"""How far a job is, counted together from its workers while they are at it.

Work is handed out in units that count when they are whole: a part of 4,096 samples, a partition of
32 MiB. Until then whoever is at one says now and then how far it has got, to an actor beside the
driver, which asks it every second. Nobody waits for that: what a worker says is lost with it, and
neither changes a result nor fails a job.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from tokendiff.cluster.session import is_connected

if TYPE_CHECKING:  # the actor's process imports this module, and need not import torch
    from tokendiff.diffusion.interfaces import Figures, OnProgress
    from tokendiff.training.trainer import OnEvent

_SECONDS = 1.0  # between two reports of a worker, and between two looks of the driver
Unit = tuple[int, int]  # number of the phase, and of the unit in it


class Board(Protocol):
    """The latest figures of every unit that is under way."""

    def write(self, unit: Unit, figures: "Figures") -> None: ...
    def wipe(self, unit: Unit) -> None: ...
    def read(self) -> "dict[Unit, Figures]": ...


class _Board:
    """In this process, or an actor's."""

    def __init__(self) -> None:
        self._figures: dict[Unit, Figures] = {}

    def write(self, unit: Unit, figures: "Figures") -> None:
        self._figures[unit] = figures

    def wipe(self, unit: Unit) -> None:
        self._figures.pop(unit, None)

    def read(self) -> "dict[Unit, Figures]":
        return dict(self._figures)  # one that changes could not be looked through


@dataclass(frozen=True)
class _BoardActor:
    """The board beside the driver; only reading waits for an answer."""

    actor: Any

    @classmethod
    def start(cls) -> Self:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        place = NodeAffinitySchedulingStrategy(here, soft=False)
        board: Any = ray.remote(_Board)
        return cls(board.options(num_cpus=0, scheduling_strategy=place).remote())

    def write(self, unit: Unit, figures: "Figures") -> None:
        self.actor.write.remote(unit, figures)

    def wipe(self, unit: Unit) -> None:
        self.actor.wipe.remote(unit)

    def read(self) -> "dict[Unit, Figures]":
        import ray

        try:
            answer: dict[Unit, Figures] = ray.get(self.actor.read.remote())
        except ray.exceptions.RayError as error:
            raise ConnectionError("the actor that workers report to is lost") from error
        return answer

    def end(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError):  # where the cluster is lost
            ray.kill(self.actor)  # who asks it is answered then


@dataclass(frozen=True, kw_only=True)
class Reporter:
    """What a worker is given to tell of its units."""

    board: Board
    phase: int

    def of(self, unit: int) -> "OnProgress":
        """Hears how far a unit has got, and passes it on once a second.

        That it is begun is passed on at once: a speed is measured from there on, and not from when
        weights began to be read.
        """
        self.board.write((self.phase, unit), (0, 0))
        due = time.monotonic()

        def tell(figures: "Callable[[], Figures]") -> None:
            nonlocal due
            if time.monotonic() >= due:
                self.board.write((self.phase, unit), figures())
                due = time.monotonic() + _SECONDS

        return tell


class JobProgress:
    """Emits "progress" as units are begun and finished, and every second in which one has moved.

    with JobProgress(on_event) as progress:
        progress.begin("rows", total=1_000_000)
        ...  # workers get `progress.reporter`
        progress.finish(unit, (4096, 524_288))
    """

    def __init__(self, on_event: "OnEvent") -> None:
        self.on_event = on_event
        self._phase = 0
        self._fields: dict[str, Any] = {}
        self._tokens_per_row: int | None = None
        self._finished_rows = 0
        self._finished: Figures = (0, 0)
        self._under_way: dict[Unit, Figures] = {}
        self._over: set[Unit] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="job progress", daemon=True)
        self._board: _Board | _BoardActor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        if isinstance(self._board, _BoardActor):
            self._board.end()
        if self._board is not None:
            self._thread.join()

    def begin(
        self,
        what: str,
        *,
        total: float,
        done: float = 0,
        tokens_per_row: int | None = None,
        **fields: Any,
    ) -> None:
        """Count something from now on, in place of what was counted before.

        Args:
            what: the events' `unit`: what `done` and `total` count.
            done: of it, what an earlier attempt did.
            tokens_per_row: where rows are not what is counted, to say how many the tokens of a
                unit make before it is whole.
            fields: what else the events say.
        """
        with self._lock:
            self._phase += 1
            self._fields = {"unit": what, "total": total, **fields}
            self._tokens_per_row, self._finished_rows = tokens_per_row, 0
            self._finished = (done, 0)
            self._under_way = {}
            self._over = set()
            self._tell()

    @property
    def reporter(self) -> Reporter:
        """For workers on any node; with it the driver begins to ask what they say."""
        is_first = self._board is None
        if is_connected() and not isinstance(self._board, _BoardActor):
            self._board = _BoardActor.start()
        elif self._board is None:
            self._board = _Board()
        if is_first:
            self._thread.start()
        return Reporter(board=self._board, phase=self._phase)

    def finish(self, unit: int, figures: "Figures", *, rows: int = 0, **fields: Any) -> None:
        """Count a unit that is whole.

        Args:
            figures: of all of it, done and tokens.
            rows: that it made, where rows are not what is counted.
            fields: what else the events say from now on.
        """
        here = (self._phase, unit)
        with self._lock:
            self._over.add(here)
            self._under_way.pop(here, None)
            self._finished = _sum([self._finished, figures])
            self._finished_rows += rows
            self._fields |= fields
            self._tell()
        if self._board is not None:
            self._board.wipe(here)

    def end(self) -> None:
        """Count all of it as done, with as many tokens as workers have told of."""
        with self._lock:
            self._phase += 1
            tokens = sum(tokens for _, tokens in [self._finished, *self._under_way.values()])
            self._finished, self._under_way = (self._fields["total"], tokens), {}
            self._tell()

    def _tell(self) -> None:
        done, tokens = _sum([self._finished, *self._under_way.values()])
        rows = {}
        if self._tokens_per_row is not None:
            under_way = sum(int(n // self._tokens_per_row) for _, n in self._under_way.values())
            rows = {"rows": self._finished_rows + under_way}
        self.on_event("progress", done=done, tokens=tokens, **rows, **self._fields)

    def _watch(self) -> None:
        assert self._board is not None, "it is there before this thread is started"
        with contextlib.suppress(ConnectionError):  # then only what is whole is counted
            while not self._stopped.wait(_SECONDS):
                self._hear(self._board.read())

    def _hear(self, said: "dict[Unit, Figures]") -> None:
        with self._lock:
            # What a worker says of a unit may arrive behind the unit itself.
            under_way = {
                unit: figures
                for unit, figures in said.items()
                if unit[0] == self._phase and unit not in self._over
            }
            if under_way != self._under_way:
                self._under_way = under_way
                self._tell()


def _sum(figures: "list[Figures]") -> "Figures":
    return sum(done for done, _ in figures), sum(tokens for _, tokens in figures)
