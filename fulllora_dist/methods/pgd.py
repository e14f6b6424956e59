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

    def __init__(self, settings: PGDSettings, threat: Linf, seed: int):
        self._settings = settings
        self._eps = threat.eps
        self._step_size = settings.step_size
        if self._step_size is None:
            self._step_size = min(2.5 * threat.eps / settings.steps, threat.eps)
        self._seed = seed

    def passes(self) -> tuple[int, int]:
        return self._settings.steps + 1, self._settings.steps + 1

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, step: int, ids: Tensor) -> Tensor:
        return pgd(
            model,
            x,
            y,
            eps=self._eps,
            steps=self._settings.steps,
            step_size=self._step_size,
            random_start=self._settings.random_start,
            seed=self._seed,
            step=step,
            ids=ids,
            purpose="train/pgd",
        )
