import io
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.decode import decode, decode_fast


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    return noise(max(2, width // 16), max(2, height // 16)).resize((width, height), Image.Resampling.BICUBIC)


def as_array(data: bytes) -> np.ndarray:
    return np.asarray(decode(data))


@pytest.mark.parametrize("read", [as_array, decode_fast])
def test_modes_become_rgb(read: Callable[[bytes], np.ndarray]) -> None:
    grey16 = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    scaled = read(encoded(Image.fromarray(grey16)))
    assert (scaled == np.arange(256).reshape(16, 16, 1)).all()

    grey8 = noise(16, 16).convert("L")
    assert (read(encoded(grey8)) == np.asarray(grey8)[:, :, None]).all()
    assert np.abs(read(encoded(grey8, "JPEG", quality=100)).astype(int) - np.asarray(grey8)[:, :, None]).max() <= 3

    colours = noise(16, 16)
    palette = colours.quantize(32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = read(encoded(palette, transparency=bytes(range(32))))
    assert (decoded == np.asarray(palette.convert("RGB"))).all()

    alpha = colours.copy()
    alpha.putalpha(grey8)
    assert (read(encoded(alpha)) == np.asarray(colours)).all()
    assert (read(encoded(colours, "WEBP", lossless=True)) == np.asarray(colours)).all()

    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    cmyk = encoded(flat.convert("CMYK"), "JPEG", quality=100)
    assert np.abs(read(cmyk).astype(int) - np.asarray(flat)).max() <= 3


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_both_backends_see_one_jpeg_alike(subsampling: int, progressive: bool) -> None:
    data = encoded(smooth(150, 97), "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    difference = np.abs(decode_fast(data).astype(int) - as_array(data))
    assert difference.max() <= 2
    assert difference.mean() < 0.5


def test_both_backends_see_real_jpegs_alike(real_data: Path) -> None:
    with tarfile.open(real_data / "imagenet-natural-100.tar") as tar:
        for member in tar.getmembers()[::7]:
            data = tar.extractfile(member).read()
            assert np.abs(decode_fast(data).astype(int) - as_array(data)).mean() < 0.5


BROKEN = {
    "nothing": b"",
    "text": b"no image",
    "cut png": encoded(noise(30, 30))[:900],
    "cut jpeg": encoded(noise(90, 90), "JPEG")[:-200],
    "cut webp": encoded(noise(90, 90), "WEBP")[:500],
    "gif": encoded(noise(8, 8), "GIF"),
    "bmp": encoded(noise(8, 8), "BMP"),
    "jpeg of zeros": b"\xff\xd8" + bytes(500),
}


@pytest.mark.parametrize("read", [decode, decode_fast])
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_image_is_refused(read: Callable[[bytes], object], name: str) -> None:
    with pytest.raises(UserError, match="not a readable JPEG, PNG or WebP"):
        read(BROKEN[name])


def test_rot_that_pillow_passes_over_is_refused() -> None:
    data = bytearray(encoded(smooth(200, 200), "JPEG", quality=90))
    start = data.index(b"\xff\xda") + 200
    data[start : start + 64] = np.random.default_rng(0).integers(0, 255, 64, dtype=np.uint8).tobytes()
    assert decode(bytes(data)).size == (200, 200), "Pillow has learnt to refuse it: drop what decode_fast adds"
    with pytest.raises(UserError, match="not a readable JPEG"):
        decode_fast(bytes(data))


def test_odd_bytes_between_segments_are_no_rot() -> None:
    """Some of ImageNet's JPEGs have them; libjpeg warns, and the image is whole."""
    image = smooth(64, 64)
    data = encoded(image, "JPEG", quality=95)
    start = data.index(b"\xff\xda")
    odd = data[:start] + b"\0\0\0" + data[start:]
    assert (decode_fast(odd) == as_array(data)).all()


def test_a_png_named_jpg_is_read() -> None:
    assert (decode_fast(encoded(noise(20, 10))) == np.asarray(noise(20, 10))).all()
