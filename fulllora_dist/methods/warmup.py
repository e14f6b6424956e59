"""What grows over the first batches of a run."""

from dataclasses import dataclass


def ramp(step: float, length: int) -> float:
    """Linear in the batch: 1 / (length + 1) at batch 0, 1 from batch `length` on."""
    return 1.0 if step >= length else (step + 1) / (length + 1)


@dataclass(frozen=True)
class WarmupSchedule:
    """Lengths in batches, as the run was planned.

    Attributes:
        eps: over which the size of the threat model grows to the full one.
        step_size: over which the attack's steps grow to their full size.
        run: of the whole run, which methods take shares of.
        since, planned, rate: batch `since` of the run stands where `planned` was planned, and each one further for
            `rate` of those: after a rollback from a method that makes several updates of a batch.
    """

    eps: int = 0
    step_size: int = 0
    run: int = 0
    since: int = 0
    planned: float = 0.0
    rate: float = 1.0

    def at(self, step: int) -> float:
        """The planned batch before which as many updates were to be made as before `step`."""
        return self.planned + (step - self.since) * self.rate
