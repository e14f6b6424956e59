"""Build the frozen timm model and load its weights."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.models.checkpoint_file import check_normaliser, check_values, read_weights, unwrapped
from fulllora_dist.models.families import family_of
from fulllora_dist.models.hub import download
from fulllora_dist.models.settings import ModelSettings
from fulllora_dist.models.weights import fingerprint, load_into


@dataclass(frozen=True)
class BackboneInfo:
    """Description of a backbone, as stored in an adapter file.

    Attributes:
        name: timm's full `arch.tag`; of a module that `adapt` was given, where it came from.
        checkpoint: path or URL of the weights, with its signature redacted; None for timm's hub or random weights.
        pretrained: False for random weights.
        seed: seed of the random weights (and of a new head).
        sha256: `fingerprint` of the original weights, before the head is cut or the position embedding resized; of a
            module that `adapt` was given, without its head; None on the meta device.
        num_classes: number of outputs of the head.
        classes: rows of the checkpoint's head that are kept; None for all.
        own_classes: whether the head is the checkpoint's own.
        image_size: side of the square input in pixels.
        mean, std: normalisation of the three channels, in units of [0, 1] pixels.
        crop_pct, interpolation, crop_mode: timm's evaluation crop of this tag.
        architecture: arguments that change the tag's architecture (depth, embed_dim, ...).
        checkpoint_key: which set of weights in the checkpoint; None if it has a single one.
        head_sha256: `fingerprint` of a new, random head above pretrained weights, and of any head of a module that
            `adapt` was given; None without one.
        module: class of a module that `adapt` was given, which `load` must be given again; None for one of timm's that
            is built by its name.
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
    checkpoint_key: str | None = None
    head_sha256: str | None = None
    module: str | None = None


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
    on_meta = torch.empty(0).device.type == "meta"
    weights: dict[str, Tensor] | None = None
    source = redacted(checkpoint or name)
    normaliser: dict[str, tuple[float, ...]] = {}
    if pretrained and not on_meta:
        weights = read_weights(checkpoint, settings.checkpoint_key) if checkpoint else download(name)
        check_values(weights, source)
        weights, normaliser = unwrapped(
            weights, lambda: _names(name, settings.model_kwargs), source, settings.checkpoint_key
        )
    outputs = len(classes) if classes is not None and num_classes is None else num_classes
    arguments: dict[str, Any] = dict(settings.model_kwargs)
    if image_size is not None:
        arguments["img_size"] = image_size
    if input_sizes:
        arguments["dynamic_img_size"] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = _create(name, arguments, outputs, weights)
    data = timm.data.resolve_model_data_config(backbone)
    side = image_size or data["input_size"][-1]
    if side != _pretrained_cfg(name).get("input_size", (0,))[-1] or "patch_size" in settings.model_kwargs:
        _check_size(backbone, name, side, "model.image_size")
        _check_windows(backbone, name, side)
    for size in input_sizes:
        _check_size(backbone, name, size, "phases.image_size")
    family = family_of(backbone, name)
    if backbone.num_classes < 1:
        raise UserError(f"model.num_classes: {name} has no classes of its own; set it to the number of classes")
    heads = [site.path for site in family.sites(backbone, name) if site.component == "head"]
    if weights is None:
        sha256 = None if on_meta else fingerprint(backbone.state_dict())
        own_classes = pretrained and num_classes in (None, _pretrained_cfg(name).get("num_classes"))
    else:
        sha256 = fingerprint(weights)
        own_classes = load_into(backbone, family, heads, weights, classes, outputs, source)
    info = BackboneInfo(
        name=name,
        checkpoint=checkpoint and redacted(checkpoint),
        pretrained=pretrained,
        seed=seed,
        sha256=sha256,
        num_classes=backbone.num_classes,
        classes=tuple(classes) if classes is not None else None,
        own_classes=own_classes,
        image_size=side,
        mean=tuple(settings.mean or data["mean"]),
        std=tuple(settings.std or data["std"]),
        crop_pct=float(data["crop_pct"]),
        interpolation=data["interpolation"],
        architecture=dict(settings.model_kwargs),
        crop_mode=data["crop_mode"],
        checkpoint_key=settings.checkpoint_key,
        head_sha256=None if weights is None or own_classes else fingerprint(_of_modules(backbone, heads)),
    )
    check_normaliser(normaliser, {"mean": info.mean, "std": info.std}, source)
    return backbone, info


def _of_modules(backbone: nn.Module, paths: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in backbone.state_dict().items() if name.rpartition(".")[0] in paths}


def _names(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """The names of a timm model's tensors."""
    with torch.device("meta"):
        return list(_create(name, dict(arguments), None, None).state_dict())


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


def _check_size(backbone: Any, name: str, size: int, setting: str) -> None:
    """Check that the patches cover the image: timm's convolution would leave out what is left at its edges."""
    patch = patch_size(backbone)
    if patch is not None and (size % patch[0] or size % patch[1]):
        raise UserError(f"{setting}: must be a multiple of the patch size {patch[0]} of {name}, got {size}")


def _check_windows(backbone: nn.Module, name: str, size: int) -> None:
    """Check that windows (of Swin) divide the grid of patches: timm would fill up the rest with unmasked zeros."""
    for path, module in backbone.named_modules():
        grid, window = getattr(module, "input_resolution", None), getattr(module, "window_size", None)
        if not isinstance(grid, tuple) or window is None:
            continue
        windows = timm.layers.to_2tuple(window)
        if any(side % of for side, of in zip(grid, windows, strict=True)):
            raise UserError(
                f"model.image_size: {size} gives a grid of {grid[0]} x {grid[1]} in {path} of {name}, which its "
                f"windows of {windows[0]} x {windows[1]} do not divide; choose another size, or window_size in "
                "model.model_kwargs"
            )


def patch_size(backbone: nn.Module) -> tuple[int, int] | None:
    """Height and width of a model's patches in pixels; None if unknown."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    return None if size is None else timm.layers.to_2tuple(size)
