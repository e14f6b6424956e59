"""Bytes of a JPEG, PNG or WebP to 8-bit RGB: Pillow is the reference, libjpeg-turbo the fast way.

EXIF orientation is ignored, as timm and torchvision do.
"""

import io
import re

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from fulllora_dist.core.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MB in RGB

_DIRECT = ("YCbCr", "RGB", "Gray")  # libjpeg-turbo has no RGB of CMYK and YCCK
# What libjpeg warns of though the image is whole: odd bytes between segments and unknown headers. Odd bytes before
# the end (0xd9) are none of that: the data that was to fill the image did not fit it.
_HARMLESS = re.compile(r"extraneous bytes before marker 0x(?!d9)|Invalid SOS parameters|nknown (JFIF|Adobe)")


def image_format(data: bytes) -> str:
    """One of FORMATS, by content; a JPEG is what starts like one."""
    if data.startswith(b"\xff\xd8"):
        return "JPEG"
    return "PNG" if data.startswith(b"\x89PNG") else "WEBP"


def decode(data: bytes) -> Image.Image:
    """An RGB image. Alpha is dropped, 16-bit greyscale is scaled to 8 bits (PIL alone would clip it).

    Raises:
        UserError: no complete JPEG, PNG or WebP, or one of more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_pixels(*image.size)
            if image.mode.startswith("I"):
                grey = (np.asarray(image).astype(np.uint32) + 128) // 257  # 65535 = 257 * 255
                return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            image.info.pop("transparency", None)  # PIL would warn that it is lost
            return image.convert("RGB")
    except UnidentifiedImageError as error:  # its text is the address of our buffer
        raise UserError(f"not a readable JPEG, PNG or WebP ({'its header is damaged' if data else 'empty'})") from error
    except Exception as error:  # PIL's plugins raise nearly anything on bad bytes
        raise UserError(f"not a readable JPEG, PNG or WebP ({error})") from error


def decode_fast(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]: JPEG by libjpeg-turbo with its accurate DCT and upsampling, all else by `decode`.

    A damaged JPEG is refused here, where Pillow fills up the image without a word.

    Raises:
        UserError: as for `decode`; a damaged JPEG.
    """
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            check_pixels(width, height)
            if colours in _DIRECT:
                return simplejpeg.decode_jpeg(data, "RGB")
        except (ValueError, KeyError) as error:  # KeyError: no colours in the header
            if not _HARMLESS.search(str(error)):
                raise UserError(f"not a readable JPEG, PNG or WebP ({error})") from error
    return np.array(decode(data))


def check_pixels(width: int, height: int) -> None:
    """Raise UserError for more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise UserError(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS}")
