"""Settings of the model and its adapter."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from fulllora_dist.core.settings import Location, Positive, Settings

Finetune = Literal["fulllora", "lora", "full", "head", "layernorm"]


Head = Literal["auto", "frozen", "trained", "adapted"]


Precision = Literal["fp32", "bf16"]


Qkv = Literal["separate", "shared"]


Component = Literal["patch_embed", "reduction", "q", "k", "v", "proj", "fc1", "fc2"]


COMPONENTS: tuple[Component, ...] = get_args(Component)
"""Every component that can have a branch. `reduction` is Swin's patch merging."""


def _three(value: object) -> object:
    if value is None:
        return None
    numbers = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    if len(numbers) != 3:
        raise ValueError(f"must be three numbers, one for each channel of RGB, got {value!r}")
    return numbers


def _of_pixels(numbers: tuple[float, float, float]) -> tuple[float, float, float]:
    """Check that they are in units of [0, 1] pixels, which is what a model of this package takes."""
    if max(numbers) > 1:
        raise ValueError(f"must be at most 1, for pixels in [0, 1], got {max(numbers):g}; divide by 255 if for 0..255")
    return numbers


_NonNegative = Annotated[float, Field(ge=0)]
Mean = Annotated[tuple[_NonNegative, _NonNegative, _NonNegative], BeforeValidator(_three), AfterValidator(_of_pixels)]
Std = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_three), AfterValidator(_of_pixels)]

_SETTINGS_OF_THEIR_OWN = {
    "img_size": "model.image_size",
    "num_classes": "model.num_classes",
    "pretrained": "model.pretrained",
    "checkpoint_path": "model.checkpoint_path",
    "model_name": "model.backbone",
    "pretrained_cfg": "model.backbone",
    "pretrained_cfg_overlay": "model.checkpoint_path, model.mean and model.std",
}
"""Arguments of timm.create_model that must not be in `model_kwargs`, and the settings that do the same."""
_RANDOM_POSITIONS = ("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords")


def _repeated(numbers: Sequence[int]) -> int | None:
    """The first number that was there before."""
    return next((number for i, number in enumerate(numbers) if number in numbers[:i]), None)


def _check_kwargs(arguments: Mapping[str, Any]) -> None:
    for argument, setting in _SETTINGS_OF_THEIR_OWN.items():
        if argument in arguments:
            raise ValueError(f"{argument} is the setting {setting}; set that instead")
    for argument in _RANDOM_POSITIONS:
        if arguments.get(argument) is not None:
            raise ValueError(
                f"{argument} draws new positions in each pass, so that the attack and the weight step would see "
                "different models; remove it"
            )
    for argument, value in arguments.items():
        if argument.endswith(("drop_rate", "drop_path_rate")):
            rates = value if isinstance(value, (list, tuple)) else [value]
            for rate in rates:
                if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
                    raise ValueError(f"{argument} must be a number in [0, 1), got {rate!r}")


class ModelSettings(Settings):
    backbone: str
    """timm's full arch.tag, e.g. vit_base_patch16_224.augreg2_in21k_ft_in1k."""
    checkpoint_path: Location | None = None
    """Weights under timm's keys (.safetensors or .pth), a path or fsspec URL; null downloads them from timm's hub."""
    checkpoint_key: str | None = None
    """Which set of weights to take from a checkpoint that has several: state_dict, model, model_ema, state_dict_ema,
    teacher, ..., or a path with dots."""
    pretrained: bool = True
    """false starts from random weights."""
    num_classes: int | None = Field(None, ge=2)
    """Number of classes; null keeps the checkpoint's. A different number creates a new head."""
    class_indices: list[Annotated[int, Field(ge=0)]] | None = Field(None, min_length=2)
    """Rows of the checkpoint's head to keep, in the order of the data's classes, instead of a new head."""
    image_size: int | None = Field(None, ge=1)
    """Input size in pixels; null takes the pretrained one. Position embeddings are resampled for another."""
    mean: Mean | None = None
    """Normalisation mean, for pixels in [0, 1]; null takes the pretrained model's."""
    std: Std | None = None
    """Normalisation standard deviation, for pixels in [0, 1]; null takes the pretrained model's."""
    model_kwargs: dict[str, Any] = Field({})
    """Further arguments of timm.create_model. Dropout and drop_path draw from torch's global generator: they depend on
    the number of ranks and are not resumed exactly."""
    precision: Precision = "fp32"
    """bf16 runs the blocks in bf16; pixels, patch embedding, adapters, optimizer and head stay in fp32."""
    compile: bool = False
    """Compile the blocks in training, one by one; needs a C++ compiler, on CUDA triton. Off at ZeRO-3."""

    @field_validator("class_indices")
    @classmethod
    def _distinct(cls, classes: list[int] | None) -> list[int] | None:
        if (twice := _repeated(classes or ())) is not None:
            raise ValueError(f"must not repeat a class, got {twice} twice")
        return classes

    @field_validator("model_kwargs")
    @classmethod
    def _known(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        _check_kwargs(arguments)
        return arguments

    @model_validator(mode="after")
    def _agree(self) -> "ModelSettings":
        if self.checkpoint_path is not None and not self.pretrained:
            raise ValueError("model.checkpoint_path: must not be set if model.pretrained is false; remove one of them")
        if self.checkpoint_key is not None and self.checkpoint_path is None:
            raise ValueError(
                f"model.checkpoint_key: {self.checkpoint_key} needs model.checkpoint_path, the file to take it from"
            )
        classes, number = self.class_indices, self.num_classes
        if classes is not None and not self.pretrained:
            raise ValueError(
                "model.class_indices: must not be set if model.pretrained is false, whose head knows no classes; set "
                f"model.num_classes={len(classes)} instead"
            )
        if classes is not None and number not in (None, len(classes)):
            raise ValueError(
                f"model.num_classes: must be the number of model.class_indices, {len(classes)}, got {number}; remove "
                "one of them"
            )
        return self


class AdapterSettings(Settings):
    trainable_fraction: float = Field(0.05, gt=0, le=1)
    """Fraction of backbone and head parameters that may train, head included; determines the rank."""
    rank: int | None = Field(None, ge=1)
    """Rank of every branch, instead of trainable_fraction."""
    alpha: float | None = Field(None, gt=0)
    """Branches are scaled by alpha / rank; null takes alpha = rank."""
    components: tuple[Component, ...] = COMPONENTS
    """Components that get a branch."""
    blocks: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Blocks that get branches, numbered from 0, as peft's layers_to_transform, e.g. [0, 1, 2]; null for all. Layers
    outside of the blocks are left to components and head; Swin's patch merging goes with the block behind it."""
    qkv: Qkv = "separate"
    """One branch each for q, k and v, or one shared by the fused projection."""
    patch_norm_eps: float = Field(1e-2, gt=0)
    """eps of the LayerNorm over flattened patches, in squared units of normalised pixels."""
    head: Head = "auto"
    """frozen, trained or adapted (a branch); auto freezes the checkpoint's own head and trains a new one."""
    train_norms: bool = False
    """Train all of the backbone's own LayerNorms beside the branches; they count towards trainable_fraction."""
    init_from: Location | None = None
    """Adapter folder to initialise from; must have the same backbone and shapes."""

    @field_validator("blocks")
    @classmethod
    def _each_once(cls, blocks: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if blocks is None:
            return None
        if not blocks:
            raise ValueError("must have at least one block, got none; null is for all")
        if (twice := _repeated(blocks)) is not None:
            raise ValueError(f"must not repeat a block, got {twice} twice")
        return tuple(sorted(blocks))
