"""How fast a run is, as it logs it under `speed/`, and whether its data workers keep up."""

import math

import torch

from fulllora_dist.data.loader import TrainStream
from fulllora_dist.methods.base import Method
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.flops import pass_cost, peak_flops
from fulllora_dist.training.context import RunContext
from fulllora_dist.training.phases import Phase, Phases
from fulllora_dist.training.step_timer import StepTimer

_ADVICE_AT = 2  # the log after which workers are judged: the first one has the start in it
_SPARE = 1.5  # workers beyond those that are busy all the time: images differ, and stores stall


class Speed:
    """Measures the batches between two logs.

    Args:
        model: before the engine partitions its tensors, and without activation checkpointing.

    Attributes:
        timer: of the parts of a batch.
    """

    def __init__(self, run: RunContext, model: AdaptedModel, stream: TrainStream, phases: Phases):
        self.timer = StepTimer(run.comm.device, run.watchdog.enter)
        self._run, self._stream = run, stream
        self._batch_size = run.config.optim.batch_size
        self._own_size = model.info.image_size
        self._peak = peak_flops(device_name(run.comm.device), model.precision) if run.comm.is_main else None
        kinds = {
            self._kind(phase.image_size, method)
            for phase in phases.phases
            for method in (phase.method, phase.after_rollback)
            if self._peak
        }
        self._costs = {
            (size, pixels): (pass_cost(model, size, attack=True), pass_cost(model, size, pixels=pixels))
            for size, pixels in kinds
        }
        self._flops, self._batches, self._logs = 0, 0, 0

    def end_batch(self, phase: Phase) -> None:
        """A batch of `phase` is done; what follows is checks, logging and checkpoints."""
        self.timer.end_batch()
        self._batches += 1
        if self._costs:
            images = self._batch_size // self._run.comm.world
            self._flops += images * phase.method.flops(*self._costs[self._kind(phase.image_size, phase.method)])

    def take(self) -> dict[str, float]:
        """Metrics of the batches since the last call on this rank: those of `StepTimer.take`; `mfu`, the share of the
        device's peak that the FLOPs of attack and weight step make, what is recomputed not counted, where that peak is
        known; `decode_ms`, the CPU time of a worker for an image."""
        metrics = self.timer.take(self._batch_size)
        seconds = metrics["step_seconds"] * max(1, self._batches)
        if self._peak:
            metrics["mfu"] = self._flops / seconds / self._peak
        self._flops, self._batches, self._logs = 0, 0, self._logs + 1
        decode = self._stream.take_decode_seconds()
        if decode is not None:
            metrics["decode_ms"] = 1000 * decode
            if self._logs == _ADVICE_AT:
                images = self._batch_size // self._run.comm.world
                for line in worker_advice(self._run.config.data.num_workers, decode, images, metrics):
                    self._run.say(line)
        return metrics

    def _kind(self, image_size: int | None, method: Method) -> tuple[int, bool]:
        """What the passes of a phase cost depends on."""
        return image_size or self._own_size, method.moves_pixels


def device_name(device: torch.device) -> str:
    """Of a GPU as its driver names it; of any other device its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def worker_advice(workers: int, decode: float, images: int, speed: dict[str, float]) -> list[str]:
    """A line if so many workers a rank are too few, or more than twice as many as keep up.

    Args:
        decode: CPU seconds of a worker for an image.
        images: of a batch on this rank.
        speed: `StepTimer.take`.
    """
    waiting = speed["share_data"]
    working = speed["step_seconds"] * (1 - waiting)
    needed = max(1, math.ceil(_SPARE * decode * images / working))
    found = (
        f"{1000 * decode:.1f} ms of CPU an image, {images} images a rank every {working:.3g} s without waiting for data"
    )
    if workers > 2 * needed:
        return [f"data.num_workers={workers}: {needed} would keep up ({found})"]
    if workers < needed and waiting > 0.05:
        return [f"warning: data.num_workers={workers}: {needed} would keep up ({found}); {waiting:.0%} was waiting"]
    return []
