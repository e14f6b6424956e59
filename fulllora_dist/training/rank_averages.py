"""Metrics averaged over the ranks, and which rank is slow: in one collective of a batch that is logged."""

import torch
from torch import Tensor

from fulllora_dist.distributed.comm import hosts
from fulllora_dist.training.context import RunContext
from fulllora_dist.training.speed import Speed

OWN = ("data", "attack", "weight_step")
"""Parts of a batch in which a rank does its own work."""
_TIMES, _SECONDS = 2.0, 0.2
"""A rank is slow if its own work takes so much longer than the median's."""


class RankAverages:
    """Averages the metrics of the ranks, and warns about a slow rank once, until another one is."""

    def __init__(self, run: RunContext, speed: Speed):
        self._run, self._speed = run, speed
        self._first = True
        self._slow: list[int] = []

    def of(self, metrics: dict[str, Tensor]) -> tuple[dict[str, float], dict[str, float]]:
        """The averages of `metrics` (scalars), and the speed of this rank, see `Speed.take`. A collective."""
        comm = self._run.comm
        values = torch.stack([value.double() for value in metrics.values()]).cpu()  # waits for the device, for `take`
        speed = self._speed.take()
        seconds = torch.zeros(comm.world, len(OWN), dtype=torch.float64)
        seconds[comm.rank] = torch.tensor([self._speed.timer.seconds[part] for part in OWN])
        total, seconds = comm.sum(torch.cat([values, seconds.flatten()])).split([len(values), seconds.numel()])
        self._note_slow(seconds.view(comm.world, len(OWN)))
        return dict(zip(metrics, (total / comm.world).tolist(), strict=True)), speed

    def _note_slow(self, seconds: Tensor) -> None:
        """Warn about ranks that are slow.

        Args:
            seconds: fp64 [ranks, parts], of a batch.
        """
        if self._first:  # includes what happens once, such as compiling
            self._first = False
            return
        own = seconds.sum(1)
        median = own.median()
        slow = ((own > _TIMES * median) & (own > median + _SECONDS)).nonzero().flatten().tolist()
        if slow and slow != self._slow:
            worst = int(own.argmax())
            part = OWN[int((seconds[worst] - seconds.median(0).values).argmax())]
            self._run.say(
                f"warning: rank {worst} ({hosts()[worst]}) is slow: a batch takes {own[worst]:.2g} s there, on the "
                f"median rank {median:.2g} s, because of its {part}; all ranks wait for it"
            )
        self._slow = slow
