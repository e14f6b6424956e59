"""Shallow real timm models, quick on a CPU, and images for them."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.data.batch import Batch
from fulllora_dist.models.adapt import create_model
from fulllora_dist.models.adapted_model import AdaptedModel

SIDE = 16
CLASSES = 4
ARCHITECTURE: dict[str, object] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN: dict[str, object] = {
    "depth": None, "depths": (2, 1), "patch_size": 2, "embed_dim": 16, "num_heads": (2, 4), "window_size": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "dinov2_swiglu": ("vit_giant_patch14_dinov2", {"init_values": 0.5, "mlp_ratio": 2}),
    "aimv2_swiglu": ("aimv2_large_patch14_224", {"mlp_ratio": 2}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.5}),
    "deit3": ("deit3_small_patch16_224", {"init_values": 0.5}),
    "siglip_pool": ("vit_base_patch16_siglip_224", {}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "swinv2_no_bias": ("swinv2_tiny_window8_256", SWIN | {"qkv_bias": False}),
    "beit": ("beit_base_patch16_224", {"init_values": 0.5}),
    "beitv2": ("beitv2_base_patch16_224", {"init_values": 0.5}),
    "beit_shared_bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "eva_giant": ("eva_giant_patch14_224", {"mlp_ratio": 2}),
    "eva02_fused": ("eva02_tiny_patch14_224", {"mlp_ratio": 2}),
    "eva02_apart": ("eva02_base_patch14_224", {"mlp_ratio": 2}),
    "eva_rope": ("vit_medium_patch16_rope_reg1_gap_256", {"init_values": 0.5}),
    "eva_rope_mixed": ("vit_small_patch16_rope_mixed_224", {"init_values": 0.5}),
    "eva_rope_sapiens2": ("vit_base_patch16_sapiens2", {"num_kv_heads": 1, "init_values": 0.5, "mlp_ratio": 2}),
    "eva_post_norm": ("eva02_tiny_patch14_224", {"mlp_ratio": 2, "use_post_norm": True}),
    "eva_pool": ("vit_pe_core_tiny_patch16_384", {"init_values": 0.5, "attn_pool_num_heads": 2}),
    "cait": ("cait_xxs24_224", {"init_values": 0.5, "depth": 1, "depth_token_only": 1}),
    "xcit": ("xcit_nano_12_p8_224", {"patch_size": 8, "depth": 1, "cls_attn_layers": 1, "eta": 0.5}),
    "convit": ("convit_tiny", {"embed_dim": 8, "num_heads": 4, "local_up_to_layer": 1}),
}
""": timm's architecture, and what of it differs from `ARCHITECTURE`; None leaves an argument out."""


def architecture(family: str) -> dict[str, object]:
    """Arguments of `timm.create_model` that make a family's model tiny."""
    return {name: value for name, value in (ARCHITECTURE | FAMILIES[family][1]).items() if value is not None}


def tiny(family: str = "vit", **settings: Any) -> AdaptedModel:
    """A model of two blocks with random weights and four classes: pixels [B, 3, 16, 16] -> logits [B, 4]."""
    name, _ = FAMILIES[family]
    if settings.get("finetune", "fulllora") in ("fulllora", "lora"):
        settings = {"rank": 3, **settings}
    return create_model(
        name,
        **{
            "pretrained": False,
            "num_classes": CLASSES,
            "image_size": SIDE,
            "model_kwargs": architecture(family),
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


def roughen(model: AdaptedModel, seed: int = 1) -> AdaptedModel:
    """Move everything frozen away from its start, where biases, tables and statistics are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    own = model.trainable()
    with torch.no_grad():
        for name, tensor in model.backbone.state_dict(keep_vars=True).items():
            if name not in own and tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64).abs() * 0.1)
    return model


def images(n: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32, side: int = SIDE) -> Tensor:
    """[n, 3, side, side] in [0, 1], with some pixels at 0 and at 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((n, 3, side, side), generator=generator, dtype=torch.float64)
    return (1.2 * noise - 0.1).clamp(0, 1).to(dtype)


def batches(count: int, size: int, dtype: torch.dtype = torch.float64, slot: int = 0) -> Iterator[Batch]:
    """Batches of different images with ids and labels of their own."""
    for i in range(count):
        generator = torch.Generator().manual_seed(1000 + i)
        yield Batch(
            images=images(size, seed=i, dtype=dtype),
            labels=torch.randint(CLASSES, (size,), generator=generator),
            ids=torch.randperm(10_000, generator=generator)[:size],
            mask=torch.ones(size, dtype=torch.bool),
            slot=slot,
        )


def patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """[B, out_h, out_w, C * kh * kw], cut out one by one."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    x = F.pad(x, (pw, pw, ph, ph))
    rows = range(0, x.shape[2] - dh * (kh - 1), sh)
    columns = range(0, x.shape[3] - dw * (kw - 1), sw)
    cut = [[x[:, :, i : i + dh * kh : dh, j : j + dw * kw : dw].flatten(1) for j in columns] for i in rows]
    return torch.stack([torch.stack(row, dim=1) for row in cut], dim=1)


def branches(model: AdaptedModel) -> list[str]:
    """Names of the branches: "blocks.0.attn.qkv.lnlora.q" and so on."""
    return [name.removesuffix(".A") for name, _ in model.backbone.named_parameters() if name.endswith(".A")]


SEES_K_BIAS = ("swinv2", "eva02", "eva_rope", "eva_post", "eva_pool", "xcit")


def softmax_ignores(family: str, tensor: str) -> bool:
    """Whether it is the bias of a k: it adds the same to every key, unless k is rotated or normalised behind it."""
    of_k = tensor.endswith(("lnlora.k.norm.bias", "k_proj.lnlora.norm.bias", "attn.k.lnlora.norm.bias"))
    pooling = "attn_pool." in tensor or "cls_attn_blocks." in tensor
    return of_k and (pooling or not family.startswith(SEES_K_BIAS))
