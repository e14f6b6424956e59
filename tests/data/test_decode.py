import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fulllora_dist.data.decode import EvalTransform, TrainTransform, decode, evaluation_box, random_box
from fulllora_dist.errors import UserError


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("width", "height", "size", "crop_pct", "mode"),
    [
        (500, 375, 224, 0.875, "center"),
        (301, 200, 64, 0.9, "center"),
        (200, 301, 64, 0.9, "center"),
        (224, 224, 96, 1.0, "center"),
        (61, 47, 224, 0.95, "center"),
        (301, 200, 64, 0.9, "squash"),
    ],
)
def test_evaluation_crop_is_torchvisions(
    width: int, height: int, size: int, crop_pct: float, mode: str, interpolation: str
) -> None:
    picture = noise(width, height)
    scaled = int(size / crop_pct)
    resize = T.Resize((scaled, scaled) if mode == "squash" else scaled, T.InterpolationMode(interpolation))
    expected = np.asarray(T.CenterCrop(size)(resize(picture))).transpose(2, 0, 1)
    result = EvalTransform(size, crop_pct, interpolation, mode)(png(picture)).numpy()
    difference = np.abs(result.astype(int) - expected.astype(int))
    assert result.dtype == np.uint8
    assert difference.max() <= 1
    assert difference.mean() < 0.01


def test_evaluation_crop_is_timms_on_real_pictures(real_data: Path) -> None:
    import tarfile

    from timm.data import create_transform

    timms = create_transform(224, is_training=False, crop_pct=0.9, interpolation="bicubic", normalize=False)
    ours = EvalTransform(224, 0.9, "bicubic")
    with tarfile.open(real_data / "imagenet-natural-100.tar") as tar:
        for member in tar.getmembers()[::10]:
            data = tar.extractfile(member).read()
            expected = timms(Image.open(io.BytesIO(data)).convert("RGB"))
            assert (ours(data).int() - expected.int()).abs().max() <= 1


sides = st.integers(1, 700)


@given(width=sides, height=sides, size=st.integers(1, 300), crop_pct=st.floats(0.5, 1), mode=st.sampled_from("cs"))
def test_evaluation_box_lies_inside(width: int, height: int, size: int, crop_pct: float, mode: str) -> None:
    left, top, right, bottom = evaluation_box(width, height, size, crop_pct, "squash" if mode == "s" else "center")
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@given(width=sides, height=sides, seed=st.integers(0, 1000), least=st.floats(0.01, 1))
def test_random_box_lies_inside(width: int, height: int, seed: int, least: float) -> None:
    left, top, right, bottom = random_box(width, height, (least, 1.0), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_have_the_area_the_ratio_and_the_flips_they_should() -> None:
    """The picture's red is its x, its green its y: the result tells where it was cut out."""
    x, y = np.meshgrid(np.arange(240), np.arange(200))
    picture = png(Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)))
    transform = TrainTransform(16, "crop", crop_scale=(0.2, 0.6), interpolation="bilinear")
    areas, ratios, flips = [], [], 0
    for seed in range(400):
        red, green, _ = transform(picture, np.random.default_rng(seed)).double().numpy()
        columns, rows = red.mean(0), green.mean(1)  # linear in the place, up to rounding
        flips += columns[0] > columns[-1]
        w, h = abs(np.polyfit(range(16), columns, 1)[0]) * 16, np.polyfit(range(16), rows, 1)[0] * 16
        areas.append(w * h / (240 * 200))
        ratios.append(w / h)
        assert np.ptp(red - columns) < 1.01  # one box for the whole picture: no skew, no second resize
    assert min(areas) > 0.19
    assert max(areas) < 0.62
    assert abs(np.mean(areas) - 0.4) < 0.03
    assert min(ratios) > 0.72
    assert max(ratios) < 1.39
    assert abs(np.mean(np.log(ratios))) < 0.05
    assert 150 < flips < 250


def test_flip_flips_half_and_none_nothing() -> None:
    picture = noise(40, 32)
    straight = EvalTransform(16, crop_pct=1.0)(png(picture))
    results = [TrainTransform(16, "flip")(png(picture), np.random.default_rng(seed)) for seed in range(200)]
    flipped = [torch.equal(result, straight.flip(2)) for result in results]
    assert all(f or torch.equal(result, straight) for f, result in zip(flipped, results, strict=True))
    assert 70 < sum(flipped) < 130
    assert torch.equal(TrainTransform(16, "none")(png(picture), np.random.default_rng(1)), straight)


def test_modes_become_rgb() -> None:
    grey16 = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    scaled = np.asarray(decode(png(Image.fromarray(grey16))))
    assert (scaled == np.arange(256).reshape(16, 16, 1)).all()

    grey8 = noise(16, 16).convert("L")
    assert (np.asarray(decode(png(grey8))) == np.asarray(grey8)[:, :, None]).all()

    colours = noise(16, 16)
    palette = colours.quantize(32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(png(palette, transparency=bytes(range(32))))
    assert (np.asarray(decoded) == np.asarray(palette.convert("RGB"))).all()

    alpha = colours.copy()
    alpha.putalpha(grey8)
    assert (np.asarray(decode(png(alpha))) == np.asarray(colours)).all()

    buffer = io.BytesIO()
    flat = Image.new("RGB", (16, 16), (200, 40, 90))
    flat.convert("CMYK").save(buffer, "JPEG", quality=100)
    assert np.abs(np.asarray(decode(buffer.getvalue())).astype(int) - np.asarray(flat)).max() <= 3


@pytest.mark.parametrize("data", [b"", b"no picture", png(noise(30, 30))[:900], b"GIF89a" + bytes(50)])
def test_what_is_no_whole_picture_is_refused(data: bytes) -> None:
    with pytest.raises(UserError, match="no readable JPEG or PNG"):
        decode(data)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: EvalTransform(0), "image size"),
        (lambda: EvalTransform(8, crop_pct=1.1), "crop_pct"),
        (lambda: EvalTransform(8, interpolation="cubist"), "interpolation"),
        (lambda: EvalTransform(8, crop_mode="border"), "crop_mode"),
        (lambda: TrainTransform(8, augment="mirror"), "augment"),
        (lambda: TrainTransform(8, crop_scale=(0.5, 0.2)), "crop_scale"),
    ],
)
def test_bad_settings_are_refused_by_name(make, name: str) -> None:
    with pytest.raises(UserError, match=name):
        make()
