"""RandAugment (Cubuk et al. 2020), torchvision's, with its randomness keyed by the sample."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fulllora_dist.core.errors import UserError

_GREY = 128  # where an image is turned or moved out of the frame
_STRENGTHS = 31  # steps of magnitude, as in the paper


@dataclass(frozen=True)
class RandAugment:
    """`operations` of the 14 operations of the paper, drawn uniformly, one after the other.

    Attributes:
        operations: how many on each image.
        magnitude: strength of each, 0..30.
    """

    operations: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        if self.operations < 1:
            raise UserError(f"randaugment operations {self.operations}: 1 or more is right")
        if not 0 <= self.magnitude < _STRENGTHS:
            raise UserError(f"randaugment magnitude {self.magnitude}: 0 to {_STRENGTHS - 1} is right")

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [3, H, W] to the same; everything random comes from `rng`, torch's own generator is left as it was."""
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(int(rng.integers(2**63)))
        try:
            result: torch.Tensor = _torchvisions(self.operations, self.magnitude)(image)
        finally:
            generator.set_state(before)
        return result


@lru_cache
def _torchvisions(operations: int, magnitude: int) -> Any:
    from torchvision.transforms import v2  # imported here: slow, and not everybody's augmentation

    bilinear = v2.InterpolationMode.BILINEAR
    return v2.RandAugment(operations, magnitude, _STRENGTHS, interpolation=bilinear, fill=_GREY)
