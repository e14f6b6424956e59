"""AutoAttack as we call it against the official code alone, and the other new attacks against written-out ones."""

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eval_cases import EPS, IMAGES, stream
from pyautoattack import AutoAttack
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.attacks.settings import Norm
from fulllora_dist.attacks.threat import Linf, threat_model
from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.function import evaluate
from fulllora_dist.evaluation.official import run_part
from tests.tiny import CLASSES

SMALL = 12
OFFICIAL = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def _alone(
    model: fd.AdaptedModel, x: Tensor, y: Tensor, eps: float, norm: str, parts: list[str], seed: int, batch_size: int
) -> list[int]:
    """The official evaluation, its targeted attacks with the three wrong classes that there are."""
    adversary = AutoAttack(model, norm=OFFICIAL[norm], eps=eps, version="standard", seed=seed)
    adversary.attacks_to_run = parts
    adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = CLASSES - 1
    _, predicted = adversary.run_standard_evaluation(x, y, batch_size=batch_size)
    return (predicted == y).int().tolist()


@pytest.mark.parametrize(
    ("name", "norm", "eps"),
    [
        ("apgd-ce", "linf", EPS),
        ("apgd-ce+apgd-t", "linf", EPS),
        ("fab-t", "l2", 0.3),
        ("apgd-t", "l1", 1.0),
        pytest.param("apgd-ce+apgd-t+fab-t+square", "l1", 1.0, marks=pytest.mark.long),
        pytest.param("square+apgd-ce", "l2", 0.3, marks=pytest.mark.long),
    ],
)
def test_parts_equal_the_official_code(
    healthy: dict[str, fd.AdaptedModel], images: Path, name: str, norm: str, eps: float
) -> None:
    """One call of it on all images: it puts what a part has left into full batches again."""
    model, batches = healthy["full_at"], stream(images, SMALL, batch_size=5)
    found = evaluate(model, batches, attacks=(name,), eps=eps, norm=norm, seed=5)["attacks"]  # type: ignore[arg-type]
    (whole,) = stream(images, SMALL, batch_size=SMALL)
    expected = _alone(model, whole.pixels(), whole.labels, eps, norm, name.split("+"), 5, batch_size=5)
    assert found[name]["correct"] == expected
    assert 0 < sum(expected) < len(expected)


@pytest.mark.long
def test_the_standard_version_on_200_images(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    model, batches = healthy["full_at"], stream(images)
    found = evaluate(model, batches, attacks=("clean", "pgd20", "autoattack"), eps=EPS, seed=3)["attacks"]
    (whole,) = stream(images, batch_size=IMAGES)
    expected = _alone(
        model, whole.pixels(), whole.labels, EPS, "linf", ["apgd-ce", "apgd-t", "fab-t", "square"], 3, batch_size=50
    )
    ours = found["autoattack"]["correct"]
    assert ours == expected
    assert sum(ours) <= sum(found["pgd20"]["correct"]) < sum(found["clean"]["correct"])
    assert sum(ours) > 0


class Unmoved(nn.Module):
    """Right at each image near its own, by no more than it must be; counts passes of an image. Twelve classes."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards, self.backwards = 0, 0
        generator = torch.Generator().manual_seed(0)
        self.weights = torch.randn(3 * 8 * 8, 12, generator=generator) * 1e-3

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._back)
        return x.flatten(1) @ self.weights + torch.arange(12.0)

    def _back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@pytest.mark.parametrize(
    ("part", "norm"),
    [
        *itertools.product(("apgd-ce", "apgd-t", "fab-t"), ("linf", "l1")),
        ("apgd-ce", "l2"),
        ("apgd-dlr", "l1"),
        ("square", "l2"),
    ],
)
def test_the_passes_of_an_image_that_survives_are_counted(part: str, norm: Norm) -> None:
    """By the official attacks themselves, within their first and last passes."""
    model, x, y = Unmoved(), torch.rand(1, 3, 8, 8), torch.tensor([11])
    _, survives = run_part(model, x, y, threat=threat_model(norm, 0.01), seed=0, part=part)
    assert survives.all()
    forward, backward = EvalAttack.parse(part).forward_and_backward(norm)
    assert forward == pytest.approx(model.forwards, rel=0.05)
    assert backward == pytest.approx(model.backwards, rel=0.05)


def test_the_generator_of_training_is_untouched(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    before = torch.get_rng_state()
    evaluate(healthy["full_at"], stream(images, 4), attacks=("apgd-ce+fab-t",), eps=EPS, gradient_masking_samples=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_fgsm_is_one_step_from_the_image(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    model, batch = healthy["standard"], stream(images, 8).read(stream(images, 8).ids)
    x = batch.pixels().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), batch.labels), x)
    expected = (x.detach() + EPS * gradient.sign()).clamp(0, 1)
    made = EvalAttack.parse("fgsm")(model, x.detach(), batch.labels, threat=Linf(EPS), seed=0, ids=batch.ids)
    torch.testing.assert_close(made, expected)


def test_dlr_has_no_scale(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    """Where cross-entropy's gradient is rounded to zero, it still finds the way."""

    class Scaled(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1e5 * healthy["full_at"](x) + 7

    found = [
        evaluate(model, stream(images), attacks=("pgd10", "dlr10"), eps=EPS)["attacks"]
        for model in (healthy["full_at"], Scaled())
    ]
    accuracy = [{name: score["accuracy"] for name, score in scores.items()} for scores in found]
    assert accuracy[1]["dlr10"] == pytest.approx(accuracy[0]["dlr10"], abs=0.01)
    assert accuracy[1]["pgd10"] > accuracy[0]["pgd10"] + 0.05


@pytest.mark.parametrize(("name", "needed"), [("autoattack", 4), ("apgd-dlr", 3), ("dlr5", 3)])
def test_too_few_classes_are_refused(name: str, needed: int) -> None:
    with pytest.raises(UserError, match=f"{name} needs at least {needed} classes"):
        EvalAttack.parse(name).check_classes(needed - 1)
    EvalAttack.parse(name).check_classes(needed)


class Valley(nn.Module):
    """Class 0 unless the mean of the pixels is within 0.1 of grey: the loss of class 0 rises towards grey, and a large
    step goes beyond it."""

    def forward(self, x: Tensor) -> Tensor:
        far = (x.mean(dim=(1, 2, 3)) - 0.5).square() - 0.01
        return torch.stack([far, -far, -far.abs() - 1], dim=1)


@pytest.mark.parametrize("name", ["fgsm", "pgd1", "cw1"])
def test_clean_mistakes_are_no_robustness(name: str) -> None:
    """An attack may push a wrong prediction to the right class: the image itself is in the ball."""
    x, y, ids = torch.full((1, 3, 4, 4), 0.45), torch.tensor([0]), torch.tensor([0])
    attack, metadata = EvalAttack.parse(name), {"threat": Linf(0.4), "seed": 0, "ids": ids}
    assert Valley()(x).argmax() != y
    assert Valley()(attack(Valley(), x, y, **metadata)).argmax() == y
    assert not attack.correct(Valley(), x, y, **metadata).any()
