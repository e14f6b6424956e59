"""Images, and the models that were trained on them."""

from pathlib import Path

import pytest
import torch
from eval_cases import IMAGES, train, write_images
from safetensors.torch import save_file

import fulllora_dist as fd
from fulllora_dist.data.loader import EvalStream
from fulllora_dist.data.shards.make import make_shards
from fulllora_dist.data.transforms import EvalTransform
from tests.tiny import ARCHITECTURE, CLASSES, SIDE, tiny


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 200 images that no model was trained on."""
    root, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("shards")
    write_images(root, 1, IMAGES)
    make_shards(root, folder, samples_per_shard=60, progress=False)
    return folder


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.Tensor, torch.Tensor]:
    """600 images and labels."""
    root, folder = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("shards")
    write_images(root, 2, 600)
    make_shards(root, folder, samples_per_shard=300, progress=False)
    (batch,) = EvalStream(folder, batch_size=600, transform=EvalTransform(size=SIDE, crop_pct=1.0))
    return batch.pixels(), batch.labels


@pytest.fixture(scope="session")
def healthy(
    training: tuple[torch.Tensor, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, fd.AdaptedModel]:
    """A standard model, one after full adversarial training, and the standard one with an adversarial adapter."""
    folder = tmp_path_factory.mktemp("standard")
    torch.manual_seed(0)
    settings = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "finetune": "full", "seed": 0}
    standard, full_at = tiny(**settings), tiny(**settings)
    train(standard, training, 150, 0, 2e-3)
    full_at.load_state_dict(standard.state_dict())
    train(full_at, training, 150, 3, 1e-3)
    save_file(standard.backbone.state_dict(), folder / "standard.safetensors")
    fulllora = fd.create_model(
        "vit_tiny_patch16_224.augreg_in21k",
        checkpoint_path=f"{folder}/standard.safetensors",
        num_classes=CLASSES,
        image_size=SIDE,
        model_kwargs=ARCHITECTURE,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        rank=4,
    )
    train(fulllora, training, 250, 3, 5e-3)
    return {"standard": standard.eval(), "full_at": full_at.eval(), "fulllora": fulllora.eval()}
