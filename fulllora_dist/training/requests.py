"""What the ranks ask of each other in every batch: the one host collective of a batch, hidden behind its step."""

from collections.abc import Callable
from typing import NamedTuple

from fulllora_dist.data.loader import TrainStream
from fulllora_dist.training.context import RunContext


class Requests(NamedTuple):
    """The largest of each over the ranks.

    Attributes:
        signal: number of the stop signal that a rank received, as a scheduler may signal a single node only; 0 without
            one.
        checkpoint: whether rank 0 wants a checkpoint after the batch.
        bad_samples: number of bad samples to count.
        system_metrics: number of samples of a node's system metrics to log, if the batch is logged.
    """

    signal: int
    checkpoint: int
    bad_samples: int
    system_metrics: int


def start_requests(run: RunContext, stream: TrainStream, step: int, *, logs: bool) -> Callable[[], Requests]:
    """Start to ask, and return at once; the returned function waits for the answer. A collective.

    Args:
        step: batches trained on after this one.
        logs: whether this batch is logged.
    """
    own = Requests(run.stop.signal or 0, _wants_checkpoint(run, step), stream.uncounted_bad, logs and run.samples())
    largest = run.comm.start_max_each(own)
    return lambda: Requests(*largest())


def _wants_checkpoint(run: RunContext, step: int) -> bool:
    """Whether rank 0 wants to save a checkpoint. It waits until the previous one is written."""
    if not run.comm.is_main:
        return False
    due = run.checkpoints.due(step)
    if run.checkpoints.idle:
        run.settle()
    return due and run.checkpoints.idle
