"""Save and load adapters: a folder with adapter.safetensors and adapter.json, without pickle or the backbone.

With `finetune: full` the tensors are the whole model's under timm's keys, including BatchNorm statistics, so that
adapter.safetensors is itself a checkpoint for `model.checkpoint_path`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.models.adapted_model import AdaptedModel, check_tensors, set_tensors
from fulllora_dist.models.adapter_address import DESCRIPTION, instead_of
from fulllora_dist.models.adapter_description import AdapterDescription, backbone_content, spec_content
from fulllora_dist.models.rebuild import build, build_onto, check_backbone, check_weights, described
from fulllora_dist.models.settings import Precision
from fulllora_dist.models.training_record import TrainingRecord
from fulllora_dist.storage.small_files import read_files, write_files

FORMAT_VERSION = 1
TENSORS = "adapter.safetensors"


def adapter_state_dict(model: AdaptedModel, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter file as {name in the timm model: tensor}, on the CPU.

    Args:
        trained: trained tensors to use instead of the model's own, such as an average, or gathered ones (ZeRO-3).

    Example:
        state = fd.adapter_state_dict(model)
        model.load_trainable(state)
    """
    tensors = {**(model.trainable() if trained is None else trained), **model.statistics()}
    # cloned, as safetensors refuses tensors that share memory, such as views of one flat buffer
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def adapter_sha256(model: AdaptedModel) -> str:
    """sha256 of the model's adapter.safetensors."""
    return hashlib.sha256(save_safetensors(adapter_state_dict(model))).hexdigest()


def _checksum(description: Mapping[str, Any]) -> str:
    """sha256 of the description, as a changed digit in alpha or std would silently change the model."""
    content = {key: value for key, value in description.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_adapter(
    model: AdaptedModel,
    folder: str | os.PathLike[str],
    *,
    state: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Save the adapter of `model`.

    Args:
        folder: local path or fsspec URL; created if it does not exist.
        state: trained tensors to save instead of the model's own (such as an average, or gathered ones).
        training: JSON-able record of how it was trained, in which "threat" is {"norm": "linf", "eps": 4 / 255}, "data"
            as in `TrainingData` and "seed" an integer; without it, the data that the model remembers
            (`AdaptedModel.record`), so that class names and crop are kept.

    Raises:
        UserError: `load` would not bring this model back, as it was changed after it was created, or `training` is
            something else; nothing is written.

    Example:
        fd.save_adapter(model, "adapter/")
        model = fd.load("adapter/")
    """
    if not isinstance(model, AdaptedModel):
        raise UserError(
            f"save_adapter: must be a model of create_model, adapt or load, got {type(model).__name__}; give the one "
            "that it wraps"
        )
    model.check_savable(state)
    if training is None:
        training = {key: value for key, value in model.record.content.items() if key == "data"}
    TrainingRecord(training)  # checks it
    tensors = save_safetensors(adapter_state_dict(model, state))
    description = {
        "format_version": FORMAT_VERSION,
        "adapter": spec_content(model.spec),
        "backbone": backbone_content(model.info),
        "family": {"name": model.family.name, "plugin": model.family.plugin},
        "timm": timm.__version__,
        "trainable": model.report.trainable,
        "trainable_share": model.report.share,
        "sha256": hashlib.sha256(tensors).hexdigest(),
        "training": dict(training),
    }
    try:
        description["checksum"] = _checksum(description)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"save_adapter: training, and model_kwargs of create_model, must be values that JSON can hold ({error}); "
            "timm takes layers by name too, such as act_layer='relu'"
        ) from None
    files = {TENSORS: tensors, DESCRIPTION: (json.dumps(description, indent=1) + "\n").encode()}
    write_files(folder, files, "save_adapter")


def read_adapter(folder: str) -> tuple[AdapterDescription, dict[str, Tensor]]:
    """Read and verify the description and tensors of an adapter.

    Raises:
        UserError: a file is missing or damaged, or has an unsupported format version.
    """
    return _verified(folder, *_read(folder, DESCRIPTION, TENSORS))


def read_description(folder: str) -> AdapterDescription:
    """Read and verify the description of an adapter alone.

    Raises:
        UserError: as `read_adapter`, which also reads the tensors.
    """
    (text,) = _read(folder, DESCRIPTION)
    return _described(redacted(folder), text)


def _read(folder: str, *names: str) -> list[bytes]:
    return read_files(folder, names, "adapter", instead_of(folder, "give a folder that save_adapter wrote"))


def _described(folder: str, text: bytes) -> AdapterDescription:
    try:
        description = json.loads(text)
        version = description["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"adapter: {folder}/{DESCRIPTION} is damaged; it must be JSON written by save_adapter"
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(f"adapter: {folder} has format version {version}; this program reads {FORMAT_VERSION}")
    if description.get("checksum") != _checksum(description):
        raise UserError(f"adapter: {folder}/{DESCRIPTION} is damaged: its checksum does not match")
    try:
        return AdapterDescription.of(description)
    except (KeyError, TypeError) as error:
        raise UserError(f"adapter: {folder}/{DESCRIPTION} has a missing or unknown field ({error})") from None


def _verified(folder: str, text: bytes, tensors: bytes) -> tuple[AdapterDescription, dict[str, Tensor]]:
    folder = redacted(folder)
    description = _described(folder, text)
    if hashlib.sha256(tensors).hexdigest() != description.sha256:
        raise UserError(f"adapter: {folder}/{TENSORS} is damaged: its sha256 does not match {DESCRIPTION}")
    try:
        return description, load_safetensors(tensors)
    except SafetensorError as error:
        raise UserError(f"adapter: {folder}/{TENSORS} is damaged ({error})") from None


def copy_adapter(source: str, folder: str) -> None:
    """Copy the adapter in `source` to `folder`, byte for byte.

    Raises:
        UserError: see `read_adapter`; or it cannot be written.
    """
    text, tensors = _read(source, DESCRIPTION, TENSORS)
    _verified(source, text, tensors)
    write_files(folder, {TENSORS: tensors, DESCRIPTION: text}, "adapter")


def load(
    folder: str,
    *,
    checkpoint_path: str | None = None,
    backbone: nn.Module | None = None,
    precision: Precision = "fp32",
) -> AdaptedModel:
    """Load an adapted model: build the backbone from timm or `checkpoint_path`, verify it, and load the adapter.

    Args:
        folder: folder written by `save_adapter`, local path or fsspec URL.
        checkpoint_path: location of the backbone's weights, if it has changed since training.
        backbone: the module that the adapter belongs to, which is adapted in place; needed where `adapt` was given one.
        precision: see `ModelSettings.precision`.

    Raises:
        UserError: missing or damaged files, an unsupported version, a different backbone or different shapes.
    """
    description, state = read_adapter(folder)
    info, spec = described(folder, description)
    if backbone is not None:
        return _load_onto(backbone, folder, description, state, precision)
    whole_model = spec.finetune == "full"  # its tensors replace the backbone's, which need not be fetched
    if whole_model:
        bare = dataclasses.replace(info, checkpoint=None, checkpoint_key=None, pretrained=False, classes=None)
        model = build(bare, spec, precision=precision)
        whole_model = model.statistics().keys() <= state.keys()
    if not whole_model:
        check_weights(folder, info, checkpoint_path)
        model = build(info, spec, checkpoint_path=checkpoint_path, precision=precision)
        check_backbone(folder, description, model.info)
    # a file without BatchNorm statistics keeps those of the backbone
    statistics = {name: tensor for name, tensor in model.statistics().items() if name in state}
    check_tensors({**model.held(), **{name: (t.dtype, t.shape) for name, t in statistics.items()}}, state)
    set_tensors({**model.trainable(), **statistics}, state)
    if whole_model:  # its origin is still the backbone that it was trained from
        origin = ("checkpoint", "checkpoint_key", "pretrained", "classes", "own_classes", "sha256")
        kept = {key: getattr(info, key) for key in origin}
        model.info = dataclasses.replace(model.info, **kept)
    model.record = TrainingRecord(description.training)
    return model


def _load_onto(
    module: nn.Module, folder: str, description: AdapterDescription, state: Mapping[str, Tensor], precision: Precision
) -> AdaptedModel:
    """Adapt the module that an adapter belongs to, and load the adapter. Refused, the module is as it was."""
    model = build_onto(module, folder, description, description.spec, precision=precision)
    own = {**model.trainable(), **model.statistics()}
    try:
        check_tensors({name: (tensor.dtype, tensor.shape) for name, tensor in own.items()}, state)
    except BaseException:
        model.original.restore(module)
        raise
    set_tensors(own, state)
    model.record = TrainingRecord(description.training)
    return model
