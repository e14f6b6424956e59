"""Bytes of a JPEG or PNG to a uint8 [3, S, S] tensor, with PIL as the reference.

Crop and resize are one `Image.resize(box=...)`: the crop's edge sees the pixels beyond it, as in a resize of the whole
picture followed by a crop, and nothing is computed that is cut away. EXIF orientation is ignored, as timm and
torchvision do.
"""

import io
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from fulllora_dist.errors import UserError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the source

_LOG_RATIO = math.log(4 / 3)
_CROP_TRIES = 10


def decode(data: bytes) -> Image.Image:
    """An RGB picture. Alpha is dropped, 16-bit greyscale is scaled to 8 bits (PIL alone would clip it).

    Raises:
        UserError: no complete JPEG or PNG.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.mode.startswith("I"):
                grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 = 257 * 255
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            image.info.pop("transparency", None)  # PIL would warn that it is lost
            return image.convert("RGB")
    except Exception as error:  # PIL's plugins raise nearly anything on bad bytes
        raise UserError(f"no readable JPEG or PNG ({error})") from error


def evaluation_box(width: int, height: int, size: int, crop_pct: float, crop_mode: str) -> Box:
    """The part of a picture that timm's evaluation transform keeps.

    It resizes the shorter side (squash: both) to floor(size / crop_pct) and cuts out the centre; roundings are those of
    torchvision's Resize and CenterCrop.
    """
    scaled = math.floor(size / crop_pct)
    short = min(width, height)
    to_width, to_height = (
        (scaled, scaled)
        if crop_mode == "squash"
        else (
            int(scaled * width / short),
            int(scaled * height / short),
        )
    )
    left, top = round((to_width - size) / 2), round((to_height - size) / 2)
    x, y = width / to_width, height / to_height
    return left * x, top * y, min((left + size) * x, width), min((top + size) * y, height)


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


def _resize(image: Image.Image, size: int, interpolation: str, box: Box) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling[interpolation.upper()], box=box))


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _check(size: int, crop_pct: float, interpolation: str) -> None:
    if size < 1:
        raise UserError(f"image size {size}: a positive number of pixels is right")
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct {crop_pct}: more than 0 and at most 1 is right")
    if interpolation.upper() not in Image.Resampling.__members__:
        names = ", ".join(name.lower() for name in Image.Resampling.__members__)
        raise UserError(f"interpolation {interpolation!r}: one of {names} is right")


@dataclass(frozen=True)
class EvalTransform:
    """timm's evaluation crop.

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
        _check(self.size, self.crop_pct, self.interpolation)
        if self.crop_mode not in ("center", "squash"):
            raise UserError(f"crop_mode {self.crop_mode!r}: center or squash is right")

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> torch.Tensor:
        """uint8 [3, size, size]; nothing is random."""
        image = decode(data)
        box = evaluation_box(*image.size, self.size, self.crop_pct, self.crop_mode)
        return _to_tensor(_resize(image, self.size, self.interpolation, box))


@dataclass(frozen=True)
class TrainTransform:
    """The training picture.

    Attributes:
        size: side of the result in pixels.
        augment: "none" is the evaluation crop, "flip" adds a horizontal flip with probability 1/2, "crop" is
            RandomResizedCrop and the flip.
        crop_scale: least and greatest share of the area for "crop".
        crop_pct: of the evaluation crop under "none" and "flip".
        interpolation: a PIL filter by name.
    """

    size: int
    augment: Literal["none", "flip", "crop"] = "flip"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_pct: float = 1.0
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        _check(self.size, self.crop_pct, self.interpolation)
        if self.augment not in ("none", "flip", "crop"):
            raise UserError(f"augment {self.augment!r}: none, flip or crop is right")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(f"crop_scale {self.crop_scale}: two shares 0 < least <= greatest <= 1 are right")

    def __call__(self, data: bytes, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [3, size, size]; everything random comes from `rng`."""
        image = decode(data)
        flip = self.augment != "none" and rng.random() < 0.5
        if self.augment == "crop":
            box = random_box(*image.size, self.crop_scale, rng)
        else:
            box = evaluation_box(*image.size, self.size, self.crop_pct, "center")
        pixels = _resize(image, self.size, self.interpolation, box)
        return _to_tensor(pixels[:, ::-1] if flip else pixels)


def picture_format(data: bytes) -> str:
    """JPEG, PNG or WEBP, by content."""
    if data.startswith(b"\xff\xd8"):
        return "JPEG"
    return "PNG" if data.startswith(b"\x89PNG") else "WEBP"
