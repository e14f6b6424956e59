"""Perturbation sizes as settings and as text, for pixels in [0, 1]."""

from typing import Annotated

from pydantic import BeforeValidator

from fulllora_dist.core.messages import one_line


def parse_size(value: object) -> object:
    """Parse "4/255" or a number to a float >= 0.

    Raises:
        ValueError: not a number, or negative.
    """
    if value is None:
        return None
    try:
        numerator, _, denominator = str(value).partition("/")
        size = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"{one_line(repr(value))} is not a size in pixels; write a number in [0, 1] or a fraction such as 4/255"
        ) from None
    if not 0 <= size < float("inf"):
        raise ValueError(f"{value} is outside [0, 1], the range of a pixel")
    return size


def check_pixel_range(size: float) -> float:
    """Check that a change of single pixels (Linf) is at most 1; lengths over whole images (L2) may be larger.

    Raises:
        ValueError: over 1, which suggests units of 0..255.
    """
    if size > 1:
        raise ValueError(
            f"{size:g} is outside [0, 1], the range of a pixel; for {size:g} of 255 grey levels write {size:g}/255"
        )
    return size


Size = Annotated[float, BeforeValidator(parse_size)]


def size_in(norm: str, eps: float) -> str:
    """Format a radius as is common in the field: Linf in grey levels, L2 as a length."""
    return f"{norm} eps = {number_in(norm, eps)}"


def number_in(norm: str, eps: float) -> str:
    """The number of `size_in` alone."""
    return f"{eps * 255:.4g}/255" if norm == "linf" else f"{eps:.4g}"
