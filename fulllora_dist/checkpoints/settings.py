"""Settings of a run's folders and checkpoints."""

from pydantic import Field, field_validator

from fulllora_dist.core.settings import Location, Settings


class RunSettings(Settings):
    output_dir: Location
    """Output folder: checkpoints, adapter, evaluation, metrics. A run that is found there is resumed."""
    checkpoint_dir: Location | None = None
    """Another folder or bucket (s3://, gs://) for checkpoints; while a bucket fails they go to output_dir."""
    seed: int = 0
    """Random seed."""
    deterministic: bool = False
    """Only kernels that torch calls deterministic: on the same GPUs in the same order the same bits, as far as torch
    and NCCL promise them (docs/cluster.md). Slower; by how much was not measured on a GPU. CPUs need it not."""
    checkpoint_every: int = Field(500, ge=1)
    """Save a checkpoint every so many batches."""
    checkpoint_minutes: float | None = Field(10.0, gt=0)
    """Also save a checkpoint after so many minutes; null disables this."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of recent checkpoints to keep."""
    max_nonfinite_steps: int = Field(10, ge=0)
    """Consecutive updates with a non-finite loss or gradient that are skipped before the run is ended."""
    resume_from: Location | None = None
    """Checkpoint (folder or URL) of a run with the same settings, epochs too, to resume when output_dir holds none."""
    log_every: int = Field(10, ge=1)
    """Log metrics every so many batches."""

    @field_validator("output_dir")
    @classmethod
    def _on_a_disk(cls, output: str) -> str:
        if "://" in output:
            raise ValueError("must be a folder on a disk; run.checkpoint_dir may be a bucket")
        return output
