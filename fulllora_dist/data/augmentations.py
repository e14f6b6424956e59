"""Augmentation of uint8 [3, H, W] images: torchvision's RandAugment and colour jitter, and random erasing.

All randomness is keyed by the sample; torch's own generator is left as it was.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

_GREY = 128  # where an image is turned or moved out of the frame
_STRENGTHS = 31  # steps of magnitude, as in the paper
_ERASING_TRIES = 10


def rand_augment(image: torch.Tensor, num_ops: int, magnitude: int, rng: np.random.Generator) -> torch.Tensor:
    """`num_ops` of the 14 operations of the paper, drawn uniformly, one after the other, of strength `magnitude` in
    0..30."""
    return _keyed(_rand_augment(num_ops, magnitude), image, rng)


def color_jitter(image: torch.Tensor, strength: float, rng: np.random.Generator) -> torch.Tensor:
    """Brightness, contrast and saturation by factors uniform in [1 - strength, 1 + strength], in random order."""
    return _keyed(_color_jitter(strength), image, rng)


def random_erasing(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Replace a rectangle by uniform noise (RE-R of Zhong et al., arXiv 1708.04896): 2 % to a third of the area, as in
    timm, of log-uniform aspect ratio in [0.3, 1 / 0.3]; unchanged where ten tries do not fit."""
    height, width = image.shape[1:]
    for _ in range(_ERASING_TRIES):
        area = height * width * rng.uniform(0.02, 1 / 3)
        ratio = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            erased = image.clone()
            erased[:, top : top + h, left : left + w] = torch.from_numpy(
                rng.integers(256, size=(3, h, w), dtype=np.uint8)
            )
            return erased
    return image


def _keyed(transform: Callable[..., Any], image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """`transform(image)`, which draws from torch's default generator, with that seeded by `rng` and put back."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int(rng.integers(2**63)))
    try:
        result: torch.Tensor = transform(image)
    finally:
        generator.set_state(before)
    return result


@lru_cache
def _color_jitter(strength: float) -> Any:
    from torchvision.transforms import v2

    return v2.ColorJitter(strength, strength, strength)


@lru_cache
def _rand_augment(num_ops: int, magnitude: int) -> Any:
    from torchvision.transforms import v2  # imported here: slow, and not everybody's augmentation

    bilinear = v2.InterpolationMode.BILINEAR
    return v2.RandAugment(num_ops, magnitude, _STRENGTHS, interpolation=bilinear, fill=_GREY)
