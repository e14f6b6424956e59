"""What enters a public attack is checked here, once a call: images, labels, sizes and counts.

Training does not come this way, so that no batch of a run waits for its own check.
"""

import operator
from typing import Any

import torch
from torch import Tensor

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.core.units import check_pixel_range, parse_size

PIXEL_TOLERANCE = 1e-6
"""How far rounding may take a pixel out of [0, 1]; further out, the image is refused."""
SUM_TOLERANCE = 0.01
"""How far the probabilities of an image may be from a sum of 1, e.g. in bf16."""
_RESIZED = 0.3  # bicubic resizing of tensors overshoots by less


def check_images(x: Any, name: str = "x", channels: int | None = None, grey_levels: bool = False) -> None:
    """Check what is known without looking at the pixels: type, dtype and shape [B, C, H, W].

    Args:
        grey_levels: whether uint8 in 0..255 is taken, too.

    Raises:
        UserError: anything else than a tensor of floats and of this shape.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"{name} must be a tensor [B, C, H, W], got {type(x).__name__}; use torch.as_tensor")
    if not (x.is_floating_point() or (grey_levels and x.dtype == torch.uint8)):
        raise UserError(f"{name} must be floats in [0, 1], got {dtype_name(x)}; for 0..255 write {name}.float() / 255")
    shape = list(x.shape)
    if x.ndim == 3:
        raise UserError(f"{name} must be a batch [B, C, H, W], got {shape}; for one image write {name}[None]")
    if x.ndim != 4:
        raise UserError(f"{name} must be a batch [B, C, H, W], got {shape}")
    if shape[1] not in (1, 3) and shape[3] in (1, 3):
        raise UserError(f"{name} must be [B, C, H, W], got {shape}, channels last; write {name}.permute(0, 3, 1, 2)")
    if channels is not None and shape[1] != channels:
        grey = f"; for grey images write {name}.expand(-1, {channels}, -1, -1)" if shape[1] == 1 else ""
        raise UserError(f"{name} must be [B, {channels}, H, W], got {shape}{grey}")


def check_precision(x: Tensor) -> None:
    """Raises UserError: fp16 or bf16, in which a perturbation would be rounded away."""
    if x.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"x must be float32 or float64, got {dtype_name(x)}, which rounds away perturbations of a grey level; "
            "write x.float() and cast inside the model"
        )


def pixel_range(x: Tensor) -> tuple[float, float]:
    """The lowest and the highest pixel, NaN where there is one. Waits for the device."""
    low, high = torch.stack(torch.aminmax(x.detach())).tolist() if x.numel() else (0.0, 0.0)
    return low, high


def check_range(low: float, high: float, name: str = "x", tolerance: float = PIXEL_TOLERANCE) -> None:
    """Check pixels by `pixel_range`.

    Raises:
        UserError: NaN, or further from [0, 1] than the tolerance.
    """
    if low >= -tolerance and high <= 1 + tolerance:
        return
    if low != low or high != high:
        raise UserError(f"{name} must be in [0, 1], got NaN")
    if low >= -_RESIZED and high <= 1 + _RESIZED:
        remedy = f"if resizing overshot, write {name}.clamp(0, 1)"
    elif low >= 0:
        remedy = "divide images of 0..255 by 255"
    else:
        remedy = "normalise in the model, not in the transform (models of create_model and load do so)"
    raise UserError(f"{name} must be in [0, 1], got {low:.4g} to {high:.4g}; {remedy}")


def checked_target(y: Any, x: Tensor, instead: str | None) -> Tensor:
    """Labels int64 [B] from any integers, or probabilities [B, classes] of x's dtype, on the device of `x`.

    Args:
        instead: of probabilities, for the line that refuses them; None takes them.

    Raises:
        UserError: neither, another number of them than of images, or negative ones.
    """
    try:
        target = torch.as_tensor(y, device=x.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(f"y must be labels [B] or probabilities [B, classes], got {type(y).__name__}") from None
    shape = list(target.shape)
    if target.ndim not in (1, 2):
        raise UserError(f"y must be labels [B] or probabilities [B, classes], got {shape}")
    if len(target) != len(x):
        raise UserError(f"y must have a label for each image, got {len(target)} for {len(x)} images")
    if target.dtype == torch.bool:
        raise UserError(f"y must be integer labels [B] or probabilities [B, classes], got {dtype_name(target)}")
    if target.ndim == 2:
        if shape[1] == 1:
            raise UserError(f"y must be labels [B] or probabilities [B, classes], got {shape}; write y.squeeze(1)")
        if instead is not None:
            raise UserError(f"y must be labels [B], got probabilities {shape}; {instead}")
        return target.to(x.dtype, copy=target.is_inference())
    if target.is_floating_point() and target.numel():
        raise UserError(f"y must be integer labels [B], got {dtype_name(target)} {shape}; write y.long()")
    return target.to(torch.int64, copy=target.is_inference())


def check_batch(x: Tensor, target: Tensor) -> int:
    """Look at the pixels and targets, in one wait for the device.

    Returns:
        How many logits the labels need at least, or probabilities exactly.

    Raises:
        UserError: pixels outside [0, 1], negative labels, or probabilities that are negative or do not sum to 1.
    """
    low, high = torch.aminmax(x.detach())
    if target.ndim == 1:
        least, most = torch.aminmax(target)
    else:
        least, most = target.amin(), (target.sum(dim=1) - 1).abs().amax()
    seen = torch.stack([number.double() for number in (low, high, least, most)]).tolist()
    if x.is_floating_point():  # no uint8 is out of range
        check_range(*seen[:2])
    if target.ndim == 1:
        if seen[2] < 0:
            raise UserError(f"y must be labels >= 0, got {seen[2]:.0f}")
        return int(seen[3]) + 1
    if not (seen[2] >= 0 and seen[3] <= SUM_TOLERANCE):
        raise UserError("y must be probabilities [B, classes], >= 0 with a sum of 1 for each image")
    return target.shape[1]


def check_labels(needed: int, classes: int, of: str = "") -> None:
    """Check labels against what there is one of for each class.

    Args:
        needed: how many classes the labels need, one more than the largest.
        classes: how many there are.
        of: what there is one of, by default the model's outputs.

    Raises:
        UserError: a label without one.
    """
    if needed > classes:
        of = of or f"the model's {classes} outputs"
        raise UserError(
            f"y must be labels below {classes}, one for each of {of}, got {needed - 1}; labels count from 0"
        )


def checked_ids(ids: Any, x: Tensor) -> Tensor:
    """The ids of the images, int64 [B]; None is 0..B-1. Raises UserError: other than integers, or another number."""
    if ids is None:
        return torch.arange(len(x), device=x.device)
    ids = torch.as_tensor(ids, device=x.device)
    if ids.shape != x.shape[:1] or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(f"ids must be integers [{len(x)}], one for each image, got {dtype_name(ids)} {list(ids.shape)}")
    return ids.long()


def checked_size(name: str, value: Any, norm: str) -> float:
    """A radius or step size: a number, or a fraction as a string.

    Raises:
        UserError: neither, negative, or over 1 where the norm is of single pixels.
    """
    if value is None or isinstance(value, bool):
        raise UserError(f"{name} must be a number or a fraction such as '4/255', got {value}")
    try:
        size = parse_size(value)
        assert isinstance(size, float)
        return check_pixel_range(size) if norm == "linf" else size
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def checked_count(name: str, value: Any, at_least: int) -> int:
    """Raises UserError: not an integer, or less than `at_least`."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < at_least:
        raise UserError(f"{name} must be an integer >= {at_least}, got {one_line(repr(value))}")
    return count


def dtype_name(of: Tensor | torch.dtype) -> str:
    """As users write it: float32."""
    return str(of.dtype if isinstance(of, Tensor) else of).removeprefix("torch.")
