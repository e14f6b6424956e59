"""All norms everywhere: projection, steepest step and start are what geometry says, sample by sample."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.threat import THREATS, in_box, threat_model
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import sample_rng

NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "linf": lambda d: d.abs().flatten(1).max(dim=1).values,
    "l2": lambda d: torch.tensor([math.sqrt(sum(v * v for v in one.flatten().tolist())) for one in d]),
    "l1": lambda d: torch.tensor([math.fsum(map(abs, one.flatten().tolist())) for one in d], dtype=torch.float64),
}
DUAL: dict[str, Callable[[Tensor], Tensor]] = {"linf": lambda g: g.abs().flatten(1).sum(dim=1), "l2": NORMS["l2"]}
DUAL["l1"] = NORMS["linf"]  # of so few values 1 % is one
SHAPE = (3, 4, 5)

often = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
norms = st.sampled_from(sorted(THREATS))
radii = st.floats(1e-3, 1.0)
seeds = st.integers(0, 2**31)
# lengths from far inside any ball to far outside, and samples of different lengths in one batch
scales = st.lists(st.floats(1e-12, 1e3), min_size=1, max_size=4)


def tensors(seed: int, lengths: list[float], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(len(lengths), *SHAPE, generator=generator, dtype=torch.float64)
    return (directions * torch.tensor(lengths, dtype=torch.float64).view(-1, 1, 1, 1)).to(dtype)


def test_the_test_knows_all_norms() -> None:
    assert NORMS.keys() == THREATS.keys()


@often
@given(norm=norms, eps=radii, lengths=scales, seed=seeds)
def test_projection_is_the_nearest_perturbation_in_the_ball(
    norm: str, eps: float, lengths: list[float], seed: int
) -> None:
    threat, delta = threat_model(norm, eps), tensors(seed, lengths)
    projected = threat.project(delta)
    assert (NORMS[norm](projected) <= eps * (1 + 1e-12)).all()
    inside = NORMS[norm](delta) <= eps
    assert torch.equal(projected[inside], delta[inside])
    torch.testing.assert_close(threat.project(projected), projected, rtol=1e-12, atol=0)
    # nearest in the Euclidean sense: from the projection, no point of the ball lies on the way to delta
    others = threat.random_start(sample_rng(seed, "others", 0, torch.arange(len(delta))), delta)
    towards = ((delta - projected) * (others - projected)).flatten(1).sum(dim=1)
    assert (towards <= 1e-9 * (1 + NORMS["l2"](delta))).all()


@often
@given(norm=norms, eps=radii, lengths=scales, seed=seeds)
def test_pulling_into_the_box_stays_in_the_ball(norm: str, eps: float, lengths: list[float], seed: int) -> None:
    threat, delta = threat_model(norm, eps), tensors(seed, lengths)
    x = tensors(seed + 1, [0.3] * len(lengths)).add(0.5).clamp(0, 1)
    moved = in_box(x + threat.project(delta))
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert (NORMS[norm](moved - x) <= eps + 1e-12).all()


@often
@given(norm=norms, lengths=st.lists(st.floats(1e-35, 1e30), min_size=1, max_size=4), seed=seeds)
def test_no_unit_step_rises_faster_than_the_steepest(norm: str, lengths: list[float], seed: int) -> None:
    """<g, v> over all v of unit norm is at most the dual norm of g, and the steepest direction reaches it."""
    gradient = tensors(seed, lengths)
    step = threat_model(norm, 1.0).steepest(gradient)
    torch.testing.assert_close(NORMS[norm](step).double(), torch.ones(len(lengths), dtype=torch.float64))
    rise = (gradient * step).flatten(1).sum(dim=1)
    torch.testing.assert_close(rise, DUAL[norm](gradient).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", sorted(THREATS))
def test_tiny_and_missing_gradients(norm: str, dtype: torch.dtype) -> None:
    """Squares of a fp32 gradient of 1e-25 underflow: the direction must not. A zero gradient gives no direction."""
    threat = threat_model(norm, 1.0)
    gradient = tensors(0, [1e-25, 0.0, 1.0], dtype)
    step = threat.steepest(gradient)
    assert step.dtype == dtype
    torch.testing.assert_close(step[0], threat.steepest(gradient[:1] * 1e25)[0])
    assert not step[1].any()
    assert not threat.project(torch.zeros(1, *SHAPE, dtype=dtype)).any()


def test_start_in_l2_is_uniform_in_the_ball() -> None:
    """The share of the ball within r is (r / eps)^d, and no direction is preferred."""
    ids = torch.arange(4000)
    like = torch.zeros(len(ids), 1, 2, 2, dtype=torch.float64)
    start = threat_model("l2", 0.7).random_start(sample_rng(3, "start", 0, ids), like)
    share = (start.flatten(1).norm(dim=1) / 0.7) ** 4
    assert kstest(share.numpy(), "uniform").pvalue > 0.01
    unit = start.flatten(1) / start.flatten(1).norm(dim=1, keepdim=True)
    assert unit.mean(dim=0).abs().max() < 4 / math.sqrt(4 * len(ids))
    second = unit.t() @ unit / len(ids)  # the identity / d, within four standard errors
    assert (second - torch.eye(4) / 4).abs().max() < 4 * 0.2 / math.sqrt(len(ids))


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_start_belongs_to_the_sample_and_fills_the_ball(norm: str) -> None:
    threat, like = threat_model(norm, 0.5), torch.zeros(64, *SHAPE)
    ids = torch.arange(64)
    start = threat.random_start(sample_rng(1, "s", 2, ids), like)
    half = threat.random_start(sample_rng(1, "s", 2, ids[32:]), like[32:])
    assert torch.equal(start[32:], half)
    assert (NORMS[norm](start) <= 0.5 * (1 + 1e-6)).all()
    assert NORMS[norm](start).max() > 0.45
    wider = threat.random_start(sample_rng(1, "s", 2, ids), like, radius=1.5)
    torch.testing.assert_close(wider, 3 * start)


def test_normal_numbers_are_normal_and_belong_to_the_sample() -> None:
    numbers = sample_rng(5, "normal", 0, torch.arange(50)).normal((200,))
    assert kstest(numbers.flatten().numpy(), "norm").pvalue > 0.01
    assert torch.equal(sample_rng(5, "normal", 0, torch.arange(20, 50)).normal((200,)), numbers[20:])
    assert abs(float(numbers[:, :100].flatten() @ numbers[:, 100:].flatten()) / 5000) < 4 / math.sqrt(5000)


class Quadratic(nn.Module):
    """Two logits, whose difference is linear in the pixels: the worst perturbation in a ball is known."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", tensors(9, [1.0])[0].flatten())

    def forward(self, pixels: Tensor) -> Tensor:
        score = (pixels.flatten(1) - 0.5) @ self.w
        return torch.stack([score, -score], dim=1)


@often
@given(norm=norms, eps=st.floats(0.01, 0.3), restarts=st.integers(1, 2), seed=seeds)
def test_pgd_finds_the_worst_of_a_linear_model(norm: str, eps: float, restarts: int, seed: int) -> None:
    """Far from the box's edge it is -eps times the steepest direction of the true class' score."""
    model, x, y = Quadratic(), torch.full((2, *SHAPE), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    found = fd.pgd(model, x, y, eps=eps, norm=norm, steps=20, step_size=eps / 4, restarts=restarts, seed=seed)
    threat = threat_model(norm, eps)
    best = x - eps * threat.steepest(model.w.view(1, *SHAPE))
    assert (NORMS[norm](found - x) <= eps * (1 + 1e-9)).all()
    torch.testing.assert_close(model(found)[:, 0], model(best).expand(2, 2)[:, 0], rtol=2e-3, atol=0)


@pytest.mark.parametrize("norm", sorted(THREATS))
def test_single_steps_take_the_norm(norm: str) -> None:
    model, x, y = Quadratic(), torch.full((2, *SHAPE), 0.5, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    settings = {"eps": 0.2, "step_size": 0.3, "norm": norm, "ids": torch.arange(2)}
    stepped = single_step(model, x, y, noise=0.0, project=True, **settings)
    threat = threat_model(norm, 0.2)
    best = x - 0.2 * threat.steepest(model.w.view(1, *SHAPE))
    torch.testing.assert_close(stepped, best.expand_as(stepped))
    further = single_step(model, x, y, noise=0.1, project=False, **settings)
    assert (NORMS[norm](further - x) > 0.25).all()


def test_impossible_threats_are_refused() -> None:
    for norm, eps, words in (
        ("l3", 0.1, "linf, l2, l1"),
        ("linf", 4, "k/255"),
        ("l2", -1, "eps must be >= 0"),
        ("l2", math.inf, ""),
    ):
        with pytest.raises(UserError, match=words):
            threat_model(norm, eps)
    assert threat_model("l2", 3.0).eps == 3.0
