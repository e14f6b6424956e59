"""Samples of a machine: CPU, memory, disk, network and GPUs, under MLflow's names of these metrics."""

import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any

import psutil

_MB = 1e6
_MAX_SAMPLES = 1000  # not yet taken


class SystemSampler:
    """Samples this machine in a thread.

    Args:
        node: its name.
        seconds: between two samples; CPU use is averaged over them.
    """

    def __init__(self, node: str, seconds: float):
        self._prefix, self._seconds = f"system/{node}/", seconds
        self._samples: deque[dict[str, float]] = deque(maxlen=_MAX_SAMPLES)
        self._ending = threading.Event()
        threading.Thread(target=self._work, name="system", daemon=True).start()

    def __len__(self) -> int:
        """Samples since the last `take`."""
        return len(self._samples)

    def take(self) -> list[dict[str, float]]:
        """The samples since the last call: {"time": ms, name: value}."""
        return [self._samples.popleft() for _ in range(len(self._samples))]

    def stop(self) -> None:
        """Take no more samples."""
        self._ending.set()

    def _work(self) -> None:
        gpus = _Gpus()
        psutil.cpu_percent()  # the first one is since the machine started
        network = psutil.net_io_counters()
        while not self._ending.wait(self._seconds):
            with suppress(OSError, psutil.Error):  # such as a disk that does not answer
                now = psutil.net_io_counters()
                values = {
                    **self._machine(),
                    "network_receive_megabytes": (now.bytes_recv - network.bytes_recv) / _MB,
                    "network_transmit_megabytes": (now.bytes_sent - network.bytes_sent) / _MB,
                    **gpus.sample(),
                }
                named = {self._prefix + name: round(value, 2) for name, value in values.items()}
                self._samples.append({"time": int(time.time() * 1000)} | named)

    def _machine(self) -> dict[str, float]:
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(os.sep)
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MB,
        }


class _Gpus:
    """All NVIDIA GPUs of the machine; none without pynvml (`pip install nvidia-ml-py`)."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        with suppress(Exception):  # no package, no driver, no GPU
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]

    def sample(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for i, handle in enumerate(self._handles):
            with suppress(self._nvml.NVMLError):  # a slice of a GPU (MIG) does not report everything
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                values[f"gpu_{i}_memory_usage_megabytes"] = memory.used / _MB
                values[f"gpu_{i}_memory_usage_percentage"] = 100 * memory.used / memory.total
                values[f"gpu_{i}_utilization_percentage"] = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
                values[f"gpu_{i}_power_usage_watts"] = self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        return values
