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
    """`num_ops` of the 14 operations of the paper, drawn uniformly, one after the other.

    Attributes:
        num_ops: how many on each image.
        magnitude: strength of each, 0..30.
    """

    num_ops: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        if self.num_ops < 1:
            raise UserError(f"randaugment.num_ops must be >= 1, got {self.num_ops}")
        if not 0 <= self.magnitude < _STRENGTHS:
            raise UserError(f"randaugment.magnitude must be between 0 and {_STRENGTHS - 1}, got {self.magnitude}")

    def __call__(self, image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [3, H, W] to the same; everything random comes from `rng`, torch's own generator is left as it was."""
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(int(rng.integers(2**63)))
        try:
            result: torch.Tensor = _torchvisions(self.num_ops, self.magnitude)(image)
        finally:
            generator.set_state(before)
        return result


@lru_cache
def _torchvisions(num_ops: int, magnitude: int) -> Any:
    from torchvision.transforms import v2  # imported here: slow, and not everybody's augmentation

    bilinear = v2.InterpolationMode.BILINEAR
    return v2.RandAugment(num_ops, magnitude, _STRENGTHS, interpolation=bilinear, fill=_GREY)
