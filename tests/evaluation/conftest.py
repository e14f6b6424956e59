"""Pictures of four classes, and models on which robust accuracy means something: trained with and without an attack."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

import fulllora_dist as fd
from fulllora_dist.data.decode import EvalTransform
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.subset import Subset
from fulllora_dist.data.write import make_shards
from tests.tiny import ARCHITECTURE, CLASSES, SIDE, tiny

PICTURES = 200
EPS = 8 / 255
HEALTHY = ("standard", "full_at", "fulllora")


def _write(root: Path, seed: int, count: int) -> None:
    prototypes = np.random.default_rng(0).integers(60, 196, (CLASSES, SIDE, SIDE, 3))
    rng = np.random.default_rng(seed)
    for label, prototype in enumerate(prototypes):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(count // CLASSES):
            noisy = 128 + 0.6 * (prototype - 128) + rng.normal(0, 40, prototype.shape)
            picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            picture.save(root / f"class{label}" / f"picture{i:03d}.png")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 200 pictures that no model was trained on."""
    root, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("shards")
    _write(root, 1, PICTURES)
    make_shards(root, folder, samples_per_shard=60, progress=False)
    return folder


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    """600 pictures and labels."""
    root, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("shards")
    _write(root, 2, 600)
    make_shards(root, folder, samples_per_shard=300, progress=False)
    (batch,) = EvalStream(folder, batch_size=600, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    return batch.pixels(), batch.labels


def stream(folder: Path, n: int | None = None, batch_size: int = 50) -> EvalStream:
    return EvalStream(folder, batch_size=batch_size, transform=EvalTransform(size=SIDE, crop_pct=1.0), subset=Subset(n))


def _batches(x: torch.Tensor, y: torch.Tensor, updates: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        chosen = torch.randint(len(x), (50,), generator=generator)
        yield x[chosen], y[chosen]


def _train(
    model: fd.AdaptedModel, data: tuple[torch.Tensor, torch.Tensor], updates: int, steps: int, lr: float
) -> None:
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


@pytest.fixture(scope="session")
def healthy(
    training: tuple[torch.Tensor, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, fd.AdaptedModel]:
    """A standard model, one after full adversarial training, and the standard one with an adversarial adapter."""
    folder = tmp_path_factory.mktemp("standard")
    torch.manual_seed(0)
    settings = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "finetune": "full", "seed": 0}
    standard, full_at = tiny(**settings), tiny(**settings)
    _train(standard, training, 150, 0, 2e-3)
    full_at.load_state_dict(standard.state_dict())
    _train(full_at, training, 150, 3, 1e-3)
    save_file(standard.backbone.state_dict(), folder / "standard.safetensors")
    fulllora = fd.create_model(
        "vit_tiny_patch16_224.augreg_in21k",
        checkpoint=f"{folder}/standard.safetensors",
        num_classes=CLASSES,
        image_size=SIDE,
        architecture=ARCHITECTURE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        rank=4,
    )
    _train(fulllora, training, 150, 3, 5e-3)
    return {"standard": standard.eval(), "full_at": full_at.eval(), "fulllora": fulllora.eval()}
