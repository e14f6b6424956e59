"""ConViT. Its first blocks attend by content, from a fused `qk`, and by position, from `pos_proj`, which does not see
the picture and stays frozen. timm has no activation checkpointing for it."""

from timm.models.convit import GPSA, MHSA, Block, ConVit

from fulllora_dist.models.families.family import Family
from fulllora_dist.models.families.timm_parts import MLPS, PATCH_EMBED, resize_pos_embed

CONVIT = Family(
    name="ConViT",
    models=(ConVit,),
    parts={
        ConVit: {"head": "head"},
        **PATCH_EMBED,
        Block: {},
        GPSA: {"qk": "qk", "v": "v", "proj": "proj", "pos_proj": None},
        MHSA: {"qkv": "qkv", "proj": "proj"},
        **MLPS,
    },
    blocks=("blocks.*",),
    checkpointing=False,
    convert=resize_pos_embed,
)
