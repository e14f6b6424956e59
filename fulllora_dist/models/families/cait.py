"""CaiT. The talking heads (`proj_l`, `proj_w`) are square matrices of 4 to 16 heads, too small for a low-rank branch,
and stay frozen. The class attention has separate layers for q, k and v."""

from timm.models.cait import (
    Cait,
    ClassAttn,
    LayerScaleBlock,
    LayerScaleBlockClassAttn,
    TalkingHeadAttn,
    checkpoint_filter_fn,
)
from torch import nn

from fulllora_dist.models.families.family import Family, Weights, register_family
from fulllora_dist.models.families.timm_parts import MLPS, PATCH_EMBED, resize_pos_embed


def _convert(weights: Weights, backbone: nn.Module) -> Weights:
    """Resample the position embedding too, which timm's filter does not do."""
    return resize_pos_embed(checkpoint_filter_fn(weights, backbone), backbone)


register_family(
    Family(
        name="CaiT",
        models=(Cait,),
        parts={
            Cait: {"head": "head"},
            **PATCH_EMBED,
            LayerScaleBlock: {},
            TalkingHeadAttn: {"qkv": "qkv", "proj": "proj", "proj_l": None, "proj_w": None},
            LayerScaleBlockClassAttn: {},
            ClassAttn: {"q": "q", "k": "k", "v": "v", "proj": "proj"},
            **MLPS,
        },
        blocks=("blocks.*", "blocks_token_only.*"),
        convert=_convert,
    )
)
