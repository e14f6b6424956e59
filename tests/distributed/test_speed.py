"""What a run says of its speed: model FLOP utilisation, against the operations of its steps, and the workers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import _config, _start

from fulllora_dist.distributed.comm import Comm
from fulllora_dist.models.flops import OperationFlops, peak_flops
from fulllora_dist.training import speed
from fulllora_dist.training.speed import worker_advice
from tests.ranks import RankServer

PEAK = 1e9


def _flops(comm: Comm, settings: dict) -> list[int]:
    """Of the operations of each batch on this rank."""
    if comm.is_main:
        speed.peak_flops = lambda *_: PEAK  # type: ignore[assignment]
    _, trainer = _start(comm, settings)
    original, found = trainer.phases.step, []

    def step(*args: Any) -> Any:
        with OperationFlops() as operations:
            metrics = original(*args)
        found.append(operations.flops)
        return metrics

    object.__setattr__(trainer.phases, "step", step)
    trainer.train()
    return found


@pytest.mark.parametrize(("method", "stage"), [("phases", 2), ("trades", 3)])
def test_utilisation_is_that_of_the_operations(
    server: RankServer, shards: str, tmp_path: Path, method: str, stage: int
) -> None:
    settings = [("distributed", "activation_checkpointing", "off")]
    counted, other = server.run(2, _flops, _config(tmp_path / "run", shards, method, stage, settings))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["speed/mfu"] * line["speed/step_seconds"] * PEAK for line in lines]
    assert counted == other
    assert found == pytest.approx(counted, rel=0.03)  # a weight step alone needs no gradient of the pixels


def _flops_after_a_rollback(comm: Comm, settings: dict) -> tuple[float, float]:
    """Of a batch before, and of one after."""
    speed.peak_flops = lambda *_: PEAK  # type: ignore[assignment]
    _, trainer = _start(comm, settings)
    (phase,), found = trainer.phases.phases, []
    for method in (phase.method, phase.after_rollback):
        trainer._speed.end_batch(replace(phase, method=method))
        found.append(trainer._speed.take()["mfu"] * PEAK)
    return found[0], found[1]


def test_the_method_after_a_rollback_has_a_cost_too(server: RankServer, shards: str, tmp_path: Path) -> None:
    """Free's passes give gradients of pixels and weights at once, PGD's do not."""
    config = _config(tmp_path / "run", shards, "free", 0, [("data", "held_out", shards)])
    config["guard"] = {"on_collapse": "rollback"}
    ((before, after),) = server.run(1, _flops_after_a_rollback, config)
    assert before > 0
    assert after > 0


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
        ("NVIDIA A10G", None, None),
        ("cpu", None, None),
    ],
)
def test_peak_of_a_device(name: str, bf16: float | None, fp32: float | None) -> None:
    assert (peak_flops(name, "bf16"), peak_flops(name, "fp32")) == (bf16, fp32)


def test_peak_in_fp32_is_not_known_with_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops("NVIDIA H200", "fp32") is None
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("workers", "share_data", "advice"),
    [
        (12, 0.0, ["data.num_workers=12: 1 would keep up (2.0 ms of CPU an image, 128 images a rank every 1.2 s"]),
        (2, 0.0, []),  # not worth a line
        (1, 0.02, []),
        (1, 0.9, ["warning: data.num_workers=1: 4 would keep up (2.0 ms of CPU an image"]),
        (4, 0.9, []),  # as many as decoding takes: it waits for the store
    ],
)
def test_advised_workers(workers: int, share_data: float, advice: list[str]) -> None:
    """128 images of 2 ms are 0.256 s of one core, and half as much again is to spare."""
    found = worker_advice(workers, 0.002, 128, {"step_seconds": 1.2, "share_data": share_data})
    assert len(found) == len(advice)
    assert all(line.startswith(start) for line, start in zip(found, advice, strict=True))
