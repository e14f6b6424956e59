"""Settings of the model and its adapter."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from fulllora_dist.core.settings import Location, Positive, Settings

Finetune = Literal["fulllora", "lora", "full", "head", "layernorm"]


Head = Literal["auto", "frozen", "trained", "adapted"]


Precision = Literal["fp32", "bf16"]


Qkv = Literal["separate", "shared"]


Component = Literal["patch_embed", "reduction", "q", "k", "v", "proj", "fc1", "fc2"]


COMPONENTS: tuple[Component, ...] = get_args(Component)
"""Every component that can have a branch. `reduction` is Swin's patch merging."""


class ModelSettings(Settings):
    backbone: str
    """timm's full arch.tag, e.g. vit_base_patch16_224.augreg2_in21k_ft_in1k."""
    checkpoint_path: Location | None = None
    """Weights under timm's keys (.safetensors or .pth), a path or fsspec URL; null downloads them from timm's hub."""
    pretrained: bool = True
    """false starts from random weights."""
    num_classes: int | None = Field(None, ge=2)
    """Number of classes; null keeps the checkpoint's. A different number creates a new head."""
    class_indices: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=2)
    """Rows of the checkpoint's head to keep, in the order of the data's classes, instead of a new head."""
    image_size: int | None = Field(None, ge=1)
    """Input size in pixels; null takes the pretrained one. Position embeddings are resampled for another."""
    mean: tuple[float, float, float] | None = None
    """Normalisation mean, for pixels in [0, 1]; null takes the pretrained model's."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Normalisation standard deviation, for pixels in [0, 1]; null takes the pretrained model's."""
    model_kwargs: dict[str, Any] = Field({})
    """Further arguments of timm.create_model. Dropout and drop_path draw from torch's global generator: they depend on
    the number of ranks and are not resumed exactly."""
    precision: Precision = "fp32"
    """bf16 runs the blocks in bf16; pixels, patch embedding, adapters, optimizer and head stay in fp32."""


class AdapterSettings(Settings):
    trainable_fraction: float = Field(0.05, gt=0, le=1)
    """Fraction of backbone and head parameters that may train, head included; determines the rank."""
    rank: int | None = Field(None, ge=1)
    """Rank of every branch, instead of trainable_fraction."""
    alpha: float | None = Field(None, gt=0)
    """Branches are scaled by alpha / rank; null takes alpha = rank."""
    components: tuple[Component, ...] = COMPONENTS
    """Components that get a branch."""
    qkv: Literal["separate", "shared"] = "separate"
    """One branch each for q, k and v, or one shared by the fused projection."""
    patch_norm_eps: float = Field(1e-2, gt=0)
    """eps of the LayerNorm over flattened patches, in squared units of normalised pixels."""
    head: Head = "auto"
    """frozen, trained or adapted (a branch); auto freezes the checkpoint's own head and trains a new one."""
    init_from: Location | None = None
    """Adapter folder to initialise from; must have the same backbone and shapes."""
