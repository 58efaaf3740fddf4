"""Machine load as metrics `system/...`, as MLflow's "System metrics" tab expects them.

The numbers come from mlflow's own collectors; only its thread is not used, because that one asks the tracking server at
every sample and gives up at the first failure.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

INTERVAL_S = 10.0


class SystemMetrics:
    """A thread that samples CPU, memory, disk, network and GPUs of this machine."""

    def __init__(self, write: Callable[[dict[str, float], int], None], start_ms: int) -> None:
        """Start sampling.

        Args:
            write: takes `{name: value}` and a step.
            start_ms: start of the run; steps count the intervals since then, also in a resumed run.
        """
        self._write = write
        self._start_ms = start_ms
        self._interval_s = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or INTERVAL_S)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tsp-system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end the thread."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        try:
            monitors = _monitors()
            _sample(monitors)  # The first CPU reading is of no period and always 0.
            last = -1
            while True:
                stopping = self._stop.wait(self._interval_s)
                step = int((time.time() - self._start_ms / 1000) / self._interval_s)
                if step > last:  # The sample at the end may fall into the interval of the one before it.
                    self._write({f"system/{name}": value for name, value in _sample(monitors).items()}, step)
                last = step
                if stopping:
                    return
        except Exception as error:  # noqa: BLE001  A collector of mlflow that fails on this machine must not cost the job.
            log.warning("system metrics are off: %s", error)


def _monitors() -> list[Any]:
    """The collectors of mlflow that work on this machine."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:  # No GPU, or no nvidia-ml-py.
        log.debug("no GPU metrics: %s", error)
    return monitors


def _sample(monitors: list[Any]) -> dict[str, float]:
    """One reading of all collectors."""
    values: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        values.update(monitor.aggregate_metrics())
        monitor.clear_metrics()
    return values
