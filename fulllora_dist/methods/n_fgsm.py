"""N-FGSM: a step from strong noise, not projected (de Jorge et al., arXiv 2202.01181).

The perturbation may leave the eps ball, up to (noise + step) eps: that is the method, not a slip.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.methods.base import MethodSettings, PerturbedStep, register_method


class NFGSMSettings(MethodSettings):
    name: Literal["n_fgsm"] = "n_fgsm"
    noise: float = Field(2.0, ge=0)
    """Radius of the uniform noise in units of eps."""
    step: float = Field(1.0, gt=0)
    """Step size in units of eps."""


@register_method
class NFGSM(PerturbedStep):
    Settings = NFGSMSettings

    def passes(self) -> tuple[int, int]:
        return 2, 2

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, step: int, ids: Tensor) -> Tensor:
        return single_step(
            model,
            x,
            y,
            eps=threat.eps,
            norm=threat.norm,
            noise=self.settings.noise * threat.eps,
            step_size=self.step_size(self.settings.step * threat.eps, step),
            project=False,
            seed=self.seed,
            step=step,
            ids=ids,
            purpose="train/n_fgsm",
        )
