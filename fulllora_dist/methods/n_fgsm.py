"""N-FGSM: a single step from strong noise, without projection (de Jorge et al., arXiv 2202.01181).

By design the perturbation may leave the eps ball, up to (noise + step) eps.
"""

from typing import Literal

from pydantic import Field

from fulllora_dist.methods.base import register_method
from fulllora_dist.methods.single_step import SingleStep, SingleStepSettings


class NFGSMSettings(SingleStepSettings):
    name: Literal["n_fgsm"] = "n_fgsm"
    noise: float = Field(2.0, ge=0)
    """Radius of the uniform noise in units of eps."""


@register_method
class NFGSM(SingleStep):
    Settings = NFGSMSettings
    project = False

    def noise(self) -> float:
        return self.settings.noise
