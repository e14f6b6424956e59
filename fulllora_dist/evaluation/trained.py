"""What a model knows of its training, as far as evaluations depend on it: class names, and the crop of images."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import timm
from timm.data import ImageNetInfo
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fulllora_dist.attacks.victim import Victim
from fulllora_dist.data.transforms import EvalTransform
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.training_record import TrainingData, TrainingRecord


def unwrapped(model: nn.Module) -> nn.Module:
    """The adapted model that an attack's `Victim`, torch.compile, DataParallel or DistributedDataParallel wraps; of
    others the model."""
    model = model.model if isinstance(model, Victim) else model
    inner: Any = getattr(model, "_orig_mod", model)
    if isinstance(inner, (DataParallel, DistributedDataParallel)):
        inner = inner.module
    return inner if isinstance(inner, AdaptedModel) else model


def record_of(model: nn.Module) -> TrainingRecord:
    """An adapter's record; an empty one of any other module."""
    record = getattr(unwrapped(model), "record", None)
    return record if isinstance(record, TrainingRecord) else TrainingRecord()


def classes_of(model: nn.Module, data: Sequence[str]) -> tuple[str, ...]:
    """Names of a model's outputs: those that it records; of a head that is ImageNet's own the WordNet ids, where the
    data has as many classes and is named by such ids, too. Empty where they are not known.

    Args:
        data: class names of the data.
    """
    model = unwrapped(model)
    recorded = record_of(model).classes
    if recorded or not isinstance(model, AdaptedModel) or not model.info.own_classes:
        return recorded
    tag = timm.models.get_pretrained_cfg(model.info.name)
    names = ImageNetInfo("imagenet-1k").label_names()
    rows = range(len(names)) if model.info.classes is None else model.info.classes
    imagenet = tag is not None and tag.num_classes == len(names) and len(rows) == len(data)
    return tuple(names[row] for row in rows) if imagenet and set(data) <= set(names) else ()


def eval_transform(
    model: AdaptedModel, crop_pct: float | None = None, interpolation: str | None = None
) -> EvalTransform:
    """The evaluation crop that the adapter was trained with, else its backbone's own, but for what is given."""
    own = transform_of(model.info, model.record.data)
    return replace(own, crop_pct=crop_pct or own.crop_pct, interpolation=interpolation or own.interpolation)


def transform_of(backbone: BackboneInfo, data: TrainingData | None) -> EvalTransform:
    """`eval_transform` by what an adapter's description says."""
    data = data or TrainingData()
    return EvalTransform(
        size=backbone.image_size,
        crop_pct=data.crop_pct or backbone.crop_pct,
        interpolation=data.interpolation or backbone.interpolation,
        crop_mode=backbone.crop_mode,
    )


def own_pictures(model: nn.Module) -> dict[str, Any] | None:
    """The settings of `eval_transform`; None for a module of one's own."""
    model = unwrapped(model)
    return asdict(eval_transform(model)) if isinstance(model, AdaptedModel) else None


def pictures_line(pictures: Mapping[str, Any], own: Mapping[str, Any] | None) -> str:
    """Size, crop and filter in words, and the model's own where they differ; empty if not known."""
    names = {"size": "pixels", "crop_pct": "crop", "interpolation": "interpolation", "crop_mode": "crop mode"}
    if not pictures.keys() >= names.keys():
        return ""
    line = "images: {size} pixels, crop {crop_pct:g}, {interpolation}, {crop_mode}".format(**pictures)
    other = [f"{shown} {own[key]}" for key, shown in names.items() if own and own[key] != pictures[key]]
    return f"{line}; the model's own: {', '.join(other)}" if other else line
