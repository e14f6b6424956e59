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

    def within(self, x: Tensor, moved: Tensor) -> Tensor:
        """`moved` brought back into the ball around `x`, and its pixels to [0, 1]."""
        return in_box(x + self.project(moved - x))

    def ascend(self, x: Tensor, x_adv: Tensor, gradient: Tensor, size: float) -> Tensor:
        """`x_adv` after a step of this length, in the ball around `x` and in [0, 1]."""
        return self.within(x, self.step(x_adv, gradient, size))

    def step(self, x_adv: Tensor, gradient: Tensor, size: float) -> Tensor:
        """`x_adv` after a step of this length, wherever that leads."""
        return x_adv + size * self.steepest(gradient)

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


class L1(Threat):
    """sum of |delta| over all pixels and channels of an image <= eps."""

    norm = "l1"

    def project(self, delta: Tensor) -> Tensor:
        return self._nearest(delta, delta.abs())

    def within(self, x: Tensor, moved: Tensor) -> Tensor:
        """The nearest image that is in the ball and in [0, 1]. Clamping after the projection, as for the other norms,
        leaves length unused: Croce and Hein, "Mind the box" (arXiv 2103.01208)."""
        delta = moved - x
        return in_box(x + self._nearest(delta, torch.where(delta > 0, 1 - x, x)))

    def _nearest(self, delta: Tensor, room: Tensor) -> Tensor:
        """The perturbation nearest to `delta` with |z| <= `room` in each pixel and a sum of eps at most.

        It is sign(delta) clamp(|delta| - t, 0, room), with the smallest t >= 0 that the sum allows (arXiv 2103.01208,
        prop. 2.1). The sum falls with t, linearly between the points where a pixel leaves its room or becomes zero;
        after sorting these, the piece in which it passes eps gives t.
        """
        size, limit = delta.abs().flatten(1).double(), room.flatten(1).double()  # fp32 sums of 300,000 are too rough
        leaves = (size - limit).clamp_min(0)
        kinks, order = torch.cat([leaves, size], dim=1).sort(dim=1)
        slopes = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1).gather(1, order).cumsum(dim=1)
        steps = torch.diff(kinks, dim=1, prepend=torch.zeros_like(kinks[:, :1]))
        before = torch.nn.functional.pad(slopes, (1, -1))  # how many pixels shrink before each point
        over = torch.minimum(size, limit).sum(dim=1, keepdim=True) - self.eps
        lost = (before * steps).cumsum(dim=1)
        piece = (lost < over).sum(dim=1, keepdim=True).clamp_max(kinks.shape[1] - 1)
        missing = (lost - over).gather(1, piece).clamp_min(0)
        t = kinks.gather(1, piece) - missing / before.gather(1, piece).clamp_min(1)
        t = torch.where(over > 1e-12 * self.eps, t.clamp_min(0), 0)  # what was projected before stays as it is
        nearest = torch.minimum((size - t).clamp_min(0), limit)
        nearest *= (self.eps / nearest.sum(dim=1, keepdim=True).clamp_min(1e-300)).clamp_max(1)  # exact up to rounding
        return delta.sign() * nearest.view_as(delta).to(delta.dtype)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Equal shares for the largest 1 % of the gradient: SLIDE (Tramèr and Boneh, arXiv 1904.13000, sec. 4.2), as
        the steepest direction proper moves one value alone."""
        flat = gradient.nan_to_num().flatten(1)
        count = max(1, round(SLIDE_SHARE * flat.shape[1]))
        largest = flat.abs().topk(count, dim=1).indices
        chosen = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign())
        return (chosen / chosen.abs().sum(dim=1, keepdim=True).clamp_min(1)).view_as(gradient)

    def step(self, x_adv: Tensor, gradient: Tensor, size: float) -> Tensor:
        """Values that cannot go further are passed over."""
        blocked = torch.where(gradient > 0, x_adv >= 1, x_adv <= 0)
        return super().step(x_adv, gradient.masked_fill(blocked, 0), size)

    def random_start(self, rng: SampleRng, like: Tensor, radius: float | None = None) -> Tensor:
        """Exponential variables over their sum and one more, with random signs: uniform in the ball."""
        radius, count = self.eps if radius is None else radius, like[0].numel()
        sizes = -torch.log1p(-rng.uniform((count + 1,)))
        signs = 2.0 * (rng.uniform((count,)) < 0.5) - 1
        shares = signs * sizes[:, :count] / sizes.sum(dim=1, keepdim=True)
        return (radius * shares).view(-1, *like.shape[1:]).to(like.dtype)


SLIDE_SHARE = 0.01
THREATS: dict[str, type[Threat]] = {"linf": Linf, "l2": L2, "l1": L1}


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
