"""Settings of the data."""

from typing import Literal

from pydantic import Field, field_validator

from fulllora_dist.core.settings import Area, Location, Settings

RUNNING = (
    "num_workers",
    "max_bad_samples",
    "connections",
    "read_ahead_mb",
    "request_timeout_s",
    "retry_timeout_s",
    "cache_dir",
    "cache_gb",
)
"""Of the settings below those on which no trained adapter depends."""


Augment = Literal["none", "flip", "crop", "randaugment"]
Backend = Literal["fast", "pil"]


class RandAugmentSettings(Settings):
    num_ops: int = Field(2, ge=1)
    """Operations on each image, drawn from the 14 of the paper."""
    magnitude: int = Field(9, ge=0, le=30)
    """Strength of each, 0 to 30; timm's m9, of 10, is 27."""


class DataSettings(Settings):
    train: Location
    """Shards with their index: a folder, a URL (s3://, gs://, https://), or path or URL of an index (.safetensors)."""
    validation: Location | None = None
    """Shards for the final evaluation, named like data.train; null leaves it out."""
    held_out: Location | None = None
    """Shards of images held out of training (make_shards.py --holdout), for the guard; null leaves it out."""
    augment: Augment = "crop"
    """none, horizontal flip, random resized crop and flip, or these and RandAugment; keyed by the sample, the same on
    any ranks."""
    crop_scale: tuple[Area, Area] = (0.25, 1.0)
    """Area of the random crop as a share of the image."""
    randaugment: RandAugmentSettings = RandAugmentSettings()
    """How strong RandAugment is."""
    color_jitter: float = Field(0.0, ge=0, le=1)
    """Brightness, contrast and saturation change by factors uniform in [1 - this, 1 + this]; 0 disables it."""
    random_erasing: float = Field(0.0, ge=0, le=1)
    """Probability that a rectangle of the training image is replaced by noise."""
    decode: Backend = "fast"
    """Of training images: libjpeg-turbo and torch's antialiased resize, or Pillow. Evaluation always uses Pillow."""
    crop_pct: float | None = Field(None, gt=0, le=1)
    """Central share that the evaluation crop keeps; null takes the backbone's."""
    interpolation: Literal["bilinear", "bicubic", "lanczos"] | None = None
    """Of every resize; null takes the backbone's."""
    num_workers: int = Field(2, ge=0)
    """Processes per rank that read and decode; 0 does it in the training process. Where far fewer would keep up, or
    more are needed, the run says so."""
    max_bad_samples: int = Field(10, ge=0)
    """Unreadable training images that others may replace, over the whole run; one more ends it."""
    connections: int = Field(4, ge=1)
    """Byte ranges of remote shards in flight per process."""
    read_ahead_mb: float = Field(64.0, gt=0)
    """10**6 bytes of remote shards that a rank requests early, shared by its workers; a restart reads them again."""
    request_timeout_s: float = Field(60.0, gt=0)
    """Seconds until an unanswered request is retried."""
    retry_timeout_s: float = Field(600.0, gt=0)
    """Seconds of retries until a range that the store does not deliver ends the run."""
    cache_dir: Location | None = None
    """Local folder that keeps what was read of remote shards, for all processes of the machine; null keeps nothing."""
    cache_gb: float = Field(100.0, gt=0)
    """Its largest size, 10**9 bytes; the least recently used go first."""

    @field_validator("crop_scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        least, greatest = scale
        if least > greatest:
            raise ValueError(f"must be [least, greatest] of the area, got [{least}, {greatest}]")
        return scale

    @field_validator("cache_dir")
    @classmethod
    def _on_a_disk(cls, folder: str | None) -> str | None:
        if folder is not None and "://" in folder:
            raise ValueError("must be a folder on a disk, given by its path")
        return folder
