"""Fast adversarial training: FGSM from a random start (Wong et al., arXiv 2001.03994)."""

from typing import Literal

from pydantic import Field

from fulllora_dist.methods.base import register_method
from fulllora_dist.methods.single_step import SingleStep, SingleStepSettings


class FGSMRSSettings(SingleStepSettings):
    name: Literal["fgsm_rs"] = "fgsm_rs"
    step: float = Field(1.25, gt=0)
    """Step size in units of eps. The paper's 1.25 was tuned on CIFAR-10; larger steps collapse more easily."""


@register_method
class FGSMRS(SingleStep):
    Settings = FGSMRSSettings
    project = True

    def noise(self) -> float:
        return 1.0
