"""Build the frozen timm model and load its weights."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.families import family_of
from fulllora_dist.models.settings import ModelSettings
from fulllora_dist.models.weights import download, fingerprint, load_into, read_weights
from fulllora_dist.storage.urls import redacted


@dataclass(frozen=True)
class BackboneInfo:
    """Description of a backbone, as stored in an adapter file.

    Attributes:
        name: timm's full `arch.tag`.
        checkpoint: path or URL of the weights, with its signature redacted; None for timm's hub or random weights.
        pretrained: False for random weights.
        seed: seed of the random weights (and of a new head).
        sha256: `fingerprint` of the original weights, before the head is cut or the position embedding resized; None on
            the meta device.
        num_classes: number of outputs of the head.
        classes: rows of the checkpoint's head that are kept; None for all.
        own_classes: whether the head is the checkpoint's own.
        image_size: side of the square input in pixels.
        mean, std: normalisation of the three channels, in units of [0, 1] pixels.
        crop_pct, interpolation, crop_mode: timm's evaluation crop of this tag.
        architecture: arguments that change the tag's architecture (depth, embed_dim, ...).
    """

    name: str
    checkpoint: str | None
    pretrained: bool
    seed: int
    sha256: str | None
    num_classes: int
    classes: tuple[int, ...] | None
    own_classes: bool
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    architecture: dict[str, object]
    crop_mode: str = "center"


def check_name(name: str, needs_tag: bool) -> None:
    """Check that timm knows a model, and that its name has a tag if there are several sets of weights.

    Raises:
        UserError: an unknown or ambiguous name; the message lists similar names or the available tags.
    """
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=3)
        raise UserError(f"model.backbone: timm has no {arch!r}; nearest: {', '.join(near) or 'none'}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{arch}.*") if "." in full]
    if tag and tag not in tags:
        raise UserError(f"model.backbone: {arch} has no tag {tag!r}; it has: {', '.join(tags)}")
    if needs_tag and not tag and len(tags) > 1:
        raise UserError(
            f"model.backbone: {arch} has several sets of weights; write {arch}.TAG, one of: {', '.join(tags)}"
        )


def _check_agreement(
    checkpoint: str | None,
    pretrained: bool,
    num_classes: int | None,
    classes: Sequence[int] | None,
    architecture: Mapping[str, object],
) -> None:
    if checkpoint is not None and not pretrained:
        raise UserError(
            f"model.checkpoint_path: must not be set if model.pretrained is false, got {redacted(checkpoint)}; "
            "remove one of them"
        )
    if classes is not None and num_classes not in (None, len(classes)):
        raise UserError(
            f"model.num_classes: must be the number of model.class_indices, {len(classes)}, got {num_classes}; "
            "remove one of them"
        )
    for argument, setting in (("img_size", "model.image_size"), ("num_classes", "model.num_classes")):
        if argument in architecture:
            raise UserError(f"model.model_kwargs: {argument} is the setting {setting}; set that instead")
    for argument in ("rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"):
        if architecture.get(argument) is not None:
            raise UserError(
                f"model.model_kwargs: {argument} draws new positions in each pass, so that the attack and the "
                "weight step would see different models; remove it"
            )


def build_backbone(
    settings: ModelSettings, *, seed: int = 0, input_sizes: Sequence[int] = ()
) -> tuple[nn.Module, BackboneInfo]:
    """Build a timm model with its weights. Returns the model and its description.

    Args:
        seed: seed of weights that are not pretrained.
        input_sizes: additional image sizes in pixels that the model must support; the position embedding is then
            resampled in each forward pass, and stays unchanged at `image_size`.

    Raises:
        UserError: an unknown name, weights that cannot be loaded or do not fit, classes out of range.
    """
    name, pretrained, num_classes = settings.backbone, settings.pretrained, settings.num_classes
    checkpoint, classes, image_size = settings.checkpoint_path, settings.class_indices, settings.image_size
    check_name(name, needs_tag=pretrained)
    _check_agreement(checkpoint, pretrained, num_classes, classes, settings.model_kwargs)
    on_meta = torch.empty(0).device.type == "meta"
    weights: dict[str, Tensor] | None = None
    if pretrained and not on_meta:
        weights = read_weights(checkpoint) if checkpoint else download(name)
    outputs = len(classes) if classes is not None and num_classes is None else num_classes
    arguments: dict[str, Any] = dict(settings.model_kwargs)
    if image_size is not None:
        arguments["img_size"] = image_size
    if input_sizes:
        arguments["dynamic_img_size"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _create(name, arguments, outputs, weights)
    _check_input_sizes(backbone, name, input_sizes)
    family = family_of(backbone, name)
    if backbone.num_classes < 1:
        raise UserError(f"model.num_classes: {name} has no classes of its own; set it to the number of classes")
    if family.prepare is not None:
        family.prepare(backbone)
    heads = [site.path for site in family.sites(backbone, name) if site.component == "head"]
    if weights is None:
        sha256 = None if on_meta else fingerprint(backbone.state_dict())
        own_classes = pretrained and num_classes in (None, _pretrained_cfg(name).get("num_classes"))
    else:
        sha256 = fingerprint(weights)
        own_classes = load_into(backbone, family, heads, weights, classes, outputs, redacted(checkpoint or name))
    data = timm.data.resolve_model_data_config(backbone)
    info = BackboneInfo(
        name=name,
        checkpoint=checkpoint and redacted(checkpoint),
        pretrained=pretrained,
        seed=seed,
        sha256=sha256,
        num_classes=backbone.num_classes,
        classes=tuple(classes) if classes is not None else None,
        own_classes=own_classes,
        image_size=image_size or data["input_size"][-1],
        mean=tuple(settings.mean or data["mean"]),
        std=tuple(settings.std or data["std"]),
        crop_pct=float(data["crop_pct"]),
        interpolation=data["interpolation"],
        architecture=dict(settings.model_kwargs),
        crop_mode=data["crop_mode"],
    )
    return backbone, info


def _create(name: str, arguments: dict[str, Any], outputs: int | None, weights: Mapping[str, Tensor] | None) -> Any:
    """Create the timm model without weights. The number of outputs defaults to that of the checkpoint's head."""
    classifier = _pretrained_cfg(name).get("classifier", "head")
    for head in [classifier] if isinstance(classifier, str) else classifier:
        if outputs is None and weights is not None and f"{head}.weight" in weights:
            outputs = len(weights[f"{head}.weight"])
    if outputs is not None:
        arguments = {**arguments, "num_classes": outputs}
    try:
        backbone = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = str(error).split("\n")[0]
        if "dynamic_img_size" in reason:
            backbone = _create(name, {k: v for k, v in arguments.items() if k != "dynamic_img_size"}, None, None)
            if family_of(backbone, name).any_size:
                return backbone
            raise UserError(f"phases.image_size: {name} supports a single image size only; remove it") from None
        raise UserError(f"model: timm cannot build {name} with {arguments}: {reason}") from None
    if "drop_path_rate" not in arguments:  # Swin defaults to 0.1, which draws from torch's generator on each rank
        for module in backbone.modules():
            if isinstance(module, timm.layers.DropPath):
                module.drop_prob = 0.0
    for module in backbone.modules():  # Sapiens2 rescales the coordinates of its RoPE at random by default
        if hasattr(module, "aug_active"):
            module.aug_active = False  # type: ignore[assignment]
    return backbone


def _pretrained_cfg(name: str) -> dict[str, Any]:
    """timm's pretrained_cfg of a tag, or of an architecture without one."""
    config = timm.models.get_pretrained_cfg(name)
    return config.to_dict() if config is not None else {}


def _check_input_sizes(backbone: Any, name: str, sizes: Sequence[int]) -> None:
    patch = patch_size(backbone)
    for size in sizes:
        if patch is not None and (size % patch[0] or size % patch[1]):
            raise UserError(f"phases.image_size: must be a multiple of the patch size {patch[0]} of {name}, got {size}")


def patch_size(backbone: nn.Module) -> tuple[int, int] | None:
    """Height and width of a model's patches in pixels; None if unknown."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    return None if size is None else timm.layers.to_2tuple(size)
