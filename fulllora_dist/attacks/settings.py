"""Settings of the threat model."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from fulllora_dist.core.settings import Settings
from fulllora_dist.core.units import Size, check_pixel_range

Norm = Literal["linf", "l2", "l1"]


class ThreatSettings(Settings):
    norm: Norm = "linf"
    """Norm of the perturbation: linf, l2 or l1 (the latter two over the whole image)."""
    eps: Size
    """Radius of the ball, for pixels in [0, 1]: a number or a fraction such as 4/255."""
    eps_warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Fraction of the batches over which the training eps, and with it the step size, rises linearly from 0."""
    step_size_warmup_ratio: float = Field(0.0, ge=0, lt=1)
    """Fraction of the batches over which the attack's step size rises linearly from 0."""

    @field_validator("eps")
    @classmethod
    def _in_range(cls, eps: float, info: ValidationInfo) -> float:
        return check_pixel_range(eps) if info.data.get("norm") == "linf" else eps
