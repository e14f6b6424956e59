"""Settings of the model and its adapter."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from fulllora_dist.core.settings import Positive, Settings

Finetune = Literal["fulllora", "lora", "full", "head", "layernorm"]


Head = Literal["auto", "frozen", "trained", "adapted"]


Precision = Literal["fp32", "bf16"]


Qkv = Literal["separate", "shared"]


Component = Literal["patch_embed", "reduction", "q", "k", "v", "proj", "fc1", "fc2"]


COMPONENTS: tuple[Component, ...] = get_args(Component)
"""Names a placement is written in. `reduction` is Swin's patch merging."""


class ModelSettings(Settings):
    backbone: str
    """timm's full arch.tag, e.g. vit_base_patch16_224.augreg2_in21k_ft_in1k."""
    checkpoint_path: str | None = None
    """Weights under timm's keys (.safetensors or .pth), a path or an fsspec URL; null takes timm's hub."""
    pretrained: bool = True
    """false starts from random weights (drawn from run.seed)."""
    num_classes: int | None = Field(None, ge=2)
    """Outputs; null keeps the checkpoint's. Another number starts a new head."""
    class_indices: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=2)
    """Rows of the checkpoint's head to keep, in the order of the data's classes."""
    image_size: int | None = Field(None, ge=1)
    """Side in pixels; null takes the pretrained one. Another resamples the position embedding."""
    mean: tuple[float, float, float] | None = None
    """Normalisation, in [0, 1] pixels; null takes the tag's."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Normalisation, in [0, 1] pixels; null takes the tag's."""
    model_kwargs: dict[str, Any] = Field({})
    """Further arguments of timm.create_model, for models of one's own. Dropout and drop_path draw from torch's own
    generator: they are the one randomness that depends on the number of ranks and is not resumed exactly."""
    precision: Precision = "fp32"
    """bf16 computes the blocks in bf16; pixels, patch embedding, adapters, optimizer and head stay in fp32."""


class AdapterSettings(Settings):
    trainable_fraction: float = Field(0.05, gt=0, le=1)
    """Share of backbone + head that may train, head counted; the rank follows from it."""
    rank: int | None = Field(None, ge=1)
    """Rank of every branch, instead of the budget."""
    alpha: float | None = Field(None, gt=0)
    """Branches are scaled by alpha / rank; null takes alpha = rank."""
    components: tuple[Component, ...] = COMPONENTS
    """Components with a branch."""
    qkv: Literal["separate", "shared"] = "separate"
    """A branch each for q, k and v, or one for the fused projection."""
    patch_norm_eps: float = Field(1e-2, gt=0)
    """eps of the LN over flattened patches, in squared units of normalised pixels."""
    head: Head = "auto"
    """frozen, trained or adapted; auto freezes the backbone's own classes and trains new ones."""
    init_from: str | None = None
    """Folder of an adapter to start from; its backbone and shapes must be these."""
