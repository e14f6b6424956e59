"""Mixup, CutMix and label smoothing, applied before the attack.

An image is mixed with its neighbour in the global batch: slots 2i and 2i + 1 are partners. The order of an epoch is
random, so the partner is a random other image. As ranks and micro-batches have an even number of slots, partners are
always on the same rank. The mixing ratio and position are drawn for each image from (seed, step, id).
"""

import numpy as np
import torch
from scipy.stats import beta
from torch import Tensor

from fulllora_dist.attacks.arguments import check_labels
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import sample_rng
from fulllora_dist.data.batch import Batch
from fulllora_dist.methods.settings import TargetSettings

_QUANTILES = 4097


def _quantiles(alpha: float) -> Tensor:
    """Beta(alpha, alpha)'s quantile function on an even grid of [0, 1], float64 [_QUANTILES]."""
    return torch.from_numpy(beta(alpha, alpha).ppf(np.linspace(0, 1, _QUANTILES)))


def _look_up(quantiles: Tensor, u: Tensor) -> Tensor:
    """The quantile function at u in [0, 1), interpolated linearly."""
    place = u.double() * (_QUANTILES - 1)
    below = place.long()
    return torch.lerp(quantiles[below], quantiles[below + 1], place - below)


def partners(count: int, device: torch.device) -> Tensor:
    """int64 [count]: position of each sample's partner; `count` and the first slot must be even.

    Raises:
        UserError: an odd number of samples, as in the last batch of a loader of one's own.
    """
    if count % 2:
        raise UserError(
            f"targets: mixing needs an even number of images, got {count}; set drop_last=True in the loader"
        )
    return torch.arange(count, device=device) ^ 1


class Mixer:
    """Creates the images and targets of a training step.

    Args:
        settings: kind and strength of mixing.
        seed: seed of the run.
    """

    def __init__(self, settings: TargetSettings, seed: int):
        self.settings = settings
        self._seed = seed
        self._quantiles = {
            name: _quantiles(alpha) for name, alpha in (("mixup", settings.mixup), ("cutmix", settings.cutmix)) if alpha
        }

    def __call__(self, batch: Batch, step: int, classes: int) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] in [0, 1], and labels int64 [B] or, with mixing, probabilities [B, classes].

        Args:
            batch: with mixing, B and the first slot must be even.
            step: number of the batch in the run.
            classes: number of the model's outputs.

        Raises:
            UserError: mixing, and the number of outputs is not known, or a label has none.
        """
        x, y = batch.pixels(), batch.labels
        if not self.settings.mixes:
            return x, y
        if classes < 1:
            raise UserError("targets: mixing needs the number of the model's outputs; set model.num_classes")
        check_labels(batch.logits_needed, classes)
        self._quantiles = {name: table.to(x.device) for name, table in self._quantiles.items()}  # copies only once
        other = partners(len(batch), x.device)
        u = sample_rng(self._seed, "train/mix", step, batch.ids).uniform((5,)).unbind(1)
        mixed = u[0] < self.settings.mix_probability
        both = len(self._quantiles) == 2
        cut = u[1] < 0.5 if both else torch.full_like(mixed, "cutmix" in self._quantiles)
        own = torch.ones_like(u[2], dtype=torch.float64)  # weight of the image's own label
        result = x
        if "mixup" in self._quantiles:
            share = torch.where(mixed & ~cut, _look_up(self._quantiles["mixup"], u[2]), own)
            weight = share.to(x.dtype).view(-1, 1, 1, 1)
            result = torch.where(weight == 1, x, weight * x + (1 - weight) * x[other])
            own = share
        if "cutmix" in self._quantiles:
            area = 1 - _look_up(self._quantiles["cutmix"], u[2])
            inside = _rectangle(area, u[3], u[4], x.shape[-2], x.shape[-1]) & (mixed & cut).view(-1, 1, 1)
            result = torch.where(inside[:, None], x[other], result)
            own = own - inside.double().mean(dim=(1, 2))  # the part outside the image does not count
        labels = torch.nn.functional.one_hot(y, classes).double()
        soft = own[:, None] * labels + (1 - own[:, None]) * labels[other]
        return result, soft.to(x.dtype)


def _rectangle(area: Tensor, u: Tensor, v: Tensor, height: int, width: int) -> Tensor:
    """bool [B, height, width]: a rectangle with that fraction of the area, around a uniform centre, cut at the edges.

    Yun et al., arXiv 1905.04899, section 3.1: sides are sqrt(area) of the image's.
    """

    def span(centre: Tensor, side: int) -> Tensor:
        length = (area.sqrt() * side).round().long()
        first = (centre.double() * side).long() - length // 2
        place = torch.arange(side, device=area.device)
        return (place >= first[:, None]) & (place < (first + length)[:, None])

    return span(u, height)[:, :, None] & span(v, width)[:, None, :]
