"""What a module that `adapt` is given is: its name, its images and their normalisation, its weights."""

from collections.abc import Collection, Mapping
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fulllora_dist.attacks.arguments import dtype_name
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.settings import ModelSettings
from fulllora_dist.models.weights import fingerprint


def check_given(module: Any) -> None:
    """Check that it is a module that can be adapted.

    Raises:
        UserError: no module, a wrapped or compiled one, one with branches, without weights, or not in fp32.
    """
    if not isinstance(module, nn.Module):
        raise UserError(f"module must be a torch.nn.Module, got {type(module).__name__}; create_model takes a name")
    if isinstance(module, AdaptedModel) or any("lnlora" in part._modules for part in module.modules()):
        raise UserError("module has an adapter already; fd.unload(model) gives the module without")
    if isinstance(module, (DataParallel, DistributedDataParallel)):
        raise UserError(f"module is wrapped in {type(module).__name__}; adapt its .module, and wrap the adapted model")
    if hasattr(module, "_orig_mod"):
        raise UserError("module is compiled; adapt it first, and compile the adapted model")
    parameters = dict(module.named_parameters())
    if any(parameter.is_inference() for parameter in parameters.values()):
        raise UserError("module: its tensors were made under torch.inference_mode; create or load it outside")
    if not parameters:
        raise UserError(f"module must have weights, got a {type(module).__name__} without parameters")
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise UserError(f"module must be float32, got {dtype_name(parameter)} ({name}); write module.float()")


def _pretrained_cfg(module: nn.Module) -> Mapping[str, Any]:
    """timm's; empty of other modules."""
    config = getattr(module, "pretrained_cfg", None)
    return config if isinstance(config, Mapping) else {}


def name_of(module: nn.Module) -> str:
    """timm's arch.tag, transformers' name_or_path, else the module's class."""
    config = _pretrained_cfg(module)
    if config.get("architecture"):
        return ".".join(filter(None, (config["architecture"], config.get("tag"))))
    return str(getattr(getattr(module, "config", None), "name_or_path", "")) or class_name(module)


def class_name(module: nn.Module) -> str:
    """With its Python module, e.g. torchvision.models.vision_transformer.VisionTransformer."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def image_size_of(module: nn.Module, name: str, given: int | None) -> int:
    """Side of the images in pixels: as given, else what timm, torchvision and transformers write into their models.

    Raises:
        UserError: the module does not say it.
    """
    sizes = [
        given,
        getattr(getattr(module, "patch_embed", None), "img_size", None),
        getattr(module, "image_size", None),
        getattr(getattr(module, "config", None), "image_size", None),
        _pretrained_cfg(module).get("input_size", (None,))[-1],
    ]
    for size in sizes:
        sides = set(size) if isinstance(size, (tuple, list)) else {size}
        if len(sides) == 1 and isinstance(side := sides.pop(), int):
            return side
    raise UserError(f"image_size: {name} does not say for which square images it is made; give their side in pixels")


def describe(
    module: nn.Module, name: str, settings: ModelSettings, num_classes: int, heads: Collection[str]
) -> BackboneInfo:
    """The description of a module, whose weights are taken as they are.

    Args:
        settings: mean, std and image_size, where they are given.
        heads: paths of the heads, which have a fingerprint of their own: where they are trained, their start is random
            and does not matter.

    Raises:
        UserError: a normalisation or an image size that is not known; no classes.
    """
    config = _pretrained_cfg(module)
    data = timm.data.resolve_data_config(pretrained_cfg=dict(config)) if config else {}
    normaliser = {key: tuple(getattr(settings, key) or data.get(key, ())) for key in ("mean", "std")}
    if missing := [key for key, value in normaliser.items() if not value]:
        raise UserError(
            f"{' and '.join(missing)}: must be given, as {name} does not say how its images are normalised; e.g. "
            "image_mean and image_std of its image processor, or (0, 0, 0) and (1, 1, 1) if it takes pixels in [0, 1]"
        )
    if num_classes < 1:
        raise UserError(f"module: {name} has no classes; make it with num_classes")
    body, head = _fingerprints(module, heads)
    return BackboneInfo(
        name=name,
        checkpoint=None,
        pretrained=True,
        seed=0,
        sha256=body,
        num_classes=num_classes,
        classes=None,
        own_classes=num_classes == config.get("num_classes", num_classes),
        image_size=image_size_of(module, name, settings.image_size),
        mean=normaliser["mean"],
        std=normaliser["std"],
        crop_pct=float(data.get("crop_pct", timm.data.DEFAULT_CROP_PCT)),
        interpolation=data.get("interpolation", "bicubic"),
        architecture={},
        crop_mode=data.get("crop_mode", "center"),
        head_sha256=head,
        module=class_name(module),
    )


def _fingerprints(module: nn.Module, heads: Collection[str]) -> tuple[str | None, str | None]:
    """Of all weights but the heads', and of the heads'; None without any, and on the meta device."""
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        return None, None
    own = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in heads}
    body = {name: tensor for name, tensor in state.items() if name not in own}
    return fingerprint(body), fingerprint(own) if own else None
