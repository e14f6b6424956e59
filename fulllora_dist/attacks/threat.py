"""Threat models: what a perturbation may be, in pixel units of [0, 1]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fulllora_dist.errors import UserError
from fulllora_dist.rng import SampleRng


@dataclass(frozen=True)
class Linf:
    """|delta| <= eps in every pixel and channel.

    Raises:
        UserError: eps is not in [0, 1].
    """

    eps: float

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise UserError(f"eps: {self.eps:g} is outside [0, 1], the range of a pixel; write grey levels as k/255")

    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbation in the ball."""
        return delta.clamp(-self.eps, self.eps)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of unit size in which the loss rises fastest."""
        return gradient.sign()

    def random_start(self, rng: SampleRng, like: Tensor, radius: float | None = None) -> Tensor:
        """Uniform in the ball of `radius` (eps unless given), of the shape and dtype of `like`."""
        radius = self.eps if radius is None else radius
        return ((2 * rng.uniform(like.shape[1:]) - 1) * radius).to(like.dtype)


def in_box(pixels: Tensor) -> Tensor:
    """The nearest picture: pixels in [0, 1]. Used outside of graphs, where a clamp would zero gradients."""
    return torch.clamp(pixels, 0, 1)
