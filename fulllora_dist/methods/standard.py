"""Training on clean images."""

from typing import Literal

from torch import Tensor, nn

from fulllora_dist.attacks.threat import Threat
from fulllora_dist.methods.base import MethodSettings, PerturbedStep, register_method


class StandardSettings(MethodSettings):
    name: Literal["standard"] = "standard"


@register_method
class Standard(PerturbedStep):
    Settings = StandardSettings

    def passes(self) -> tuple[int, int]:
        return 1, 1

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, step: int, ids: Tensor) -> Tensor:
        return x
