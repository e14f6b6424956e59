"""BEiT and BEiT v2. The attention reads `qkv.weight` and has its own biases."""

from timm.models.beit import Attention, Beit, Block

from fulllora_dist.models.families.family import Family, register_family
from fulllora_dist.models.families.timm_parts import MLPS, PATCH_EMBED, CallsQkv


class CallingAttention(CallsQkv, Attention):
    """BEiT's attention, changed to call `qkv`."""


register_family(
    Family(
        name="BEiT",
        models=(Beit,),
        parts={
            Beit: {"head": "head"},
            **PATCH_EMBED,
            Block: {},
            Attention: {"qkv": "qkv", "proj": "proj"},
            **MLPS,
        },
        blocks=("blocks.*",),
        calling={Attention: CallingAttention},
    )
)
