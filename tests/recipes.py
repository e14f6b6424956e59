"""Ways to train as fragments of a config, and the plain PyTorch that each should equal.

The plain side is written from the papers, sample by sample where the package works on batches, and shares nothing with
it but the source of random numbers, which must be the same to compare.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import beta
from torch import Tensor, nn

from fulllora_dist.config.schema import Config
from fulllora_dist.core.rng import sample_rng
from fulllora_dist.training.phases import Phases, build_phases

Recipe = dict[str, Any]

SOFT: Recipe = {"label_smoothing": 0.1, "mixup": 0.4, "cutmix": 1.0, "mix_probability": 0.8}
"""Every kind of mixing at once."""
WEAKENED: Recipe = {"attention_drop": 0.7, "perturbation_mask": 0.7, "mask_patch": 4}


def build(recipe: Recipe, *, eps: float, seed: int, updates: int) -> Phases:
    """The recipe as a run of so many updates, through the config."""
    config = Config.model_validate(
        {
            "model": {"backbone": "none"},
            "data": {"train": "none"},
            "run": {"output_dir": "none", "seed": seed},
            "optim": {"epochs": 1},
            **recipe,
            "threat": {"eps": eps, **recipe.get("threat", {})},
        }
    )
    return build_phases(config, steps_per_epoch=updates)


# -- plain PyTorch -------------------------------------------------------------------------------------------------


def rise(step: int, share: float, run: int) -> float:
    length = round(share * run)
    return min(1.0, (step + 1) / (length + 1))


def to_ball(delta: Tensor, eps: float, norm: str) -> Tensor:
    if norm == "linf":
        return torch.where(delta.abs() > eps, delta.sign() * eps, delta)
    return torch.stack([d * min(1.0, eps / float(torch.linalg.vector_norm(d))) for d in delta])


def uphill(gradient: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return gradient.sign()
    return torch.stack([g / torch.linalg.vector_norm(g) for g in gradient])


def _start(method: Recipe, x: Tensor, ids: Tensor, step: int, seed: int, eps: float, norm: str) -> Tensor:
    name = method["name"]
    rng = sample_rng(seed, f"train/{name}/start/0", step, ids)
    if name == "mart" or "start" in method:
        return to_ball((method.get("start", 0.001) * rng.normal(x.shape[1:])).to(x.dtype), eps, norm)
    if norm == "linf":
        return ((rng.uniform(x.shape[1:]) * 2 - 1) * eps).to(x.dtype)
    direction, u = rng.normal(x.shape[1:]).double(), rng.uniform((1,))[:, 0].double()
    lengths = eps * u ** (1 / x[0].numel())
    return torch.stack([d / d.norm() * r for d, r in zip(direction, lengths, strict=True)]).to(x.dtype)


def mixed(x: Tensor, y: Tensor, ids: Tensor, step: int, seed: int, classes: int, settings: Recipe) -> tuple:
    """mixup (Zhang et al., arXiv 1710.09412) or CutMix (Yun et al., arXiv 1905.04899), each image with its pair."""
    if not settings.get("mixup") and not settings.get("cutmix"):
        return x, y
    grid = np.linspace(0, 1, 4097)
    draws = sample_rng(seed, "train/mix", step, ids).uniform((5,)).double().numpy()
    images, targets = [], []
    for i in range(len(x)):
        j = i + 1 if i % 2 == 0 else i - 1
        chance, which, u, across, down = draws[i]
        image, share = x[i].clone(), 1.0
        if chance < settings.get("mix_probability", 1.0):
            cut = which < 0.5 if settings.get("mixup") and settings.get("cutmix") else bool(settings.get("cutmix"))
            alpha = settings["cutmix" if cut else "mixup"]
            share = float(np.interp(u, grid, beta.ppf(grid, alpha, alpha)))
            if cut:
                height, width = x.shape[2:]
                rows, columns = round((1 - share) ** 0.5 * height), round((1 - share) ** 0.5 * width)
                top, left = int(across * height) - rows // 2, int(down * width) - columns // 2
                taken = 0
                for r in range(max(0, top), min(height, top + rows)):
                    for c in range(max(0, left), min(width, left + columns)):
                        image[:, r, c] = x[j, :, r, c]
                        taken += 1
                share = 1 - taken / (height * width)
            else:
                image = share * x[i] + (1 - share) * x[j]
        target = torch.zeros(classes, dtype=torch.float64)
        target[y[i]] += share
        target[y[j]] += 1 - share
        images.append(image)
        targets.append(target)
    return torch.stack(images), torch.stack(targets).to(x.dtype)


def _unmasked(delta: Tensor, kept: float, patch: int, draws: Tensor) -> Tensor:
    """Mo et al.'s perturbation random masking: int(n (1 - kept)) patches of each image lose their perturbation."""
    delta = delta.clone()
    columns = delta.shape[3] // patch
    for i, draw in enumerate(draws):
        for p in draw.argsort()[: int(len(draw) * (1 - kept))].tolist():
            r, c = p // columns * patch, p % columns * patch
            delta[i, :, r : r + patch, c : c + patch] = 0
    return delta


def _attack_gradient(model: nn.Module, objective: Any, x: Tensor, masks: list[Tensor]) -> Tensor:
    """With `masks`, the gradient that leaves each block's attention is multiplied by its block's mask [B]."""
    blocks = [m for name, m in model.named_modules() if name.endswith(".attn")] if masks else []

    def drop(mask: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            output.register_hook(lambda gradient: gradient * mask.view(-1, 1, 1).to(gradient.dtype))

        return hook

    handles = [block.register_forward_hook(drop(mask)) for block, mask in zip(blocks, masks, strict=True)]
    x = x.clone().requires_grad_()
    training = model.training
    model.eval()
    (gradient,) = torch.autograd.grad(objective(model(x)), x)
    model.train(training)
    for handle in handles:
        handle.remove()
    return gradient


def plain_loss(
    recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, step: int, *, eps: float, seed: int, run: int
) -> Tensor:
    """The mean loss of one weight step on pixels x in [0, 1]; for pgd, trades and mart."""
    method, threat, targets = recipe["method"], recipe.get("threat", {}), recipe.get("targets", {})
    name, steps, norm = method["name"], method["steps"], threat.get("norm", "linf")
    eps = threat.get("eps", eps) * rise(step, threat.get("eps_warmup_ratio", 0), run)
    given = method.get("step_size")
    size = min(2.5 * eps / steps, eps) if given is None else given * rise(step, threat.get("eps_warmup_ratio", 0), run)
    size *= rise(step, threat.get("step_size_warmup_ratio", 0), run)
    model.eval()
    with torch.no_grad():
        x, y = mixed(x, y, ids, step, seed, model(x).shape[1], targets)
        clean = model(x)
    model.train()

    def objective(logits: Tensor) -> Tensor:
        if name == "trades":
            p = clean.softmax(1)
            return (p * (p.log() - logits.log_softmax(1))).sum()
        return F.cross_entropy(logits, y)

    kept = {key: rise(step, method.get(key, 0), run) for key in ("attention_drop", "perturbation_mask")}
    depth = sum(n.endswith(".attn") for n, _ in model.named_modules())
    x_adv = (x + _start(method, x, ids, step, seed, eps, norm)).clamp(0, 1)
    for k in range(steps):
        if kept["perturbation_mask"] < 1:
            patch = method["mask_patch"]
            count = (x.shape[2] // patch) * (x.shape[3] // patch)
            draws = sample_rng(seed, f"train/perturbation_mask/{k}", step, ids).uniform((count,))
            x_adv = x + _unmasked(x_adv - x, kept["perturbation_mask"], patch, draws)
        masks = [
            sample_rng(seed, f"train/attention_drop/{k}/{b}", step, ids).uniform((1,))[:, 0] < kept["attention_drop"]
            for b in range(depth if kept["attention_drop"] < 1 else 0)
        ]
        x_adv = x_adv + size * uphill(_attack_gradient(model, objective, x_adv, masks), norm)
        x_adv = (x + to_ball(x_adv - x, eps, norm)).clamp(0, 1)

    if method.get("clean_fraction"):
        kept_clean = sample_rng(seed, "train/clean", step, ids).uniform((1,))[:, 0] < method["clean_fraction"]
        assert kept_clean.any()
        x_adv = torch.stack([x[i] if kept_clean[i] else x_adv[i] for i in range(len(x))])
    smoothing = targets.get("label_smoothing", 0.0)
    soft = y if y.ndim == 2 else F.one_hot(y, clean.shape[1]).to(clean.dtype)
    soft = (1 - smoothing) * soft + smoothing / clean.shape[1]
    if name == "pgd":
        return -(soft * model(x_adv).log_softmax(1)).sum(1).mean()
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1)
    if name == "trades":
        return -(soft * p.log()).sum(1).mean() + method.get("beta", 6.0) * divergence.mean()
    assert name == "mart"
    own = torch.arange(len(y))
    others = q.clone()
    others[own, y] = 0
    bce = -(soft * q.log()).sum(1) - (1.0001 - others.max(1).values + 1e-12).log()
    return (bce + method.get("weight", 5.0) * divergence * (1 - p[own, y])).mean()
