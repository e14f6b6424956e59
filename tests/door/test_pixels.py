"""Pixels that are none: refused in one line, by attacks, models and evaluations, and never looked at in training."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from plain_pgd import plain_pgd
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fulllora_dist as fd
from fulllora_dist.config.schema import Config
from fulllora_dist.core.errors import UserError
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.engine import Engine
from fulllora_dist.distributed.settings import DistributedSettings, OptimSettings
from fulllora_dist.training.phases import build_phases
from tests.ranks import RankServer
from tests.tiny import CLASSES, SIDE, batches, images, stir, tiny

KEY: dict[str, Any] = {"eps": 8 / 255, "steps": 3, "step_size": 3 / 255}
IN_MODEL = "normalise in the model, not in the transform (models of create_model and load do so)"
MEANT = "; where they are meant, set model.pixels_checked = True"


def flat(low: float, high: float) -> Tensor:
    """A batch of these two pixels alone."""
    return torch.tensor([low, high]).repeat(4, 3, SIDE, SIDE // 2)


def with_nan() -> Tensor:
    x = images()
    x[2, 1, 0, 0] = float("nan")
    return x


OUTSIDE: dict[str, tuple[Callable[[], Any], str]] = {
    "normalised": (lambda: (images() - 0.5) / 0.25, f"x must be in [0, 1], got -2 to 2; {IN_MODEL}"),
    "normalised to [-1, 1]": (lambda: 2 * images() - 1, f"x must be in [0, 1], got -1 to 1; {IN_MODEL}"),
    "0..255": (lambda: 255 * images(), "x must be in [0, 1], got 0 to 255; divide images of 0..255 by 255"),
    "overshoot": (
        lambda: flat(-0.0625, 1.125),
        "x must be in [0, 1], got -0.0625 to 1.125; if resizing overshot, write x.clamp(0, 1)",
    ),
    "twice the tolerance": (
        lambda: flat(-2e-6, 1),
        "x must be in [0, 1], got -2e-06 to 1; if resizing overshot, write x.clamp(0, 1)",
    ),
    "NaN": (with_nan, "x must be in [0, 1], got NaN"),
    "infinite": (lambda: flat(0, float("inf")), "x must be in [0, 1], got 0 to inf; divide images of 0..255 by 255"),
    "uint8": (
        lambda: (255 * images()).byte(),
        "x must be floats in [0, 1], got uint8; for 0..255 write x.float() / 255",
    ),
    "int64": (
        lambda: (255 * images()).long(),
        "x must be floats in [0, 1], got int64; for 0..255 write x.float() / 255",
    ),
    "float16": (
        lambda: images().half(),
        "x must be float32 or float64, got float16, which rounds away perturbations of a grey level; write x.float() "
        "and cast inside the model",
    ),
    "bfloat16": (
        lambda: images().bfloat16(),
        "x must be float32 or float64, got bfloat16, which rounds away perturbations of a grey level; write x.float() "
        "and cast inside the model",
    ),
    "one image": (
        lambda: images()[0],
        "x must be a batch [B, C, H, W], got [3, 16, 16]; for one image write x[None]",
    ),
    "rows": (lambda: images().flatten(1), "x must be a batch [B, C, H, W], got [4, 768]"),
    "channels last": (
        lambda: images().permute(0, 2, 3, 1),
        "x must be [B, C, H, W], got [4, 16, 16, 3], channels last; write x.permute(0, 3, 1, 2)",
    ),
    "numpy": (lambda: images().numpy(), "x must be a tensor [B, C, H, W], got ndarray; use torch.as_tensor"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_an_attack_refuses_what_are_no_pixels(case: str) -> None:
    make, line = OUTSIDE[case]
    with pytest.raises(UserError) as refusal:
        fd.pgd(tiny(), make(), torch.arange(4), **KEY)
    assert str(refusal.value) == line


@pytest.mark.parametrize("outside", [-1e-6, 1 + 1e-6, 1 + 1e-7])
def test_rounding_is_clamped(outside: float) -> None:
    model, x, y = stir(tiny()).eval(), images(), torch.arange(4)
    x[0, 0, 0, 0] = outside
    found = fd.pgd(model, x, y, **KEY)
    assert torch.equal(found, fd.pgd(model, x.clamp(0, 1), y, **KEY))
    assert (found - plain_pgd(model, x.clamp(0, 1), y, **KEY)).abs().max() <= 1e-7


def test_the_ball_of_an_attack_on_pixels_is_that_of_plain_pytorch() -> None:
    model, x, y = stir(tiny()).eval().double(), images(8, dtype=torch.float64), torch.arange(8) % CLASSES
    found = fd.pgd(model, x, y, **KEY)
    assert (found - plain_pgd(model, x, y, **KEY)).abs().max() <= 1e-12
    assert (found - x).abs().max() == pytest.approx(8 / 255, abs=1e-12)


FORWARD: dict[str, tuple[Callable[[], Any], str]] = {
    "normalised": (
        lambda: (images() - 0.5) / 0.25,
        f"pixels must be in [0, 1], got -2 to 2; {IN_MODEL}{MEANT}",
    ),
    "normalised to [-1, 1]": (
        lambda: 2 * images() - 1,
        f"pixels must be in [0, 1], got -1 to 1; {IN_MODEL}{MEANT}",
    ),
    "0..255": (
        lambda: 255 * images(),
        f"pixels must be in [0, 1], got 0 to 255; divide images of 0..255 by 255{MEANT}",
    ),
    "NaN": (with_nan, f"pixels must be in [0, 1], got NaN{MEANT}"),
    "uint8": (
        lambda: (255 * images()).byte(),
        "pixels must be floats in [0, 1], got uint8; for 0..255 write pixels.float() / 255",
    ),
    "one image": (
        lambda: images()[0],
        "pixels must be a batch [B, C, H, W], got [3, 16, 16]; for one image write pixels[None]",
    ),
    "channels last": (
        lambda: images().permute(0, 2, 3, 1),
        "pixels must be [B, C, H, W], got [4, 16, 16, 3], channels last; write pixels.permute(0, 3, 1, 2)",
    ),
    "grey": (
        lambda: images()[:, :1],
        "pixels must be [B, 3, H, W], got [4, 1, 16, 16]; for grey images write pixels.expand(-1, 3, -1, -1)",
    ),
    "numpy": (lambda: images().numpy(), "pixels must be a tensor [B, C, H, W], got ndarray; use torch.as_tensor"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", FORWARD)
def test_a_model_refuses_what_are_no_pixels(case: str, training: bool) -> None:
    make, line = FORWARD[case]
    model = tiny().train(training)
    for _ in range(2):  # what was refused is not known from then on
        with pytest.raises(UserError) as refusal:
            model(make())
        assert str(refusal.value) == line


def test_timm_s_own_transform_is_refused() -> None:
    """What users of timm do first: its transform ends in Normalize."""
    model = tiny()
    config = timm.data.resolve_model_data_config(model.backbone) | {"input_size": (3, SIDE, SIDE), "crop_pct": 1.0}
    transform = timm.data.create_transform(**config)
    picture = Image.fromarray((images(1)[0].permute(1, 2, 0) * 255).byte().numpy())
    x = transform(picture)[None]
    assert x.min() < -0.9
    span = f"{float(x.min()):.4g} to {float(x.max()):.4g}"
    with pytest.raises(UserError, match=r"^pixels must be in \[0, 1\], got ") as refusal:
        model(x)
    assert span in str(refusal.value)
    with pytest.raises(UserError, match=rf"^x must be in \[0, 1\], got {span}; normalise in the model"):
        fd.pgd(model, x, [0], **KEY)


def test_pixels_that_are_meant_to_be_outside_pass() -> None:
    """A little noise at once, more after a first batch or by `pixels_checked`; the logits are the backbone's own."""
    model, x = stir(tiny()).eval(), images()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def expected(pixels: Tensor) -> Tensor:
        return model.backbone((pixels - model.mean) / model.std)

    with torch.no_grad():
        little = x + 0.1 * noise
        assert little.min() < -0.1
        assert torch.equal(model(little), expected(little))
        assert torch.equal(model(x + noise), expected(x + noise))
        other = tiny()
        other.pixels_checked = True
        other(x + noise)
        assert torch.equal(model(x.double()), expected(x)), "float64 is cast"


# -- evaluations ---------------------------------------------------------------------------------------------------


class Normalised:
    """A transform of one's own, as in timm: what EvalTransform gives as floats, with a factor and a shift."""

    def __init__(self, std: float, mean: float = 0.0):
        self._inner, self._std, self._mean = EvalTransform(size=SIDE, crop_pct=1.0), std, mean
        self.size = SIDE

    def __call__(self, *arguments: Any) -> Tensor:
        return (self._inner(*arguments).float() / 255 - self._mean) / self._std


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of four classes, each with a black and a white pixel."""
    root, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (root / f"class{label}").mkdir()
        for i in range(3):
            pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            pixels[0, 0], pixels[0, 1] = 0, 255
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    make_shards(root, folder, progress=False)
    return folder


@pytest.mark.parametrize(
    ("transform", "line"),
    [
        (Normalised(0.25, 0.5), f"data must be in [0, 1], got -2 to 2; {IN_MODEL}"),
        (Normalised(0.5, 0.5), f"data must be in [0, 1], got -1 to 1; {IN_MODEL}"),
        (Normalised(1 / 255), "data must be in [0, 1], got 0 to 255; divide images of 0..255 by 255"),
        (Normalised(0.9), "data must be in [0, 1], got 0 to 1.111; if resizing overshot, write data.clamp(0, 1)"),
    ],
    ids=["normalised", "to [-1, 1]", "0..255", "overshoot"],
)
def test_an_evaluation_refuses_normalised_images(
    transform: Normalised,
    line: str,
    shards: Path,
    unchanged: Callable[..., AbstractContextManager[None]],
) -> None:
    stream = EvalStream(shards, batch_size=4, transform=transform)
    with unchanged(shards), pytest.raises(UserError) as refusal:
        fd.evaluate(tiny(), stream, attacks=("clean",))
    assert str(refusal.value) == line


def test_an_evaluation_takes_floats_in_0_1(shards: Path) -> None:
    model = stir(tiny())
    floats = EvalStream(shards, batch_size=4, transform=Normalised(1.0))
    found = fd.evaluate(model, floats, attacks=("clean", "pgd2"))
    integers = EvalStream(shards, batch_size=4, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    assert found["attacks"] == fd.evaluate(model, integers, attacks=("clean", "pgd2"))["attacks"]
    (batch,) = EvalStream(shards, batch_size=12, transform=Normalised(1.0))
    assert torch.equal(batch.images, torch.cat([batch.pixels() for batch in integers])), "not cut to integers"
    with torch.no_grad():
        right = model.eval()(batch.images).argmax(1) == batch.labels
    assert found["attacks"]["clean"]["correct"] == right.int().tolist()


# -- training ------------------------------------------------------------------------------------------------------


class Looks(TorchDispatchMode):
    """Counts how often a range of values is looked at."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "aminmax" in str(func)
        return func(*args, **(kwargs or {}))


METHODS = ("standard", "pgd", "trades", "mart", "free", "fgsm_rs", "n_fgsm")


def _looks_in_training(comm: Comm) -> dict[str, int]:
    optim = OptimSettings(lr=1e-3, batch_size=4, epochs=1)
    engine = Engine(tiny(), optim, DistributedSettings(zero_stage=0), {}, comm, 10)
    counts = {}
    for name in METHODS:
        config = {"backbone": "none"}, {"train": "none"}, {"output_dir": "none"}, {"epochs": 1}, {"eps": 8 / 255}
        sections = dict(zip(("model", "data", "run", "optim", "threat"), config, strict=True))
        method = build_phases(Config.model_validate({**sections, "method": {"name": name}}), 2).at(0).method
        with Looks() as looks:
            for step, batch in enumerate(batches(2, 4, dtype=torch.float32)):
                method.step(engine, batch, step)
        counts[name] = looks.count
    return counts


def test_training_does_not_look_at_its_pixels(rank_server: RankServer) -> None:
    """On a GPU each look would wait for it. The public attack looks once a call, however many steps it makes."""
    assert rank_server.run(1, _looks_in_training) == [dict.fromkeys(METHODS, 0)]
    model = tiny()
    model(images())
    counts = []
    for steps in (1, 5):
        with Looks() as looks:
            fd.pgd(model, images(), torch.arange(4), eps=8 / 255, steps=steps, step_size=1 / 255)
        counts.append(looks.count)
    assert counts == [2, 2], "once at the pixels, once at the labels"
