"""Each check warns of a model that was built to have its symptom, and is quiet on three healthy ones."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_cases import EPS, HEALTHY, stream
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.attacks.threat import Linf
from fulllora_dist.data.batch import Batch
from fulllora_dist.evaluation.attacks import EvalAttack
from fulllora_dist.evaluation.checks import CHECKS, CheckBatch
from fulllora_dist.evaluation.function import evaluate
from fulllora_dist.evaluation.reported import order_warnings
from fulllora_dist.evaluation.summary import table
from fulllora_dist.models.branches import branches_of
from fulllora_dist.models.precision import in_full_fp32
from tests.tiny import tiny
from tools.experiments.symptoms import Around, Detached, Noisy, Probabilities, Saturated

LEVELS = 32 / 255


class AroundMeans(Around):
    """With the mean image of each class."""

    def __init__(self, model: nn.Module, images: tuple[Tensor, Tensor]):
        super().__init__(model)
        x, y = images
        self.means = torch.stack([x[y == label].mean(dim=0) for label in range(4)]).flatten(1)


class NearestMean(AroundMeans):
    """Without a gradient, too, and noise does not change what is near: PGD fools it at no eps."""

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x.detach().flatten(1), self.means).square() + 0 * x.sum()


class Trench(AroundMeans):
    """Pixels of an image lie on a coarse grid, so the model knows how far a perturbation went along a direction. The
    margin falls a little, rises again, and is negative at the edge of the ball: small steps stay in between."""

    def forward(self, x: Tensor) -> Tensor:
        delta = x - (x / LEVELS).round().detach() * LEVELS
        pattern = torch.ones(x[0].numel()).view(x.shape[1:])
        pattern.view(-1)[::2] = -1
        t = (delta * pattern).flatten(1).mean(dim=1) / EPS
        dip = torch.where(t < 0.25, 1 - 2 * t.clamp_min(-0.1), 0.5 + 2 * (t - 0.25))
        margin = torch.where(t > 0.85, -1, dip)
        own = torch.nn.functional.one_hot(torch.cdist(x.detach().flatten(1), self.means).argmin(dim=1), 4)
        return own * margin[:, None]


class Rough(AroundMeans):
    """Waves shorter than eps: each start ends in another valley."""

    def forward(self, x: Tensor) -> Tensor:
        waves = torch.randn(x[0].numel(), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        flat = x.flatten(1).double()
        return -0.5 * torch.cdist(flat, self.means.double()).square() + 4 * torch.sin(2 * flat @ waves)


class OnAGrid:
    """Images of few grey levels."""

    def __init__(self, images: Any):
        self._images = images
        self.batches, self.index, self.digest = images.batches, images.index, "on a grid"
        self.settings = images.settings

    def read(self, ids: np.ndarray) -> Batch:
        batch = self._images.read(ids)
        return replace(batch, images=((batch.pixels() / LEVELS).round() * LEVELS).clamp(0, 7 * LEVELS))


SICK: dict[str, tuple[type[Around] | None, type[OnAGrid] | None]] = {
    "determinism": (Noisy, None),
    "probabilities": (Probabilities, None),
    "zero_gradients": (Saturated, None),
    "single_step": (Trench, OnAGrid),
    "huge_eps": (NearestMean, None),
    "restarts": (Rough, None),
    "square": (Detached, None),
}


def _check(model: nn.Module, images: Any, eps: float = EPS) -> dict[str, Any]:
    return evaluate(model, images, attacks=("clean",), eps=eps, gradient_masking_samples=50)


def _broken(kind: type[Around] | None, model: nn.Module, training: tuple[Tensor, Tensor]) -> nn.Module:
    if kind is None:
        return model
    return kind(model, training) if issubclass(kind, AroundMeans) else kind(model)


(TRANSFER,) = (check for check in CHECKS if check.name == "transfer")


def _batch(model: nn.Module, images: Path, eps: float) -> CheckBatch:
    (batch,) = stream(images, 50)
    return CheckBatch(model, batch.pixels(), batch.labels, batch.ids, Linf(eps), 0)


class SaturatedByBranches(fd.AdaptedModel):
    """Where a branch acts, softmax is one or zero, and no gradient of cross-entropy is left."""

    def forward(self, pixels: Tensor) -> Tensor:
        on = any(branch.module.on for branch in branches_of(self))
        return super().forward(pixels) * (1e5 if on else 1)


def test_branches_that_mask_gradients_are_seen_without_them(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    model = copy.deepcopy(healthy["fulllora"])
    model.__class__ = SaturatedByBranches
    batch = _batch(model, images, 3 * EPS)
    measured = TRANSFER.measure(batch)
    assert measured is not None
    line = TRANSFER.warn(measured)
    assert line is not None
    assert line.startswith("pgd20 on the model without its branches fools ")
    assert batch.correct.float().mean() > 0.5


def test_the_examples_for_the_bare_model_by_hand(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    model, eps = healthy["fulllora"], 2 * EPS
    batch = _batch(model, images, eps)
    found, x, y = TRANSFER.measure(batch), batch.x, batch.y
    bare = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            if name.endswith(".B"):
                parameter.zero_()
    correct = model(x).argmax(1) == y
    by_bare, direct = (
        correct & (model(EvalAttack.parse("pgd20")(m, x, y, threat=Linf(eps), seed=0, ids=batch.ids)).argmax(1) == y)
        for m in (bare, model)
    )
    assert found is not None
    assert found == {"other_alone": (direct & ~by_bare).sum(), "many_alone": (~direct & by_bare).sum()}
    assert found["many_alone"] > 0


def test_branches_are_found_inside_of_modules_of_others(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    class Theirs(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    wrapped, bare = (
        TRANSFER.measure(_batch(model, images, 2 * EPS))
        for model in (nn.Sequential(Theirs(healthy["fulllora"])), healthy["fulllora"])
    )
    assert bare is not None
    assert wrapped == bare
    assert all(branch.module.on for branch in branches_of(healthy["fulllora"]))
    assert TRANSFER.measure(_batch(Theirs(healthy["full_at"]), images, EPS)) is None


@pytest.mark.parametrize("check", [check.name for check in CHECKS if check.name != "transfer"])
def test_a_symptom_is_seen(
    check: str, healthy: dict[str, fd.AdaptedModel], training: tuple[Tensor, Tensor], images: Path
) -> None:
    broken, other = SICK[check]
    model: nn.Module = _broken(broken, healthy["standard"], training)
    eps = 3 * EPS if check == "square" else EPS  # 300 queries do little at a small one
    found = _check(model, other(stream(images)) if other else stream(images), eps)
    assert [line for line in found["warnings"] if line.startswith(f"{check}: ")], (found["checks"], found["warnings"])
    assert found["attacks"]["clean"]["accuracy"] > 0.5, "it is correct without an attack"


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_models_are_left_alone(name: str, healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    found = _check(healthy[name], stream(images))
    assert found["warnings"] == []
    names = [check.name for check in CHECKS if name == "fulllora" or check is not TRANSFER]
    assert list(found["checks"]) == names
    not_made = "" if name == "fulllora" else "; not made: transfer"
    assert table(found).endswith(f"\n{len(names)} checks for masked gradients, no warning{not_made}")
    assert found["checks"]["huge_eps"]["n"] >= 15, "right often enough for a symptom to show"


def test_without_checks_none_is_made(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    found = evaluate(healthy["standard"], stream(images, 8), attacks=("clean",), eps=EPS)
    assert (found["checks"], found["warnings"]) == ({}, [])
    at_zero = evaluate(healthy["standard"], stream(images, 8), attacks=("clean",), eps=0, gradient_masking_samples=8)
    assert at_zero["checks"] == {}


def test_reported_figures_in_the_wrong_order_are_said() -> None:
    """fgsm or square alone stronger than an iterated attack on the gradient; a chance win is none."""
    all_right, none_right, but_few = torch.ones(50).bool().numpy(), torch.zeros(50).bool().numpy(), torch.arange(50) > 3
    names = {name: EvalAttack.parse(name) for name in ("fgsm", "square", "pgd3", "pgd20", "apgd-ce", "clean")}
    names["transfer"] = EvalAttack.parse("transfer:runs/a/adapter")

    def said(**left: np.ndarray) -> list[str]:
        columns = {names[name.replace("_", "-")]: rows for name, rows in left.items()}
        return [line.partition(" fools")[0] for line in order_warnings(columns, "eps = 4: ")]

    assert said(clean=all_right, fgsm=none_right, pgd3=all_right) == []
    assert said(fgsm=none_right, pgd20=all_right) == ["single_step: eps = 4: fgsm"]
    assert said(square=none_right, pgd20=all_right, apgd_ce=none_right) == ["square: eps = 4: square"]
    assert said(transfer=none_right, pgd20=all_right) == ["transfer: eps = 4: transfer:runs/a/adapter"]
    assert said(transfer=all_right, pgd20=none_right, fgsm=all_right) == []
    assert said(fgsm=none_right, transfer=all_right) == [], "no attack on this model"
    assert said(fgsm=all_right, square=all_right, pgd20=none_right, apgd_ce=none_right) == []
    assert said(fgsm=but_few.numpy(), pgd20=all_right) == []


def test_of_a_whole_evaluation(
    healthy: dict[str, fd.AdaptedModel], training: tuple[Tensor, Tensor], images: Path
) -> None:
    """Without a check of its own, too."""
    broken = Trench(healthy["standard"], training)
    found = evaluate(broken, OnAGrid(stream(images, 50)), attacks=("clean", "fgsm", "pgd20"), eps=EPS)
    (line,) = found["warnings"]
    assert line.startswith("single_step: eps = 0.03137: fgsm fools ")
    assert " images that pgd20 does not, and 0 are the other way round" in line


def test_no_number_is_no_answer(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    """argmax of NaN is the first class."""

    class Nan(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return healthy["standard"](x) * torch.where(x.mean(dim=(1, 2, 3)) > 0.5, torch.nan, 1)[:, None]

    found = evaluate(Nan(), stream(images), attacks=("clean", "pgd3"), eps=EPS)["attacks"]
    (whole,) = stream(images, batch_size=200)
    bright = whole.pixels().mean(dim=(1, 2, 3)) > 0.5
    assert bright[whole.labels == 0].any()
    assert not any(right and of_nan for right, of_nan in zip(found["clean"]["correct"], bright, strict=True))
    assert found["clean"]["accuracy"] > 0


@pytest.mark.parametrize("finetune", ["fulllora", "full"])
def test_an_adapted_model_knows_that_it_computes_in_bf16(finetune: str, images: Path) -> None:
    """Also where its parameters are kept in fp32."""
    found = evaluate(tiny(finetune=finetune, precision="bf16"), stream(images, 4), attacks=("clean",), eps=EPS)
    assert found["precision"] == "bf16"


def test_fp32_is_full_fp32_inside_and_as_before_outside() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with in_full_fp32():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bf16_is_said(healthy: dict[str, fd.AdaptedModel], images: Path) -> None:
    class InBf16(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return healthy["standard"](x) * self.scale

    found = evaluate(InBf16(), stream(images, 8), attacks=("clean",), eps=EPS)
    assert found["warnings"] == ["precision: computed in bf16; a figure to report is computed in fp32"]
