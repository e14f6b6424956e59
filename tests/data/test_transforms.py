import io
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import auto_augment, create_transform
from torchvision.transforms import v2

from fulllora_dist.config.load import load_config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.settings import Augment, Backend, RandAugmentSettings
from fulllora_dist.data.transforms import EvalTransform, TrainTransform, random_box


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
    image = noise(width, height)
    scaled = int(size / crop_pct)
    resize = T.Resize((scaled, scaled) if mode == "squash" else scaled, T.InterpolationMode(interpolation))
    expected = np.asarray(T.CenterCrop(size)(resize(image))).transpose(2, 0, 1)
    result = EvalTransform(size, crop_pct, interpolation, mode)(png(image)).numpy()
    assert result.dtype == np.uint8
    assert (result == expected).all()


@pytest.mark.parametrize(("crop_pct", "mode"), [(0.9, "center"), (0.875, "squash"), (1.0, "center")])
def test_evaluation_crop_is_timms_on_real_images(naturals: list[bytes], crop_pct: float, mode: str) -> None:
    timms = create_transform(
        224, is_training=False, crop_pct=crop_pct, crop_mode=mode, interpolation="bicubic", normalize=False
    )
    ours = EvalTransform(224, crop_pct, "bicubic", mode)
    for data in naturals[::2]:
        expected = timms(Image.open(io.BytesIO(data)).convert("RGB"))
        assert torch.equal(ours(data), expected)


sides = st.integers(1, 700)


@given(width=sides, height=sides, seed=st.integers(0, 1000), least=st.floats(0.01, 1))
def test_random_box_lies_inside(width: int, height: int, seed: int, least: float) -> None:
    left, top, right, bottom = random_box(width, height, (least, 1.0), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_have_the_area_the_ratio_and_the_flips_they_should() -> None:
    """The image's red is its x, its green its y: the result tells where it was cut out."""
    x, y = np.meshgrid(np.arange(240), np.arange(200))
    image = png(Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8)))
    transform = TrainTransform(16, "crop", crop_scale=(0.2, 0.6), interpolation="bilinear")
    areas, ratios, flips = [], [], 0
    for seed in range(400):
        red, green, _ = transform(image, np.random.default_rng(seed)).double().numpy()
        columns, rows = red.mean(0), green.mean(1)  # linear in the place, up to rounding
        flips += columns[0] > columns[-1]
        w, h = abs(np.polyfit(range(16), columns, 1)[0]) * 16, np.polyfit(range(16), rows, 1)[0] * 16
        areas.append(w * h / (240 * 200))
        ratios.append(w / h)
        assert np.ptp(red - columns) < 1.01  # one box for the whole image: no skew, no second resize
    assert min(areas) > 0.19
    assert max(areas) < 0.62
    assert abs(np.mean(areas) - 0.4) < 0.03
    assert min(ratios) > 0.72
    assert max(ratios) < 1.39
    assert abs(np.mean(np.log(ratios))) < 0.05
    assert 150 < flips < 250


def test_a_sliver_does_not_become_a_large_image() -> None:
    sliver = png(Image.new("RGB", (1, 5000)))
    for transform in (EvalTransform(224), TrainTransform(224, "flip"), TrainTransform(224, "flip", backend="pil")):
        with pytest.raises(UserError, match=r"x 1\d{6} pixels"):
            transform(sliver, np.random.default_rng(0))
    assert TrainTransform(224, "crop")(sliver, np.random.default_rng(0)).shape == (3, 224, 224)


@pytest.mark.parametrize("backend", ["fast", "pil"])
def test_flip_flips_half_and_none_nothing(backend: Backend) -> None:
    image = noise(40, 32)
    straight = TrainTransform(16, "none", backend=backend)(png(image), np.random.default_rng(0))
    transform = TrainTransform(16, "flip", backend=backend)
    results = [transform(png(image), np.random.default_rng(seed)) for seed in range(200)]
    flipped = [torch.equal(result, straight.flip(2)) for result in results]
    assert all(f or torch.equal(result, straight) for f, result in zip(flipped, results, strict=True))
    assert 70 < sum(flipped) < 130
    if backend == "pil":
        assert torch.equal(EvalTransform(16, crop_pct=1.0)(png(image)), straight)


@pytest.fixture(scope="module")
def naturals(real_data: Path) -> list[bytes]:
    """Twenty ImageNet images at natural size."""
    with tarfile.open(real_data / "imagenet-natural-100.tar") as tar:
        return [tar.extractfile(member).read() for member in tar.getmembers()[::5]]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_reference_crop_is_torchvisions(interpolation: str) -> None:
    """The box that our generator draws, through torchvision's own crop and resize."""
    image = noise(333, 222)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        flip = rng.random() < 0.5
        left, top, right, bottom = random_box(333, 222, (0.08, 1.0), rng)
        mode = T.InterpolationMode(interpolation)
        box = (top, left, bottom - top, right - left)
        expected = T.functional.resized_crop(image, *box, [64, 64], mode)
        result = TrainTransform(64, "crop", interpolation=interpolation, backend="pil")(
            png(image), np.random.default_rng(seed)
        )
        pixels = np.asarray(expected)[:, ::-1] if flip else np.asarray(expected)
        assert (result.numpy() == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_the_fast_backend_makes_the_same_image(naturals: list[bytes], augment: Augment, interpolation: str) -> None:
    means = []
    for i, data in enumerate(naturals):
        fast, reference = (
            TrainTransform(224, augment, crop_pct=0.9, interpolation=interpolation, backend=backend)(
                data, np.random.default_rng(i)
            )
            for backend in ("fast", "pil")
        )
        assert (fast.shape, fast.dtype) == ((3, 224, 224), torch.uint8)
        means.append((fast.int() - reference.int()).abs().float().mean())
    assert np.mean(means) < 0.35  # of 255
    assert max(means) < 1.0


@pytest.mark.parametrize("backend", ["fast", "pil"])
def test_a_image_depends_on_its_generator_alone(naturals: list[bytes], backend: Backend) -> None:
    transform = TrainTransform(96, "randaugment", backend=backend)
    made = [transform(data, np.random.default_rng(i)) for i, data in enumerate(naturals)]
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    again = [transform(data, np.random.default_rng(i)) for i, data in reversed(list(enumerate(naturals)))]
    assert all(torch.equal(one, other) for one, other in zip(made, reversed(again), strict=True))
    assert not torch.equal(made[0], transform(naturals[0], np.random.default_rng(99)))
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert torch.equal(before[0], after[0])
    assert (before[1] == after[1]).all()
    assert before[2] == after[2]


def test_randaugment_is_the_crop_and_torchvisions_operations(naturals: list[bytes]) -> None:
    plain, settings = TrainTransform(96, "crop"), RandAugmentSettings(num_ops=3, magnitude=15)
    augmented = TrainTransform(96, "randaugment", randaugment=settings)
    changed = 0
    for i, data in enumerate(naturals):
        rng = np.random.default_rng(i)
        cropped = plain(data, rng)  # leaves the generator where RandAugment begins
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            theirs = v2.RandAugment(3, 15, 31, v2.InterpolationMode.BILINEAR, 128)(cropped)
        result = augmented(data, np.random.default_rng(i))
        assert torch.equal(result, theirs)
        changed += not torch.equal(result, cropped)
    assert changed > len(naturals) / 2


def test_the_strong_recipe_has_timms_magnitude_of_9() -> None:
    """timm's scale ends at 10, torchvision's at 30."""
    path = Path(__file__).parents[2] / "configs" / "imagenet_vit_large_strong.yaml"
    settings, space = load_config(str(path)).data.randaugment, v2.RandAugment._AUGMENTATION_SPACE
    for name, timms, centre in (
        ("Rotate", auto_augment._rotate_level_to_arg, 0),
        ("ShearX", auto_augment._shear_level_to_arg, 0),
        ("Contrast", auto_augment._enhance_increasing_level_to_arg, 1),
    ):
        ours = float(space[name][0](31, 224, 224)[settings.magnitude])
        assert ours == pytest.approx(abs(timms(9, {})[0] - centre))
    assert (settings.magnitude, settings.num_ops) == (27, 1)


def test_color_jitter_is_torchvisions_after_the_crop(naturals: list[bytes]) -> None:
    plain, jittered = TrainTransform(96, "crop"), TrainTransform(96, "crop", color_jitter=0.4)
    for i, data in enumerate(naturals):
        rng = np.random.default_rng(i)
        cropped = plain(data, rng)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            theirs = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)(cropped)
        assert torch.equal(jittered(data, np.random.default_rng(i)), theirs)
        assert not torch.equal(theirs, cropped)


def test_random_erasing_replaces_a_rectangle_by_noise(naturals: list[bytes]) -> None:
    """In that share of the images; the rest of each image stays, and other draws are as without it."""
    plain, erasing = TrainTransform(96, "crop"), TrainTransform(96, "crop", random_erasing=0.5)
    areas = []
    for i in range(200):
        data = naturals[i % len(naturals)]
        before, after = (transform(data, np.random.default_rng(i)) for transform in (plain, erasing))
        changed = (before != after).any(dim=0)
        if not changed.any():
            continue
        rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
        top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
        inside = after[:, top:bottom, left:right].float()
        assert changed[top:bottom, left:right].float().mean() > 0.99
        areas.append((bottom - top) * (right - left) / 96**2)
        assert (inside.mean() - 127.5).abs() < 6 * 73.9 / inside.numel() ** 0.5
        assert 0.25 < (bottom - top) / (right - left) < 4
    assert 70 < len(areas) < 130
    assert min(areas) < 0.06
    assert 0.28 < max(areas) < 0.35


def test_stronger_randaugment_changes_more(naturals: list[bytes]) -> None:
    def distance(magnitude: int) -> float:
        total = 0.0
        for i, data in enumerate(naturals):
            plain = TrainTransform(64, "crop")(data, np.random.default_rng(i))
            harder = TrainTransform(64, "randaugment", randaugment=RandAugmentSettings(num_ops=2, magnitude=magnitude))
            total += float((harder(data, np.random.default_rng(i)).int() - plain.int()).abs().float().mean())
        return total

    assert distance(2) < distance(10) < distance(25)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: EvalTransform(0), "image size"),
        (lambda: EvalTransform(8, crop_pct=1.1), "crop_pct"),
        (lambda: EvalTransform(8, interpolation="cubist"), "interpolation"),
        (lambda: EvalTransform(8, crop_mode="border"), "crop_mode"),
        (lambda: TrainTransform(8, crop_mode="border"), "crop_mode"),
    ],
)
def test_bad_settings_are_refused_by_name(make, name: str) -> None:
    with pytest.raises(UserError, match=name):
        make()
