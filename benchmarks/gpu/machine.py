"""The device: what it is, what it can do at most, and its clock."""

import gc
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

# Dense bf16 operations per second and bytes per second of memory, as a card's maker states them, by
# whole words of its name; the first that fits counts.
PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2.25e15, 8.0e12),
    "H200": (9.89e14, 4.8e12),
    "GH200": (9.89e14, 4.0e12),
    "H100 PCIe": (7.56e14, 2.0e12),
    "H100 NVL": (8.35e14, 3.9e12),
    "H100": (9.89e14, 3.35e12),
    "A100-SXM4-80GB": (3.12e14, 2.04e12),
    "A100 80GB PCIe": (3.12e14, 1.94e12),
    "A100": (3.12e14, 1.56e12),
    "L40S": (3.62e14, 8.64e11),
    "L4": (1.21e14, 3.0e11),
    "A10": (1.25e14, 6.0e11),
    "RTX 4090": (1.65e14, 1.01e12),
}


@dataclass(frozen=True)
class Machine:
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def name(self) -> str:
        if self.is_cuda:
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"

    @cached_property
    def stated(self) -> tuple[float, float] | None:
        """What `PEAKS` says of the card; None where it does not know it."""
        fits = (peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", self.name))
        return next(fits, None)

    @cached_property
    def peaks(self) -> tuple[float, float]:
        """Operations and bytes per second: as stated, else as measured."""
        return self.stated or (self.measured_operations(), self.measured_bytes())

    def measured_operations(self) -> float:
        """Of one large product of bf16 matrices (float32 on a CPU)."""
        size, dtype = (8192, torch.bfloat16) if self.is_cuda else (256, torch.float32)
        a = torch.ones(size, size, dtype=dtype, device=self.device)
        return 2.0 * size**3 / self.seconds_of(lambda: a @ a)

    def measured_bytes(self) -> float:
        """Of copying within the memory: read and written."""
        source = torch.ones(2**28 if self.is_cuda else 2**20, device=self.device)
        target = torch.empty_like(source)
        return 2.0 * source.nbytes / self.seconds_of(lambda: target.copy_(source))

    def seconds_of(self, work: Callable[[], Any], *, repeats: int = 5) -> float:
        """Of one call, the median of some, after one that is not counted. On a card the clock is
        the card's own.
        """
        work()
        times = []
        for _ in range(repeats):
            clock = Stopwatch(self)
            work()
            times.append(clock.stop())
        return sorted(times)[repeats // 2]

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give the memory of what went before back, count its peak anew, and forget what was
        compiled: flex attention that was compiled in more than eight ways is not compiled any more.
        """
        if self.is_cuda:
            gc.collect()
            torch.compiler.reset()
            torch.cuda.init()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gigabytes(self) -> float | None:
        return torch.cuda.max_memory_allocated(self.device) / 1e9 if self.is_cuda else None


class Stopwatch:
    """Started when it is made. On a card it is a pair of events, so that neither starting nor
    `mark` waits for the device; `stop` does.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._end: Any = None
        if machine.is_cuda:
            self._start: Any = torch.cuda.Event(enable_timing=True)
            self._start.record()
        else:
            self._start = time.perf_counter()

    def mark(self) -> None:
        """Here it ends."""
        if self._machine.is_cuda:
            self._end = torch.cuda.Event(enable_timing=True)
            self._end.record()
        else:
            self._end = time.perf_counter()

    def stop(self) -> float:
        """Seconds up to `mark`, or up to now."""
        if self._end is None:
            self.mark()
        if not self._machine.is_cuda:
            return float(self._end - self._start)
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1e3
