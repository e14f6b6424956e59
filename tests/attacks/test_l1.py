"""L1: the projection is the nearest image in the ball and the box by a linear program and by the official code, and
PGD comes near the best perturbation of a linear model."""

import numpy as np
import pytest
import torch
from pyautoattack.autopgd_base import L1_projection
from scipy.optimize import linprog
from scipy.stats import kstest
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.threat import L1
from fulllora_dist.core.rng import sample_rng

SHAPE = (3, 4, 5)
D = 60


def drawn(seed: int, n: int = 8, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    """Images with some pixels at 0 and at 1, and where steps of many lengths have taken them."""
    generator = torch.Generator().manual_seed(seed)
    x = (1.4 * torch.rand(n, *shape, generator=generator, dtype=torch.float64) - 0.2).clamp(0, 1)
    lengths = torch.logspace(-2, 1, n, dtype=torch.float64).view(-1, 1, 1, 1)
    return x, x + lengths * torch.randn(n, *shape, generator=generator, dtype=torch.float64)


def furthest_along(direction: np.ndarray, x: np.ndarray, eps: float) -> float:
    """max <direction, z> over all perturbations z of x in the ball and the box, by a linear program: z = up - down."""
    bounds = [*((0, 1 - v) for v in x), *((0, v) for v in x)]
    found = linprog(np.concatenate([-direction, direction]), A_ub=np.ones((1, 2 * len(x))), b_ub=[eps], bounds=bounds)
    assert found.success
    return -found.fun


@pytest.mark.parametrize("eps", [0.05, 1.0, 12.0, 100.0])
def test_nothing_in_the_ball_and_the_box_is_nearer(eps: float) -> None:
    """z is the projection of d where no point of the convex set lies further along d - z than z itself."""
    x, moved = drawn(0)
    z = L1(eps).within(x, moved) - x
    assert (z.abs().flatten(1).sum(dim=1) <= eps * (1 + 1e-12)).all()
    assert ((x + z >= 0) & (x + z <= 1)).all()
    for image, delta, nearest in zip(x, moved - x, z, strict=True):
        rest = (delta - nearest).flatten().numpy()
        here = float(rest @ nearest.flatten().numpy())
        assert furthest_along(rest, image.flatten().numpy(), eps) <= here + 1e-9 * (1 + abs(here))


@pytest.mark.parametrize("eps", [0.5, 5.0])
def test_equals_the_official_projection(eps: float) -> None:
    x, moved = (t.float() for t in drawn(1, 32))
    theirs = moved + L1_projection(x, moved - x, eps)
    error = (L1(eps).within(x, moved) - theirs).abs().flatten(1).amax(dim=1)
    assert (error <= 2e-7 * (1 + (moved - x).abs().flatten(1).sum(dim=1))).all(), "up to rounding of their fp32 sums"


def test_large_images_in_fp32_use_the_whole_ball_and_no_more() -> None:
    x, moved = drawn(2, 2, (3, 224, 224))
    for eps in (12.0, 255.0):
        z = L1(eps).within(x.float(), moved.float()).double() - x.float().double()
        assert z.abs().flatten(1).sum(dim=1).tolist() == pytest.approx([eps, eps], rel=1e-4)


def test_a_step_is_shared_by_the_largest_values() -> None:
    """The best direction of which no value takes more than 1 / 30 of the length: 1 % of 3,000 values are 30."""
    gradient = torch.randn(2, 3, 20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient[1, :, 1:] = 0
    gradient[1, 0, 0, 20:] = gradient[1, 1:, 0] = 0  # fewer than 30 are not zero
    step = L1(1.0).steepest(gradient)
    assert step.abs().flatten(1).sum(dim=1).tolist() == pytest.approx([1, 1])
    assert step.abs().flatten(1).amax(dim=1).tolist() == pytest.approx([1 / 30, 1 / 20])
    rise = (step * gradient).flatten(1).sum(dim=1)
    assert rise[0] == pytest.approx(gradient[0].flatten().abs().sort().values[-30:].mean())
    assert rise[1] == pytest.approx(gradient[1, 0, 0, :20].abs().mean())


def test_starts_are_uniform_in_the_ball() -> None:
    """The share of the ball within r is (r / eps)^d, and each value of it has its distribution."""
    like = torch.zeros(4000, 1, 2, 2, dtype=torch.float64)
    start = L1(0.7).random_start(sample_rng(3, "start", 0, torch.arange(len(like))), like).flatten(1) / 0.7
    assert kstest((start.abs().sum(dim=1) ** 4).numpy(), "uniform").pvalue > 0.01
    for value in start.T:
        # |z| of one of four: P(|z| > t) = (1 - t)^4
        assert kstest(((1 - value.abs()) ** 4).numpy(), "uniform").pvalue > 0.001
        assert abs((value > 0).double().mean() - 0.5) < 4 * 0.5 / len(like) ** 0.5


class Linear(nn.Module):
    """Two logits, whose difference is linear in the pixels."""

    def __init__(self, d: int):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("w", torch.randn(d, generator=generator, dtype=torch.float64))

    def forward(self, pixels: Tensor) -> Tensor:
        score = pixels.flatten(1) @ self.w
        return torch.stack([-score, score], dim=1)


def test_pgd_comes_near_the_best_of_a_linear_model() -> None:
    """Which takes the steepest values as far as the box lets them, until eps is used up: here about the 1 % of
    which a step is made."""
    shape, eps, model = (3, 20, 50), 20.0, Linear(3000)
    x, _ = drawn(4, 4, shape)
    labels = torch.zeros(len(x), dtype=torch.int64)
    found = fd.pgd(model, x, labels, eps=eps, norm="l1", steps=40, step_size=eps / 10)
    assert ((found - x).abs().flatten(1).sum(dim=1) <= eps * (1 + 1e-9)).all()
    for image, adversarial in zip(x.flatten(1), found.flatten(1), strict=True):
        best = furthest_along(model.w.numpy(), image.numpy(), eps)
        assert 0.97 * best <= float((adversarial - image) @ model.w) <= best * (1 + 1e-9)


@pytest.mark.parametrize("project", [True, False])
def test_a_single_step_passes_over_what_cannot_go_further(project: bool) -> None:
    """As each step of PGD does: half of the values are at the edge that the largest gradients point to."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2, dtype=torch.float64))
    x, y = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64), torch.tensor([0, 1])
    weight = model[1].weight.detach().view(2, 3, 8, 8)
    towards = torch.stack([weight[1] - weight[0], weight[0] - weight[1]])  # in which the loss rises
    x = torch.where(towards.abs() > towards.abs().median(), (towards > 0).double(), x)
    found = single_step(model, x, y, eps=1.0, noise=0, step_size=1.0, project=project, norm="l1", ids=torch.arange(2))
    moved = (found - x).abs()
    torch.testing.assert_close(moved.sum(dim=(1, 2, 3)), torch.ones(2, dtype=torch.float64))
    assert moved[towards.abs() > towards.abs().median()].max() == 0
    if project:
        same = fd.pgd(model, x, y, eps=1.0, steps=1, step_size=1.0, norm="l1", random_start=False)
        torch.testing.assert_close(found, same)
