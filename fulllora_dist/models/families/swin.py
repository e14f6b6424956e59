"""Swin and SwinV2. SwinV2's attention reads `qkv.weight` and has its own biases; its position bias MLP `cpb_mlp` does
not depend on the image and stays frozen."""

from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2

from fulllora_dist.models.families.family import Family, register_family
from fulllora_dist.models.families.timm_parts import MLPS, PATCH_EMBED, POOLED_HEAD, CallsQkv

_BLOCKS = ("layers.*.downsample", "layers.*.blocks.*")


class CallingWindowAttention(CallsQkv, v2.WindowAttention):
    """SwinV2's attention, changed to call `qkv`."""


register_family(
    Family(
        name="Swin",
        models=(v1.SwinTransformer,),
        parts={
            v1.SwinTransformer: {},
            **PATCH_EMBED,
            v1.SwinTransformerStage: {},
            v1.PatchMerging: {"reduction": "reduction"},
            v1.SwinTransformerBlock: {},
            v1.WindowAttention: {"qkv": "qkv", "proj": "proj"},
            **MLPS,
            **POOLED_HEAD,
        },
        blocks=_BLOCKS,
    )
)

register_family(
    Family(
        name="SwinV2",
        models=(v2.SwinTransformerV2,),
        parts={
            v2.SwinTransformerV2: {},
            **PATCH_EMBED,
            v2.SwinTransformerV2Stage: {},
            v2.PatchMerging: {"reduction": "reduction"},
            v2.SwinTransformerV2Block: {},
            v2.WindowAttention: {"qkv": "qkv", "proj": "proj", "cpb_mlp.*": None},
            **MLPS,
            **POOLED_HEAD,
        },
        blocks=_BLOCKS,
        calling={v2.WindowAttention: CallingWindowAttention},
    )
)
