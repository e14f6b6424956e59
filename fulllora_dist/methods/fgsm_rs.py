"""Fast adversarial training: FGSM from a random start (Wong et al., arXiv 2001.03994)."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.methods.base import MethodSettings, PerturbedStep, register_method


class FGSMRSSettings(MethodSettings):
    name: Literal["fgsm_rs"] = "fgsm_rs"
    step: float = Field(1.25, gt=0)
    """Step size in units of eps. The paper's 1.25 was tuned on CIFAR-10; larger ones collapse more easily."""


@register_method
class FGSMRS(PerturbedStep):
    Settings = FGSMRSSettings

    def passes(self) -> tuple[int, int]:
        return 2, 2

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, step: int, ids: Tensor) -> Tensor:
        return single_step(
            model,
            x,
            y,
            eps=threat.eps,
            norm=threat.norm,
            noise=threat.eps,
            step_size=self.step_size(self.settings.step * threat.eps, step),
            project=True,
            seed=self.seed,
            step=step,
            ids=ids,
            purpose="train/fgsm_rs",
        )
