"""Attacks stay in ball and box, leave the model as it was, and do not depend on the batch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fulllora_dist as fd
from fulllora_dist.attacks.fgsm import single_step
from fulllora_dist.attacks.pgd import LOSSES
from fulllora_dist.core.rng import sample_rng
from tests.tiny import images, stir, tiny

ROUNDING = 1e-7
CLASSES = 5


class Net(nn.Module):
    """Small, with modules that behave otherwise in training, and parameters of which some are frozen."""

    def __init__(self, seed: int = 0, breaks_at: int | None = None):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(6 * 64, CLASSES)
        self.conv.bias.requires_grad_(False)
        self.calls, self.breaks_at = 0, breaks_at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.breaks_at:
            raise ArithmeticError("on purpose")
        assert not any(module.training for module in self.modules())
        assert not any(parameter.requires_grad for parameter in self.parameters())
        return self.out(self.drop(torch.tanh(3 * self.norm(self.conv(x)))).flatten(1))


def data(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return images(n, seed, dtype, side=8), torch.arange(n) % CLASSES


def run_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, **more: object) -> Tensor:
    return fd.pgd(model, x, y, **({"eps": eps, "steps": 2, "step_size": 0.7 * eps} | more))


def run_fgsm_rs(model: nn.Module, x: Tensor, y: Tensor, eps: float, **more: object) -> Tensor:
    settings = {"norm": "linf", "ids": torch.arange(len(x))} | more
    return single_step(model, x, y, eps=eps, noise=eps, step_size=1.25 * eps, project=True, **settings)


ATTACKS: dict[str, Callable[..., Tensor]] = {"pgd": run_pgd, "fgsm_rs": run_fgsm_rs}


def state(model: nn.Module) -> tuple:
    modes = [module.training for module in model.modules()]
    asking = [parameter.requires_grad for parameter in model.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    values = [value.clone() for value in model.state_dict().values()]
    return modes, asking, gradients, values


def assert_same(before: tuple, after: tuple) -> None:
    assert before[:2] == after[:2]
    for old, new in zip(before[2] + before[3], after[2] + after[3], strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


any_attack = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
sizes = st.floats(0.001, 0.3)
seeds = st.integers(0, 2**31)


@any_attack
@given(
    eps=sizes,
    relative=st.floats(0.05, 3),
    steps=st.integers(0, 4),
    restarts=st.integers(1, 3),
    loss=st.sampled_from(["ce", "margin"]),
    random_start=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    n=st.integers(1, 5),
    seed=seeds,
)
def test_pgd_stays_in_ball_and_box(
    eps: float,
    relative: float,
    steps: int,
    restarts: int,
    loss: str,
    random_start: bool,
    dtype: torch.dtype,
    n: int,
    seed: int,
) -> None:
    x, y = data(n, seed, dtype)
    x_adv = fd.pgd(
        Net().to(dtype),
        x,
        y,
        eps=eps,
        steps=steps,
        step_size=relative * eps,
        restarts=restarts,
        loss=loss,
        random_start=random_start,
        seed=seed,
    )
    assert x_adv.dtype == dtype
    assert x_adv.shape == x.shape
    assert not x_adv.requires_grad
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert (x_adv - x).abs().max() <= eps + ROUNDING
    if not random_start and steps == 0:
        assert torch.equal(x_adv, x)
    if steps * relative >= 2:
        assert (x_adv - x).abs().max() >= 0.99 * eps


@any_attack
@given(
    eps=sizes,
    noise=st.floats(0, 3),
    step=st.floats(0.1, 2),
    project=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    n=st.integers(1, 5),
    seed=seeds,
)
def test_a_single_step_reaches_noise_plus_step_or_is_projected(
    eps: float, noise: float, step: float, project: bool, dtype: torch.dtype, n: int, seed: int
) -> None:
    x, y = data(n, seed, dtype)
    x_adv = single_step(
        Net().to(dtype),
        x,
        y,
        eps=eps,
        noise=noise * eps,
        step_size=step * eps,
        project=project,
        norm="linf",
        ids=torch.arange(n),
        seed=seed,
    )
    assert x_adv.dtype == dtype
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    furthest = (x_adv - x).abs().max()
    assert furthest <= (eps if project else (noise + step) * eps) + ROUNDING
    if not project and noise + step > 1.6:
        assert furthest > 1.05 * eps


@any_attack
@given(
    attack=st.sampled_from(sorted(ATTACKS)),
    modes=st.lists(st.booleans(), min_size=5, max_size=5),
    breaks_at=st.sampled_from([None, 1, 2]),
    had_gradients=st.booleans(),
)
def test_the_model_is_left_as_it_was(
    attack: str, modes: list[bool], breaks_at: int | None, had_gradients: bool
) -> None:
    """Each module's own mode, each parameter's `requires_grad` and `.grad`, buffers; also where the model raises."""
    model = Net(breaks_at=breaks_at)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    if had_gradients:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    before = state(model)
    x, y = data(3)
    broken = breaks_at is not None and breaks_at <= (2 if attack == "pgd" else 1)
    if broken:
        with pytest.raises(ArithmeticError):
            ATTACKS[attack](model, x, y, 0.1)
    else:
        ATTACKS[attack](model, x, y, 0.1)
    assert_same(before, state(model))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("finetune", ["fulllora", "full"])
@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_an_adapted_model_in_bf16_is_attacked(attack: str, finetune: str, outer: type) -> None:
    model = stir(tiny(finetune=finetune, precision="bf16")).train()
    before = state(model)
    x, y = images(8), torch.arange(8) % 4
    with outer():
        x_adv = ATTACKS[attack](model, x, y, 8 / 255)
    assert_same(before, state(model))
    assert x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() <= 8 / 255 + ROUNDING
    model.eval()
    with torch.no_grad():
        assert F.cross_entropy(model(x_adv), y) > F.cross_entropy(model(x), y)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_sample_is_attacked_alone_as_in_any_batch(attack: str) -> None:
    model = Net().double()
    x, y = data(6, dtype=torch.float64)
    ids = torch.tensor([7, 3, 2**40, 0, 11, 5])
    key = {"seed": 4, "step": 9, "purpose": "here"}
    together = ATTACKS[attack](model, x, y, 0.1, ids=ids, **key)
    order = torch.tensor([4, 1, 0])
    torch.testing.assert_close(
        ATTACKS[attack](model, x[order], y[order], 0.1, ids=ids[order], **key), together[order], rtol=0, atol=1e-12
    )
    for i in range(len(x)):
        alone = ATTACKS[attack](model, x[i : i + 1], y[i : i + 1], 0.1, ids=ids[i : i + 1], **key)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-12)


def test_the_start_is_keyed_by_seed_purpose_step_restart_and_id() -> None:
    model, (x, y), ids = Net(), data(4), torch.tensor([5, 6, 7, 8])
    key = {"seed": 1, "step": 2, "ids": ids, "purpose": "p"}
    start = run_pgd(model, x, y, 0.1, steps=0, **key)
    noise = sample_rng(1, "p/start/0", 2, ids).uniform((3, 8, 8)) * 2 - 1
    assert torch.equal(start, torch.clamp(x + noise * 0.1, 0, 1))
    others = [run_pgd(model, x, y, 0.1, steps=0, **(key | c)) for c in ({"seed": 2}, {"step": 3}, {"purpose": "q"})]
    others.append(run_pgd(model, x, y, 0.1, steps=0, **(key | {"ids": ids + 10})))
    assert all((other - start).abs().mean() > 0.02 for other in others)


@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_restarts_are_never_weaker_on_any_sample(loss: str) -> None:
    model = Net().eval()
    with torch.no_grad():
        x = images(200, side=8)
        y = Net().eval().requires_grad_(False)(x).argmax(1)

    def fooled(restarts: int) -> Tensor:
        x_adv = run_pgd(model, x, y, 0.02, steps=1, restarts=restarts, loss=loss)
        with torch.no_grad():
            return Net().eval().requires_grad_(False)(x_adv).argmax(1) != y

    once, thrice, often = fooled(1), fooled(3), fooled(8)
    assert 0 < once.sum() < 200
    assert torch.equal(once & thrice, once)
    assert torch.equal(thrice & often, thrice)
    assert often.sum() > once.sum()


def test_restarts_take_the_likeliest_class_of_probabilities_for_the_label() -> None:
    model = Net()
    x, y = data(32)
    soft = F.one_hot(y, Net().eval().requires_grad_(False)(x[:1]).shape[1]).to(x.dtype)
    one, other = (fd.pgd(model, x, t, eps=0.02, steps=1, step_size=0.02, restarts=3) for t in (y, soft))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_more_steps_find_a_higher_loss() -> None:
    model, (x, y) = Net(), data(64)
    frozen = Net().eval().requires_grad_(False)
    attacks = [x] + [run_pgd(model, x, y, 0.05, steps=s, step_size=0.02) for s in (0, 1, 3, 10)]
    losses = [float(F.cross_entropy(frozen(x_adv), y)) for x_adv in attacks]
    assert losses[2] < losses[3] < losses[4]
    assert losses[4] > losses[0] + 0.2


@any_attack
@given(n=st.integers(1, 6), classes=st.integers(2, 7), seed=seeds)
def test_losses_equal_their_definitions(n: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (n,), generator=generator)
    margin = ce = 0.0
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        margin += max(v for j, v in enumerate(z) if j != y) - z[y]
        ce += float(torch.logsumexp(torch.tensor(z, dtype=torch.float64), 0)) - z[y]
    assert LOSSES["margin"](logits, labels).item() == pytest.approx(margin, abs=1e-12)
    assert LOSSES["ce"](logits, labels).item() == pytest.approx(ce, abs=1e-12)
