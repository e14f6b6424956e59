"""Where the time of a training step goes: waiting for data, attack, weight step, communication."""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable

import torch

PARTS = ("data", "attack", "weight_step", "communication")
_MOST = 10_000  # marks between two logs; later ones are left out, and an event on the GPU is not free


class StepTimer:
    """Times the parts of the batches between two logs.

    On CUDA the times are those of the device, from events that nothing waits for: "data" is then time in which the
    device had no batch to work on. Elsewhere they are those of the wall clock.

    Args:
        device: of the model.
        enter: called with the name of each part that begins.

    Attributes:
        seconds: of a batch before the last `take`, by part.
    """

    def __init__(self, device: torch.device, enter: Callable[[str], None] = lambda part: None):
        self._cuda, self._enter = device.type == "cuda", enter
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._began, self._batches = time.perf_counter(), 0
        self.seconds: dict[str, float] = {}

    def mark(self, part: str) -> None:
        """What follows belongs to `part`, one of `PARTS` or another name, which counts in no share but in the total."""
        self._enter(part)
        if len(self._marks) < _MOST:
            self._marks.append((part, self._now()))

    def end_batch(self) -> None:
        """One more batch is done; what follows is checks, logging and checkpoints."""
        self._batches += 1
        self.mark("other")

    def take(self, batch_size: int) -> dict[str, float]:
        """Metrics of the batches since the last call; call it where the host has just waited for the device.

        Args:
            batch_size: of the global batch.

        Returns:
            `step_seconds` and `images_per_second` by the wall clock, with checks and checkpoints, and `share_<part>` of
            each of `PARTS`, of the time between the first mark and the last. On this rank.
        """
        now, marks = time.perf_counter(), self._marks
        seconds: defaultdict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in itertools.pairwise(marks):
            seconds[part] += self._between(begin, end)
        self.seconds = {part: seconds[part] / max(1, self._batches) for part in PARTS}
        each, total = (now - self._began) / max(1, self._batches), sum(seconds.values())
        self._marks, self._began, self._batches = marks[-1:], now, 0
        metrics = {"step_seconds": each, "images_per_second": batch_size / each}
        return metrics | {f"share_{part}": seconds[part] / total if total else 0.0 for part in PARTS}

    def _now(self) -> "float | torch.cuda.Event":
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        if isinstance(begin, float) or isinstance(end, float):
            return float(end) - float(begin)  # type: ignore[arg-type]
        if not end.query():  # recorded after what the host waited for
            return 0.0
        return begin.elapsed_time(end) / 1000
