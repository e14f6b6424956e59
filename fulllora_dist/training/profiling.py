"""A trace of a few training steps, for `train.py --profile N`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fulllora_dist.data.batch import Batch
from fulllora_dist.training.context import RunContext

WARM = 3  # batches before those that are recorded: they allocate, compile and choose kernels


def profiled(batches: Iterator[Batch], steps: int, run: RunContext) -> Iterator[Batch]:
    """The batches; on rank 0 `steps` of them, after `WARM`, are recorded in `run.output_dir`/profile: what the host and
    the GPU did as trace.json.gz, for https://ui.perfetto.dev, and on CUDA the memory as memory.pickle, for
    https://pytorch.org/memory_viz."""
    if not (steps and run.comm.is_main):
        yield from batches
        return
    cuda = run.comm.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    folder = os.path.join(run.config.run.output_dir, "profile")

    def write(profiler: profile) -> None:
        os.makedirs(folder, exist_ok=True)
        profiler.export_chrome_trace(os.path.join(folder, "trace.json.gz"))
        run.say(f"wrote a trace of {profiler.step_num - WARM} batches to {folder}")

    rounds = schedule(wait=0, warmup=WARM, active=steps, repeat=1)
    with (
        _memory_history(os.path.join(folder, "memory.pickle") if cuda else None, run.comm.device),
        profile(activities=activities, schedule=rounds, on_trace_ready=write) as profiler,
    ):
        for _, batch in zip(range(WARM + steps), batches, strict=False):
            yield batch
            profiler.step()
    yield from batches


@contextmanager
def _memory_history(file: str | None, device: torch.device) -> Iterator[None]:
    """Write the allocations made within to `file`, if there is one."""
    if file is None:
        yield
        return
    torch.cuda.memory._record_memory_history(device=device)
    try:
        yield
        os.makedirs(os.path.dirname(file), exist_ok=True)
        torch.cuda.memory._dump_snapshot(file)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None, device=device)
