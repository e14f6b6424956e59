"""Samples of machines; those of their GPUs with NVML's answers written down here, as tests have no GPU."""

import time
from types import SimpleNamespace

import pynvml
import pytest

from fulllora_dist.tracking.system import SystemSampler


def test_gpus_are_sampled_as_far_as_they_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(gpu: int) -> SimpleNamespace:
        if gpu == 1:  # a part of one (MIG)
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(gpu=50)

    for name, answer in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(used=3e9, total=4e9),
        "nvmlDeviceGetUtilizationRates": busy,
        "nvmlDeviceGetPowerUsage": lambda gpu: 350_000,
    }.items():
        monkeypatch.setattr(pynvml, name, answer)  # of that name there is one
    sampler = SystemSampler("a", 0.01)
    while not (samples := sampler.take()):
        time.sleep(0.01)
    sampler.stop()
    found = {name.removeprefix("system/a/"): value for name, value in samples[0].items() if "gpu" in name}
    memory = {"memory_usage_megabytes": 3000, "memory_usage_percentage": 75}
    both = {f"gpu_{i}_{name}": value for i in (0, 1) for name, value in memory.items()}
    assert found == both | {"gpu_0_utilization_percentage": 50, "gpu_0_power_usage_watts": 350}
