"""How busy this machine is while a stage runs: what MLflow shows as system metrics.

Sampled here and sent through the run's queue, since MLflow's own monitor waits for its server. It
sees the machine of the driver; what workers elsewhere do is in Ray's dashboard.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_MIB = 1 << 20
SAMPLE_SECONDS = 10.0
logger = logging.getLogger(__name__)


class _Sampler:
    """Totals since the start for what only ever grows, the present value for the rest."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._network, self._disk = psutil.net_io_counters(), psutil.disk_io_counters()
        psutil.cpu_percent()  # the next call tells the mean since this one

    def sample(self) -> dict[str, float]:
        memory = self._psutil.virtual_memory()
        figures = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MIB,
            "system_memory_usage_percentage": memory.percent,
        }
        network, disk = self._psutil.net_io_counters(), self._psutil.disk_io_counters()
        if self._network and network:
            received = network.bytes_recv - self._network.bytes_recv
            sent = network.bytes_sent - self._network.bytes_sent
            figures["network_receive_megabytes"] = received / _MIB
            figures["network_transmit_megabytes"] = sent / _MIB
        if self._disk and disk:
            figures["disk_read_megabytes"] = (disk.read_bytes - self._disk.read_bytes) / _MIB
            figures["disk_write_megabytes"] = (disk.write_bytes - self._disk.write_bytes) / _MIB
        return {f"system/{name}": round(value, 2) for name, value in figures.items()}


@contextmanager
def sampled(
    send: Callable[[Mapping[str, float], int], None],
) -> Iterator[None]:
    """Call `send(metrics, number of the sample)` every `SAMPLE_SECONDS` while the block runs.

    Whatever goes wrong here is said once, and stops the sampling alone.
    """
    stopped = threading.Event()

    def run() -> None:
        try:
            sampler = _Sampler()
            number = 0
            while not stopped.wait(SAMPLE_SECONDS):
                send(sampler.sample(), number)
                number += 1
        except Exception as error:
            logger.warning("no more system metrics: %r", error)

    thread = threading.Thread(target=run, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
