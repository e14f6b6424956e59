"""ConViT. The first blocks attend by content, with a fused `qk`, and by position, with `pos_proj`, which does not
depend on the image and stays frozen. timm does not support activation checkpointing for it."""

from timm.models.convit import GPSA, MHSA, Block, ConVit

from fulllora_dist.models.families.family import Family, register_family
from fulllora_dist.models.families.timm_parts import MLPS, PATCH_EMBED, resize_pos_embed

register_family(
    Family(
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
)
