"""Settings of the threat model."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from fulllora_dist.core.settings import Settings
from fulllora_dist.core.units import Size, check_pixel_range

Norm = Literal["linf", "l2"]


class ThreatSettings(Settings):
    norm: Norm = "linf"
    """Norm of the perturbation: linf (of each pixel and channel) or l2 (of the whole image)."""
    eps: Size
    """Its size in pixels of [0, 1]: 4/255 or a number."""
    eps_warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the batches over which the eps of training rises linearly from 0 to its full size."""
    step_size_warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Share of the batches over which the attack's step size rises linearly from 0 to its full size."""

    @field_validator("eps")
    @classmethod
    def _in_range(cls, eps: float, info: ValidationInfo) -> float:
        return check_pixel_range(eps) if info.data.get("norm") == "linf" else eps
