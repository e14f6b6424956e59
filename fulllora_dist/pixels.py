"""Sizes in pixel units of [0, 1] as settings."""

from typing import Annotated

from pydantic import BeforeValidator


def parse_pixels(value: object) -> object:
    """ "4/255" or a number -> a float in [0, 1].

    Raises:
        ValueError: not a number, negative, or over 1, which means units of 0..255.
    """
    if value is None:
        return None
    try:
        numerator, _, denominator = str(value).partition("/")
        size = float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"{value!r} is no size in pixels; write a number in [0, 1] or a fraction such as 4/255"
        ) from None
    if not 0 <= size <= 1:
        hint = f"; for {value} of 255 grey levels write {value}/255" if size > 1 and not denominator else ""
        raise ValueError(f"{value} is outside [0, 1], the range of a pixel{hint}")
    return size


Pixels = Annotated[float, BeforeValidator(parse_pixels)]
