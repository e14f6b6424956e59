"""Threat models: sets of allowed perturbations, for pixels in [0, 1]."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fulllora_dist.attacks.settings import Norm
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import SampleRng


@dataclass(frozen=True)
class Threat(ABC):
    """A ball of perturbations around each image. All tensors are [B, C, H, W]; samples are independent.

    Attributes:
        norm: name of the norm in the settings.
        eps: radius, for pixels in [0, 1].
    """

    norm: ClassVar[Norm]
    eps: float

    def __post_init__(self) -> None:
        if not 0 <= self.eps < float("inf"):
            raise UserError(f"eps must be >= 0 and finite, got {self.eps:g}")

    def scaled(self, factor: float) -> Self:
        """The ball with `factor` times the radius."""
        return replace(self, eps=self.eps * factor)

    @abstractmethod
    def project(self, delta: Tensor) -> Tensor:
        """The nearest perturbation in the ball. Clamping the image to [0, 1] afterwards does not leave the ball."""

    @abstractmethod
    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of unit norm in which the loss rises fastest; zero where the gradient is zero or NaN."""

    @abstractmethod
    def random_start(self, rng: SampleRng, like: Tensor, radius: float | None = None) -> Tensor:
        """A uniform sample in the ball of `radius` (default: eps), with the shape and dtype of `like`."""


class Linf(Threat):
    """|delta| <= eps in every pixel and channel.

    Raises:
        UserError: eps is not in [0, 1].
    """

    norm = "linf"

    def __post_init__(self) -> None:
        if not 0 <= self.eps <= 1:
            raise UserError(f"eps: {self.eps:g} is outside [0, 1], the range of a pixel; write grey levels as k/255")

    def project(self, delta: Tensor) -> Tensor:
        return delta.clamp(-self.eps, self.eps)

    def steepest(self, gradient: Tensor) -> Tensor:
        return gradient.sign()  # that of NaN is 0

    def random_start(self, rng: SampleRng, like: Tensor, radius: float | None = None) -> Tensor:
        radius = self.eps if radius is None else radius
        return ((2 * rng.uniform(like.shape[1:]) - 1) * radius).to(like.dtype)


class L2(Threat):
    """sqrt(sum of delta^2 over all pixels and channels of an image) <= eps."""

    norm = "l2"

    def project(self, delta: Tensor) -> Tensor:
        # the factor is exactly 1 inside the ball, so that projecting twice changes nothing
        return delta * (self.eps / _norms(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max(1)

    def steepest(self, gradient: Tensor) -> Tensor:
        # scale by the largest entry first: the squares of a fp32 gradient of 1e-25 would underflow
        tiny, gradient = torch.finfo(gradient.dtype).tiny, gradient.nan_to_num()
        gradient = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(tiny)
        return gradient / _norms(gradient).clamp_min(tiny)

    def random_start(self, rng: SampleRng, like: Tensor, radius: float | None = None) -> Tensor:
        """A Gaussian direction, and a radius of density ~ r^(d - 1): r = eps u^(1 / d) in d dimensions."""
        radius = self.eps if radius is None else radius
        direction = self.steepest(rng.normal(like.shape[1:]).to(like.dtype))
        return direction * (radius * rng.uniform((1, 1, 1)).to(like.dtype) ** (1 / like[0].numel()))


THREATS: dict[str, type[Threat]] = {"linf": Linf, "l2": L2}


def threat_model(norm: str, eps: float) -> Threat:
    """The threat model with the given norm and radius.

    Raises:
        UserError: an unknown norm, or an invalid radius.
    """
    if not isinstance(norm, str) or norm not in THREATS:
        raise UserError(f"norm: {norm!r} is unknown; known: {', '.join(THREATS)}")
    return THREATS[norm](eps)


def in_box(pixels: Tensor) -> Tensor:
    """Clamp pixels to [0, 1]. Only used outside autograd graphs, as a clamp would zero gradients."""
    return torch.clamp(pixels, 0, 1)


def _norms(pixels: Tensor) -> Tensor:
    """Euclidean length of each sample, [B, 1, 1, 1]."""
    return pixels.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
