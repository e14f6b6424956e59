"""XCiT. Each convolution of the patch embedding gets a branch. The depthwise convolutions of the local patch
interaction have only 9 weights per channel, and the position encoding does not depend on the image; both stay
frozen."""

from timm.models.cait import ClassAttn
from timm.models.xcit import LPI, XCA, ClassAttentionBlock, ConvPatchEmbed, PositionalEncodingFourier, XCABlock, Xcit

from fulllora_dist.models.families.family import Family, register_family
from fulllora_dist.models.families.timm_parts import MLPS

register_family(
    Family(
        name="XCiT",
        models=(Xcit,),
        parts={
            Xcit: {"head": "head"},
            ConvPatchEmbed: {"proj.*.0": "patch_embed"},
            PositionalEncodingFourier: {"token_projection": None},
            XCABlock: {},
            XCA: {"qkv": "qkv", "proj": "proj"},
            LPI: {"conv1": None, "conv2": None},
            ClassAttentionBlock: {},
            ClassAttn: {"q": "q", "k": "k", "v": "v", "proj": "proj"},
            **MLPS,
        },
        blocks=("blocks.*", "cls_attn_blocks.*"),
        any_size=True,
    )
)
