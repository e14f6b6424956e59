"""Training on clean images."""

from torch import Tensor, nn

from fulllora_dist.attacks.threat import Threat
from fulllora_dist.methods.base import PerturbedStep, register_method
from fulllora_dist.methods.settings import StandardSettings


@register_method
class Standard(PerturbedStep):
    Settings = StandardSettings

    def passes(self) -> tuple[int, int]:
        return 1, 1

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, step: int, ids: Tensor) -> Tensor:
        return x
