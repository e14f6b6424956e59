"""Each method against a loop written from its paper, and the passes it costs."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.core.rng import sample_rng
from fulllora_dist.data.batch import Batch
from fulllora_dist.methods import METHODS, Method
from fulllora_dist.methods.base import MetricAverager
from fulllora_dist.methods.multi_step import Weakened
from fulllora_dist.methods.warmup import WarmupSchedule
from tests import recipes
from tests.recipes import SOFT, WEAKENED, Recipe, plain_loss
from tests.tiny import CLASSES, batches, images, stir, tiny

EPS, SEED, LR = 0.05, 11, 3e-3

BATCHES = 6
WARMUP = 4
WARM, STEP_WARM = {"eps_warmup_ratio": WARMUP / BATCHES}, {"step_size_warmup_ratio": WARMUP / BATCHES}
PGD, NFGSM = {"name": "pgd", "steps": 2}, {"name": "n_fgsm", "noise": 1.5, "step": 0.8}
RECIPES: dict[str, Recipe] = {
    "standard": {"method": {"name": "standard"}},
    "pgd": {"method": {"name": "pgd", "steps": 3}},
    "pgd, no random start": {"method": {**PGD, "step_size": 0.03, "random_start": False}},
    "free": {"method": {"name": "free", "replays": 3}},
    "free, small steps": {"method": {"name": "free", "replays": 2, "step_size": 0.02}},
    "fgsm_rs": {"method": {"name": "fgsm_rs", "step": 1.1}},
    "n_fgsm": {"method": NFGSM},
    "n_fgsm, eps warm-up": {"method": NFGSM, "threat": WARM},
    "pgd, eps warm-up": {"method": PGD, "threat": WARM},
    "free, eps warm-up": {"method": {"name": "free", "replays": 2}, "threat": WARM},
    "fgsm_rs, step warm-up": {"method": {"name": "fgsm_rs", "step": 1.1}, "threat": STEP_WARM},
    "n_fgsm, step warm-up": {"method": NFGSM, "threat": STEP_WARM},
    "free, step warm-up": {"method": {"name": "free", "replays": 2}, "threat": STEP_WARM},
    "free, L2": {"method": {"name": "free", "replays": 2}, "threat": {"norm": "l2", "eps": 0.8}},
    "free, mixed": {"method": {"name": "free", "replays": 2}, "targets": {"mixup": 0.3, "cutmix": 1.0}},
}
# compared with `plain_loss`
NEWER: dict[str, Recipe] = {
    "trades": {"method": {"name": "trades", "steps": 2, "beta": 3.0}},
    "mart": {"method": {"name": "mart", "steps": 2, "weight": 4.0}},
    "pgd, L2": {"method": PGD, "threat": {"norm": "l2", "eps": 0.8}},
    "trades, Gaussian start": {"method": {"name": "trades", "steps": 2, "start": 0.002}},
    "pgd, given step and eps warm-up": {"method": {**PGD, "step_size": 0.03}, "threat": {"eps_warmup_ratio": 0.5}},
    "pgd, half of the images clean": {"method": {**PGD, "clean_fraction": 0.5}},
    "trades, L2": {"method": {"name": "trades", "steps": 2}, "threat": {"norm": "l2", "eps": 0.8}},
    "pgd, mixed and smoothed": {"method": PGD, "targets": SOFT},
    "pgd, mixup alone": {"method": PGD, "targets": {"mixup": 0.3}},
    "pgd, cutmix alone": {"method": PGD, "targets": {"cutmix": 1.0}},
    "pgd, step size warm-up": {"method": PGD, "threat": {"eps_warmup_ratio": 0.5, "step_size_warmup_ratio": 0.9}},
    "pgd, attention drop": {"method": {**PGD, "attention_drop": 0.7}},
    "pgd, perturbation mask": {"method": {**PGD, "perturbation_mask": 0.7, "mask_patch": 4}},
    # one step: in a second one an image may be left without any perturbation, where the divergence has no gradient
    "trades, weakened": {"method": {"name": "trades", "steps": 1, **WEAKENED}, "threat": WARM},
    "mart, weakened": {"method": {"name": "mart", "steps": 2, **WEAKENED}},
    "trades, mixed and smoothed": {"method": {"name": "trades", "steps": 2}, "targets": SOFT},
    "mart, smoothed": {"method": {"name": "mart", "steps": 2}, "targets": {"label_smoothing": 0.1}},
}
ALL = RECIPES | NEWER
PASSES = {"standard": 1, "pgd": 4, "free": 3}


def eps_at(case: str, step: int) -> float:
    """Linear from 0, which no batch sees, to the full size at batch WARMUP."""
    eps = RECIPES[case].get("threat", {}).get("eps", EPS)
    return eps * min(1.0, (step + 1) / (WARMUP + 1)) if "eps warm-up" in case else eps


def grown_at(case: str, step: int) -> float:
    """Share of the step size that the warm-up has reached."""
    return min(1.0, (step + 1) / (WARMUP + 1)) if "step warm-up" in case else 1.0


def build(case: str) -> Method:
    updates = BATCHES * ALL[case]["method"].get("replays", 1)
    return recipes.build(ALL[case], eps=EPS, seed=SEED, updates=updates).at(0).method


def passes(case: str) -> tuple[int, int]:
    """(forward, backward) passes of a batch: an attack step takes one each, TRADES' attack clean logits before that,
    and where the weight step sees clean and perturbed images it is two."""
    method = ALL[case]["method"]
    if case in RECIPES and method["name"] != "pgd":
        both = PASSES.get(case, 2)
        return both, both
    weight_step = 2 if method["name"] in ("trades", "mart") else 1
    return method["steps"] + weight_step + (method["name"] == "trades"), method["steps"] + weight_step


class Moody(nn.Module):
    """A tiny adapted ViT in float64 that answers otherwise in training, so that a wrong mode shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = stir(tiny(head="trained")).double()

    def forward(self, pixels: Tensor) -> Tensor:
        logits = self.inner(pixels)
        return logits + 3 * torch.sin(pixels.mean(dim=(1, 2, 3)))[:, None] * logits if self.training else logits


def start() -> Moody:
    return Moody().train()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.01)


class PlainEngine:
    """The two doors over plain PyTorch."""

    classes = CLASSES

    def __init__(self, model: nn.Module, accumulation: int = 1):
        self.attack_view = model
        self._parts = accumulation
        self._optimizer = optimizer_of(model)

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.attack_view(pixels)

    def backward(self, loss: Tensor) -> None:
        (loss / self._parts).backward()

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        self._optimizer.zero_grad()
        yield from batch.split(self._parts)
        self._optimizer.step()


def train(method: Method, model: nn.Module, data: list[Batch], accumulation: int = 1, first: int = 0) -> None:
    engine = PlainEngine(model, accumulation)
    for step, batch in enumerate(data, start=first):
        method.step(engine, batch, step)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def difference(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def live_difference(one: nn.Module, other: nn.Module) -> float:
    """Without the bias of k's LN, which softmax does not see: its gradient is rounding, of which Adam makes steps."""
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for (n, a), b in pairs if not n.endswith("k.norm.bias"))


# -- the papers, in plain PyTorch ----------------------------------------------------------------------------------


def noise(purpose: str, step: int, batch: Batch, radius: float) -> Tensor:
    """U(-radius, radius): the numbers must be the same to compare, so they come from the same place."""
    u = sample_rng(SEED, f"{purpose}/start/0", step, batch.ids).uniform(batch.images.shape[1:])
    return ((u * 2 - 1) * radius).double()


def box(x: Tensor, delta: Tensor) -> Tensor:
    """delta such that x + delta is an image."""
    return torch.max(torch.min(delta, 1 - x), -x)


def attack_gradient(model: nn.Module, x: Tensor, delta: Tensor, y: Tensor) -> Tensor:
    delta = delta.clone().requires_grad_()
    model.eval()
    F.cross_entropy(model(x + delta), y).backward()
    model.train()
    model.zero_grad()
    return delta.grad


def madry(steps: int, step_size: float | None, random_start: bool) -> Callable[..., Tensor]:
    def perturb(model: nn.Module, batch: Batch, step: int, eps: float, grown: float) -> Tensor:
        x = batch.images
        delta = noise("train/pgd", step, batch, eps) if random_start else torch.zeros_like(x)
        delta = box(x, delta)
        for _ in range(steps):
            size = min(2.5 * eps / steps, eps) if step_size is None else step_size
            delta = delta + size * attack_gradient(model, x, delta, batch.labels).sign()
            delta = box(x, torch.where(delta.abs() > eps, delta.sign() * eps, delta))
        return delta

    return perturb


def wong(model: nn.Module, batch: Batch, step: int, eps: float, grown: float) -> Tensor:
    x = batch.images
    delta = box(x, noise("train/fgsm_rs", step, batch, eps))
    delta = delta + grown * 1.1 * eps * attack_gradient(model, x, delta, batch.labels).sign()
    return box(x, delta.clip(-eps, eps))


def de_jorge(model: nn.Module, batch: Batch, step: int, eps: float, grown: float) -> Tensor:
    x = batch.images
    eta = box(x, noise("train/n_fgsm", step, batch, 1.5 * eps))
    return box(x, eta + grown * 0.8 * eps * attack_gradient(model, x, eta, batch.labels).sign())


def clean(model: nn.Module, batch: Batch, step: int, eps: float, grown: float) -> Tensor:
    return torch.zeros_like(batch.images)


PERTURB: dict[str, Callable[..., Tensor]] = {
    "standard": clean,
    "pgd": madry(3, None, True),
    "pgd, no random start": madry(2, 0.03, False),
    "fgsm_rs": wong,
    "n_fgsm": de_jorge,
    "n_fgsm, eps warm-up": de_jorge,
    "n_fgsm, step warm-up": de_jorge,
    "fgsm_rs, step warm-up": wong,
    "pgd, eps warm-up": madry(2, None, True),
}


def train_as_written(case: str, model: nn.Module, data: list[Batch]) -> None:
    optimizer = optimizer_of(model)
    for step, batch in enumerate(data):
        if case in NEWER:
            loss = plain_loss(
                NEWER[case], model, batch.images, batch.labels, batch.ids, step, eps=EPS, seed=SEED, run=BATCHES
            )
        else:
            delta = PERTURB[case](model, batch, step, eps_at(case, step), grown_at(case, step))
            loss = F.cross_entropy(model(batch.images + delta), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def train_for_free(case: str, model: nn.Module, data: list[Batch]) -> Tensor:
    """Shafahi et al., algorithm 1: delta is set to zero once, before the first minibatch of the run."""
    recipe, optimizer = RECIPES[case], optimizer_of(model)
    norm = recipe.get("threat", {}).get("norm", "linf")
    delta = torch.zeros_like(data[0].images)
    for step, batch in enumerate(data):
        eps = eps_at(case, step)
        size = recipe["method"].get("step_size", eps) * grown_at(case, step)
        x, y = recipes.mixed(batch.images, batch.labels, batch.ids, step, SEED, CLASSES, recipe.get("targets", {}))
        for _ in range(recipe["method"]["replays"]):
            seen = (x + delta).clip(0, 1).requires_grad_()
            optimizer.zero_grad()
            F.cross_entropy(model(seen), y).backward()
            delta = recipes.to_ball(delta + size * recipes.uphill(seen.grad, norm), eps, norm)
            optimizer.step()
    return delta


# -- the tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", ALL)
def test_equals_the_paper_over_many_updates(case: str, accumulation: int) -> None:
    model, reference = start(), start()
    data = list(batches(BATCHES, size=8, slot=12))
    before = weights(model)
    method = build(case)
    train(method, model, data, accumulation)
    if case.startswith("free"):
        delta = train_for_free(case, reference, data)
        state = method.slot_state()
        found = state["delta"] if "delta" in state else state["delta_sign"].double() * EPS
        torch.testing.assert_close(found, delta, rtol=0, atol=1e-12)
    else:
        train_as_written(case, reference, data)
    assert live_difference(model, reference) < 1e-11
    assert difference(model, reference) < 1e-8
    trained = {f"inner.backbone.{name}" for name in model.inner.trainable()}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained
    assert max(float((model.state_dict()[name] - before[name]).abs().max()) for name in trained) > 3 * LR


@pytest.mark.parametrize("case", ALL)
def test_passes_are_what_theory_says(case: str) -> None:
    """Counted at the first block, in images: every forward and backward through the whole model goes by it."""
    model, method = start(), build(case)
    block = model.inner.backbone.get_submodule("blocks.0")
    count = {"forward": 0, "backward": 0}
    block.register_forward_hook(lambda _, __, out: count.update(forward=count["forward"] + len(out)))
    block.register_full_backward_hook(lambda _, __, out: count.update(backward=count["backward"] + len(out[0])))
    train(method, model, list(batches(2, size=4)))
    forward, backward = passes(case)
    assert count == {"forward": 2 * 4 * forward, "backward": 2 * 4 * backward}
    assert method.passes() == (forward, backward)
    assert method.updates_per_batch == (forward if case.startswith("free") else 1)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("case", [case for case in RECIPES if "targets" not in RECIPES[case]])
def test_metrics_are_means_over_the_batch_that_the_weight_step_saw(case: str, accumulation: int) -> None:
    model = start()
    seen: list[tuple[float, float]] = []

    def record(module: nn.Module, args: tuple[Tensor], logits: Tensor) -> None:
        if module.training:  # attacks run in evaluation mode
            labels = batch.labels.split(len(logits))[len(seen) % accumulation]
            correct = (logits.argmax(1) == labels).double().mean()
            seen.append((F.cross_entropy(logits, labels).item(), correct.item()))

    model.register_forward_hook(record)
    (batch,) = batches(1, size=6)
    metrics = build(case).step(PlainEngine(model, accumulation), batch, 0)
    last = seen[-accumulation:]
    for key, values in zip(("loss", "accuracy"), zip(*last, strict=True), strict=True):
        assert metrics[key].item() == pytest.approx(sum(values) / accumulation, abs=1e-6)
        assert metrics[key].shape == ()


def test_a_mixed_image_is_right_by_its_larger_share() -> None:
    logits, soft = (
        torch.tensor([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]]),
        torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.1, 0.9]]),
    )
    means = MetricAverager()
    means.add(torch.tensor(1.0), logits, soft)
    assert means.result()["accuracy"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("case", "kept"), [("free", "delta_sign"), ("free, small steps", "delta"), ("free, eps warm-up", "delta")]
)
def test_free_resumes_from_its_state_as_if_never_stopped(case: str, kept: str) -> None:
    """In fp32, as in a run, and exactly: with a step of eps one byte a pixel says all."""
    data = list(batches(5, size=4, dtype=torch.float32))
    model, method = start().float(), build(case)
    train(method, model, data[:3])
    state = method.slot_state()
    assert {name: value.dtype for name, value in state.items()} == {
        kept: torch.int8 if kept == "delta_sign" else torch.float32
    }
    assert state[kept].shape == data[0].images.shape
    assert 0.2 < float((state[kept] > 0).float().mean()) < 0.8
    assert 0.2 < float((state[kept] < 0).float().mean()) < 0.8
    resumed, twin = build(case), copy.deepcopy(model)
    resumed.load_slot_state({name: value.clone() for name, value in state.items()})
    train(method, model, data[3:], first=3)
    train(resumed, twin, data[3:], first=3)
    assert difference(model, twin) == 0
    assert all(torch.equal(value, resumed.slot_state()[name]) for name, value in method.slot_state().items())


def test_free_keeps_no_alias_of_the_state_it_was_given() -> None:
    method = build("free, small steps")
    given = {"delta": torch.full((4, 3, 16, 16), 0.01)}
    method.load_slot_state(given)
    train(method, start().float(), list(batches(1, size=4, dtype=torch.float32)))
    assert torch.equal(given["delta"], torch.full((4, 3, 16, 16), 0.01))
    assert build("free").slot_state() == {}


@pytest.mark.parametrize("case", [case for case in ALL if not case.startswith("free")])
def test_other_methods_have_no_state(case: str) -> None:
    assert build(case).slot_state() == {}


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_attention_drop_belongs_to_the_sample_also_in_windows(family: str) -> None:
    """A sample's gradient in a batch is its gradient alone, and dropping changes gradients but no logits."""
    model = stir(tiny(family)).double().eval()
    side = model.info.image_size
    x, ids = images(4, dtype=torch.float64, side=side), torch.arange(4) + 10
    settings = METHODS["pgd"].Settings(attention_drop=1.0)

    def gradient(part: slice, drop: bool) -> tuple[Tensor, Tensor]:
        weakened = Weakened(settings, None, WarmupSchedule(run=9), seed=SEED, step=4, ids=ids[part])
        leaf = x[part].clone().requires_grad_()
        with weakened.passing(model, 0) if drop else nullcontext():
            logits = model(leaf)
            (found,) = torch.autograd.grad(F.cross_entropy(logits, ids[part] % CLASSES, reduction="sum"), leaf)
        return logits.detach(), found

    (bare_logits, bare), (logits, together) = gradient(slice(0, 4), False), gradient(slice(0, 4), True)
    assert torch.equal(logits, bare_logits)
    alone = torch.cat([gradient(slice(i, i + 1), True)[1] for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-15)
    assert ((together - bare).abs().amax(dim=(1, 2, 3)) > 1e-3 * bare.abs().amax(dim=(1, 2, 3))).any()
    assert torch.equal(gradient(slice(0, 4), False)[1], bare)  # nothing is left behind
