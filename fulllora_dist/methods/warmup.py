"""Linear warm-up of eps and step size over the first batches of a run."""

from dataclasses import dataclass


def ramp(step: float, length: int) -> float:
    """The linear warm-up factor: 1 / (length + 1) at batch 0, 1 from batch `length` on."""
    return 1.0 if step >= length else (step + 1) / (length + 1)


@dataclass(frozen=True)
class WarmupSchedule:
    """Warm-up lengths in batches of the run as planned.

    Attributes:
        eps: batches over which eps grows to its full size.
        step_size: batches over which the attack's step size grows to its full size.
        run: batches of the whole run.
        since, planned, rate: batch `since` of the run corresponds to the planned batch `planned`, and each later one
            counts as `rate` batches; used after a rollback from a method with several updates per batch.
    """

    eps: int = 0
    step_size: int = 0
    run: int = 0
    since: int = 0
    planned: float = 0.0
    rate: float = 1.0

    def at(self, step: int) -> float:
        """The planned batch with as many updates before it as there are before batch `step`."""
        return self.planned + (step - self.since) * self.rate
