"""Modules shared by several timm families, and resampling of a checkpoint's position embedding."""

from typing import Any

from timm.layers import (
    AttentionPoolLatent,
    ClassifierHead,
    GluMlp,
    Mlp,
    PatchEmbed,
    SwiGLU,
    resample_abs_pos_embed,
)
from torch import nn

from fulllora_dist.models.families.family import Parts, Weights

PATCH_EMBED: Parts = {PatchEmbed: {"proj": "patch_embed"}}

MLPS: Parts = {
    Mlp: {"fc1": "fc1", "fc2": "fc2"},
    GluMlp: {"fc1": "fc1", "fc2": "fc2"},
    SwiGLU: {"fc1_g": "fc1", "fc1_x": "fc1", "fc2": "fc2"},
}

ATTENTION_POOL: Parts = {AttentionPoolLatent: {"q": "q", "kv": "kv", "proj": "proj"}}

POOLED_HEAD: Parts = {ClassifierHead: {"fc": "head"}}


class CallsQkv:
    """Mixin for a timm attention that reads `self.qkv.weight`, which makes it call `self.qkv`."""

    q_bias: Any = None  # hides the parameter that timm checks to decide


def resize_pos_embed(weights: Weights, backbone: nn.Module) -> Weights:
    """Resample a position embedding [1, patches, dim] without prefix tokens to the model's grid."""
    own = backbone.get_parameter("pos_embed") if "pos_embed" in weights else None
    if own is None or own.shape == weights["pos_embed"].shape:
        return weights
    grid = backbone.get_submodule("patch_embed").grid_size
    resized = resample_abs_pos_embed(weights["pos_embed"], new_size=grid, num_prefix_tokens=0)
    return weights | {"pos_embed": resized}
