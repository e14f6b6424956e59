"""Settings of a run's folders and checkpoints."""

from pydantic import Field, field_validator

from fulllora_dist.core.settings import Settings


class RunSettings(Settings):
    output_dir: str
    """Folder of the run: checkpoints, adapter, evaluation, metrics. A run found there is resumed."""
    checkpoint_dir: str | None = None
    """Where checkpoints lie instead: a folder or bucket (s3://, gs://). While a bucket fails, they go to output_dir."""
    seed: int = 0
    """Of everything random."""
    checkpoint_every: int = Field(500, ge=1)
    """Batches between checkpoints."""
    checkpoint_minutes: float | None = Field(10.0, gt=0)
    """And minutes; null goes by batches alone."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints are kept."""
    max_nonfinite_steps: int = Field(10, ge=0)
    """Updates in a row that may be skipped, on all ranks together, as the loss or its gradient is not finite."""
    resume_from: str | None = None
    """Folder or URL of a checkpoint to start from where the run has none yet."""
    log_every: int = Field(10, ge=1)
    """Batches between logged metrics."""

    @field_validator("output_dir")
    @classmethod
    def _on_a_disk(cls, output: str) -> str:
        if "://" in output:
            raise ValueError("must be a folder on a disk; run.checkpoint_dir may be a bucket")
        return output
