"""Images of four classes, and models on which robust accuracy means something: trained with and without an attack."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import fulllora_dist as fd
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.transforms import EvalTransform
from tests.tiny import CLASSES, SIDE

IMAGES = 200
EPS = 8 / 255
HEALTHY = ("standard", "full_at", "fulllora")


def write_images(root: Path, seed: int, count: int) -> None:
    prototypes = np.random.default_rng(0).integers(60, 196, (CLASSES, SIDE, SIDE, 3))
    rng = np.random.default_rng(seed)
    for label, prototype in enumerate(prototypes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(count // CLASSES):
            noisy = 128 + 0.6 * (prototype - 128) + rng.normal(0, 25, prototype.shape)
            image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            image.save(root / f"class{label}" / f"picture{i:03d}.png")


def stream(folder: Path, n: int | None = None, batch_size: int = 50) -> EvalStream:
    return EvalStream(folder, batch_size=batch_size, transform=EvalTransform(size=SIDE, crop_pct=1.0), subset=Subset(n))


def _batches(x: torch.Tensor, y: torch.Tensor, updates: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        chosen = torch.randint(len(x), (50,), generator=generator)
        yield x[chosen], y[chosen]


def train(model: fd.AdaptedModel, data: tuple[torch.Tensor, torch.Tensor], updates: int, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, updates)
    for k, (x, y) in enumerate(_batches(*data, updates)):
        if steps:
            eps = EPS * min(1, 2 * k / updates)
            x = fd.pgd(model, x, y, eps=eps, steps=steps, step_size=eps / 2, step=k)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
