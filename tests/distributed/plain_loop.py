"""Adversarial training in plain PyTorch, written from the papers' formulas: no DeepSpeed, no engine, no method of ours.

It shares with the program the model (tested by itself) and the numbers that a random start draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import EPS, OPTIM, RECIPES, SEED, UPDATES
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from fulllora_dist.core.rng import sample_rng
from fulllora_dist.data.batch import Batch
from fulllora_dist.models.adapted_model import AdaptedModel
from tests.recipes import Recipe, plain_loss

WRITTEN_OUT = ("standard", "pgd", "free", "fgsm_rs", "n_fgsm")


@dataclass
class Result:
    parameters: dict[str, Tensor]
    ema: dict[str, Tensor]
    losses: list[float]
    norms: list[float]


def _noise(x: Tensor, ids: Tensor, method: str, step: int, radius: float) -> Tensor:
    return (2 * sample_rng(SEED, f"train/{method}/start/0", step, ids).uniform(x.shape[1:]) - 1) * radius


def _sign(model: AdaptedModel, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y), x)[0].sign()


def _perturbed(model: AdaptedModel, method: str, x: Tensor, y: Tensor, ids: Tensor, step: int) -> Tensor:
    if method in ("standard", "free"):
        return x
    if method == "pgd":  # two steps of 2.5 eps / 2, but at most eps
        adversarial = (x + _noise(x, ids, method, step, EPS)).clamp(0, 1)
        for _ in range(2):
            adversarial = adversarial + EPS * _sign(model, adversarial, y)
            adversarial = torch.min(torch.max(adversarial, x - EPS), x + EPS).clamp(0, 1)
        return adversarial
    if method == "fgsm_rs":
        start = (x + _noise(x, ids, method, step, EPS)).clamp(0, 1)
        delta = (start + 1.25 * EPS * _sign(model, start, y) - x).clamp(-EPS, EPS)
        return (x + delta).clamp(0, 1)
    assert method == "n_fgsm"
    start = (x + _noise(x, ids, method, step, 2 * EPS)).clamp(0, 1)
    return (start + EPS * _sign(model, start, y)).clamp(0, 1)


def _recipe_at(name: str, step: int) -> tuple[Recipe, float]:
    """The recipe and eps of one update: its phases end with the second, fifth and sixth."""
    recipe = RECIPES[name]
    phase = recipe["phases"][(step >= 2) + (step >= 5)] if "phases" in recipe else {}
    return {**recipe, "method": phase.get("method", recipe["method"])}, phase.get("eps", EPS)


def plain_training(model: AdaptedModel, method: str, data: Sequence[Batch], parts: int) -> Result:
    """Six updates on whole batches, or on their gradients summed over `parts` micro-batches."""
    model.train()
    named = model.trainable()
    tokens = {"cls_token", "pos_embed"}  # which timm does not decay
    weights, rest = (
        [p for name, p in named.items() if (p.dim() > 1 and name not in tokens) == matrix] for matrix in (True, False)
    )
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": OPTIM.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=OPTIM.lr,
        betas=OPTIM.betas,
    )
    warmup = int(OPTIM.warmup_ratio * UPDATES)
    schedule = SequentialLR(
        optimizer,
        [
            LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1),
            CosineAnnealingLR(optimizer, UPDATES - warmup, eta_min=OPTIM.min_lr),
        ],
        milestones=[warmup],
    )
    ema = {name: p.detach().clone() for name, p in named.items()}
    result = Result({}, ema, [], [])
    replays = 2 if method == "free" else 1
    delta = torch.zeros(data[0].images.shape)
    updates = 0
    for step, batch in enumerate(data):
        images = batch.images.float() / 255
        for _ in range(replays):
            loss_sum = 0.0
            for part in torch.arange(len(batch)).chunk(parts):
                x, y = images[part], batch.labels[part]
                if method == "free":
                    x = (x + delta[part]).clamp(0, 1).requires_grad_()
                if method in WRITTEN_OUT:
                    x = _perturbed(model, method, x, y, batch.ids[part], step)
                    loss = F.cross_entropy(model(x), y) / parts
                else:
                    recipe, eps = _recipe_at(method, step)
                    ids = batch.ids[part]
                    loss = plain_loss(recipe, model, x, y, ids, step, eps=eps, seed=SEED, run=UPDATES) / parts
                loss.backward()
                loss_sum += loss.item()
                if method == "free":
                    delta[part] = (delta[part] + EPS * x.grad.sign()).clamp(-EPS, EPS)
            result.norms.append(torch.nn.utils.clip_grad_norm_(named.values(), OPTIM.grad_clip).item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            updates += 1
            decay = min(OPTIM.ema_decay, updates / (updates + 10))
            for name, p in named.items():
                ema[name] = decay * ema[name] + (1 - decay) * p.detach()
        result.losses.append(loss_sum)
    result.parameters = {name: p.detach().clone() for name, p in named.items()}
    return result
