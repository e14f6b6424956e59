"""PGD adversarial training (Madry et al., arXiv 1706.06083)."""

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from fulllora_dist.attacks.pgd import pgd
from fulllora_dist.attacks.threat import Linf
from fulllora_dist.methods.base import MethodSettings, PerturbedStep
from fulllora_dist.pixels import Pixels


class PGDSettings(MethodSettings):
    name: Literal["pgd"] = "pgd"
    steps: int = Field(3, ge=1)
    """Attack steps: each is one forward and one backward pass."""
    step_size: Pixels | None = None
    """In pixels; null takes 2.5 eps / steps, as Madry et al. do, but at most eps."""
    random_start: bool = True
    """Start uniformly in the ball instead of at the picture."""


class PGD(PerturbedStep):
    Settings = PGDSettings

    def passes(self) -> tuple[int, int]:
        return self.settings.steps + 1, self.settings.steps + 1

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, threat: Linf, step: int, ids: Tensor) -> Tensor:
        step_size = self.settings.step_size
        if step_size is None:
            step_size = min(2.5 * threat.eps / self.settings.steps, threat.eps)
        return pgd(
            model,
            x,
            y,
            eps=threat.eps,
            steps=self.settings.steps,
            step_size=step_size,
            random_start=self.settings.random_start,
            seed=self.seed,
            step=step,
            ids=ids,
            purpose="train/pgd",
        )
