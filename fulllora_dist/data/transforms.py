"""Bytes of an image to a uint8 [3, S, S] tensor: crop, resize, augmentation.

Two backends. "pil" is the reference and what evaluation always uses, so that its numbers depend on Pillow alone. "fast"
decodes by libjpeg-turbo and resizes by torch's antialiased uint8 kernels; docs/data.md has the measured difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.augmentations import color_jitter, rand_augment, random_erasing
from fulllora_dist.data.decode import check_pixels, decode, decode_fast
from fulllora_dist.data.settings import Augment, Backend, RandAugmentSettings

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the source

_LOG_RATIO = math.log(4 / 3)
_CROP_TRIES = 10
_TORCH_MODES = ("bilinear", "bicubic")  # that torch resizes with antialiasing


def _centre(width: int, height: int, size: int, crop_pct: float, crop_mode: str) -> tuple[tuple[int, int], Box]:
    """((width, height), box): what timm's evaluation transform resizes to, and the centre that it cuts out. The shorter
    side (squash: both) becomes floor(size / crop_pct). Roundings are those of torchvision's Resize and CenterCrop."""
    to_width = to_height = math.floor(size / crop_pct)
    if crop_mode != "squash":
        short = min(width, height)
        to_width, to_height = int(to_width * width / short), int(to_height * height / short)
        check_pixels(to_width, to_height)  # an image of 1 x 10,000 pixels is small, and large once it is resized
    left, top = round((to_width - size) / 2), round((to_height - size) / 2)
    return (to_width, to_height), (left, top, left + size, top + size)


def centre_crop(image: Image.Image, size: int, crop_pct: float, crop_mode: str, interpolation: str) -> Image.Image:
    """timm's evaluation image of an RGB one, pixel for pixel."""
    scaled, box = _centre(*image.size, size, crop_pct, crop_mode)
    return image.resize(scaled, _resampling(interpolation)).crop(box)


def random_box(width: int, height: int, crop_scale: tuple[float, float], rng: np.random.Generator) -> Box:
    """RandomResizedCrop (Szegedy et al. 2015, as torchvision draws it): a share of the area uniform in `crop_scale`,
    log-uniform aspect ratio in [3/4, 4/3]; where ten tries do not fit, the centre with the nearest allowed ratio."""
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*crop_scale)
        ratio = math.exp(rng.uniform(-_LOG_RATIO, _LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resampling(interpolation: str) -> Image.Resampling:
    return Image.Resampling[interpolation.upper()]


def _to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def _resized(pixels: np.ndarray, width: int, height: int, interpolation: str) -> torch.Tensor:
    """uint8 [H, W, 3] to uint8 [3, height, width], antialiased."""
    if interpolation not in _TORCH_MODES:
        return _to_tensor(Image.fromarray(pixels).resize((width, height), _resampling(interpolation)))
    channels_last = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(channels_last, (height, width), mode=interpolation, antialias=True)[0]


def _check_crop(size: int, crop_pct: float, interpolation: str, crop_mode: str) -> None:
    if size < 1:
        raise UserError(f"image size must be >= 1, got {size}")
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct must be > 0 and <= 1, got {crop_pct}")
    _check_choice("interpolation", interpolation, [name.lower() for name in Image.Resampling.__members__])
    _check_choice("crop_mode", crop_mode, ("center", "squash"))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


@dataclass(frozen=True)
class EvalTransform:
    """timm's evaluation crop, by Pillow.

    Attributes:
        size: side of the result in pixels.
        crop_pct: share of the shorter side that is kept, in (0, 1].
        interpolation: a PIL filter by name (timm's names fit).
        crop_mode: "center" keeps the aspect ratio, "squash" does not ("border" is not supported).
    """

    size: int
    crop_pct: float = 0.875
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        _check_crop(self.size, self.crop_pct, self.interpolation, self.crop_mode)

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> torch.Tensor:
        """uint8 [3, size, size]; nothing is random."""
        return _to_tensor(centre_crop(decode(data), self.size, self.crop_pct, self.crop_mode, self.interpolation))


@dataclass(frozen=True)
class TrainTransform:
    """The training image.

    Attributes:
        size: side of the result in pixels.
        augment: "none" is the evaluation crop, "flip" adds a horizontal flip with probability 1/2, "crop" is
            RandomResizedCrop and the flip, "randaugment" is "crop" and RandAugment after it.
        crop_scale: least and greatest share of the area for "crop" and "randaugment".
        crop_pct, crop_mode: of the evaluation crop under "none" and "flip".
        interpolation: a PIL filter by name.
        randaugment: its settings.
        color_jitter: strength, 0 for none; after the flip and before RandAugment.
        random_erasing: probability, 0 for none; the last step.
        backend: "fast" or "pil"; random decisions are the same under both.
    """

    size: int
    augment: Augment = "flip"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    randaugment: RandAugmentSettings = field(default_factory=RandAugmentSettings)
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    backend: Backend = "fast"

    def __post_init__(self) -> None:
        _check_crop(self.size, self.crop_pct, self.interpolation, self.crop_mode)

    def __call__(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [3, size, size]; everything random comes from `rng`."""
        flip = self.augment != "none" and rng.random() < 0.5
        image = self._fast(data, rng) if self.backend == "fast" else self._reference(data, rng)
        if flip:
            image = image.flip(2)
        if self.color_jitter:
            image = color_jitter(image, self.color_jitter, rng)
        if self.augment == "randaugment":
            image = rand_augment(image, self.randaugment.num_ops, self.randaugment.magnitude, rng)
        if self.random_erasing and rng.random() < self.random_erasing:
            image = random_erasing(image, rng)
        return image.contiguous()

    def _random_box(self, width: int, height: int, rng: np.random.Generator) -> Box | None:
        return random_box(width, height, self.crop_scale, rng) if self.augment in ("crop", "randaugment") else None

    def _fast(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        pixels = decode_fast(data)
        height, width = pixels.shape[:2]
        if (box := self._random_box(width, height, rng)) is not None:
            left, top, right, bottom = box
            return _resized(pixels[top:bottom, left:right], self.size, self.size, self.interpolation)
        scaled, (left, top, right, bottom) = _centre(width, height, self.size, self.crop_pct, self.crop_mode)
        return _resized(pixels, *scaled, self.interpolation)[:, top:bottom, left:right]

    def _reference(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        image = decode(data)
        if (box := self._random_box(*image.size, rng)) is None:
            return _to_tensor(centre_crop(image, self.size, self.crop_pct, self.crop_mode, self.interpolation))
        return _to_tensor(image.crop(box).resize((self.size, self.size), _resampling(self.interpolation)))
