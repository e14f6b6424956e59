"""What grows over the first batches of a run."""

from dataclasses import dataclass


def ramp(step: int, length: int) -> float:
    """Linear in the batch: 1 / (length + 1) at batch 0, 1 from batch `length` on."""
    return 1.0 if step >= length else (step + 1) / (length + 1)


@dataclass(frozen=True)
class Ramps:
    """Lengths in batches.

    Attributes:
        eps: over which the size of the threat model grows to the full one.
        step_size: over which the attack's steps grow to their full size.
        run: of the whole run, which methods take shares of.
    """

    eps: int = 0
    step_size: int = 0
    run: int = 0
