"""In bf16 TRADES' first gradient is that of fp32 from its default start, and noise from that of the paper's code."""

import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fulllora_dist.attacks.pgd import attack_mode, input_gradient, kl_divergence
from fulllora_dist.attacks.threat import in_box, threat_model
from fulllora_dist.core.rng import sample_rng
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.methods.trades import gaussian_start
from fulllora_dist.models.adapt import create_model

EPS, SIZE = 4 / 255, 96
LENT = Path(__file__).parents[3] / "shared" / "data"  # to the project, not part of it


def images(count: int) -> Tensor:
    """[count, 3, SIZE, SIZE] in [0, 1]."""
    with tarfile.open(LENT / "imagenet-natural-100.tar") as tar:
        pictures = [member for member in tar if member.name.lower().endswith((".jpg", ".jpeg"))][:count]
        return torch.stack([EvalTransform(SIZE)(tar.extractfile(member).read()) for member in pictures]) / 255


def first_gradient(precision: str, start: Tensor, x: Tensor) -> Tensor:
    model = create_model(
        "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        checkpoint_path=str(LENT / "vit_tiny_patch16_224.safetensors"),
        image_size=SIZE,
        rank=4,
        precision=precision,
    )
    with attack_mode(model):
        with torch.no_grad():
            clean = model(x)
        return input_gradient(model, start, clean, loss=kl_divergence)


@pytest.mark.skipif(not LENT.is_dir(), reason=f"needs {LENT}")
def test_the_default_start_survives_bf16() -> None:
    x, threat = images(8), threat_model("linf", EPS)
    rng = sample_rng(0, "train/trades/start/0", 0, torch.arange(8))
    starts = {"uniform": threat.random_start(rng, x), "1e-3": gaussian_start(1e-3, threat, rng, x)}
    agreement = {}
    for name, start in starts.items():
        ours, exact = (first_gradient(precision, in_box(x + start), x) for precision in ("bf16", "fp32"))
        agreement[name] = float((ours.sign() == exact.sign()).float().mean())
    assert agreement["uniform"] > 0.9
    assert agreement["1e-3"] < 0.75
