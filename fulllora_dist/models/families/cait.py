"""CaiT. Its talking heads (`proj_l`, `proj_w`) are square in the number of heads, 4 to 16: nothing of lower rank, and
they stay frozen. The class attention's q, k and v are separate layers."""

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
    """timm's filter does not fit the position embedding to another image size."""
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
