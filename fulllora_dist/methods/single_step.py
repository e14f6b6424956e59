"""Single-step attacks during training."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.threat import Threat
from fulllora_dist.methods.base import PerturbedStep


class SingleStep(PerturbedStep):
    """A single step from uniform noise.

    Attributes:
        project: whether the perturbation is projected to the ball.
    """

    project: ClassVar[bool]

    @abstractmethod
    def noise(self) -> float:
        """Radius of the noise in units of eps."""

    def passes(self) -> tuple[int, int]:
        return 2, 2

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, step: int, ids: Tensor) -> Tensor:
        return single_step(
            model,
            x,
            y,
            eps=threat.eps,
            norm=threat.norm,
            noise=self.noise() * threat.eps,
            step_size=self.step_size(self.settings.step * self.threat.eps, step),
            project=self.project,
            seed=self.seed,
            step=step,
            ids=ids,
            purpose=f"train/{self.settings.name}",
        )
