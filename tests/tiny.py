"""Shallow real timm models, quick on a CPU, and pictures for them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fulllora_dist.data.batch import Batch
from fulllora_dist.models.finetune import AdaptedModel, create_model

SIDE = 16
CLASSES = 4
ARCHITECTURE: dict[str, object] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "dinov2_swiglu": ("vit_giant_patch14_dinov2", {"init_values": 0.5, "mlp_ratio": 2}),
    "aimv2_swiglu": ("aimv2_large_patch14_224", {"mlp_ratio": 2}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.5}),
}


def tiny(family: str = "vit", **settings: Any) -> AdaptedModel:
    """A model of two blocks with random weights and four classes: pixels [B, 3, 16, 16] -> logits [B, 4]."""
    name, more = FAMILIES[family]
    if settings.get("finetune", "fulllora") in ("fulllora", "lora"):
        settings = {"rank": 3, **settings}
    return create_model(
        name,
        **{
            "pretrained": False,
            "num_classes": CLASSES,
            "image_size": SIDE,
            "architecture": ARCHITECTURE | more,
            **settings,
        },
    )


def stir(model: AdaptedModel, seed: int = 0) -> AdaptedModel:
    """Move everything that trains away from its start, B included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def pictures(n: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, side: int = SIDE) -> Tensor:
    """[n, 3, side, side] in [0, 1], with some pixels at 0 and at 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((n, 3, side, side), generator=generator, dtype=torch.float64)
    return (1.2 * noise - 0.1).clamp(0, 1).to(dtype)


def batches(count: int, size: int, dtype: torch.dtype = torch.float64, slot: int = 0) -> Iterator[Batch]:
    """Batches of different pictures with ids and labels of their own."""
    for i in range(count):
        generator = torch.Generator().manual_seed(1000 + i)
        yield Batch(
            images=pictures(size, seed=i, dtype=dtype),
            labels=torch.randint(CLASSES, (size,), generator=generator),
            ids=torch.randperm(10_000, generator=generator)[:size],
            mask=torch.ones(size, dtype=torch.bool),
            slot=slot,
        )


def branches(model: AdaptedModel) -> list[str]:
    """Names of the branches: "blocks.0.attn.qkv.lnlora.q" and so on."""
    return [name.removesuffix(".A") for name, _ in model.backbone.named_parameters() if name.endswith(".A")]
