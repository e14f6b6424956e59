"""EVA and EVA-02, and other models of the same timm class: RoPE ViTs, DINOv3, the Perception Encoder.

The attention either reads the weight of a fused qkv and has its own biases, or calls q_proj, k_proj and v_proj.
"""

from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm

from fulllora_dist.models.families.family import Family, register_family
from fulllora_dist.models.families.timm_parts import ATTENTION_POOL, MLPS, PATCH_EMBED, CallsQkv

_PROJECTIONS = {"qkv": "qkv", "q_proj": "q", "k_proj": "k", "v_proj": "v", "proj": "proj"}


class CallingEvaAttention(CallsQkv, EvaAttention):
    """EVA's attention, changed to call a fused `qkv`."""


register_family(
    Family(
        name="EVA",
        models=(Eva,),
        parts={
            Eva: {"head": "head"},
            **PATCH_EMBED,
            EvaBlock: {},
            EvaBlockPostNorm: {},
            EvaAttention: _PROJECTIONS,
            AttentionRope: _PROJECTIONS,
            **MLPS,
            **ATTENTION_POOL,
        },
        blocks=("blocks.*",),
        calling={EvaAttention: CallingEvaAttention},
    )
)
