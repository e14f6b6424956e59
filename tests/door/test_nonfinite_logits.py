"""Logits that are NaN or infinite are a wrong prediction under every attack, and the report says how many there are."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyautoattack import AutoAttack
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.attacks.threat import L2, Linf, Threat
from fulllora_dist.core.rng import sample_rng
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.official import square
from fulllora_dist.evaluation.summary import table
from fulllora_dist.registry.predict import predict
from tests.tiny import CLASSES, SIDE, tiny

EPS = 0.03  # no multiple of a grey level
SHAPE = (3, SIDE, SIDE)
PARTS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
ATTACKS = ("clean", "fgsm", "pgd3", "pgd2x2", "cw3", "dlr3", *PARTS, "autoattack")


def _images() -> tuple[Tensor, Tensor, Tensor]:
    """12 images of four classes on a grid of grey levels, with labels and ids: of each class one that is clear, one
    that is near to the next class, and one that is bright."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(60, 140, (CLASSES, *SHAPE), generator=generator)
    noise = torch.randint(-30, 30, (3, CLASSES, *SHAPE), generator=generator)
    levels = prototypes + noise
    levels[1] += ((prototypes.roll(-1, 0) - prototypes) * 0.3).round().long()
    levels[2] += 80
    return levels.flatten(0, 1) / 255, torch.arange(CLASSES).repeat(3), torch.arange(12)


X, Y, IDS = _images()
BRIGHT = X.mean(dim=(1, 2, 3)) > 0.55


class Nearest(nn.Module):
    """The nearest class mean, whatever the brightness: logits [B, 4], linear in the pixels."""

    def __init__(self) -> None:
        super().__init__()
        means = torch.stack([X[label == Y].mean(dim=0).flatten() for label in range(CLASSES)])
        means = means - means.mean(dim=1, keepdim=True)
        self.register_buffer("means", means)
        self.register_buffer("squares", means.square().sum(dim=1) / 2)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return (flat - flat.mean(dim=1, keepdim=True)) @ self.means.T - self.squares


class Broken(nn.Module):
    """Nearest, but for the images where `where` is true: there all logits, or those of one class, are `value`."""

    def __init__(self, where: Callable[[Tensor], Tensor], value: float = torch.nan, column: int | None = None):
        super().__init__()
        self.model, self.where, self.value, self.column = Nearest(), where, value, column

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        broken = self.where(x)[:, None].expand(-1, CLASSES)
        if self.column is not None:
            broken = broken & (torch.arange(CLASSES) == self.column)
        return torch.where(broken, self.value, logits)


def everywhere(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool)


def bright(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2, 3)) > 0.55


def perturbed(x: Tensor) -> Tensor:
    """Off the grid of grey levels."""
    return ((x * 255).round() - x * 255).abs().amax(dim=(1, 2, 3)) > 1e-3


def survivors(model: nn.Module, name: str, threat: Threat) -> list[bool]:
    return EvalAttack.parse(name).correct(model, X, Y, threat=threat, seed=3, ids=IDS).tolist()


def official(part: str, threat: Threat, chosen: Tensor) -> list[bool]:
    """The official code on some of the images, and the model whose logits are all finite."""
    norm = {"linf": "Linf", "l2": "L2"}[threat.norm]
    adversary = AutoAttack(Nearest(), norm=norm, eps=threat.eps, version="standard", seed=3)
    adversary.attacks_to_run = [part]
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = CLASSES - 1
    x, y = X[chosen], Y[chosen]
    _, predicted = adversary.run_standard_evaluation(x, y, batch_size=len(x))
    return (predicted == y).tolist()


def test_the_model_is_right_and_some_images_are_bright() -> None:
    assert torch.equal(Nearest()(X).argmax(dim=1), Y)
    assert BRIGHT.tolist() == [False] * 8 + [True] * 4
    assert not perturbed(X).any()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_model_without_a_finite_logit_has_no_correct_image(attack: str, value: float) -> None:
    assert survivors(Broken(everywhere, value), attack, Linf(EPS)) == [False] * 12


@pytest.mark.parametrize("attack", ATTACKS)
def test_where_any_change_breaks_the_logits_nothing_is_robust(attack: str) -> None:
    expected = [attack == "clean"] * 12
    assert survivors(Broken(perturbed), attack, Linf(EPS)) == expected


@pytest.mark.parametrize(
    ("part", "threat", "value", "column"),
    [
        ("apgd-ce", Linf(0.06), torch.nan, None),
        ("apgd-ce", L2(1.3), torch.inf, 0),
        ("apgd-dlr", Linf(0.06), torch.nan, 3),
        ("apgd-t", Linf(0.06), torch.inf, None),
        ("fab", Linf(0.06), torch.nan, None),
        ("fab-t", Linf(0.06), -torch.inf, 0),
    ],
)
def test_the_others_are_attacked_as_if_alone(part: str, threat: Threat, value: float, column: int | None) -> None:
    """Bright images are wrong; the others get the verdict of the official code on them and the whole model."""
    others = official(part, threat, ~BRIGHT)
    assert survivors(Broken(bright, value, column), part, threat) == [*others, *[False] * 4]
    assert 0 < sum(others) < len(others), "this radius shows nothing"


def test_square_attacks_the_others_as_if_alone() -> None:
    """The NaN of one class alone made it fail. Here it comes at one query of one image, after which the attack begins
    anew: with one more class its examples are those of the model that never had it."""
    alone = AutoAttack(Nearest(), norm="Linf", eps=0.25, version="standard", seed=5).square
    alone.n_queries = 300
    calls = 0

    class Once(Nearest):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            logits = super().forward(x)
            return logits.index_fill(1, torch.tensor([0]), torch.nan) if calls == 3 else logits

    found = square(Once(), X, Y, threat=Linf(0.25), seed=5, queries=300)
    torch.testing.assert_close(found, alone.perturb(X, Y), rtol=0, atol=0)
    assert calls > 100
    broken = Broken(bright, torch.nan, 0)
    every = square(broken, X, Y, threat=Linf(EPS), seed=5, queries=100)
    assert ((every - X).abs() <= EPS + 1e-6).all()


@pytest.mark.parametrize("part", ["apgd-ce", "apgd-t"])
def test_finite_logits_are_handed_to_the_official_code_as_they_are(part: str) -> None:
    assert survivors(Nearest(), part, Linf(0.06)) == official(part, Linf(0.06), everywhere(X))


def test_an_infinite_logit_of_the_label_is_no_answer() -> None:
    right = Broken(everywhere, torch.inf, column=0)
    assert right(X).argmax(dim=1).tolist() == [0] * 12
    assert survivors(right, "clean", Linf(EPS)) == survivors(right, "apgd-ce", Linf(EPS)) == [False] * 12


def test_each_restart_that_ends_at_nan_fools_the_first_class_too() -> None:
    """Without a gradient an example is its random start; NaN where that is brighter than the image."""
    grey, label = torch.full((40, *SHAPE), 0.5), torch.zeros(40, dtype=torch.int64)

    class Brighter(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = torch.tensor([1.0, 0.0]).expand(len(x), 2) + 0 * x.mean()
            return torch.where(x.mean(dim=(1, 2, 3))[:, None] > 0.5 + 1e-9, torch.nan, logits)

    ids = torch.arange(40)
    starts = [(2 * sample_rng(0, f"eval/pgd1x2/start/{k}", 0, ids).uniform(SHAPE) - 1) * EPS for k in range(2)]
    means = [start.mean(dim=(1, 2, 3)) <= 0 for start in starts]
    expected = (means[0] & means[1]).tolist()
    found = EvalAttack.parse("pgd1x2").correct(Brighter(), grey, label, threat=Linf(EPS), seed=0, ids=ids).tolist()
    assert found == expected
    assert 0 < sum(expected) < 40


@pytest.mark.parametrize("norm", [Linf(EPS), L2(0.5)])
@pytest.mark.parametrize("attack", ["fgsm", "pgd3", "apgd-ce"])
def test_a_gradient_that_is_nan_moves_no_image_out_of_the_ball(attack: str, norm: Threat) -> None:
    """Its logits are finite, and right all over the ball: so it is robust, and no pixel becomes NaN."""

    class NanGradient(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Nearest()(X)[: len(x)] + torch.sqrt((x - x).sum(dim=(1, 2, 3)))[:, None]

    x, y, ids = X[:2], Y[:2], IDS[:2]
    examples = EvalAttack.parse(attack)(NanGradient(), x, y, threat=norm, seed=0, ids=ids)
    assert examples.isfinite().all()
    assert EvalAttack.parse(attack).correct(NanGradient(), x, y, threat=norm, seed=0, ids=ids).tolist() == [True] * 2


# ---- the whole evaluation


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 12 images."""
    root, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("shards")
    for i, (image, label) in enumerate(zip(X, Y, strict=True)):
        (root / f"class{label}").mkdir(exist_ok=True)
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(root / f"class{label}" / f"{i:02d}.png")
    make_shards(root, folder, progress=False)
    return folder


def _evaluate(model: nn.Module, shards: Path, *attacks: str, checked: int = 0, eps: float = EPS) -> dict:
    images = EvalStream(shards, batch_size=5, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    return fd.evaluate(model, images, attacks=attacks, eps=eps, gradient_masking_samples=checked)


def test_the_report_counts_logits_and_images(shards: Path) -> None:
    """Of the four bright images two logits each are NaN, of the others none, under each attack."""

    class TwoColumns(Broken):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(bright(x)[:, None] & (torch.arange(CLASSES) < 2), torch.nan, self.model(x))

    report = _evaluate(TwoColumns(bright), shards, "clean", "pgd2", "apgd-ce")
    wrong = "these images count as wrong"
    assert report["warnings"] == [
        f"finite: 8 logits of 4 of 12 images are not finite under clean: {wrong}",
        f"finite: 8 logits of 4 of 12 images are not finite under pgd2 at eps = 0.03: {wrong}",
        f"finite: 8 logits of 4 of 12 images are not finite under apgd-ce at eps = 0.03: {wrong}",
    ]
    assert [sum(report["attacks"][name]["correct"]) for name in ("clean", "apgd-ce")] == [8, sum(official_like(shards))]
    assert f"warning: {report['warnings'][0]}" in table(report).splitlines()


def official_like(shards: Path) -> list[int]:
    """What of the images that are not bright the whole model keeps under the same attack."""
    images = EvalStream(shards, batch_size=5, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    report = _evaluate(Nearest(), shards, "apgd-ce")
    dark = [not bool(bright(images.read(np.array([i])).pixels())) for i in range(12)]
    return [correct for correct, is_dark in zip(report["attacks"]["apgd-ce"]["correct"], dark, strict=True) if is_dark]


def test_logits_that_break_under_attack_alone_are_counted_there(shards: Path) -> None:
    report = _evaluate(Broken(perturbed), shards, "clean", "fgsm")
    assert report["warnings"] == [
        "finite: 48 logits of 12 of 12 images are not finite under fgsm at eps = 0.03: these images count as wrong"
    ]
    assert (report["attacks"]["clean"]["accuracy"], report["attacks"]["fgsm"]["accuracy"]) == (1, 0)


@pytest.mark.parametrize("where", [everywhere, bright, perturbed])
def test_the_other_checks_end_and_their_numbers_are_finite(shards: Path, where: Callable[[Tensor], Tensor]) -> None:
    """No traceback, no NaN in evaluation.json, and no word of a random model."""
    report = _evaluate(Broken(where), shards, "clean", checked=12)
    text = json.dumps(report, allow_nan=False)
    assert json.loads(text)["checks"]["determinism"] == {"change": 0}
    assert not [line for line in report["warnings"] if line.startswith("determinism")]


def test_a_healthy_model_is_not_warned_of(shards: Path) -> None:
    assert _evaluate(Nearest(), shards, "clean", "fgsm")["warnings"] == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_prediction_without_finite_logits_is_none(shards: Path, tmp_path: Path, value: float) -> None:
    model = tiny(mean=(0,) * 3, std=(1,) * 3)
    broken = Broken(bright, value)
    broken.anchor = nn.Parameter(torch.zeros(1))
    output = tmp_path / "out.jsonl"
    classes = [f"class{k}" for k in range(CLASSES)]
    transform = EvalTransform(size=SIDE, crop_pct=1.0, interpolation=model.info.interpolation)
    counts = predict(broken, str(shards), str(output), transform, classes, progress=False)
    assert counts == {"pictures": 12, "predicted": 12, "unreadable": 4}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row in rows:
        if row["picture"].split("/")[-1] in ("08", "09", "10", "11"):
            assert row == {"picture": row["picture"], "error": "the model's logits are not finite"}
        else:
            assert row["class"] == row["picture"].split("/")[0]
