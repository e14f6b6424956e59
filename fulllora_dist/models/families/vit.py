"""timm's ViT, and other models of the same class: DeiT, DeiT-III, DINO, DINOv2 (registers, layer scale, SwiGLU), CLIP,
SigLIP and AIMv2 towers."""

from typing import Any

from timm.layers import Attention
from timm.models import vision_transformer as vit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer

from fulllora_dist.models.families.family import Family, Weights, register_family
from fulllora_dist.models.families.timm_parts import ATTENTION_POOL, MLPS, PATCH_EMBED


def _convert(weights: Weights, backbone: Any) -> Weights:
    """Call timm's filter with the arguments that timm chooses by the architecture's name, and support the original
    checkpoints of DeiT-III, whose layer scales are called gamma_1 and gamma_2."""
    name: str = getattr(backbone, "pretrained_cfg", {}).get("architecture", "")
    resampling: dict[str, Any] = {}
    if "flexi" in name:
        resampling = {"interpolation": "bilinear", "antialias": False}
    elif "radio" in name:
        corners = any(aligned in name for aligned in vit._RADIO_ALIGN_CORNERS)
        resampling = {"interpolation": "bilinear", "antialias": False, "align_corners": corners}
    adapt_layer_scale = any(".gamma_1" in key for key in weights)
    return vit.checkpoint_filter_fn(weights, backbone, adapt_layer_scale=adapt_layer_scale, **resampling)


register_family(
    Family(
        name="ViT",
        models=(VisionTransformer, VisionTransformerDistilled),
        parts={
            VisionTransformer: {"head": "head"},
            VisionTransformerDistilled: {"head": "head", "head_dist": "head"},
            **PATCH_EMBED,
            Block: {},
            Attention: {"qkv": "qkv", "proj": "proj"},
            **MLPS,
            **ATTENTION_POOL,
        },
        blocks=("blocks.*",),
        convert=_convert,
    )
)
