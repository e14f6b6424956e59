"""Save and load adapters: a folder with adapter.safetensors and adapter.json, without pickle or the backbone.

With `finetune: full` the tensors are the whole model's under timm's keys, including BatchNorm statistics, so that
adapter.safetensors is itself a checkpoint for `model.checkpoint_path`.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NoReturn

import fsspec
import timm
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import explain
from fulllora_dist.models.adapt import build_adapted
from fulllora_dist.models.adapted_model import AdaptedModel, AdapterSpec, check_tensors, set_tensors
from fulllora_dist.models.adapter_description import AdapterDescription, backbone_content
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.checkpoint_header import read_header
from fulllora_dist.models.families import FAMILIES
from fulllora_dist.models.settings import AdapterSettings, ModelSettings, Precision
from fulllora_dist.models.training_record import TrainingRecord
from fulllora_dist.storage.urls import classify_error, open_anywhere, redacted, write_anywhere

FORMAT_VERSION = 1
TENSORS = "adapter.safetensors"
DESCRIPTION = "adapter.json"


def adapter_state(model: AdaptedModel, trained: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of an adapter file as {name in the timm model: tensor}, on the CPU.

    Args:
        trained: trained tensors to use instead of the model's own, such as an average, or gathered ones (ZeRO-3).
    """
    tensors = {**(model.trainable() if trained is None else trained), **model.statistics()}
    # cloned, as safetensors refuses tensors that share memory, such as views of one flat buffer
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }


def adapter_sha256(model: AdaptedModel) -> str:
    """sha256 of the model's adapter.safetensors."""
    return hashlib.sha256(save_safetensors(adapter_state(model))).hexdigest()


def _checksum(description: Mapping[str, Any]) -> str:
    """sha256 of the description, as a changed digit in alpha or std would silently change the model."""
    content = {key: value for key, value in description.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_adapter(
    model: AdaptedModel,
    folder: str,
    *,
    state: Mapping[str, Tensor] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Save the adapter of `model`.

    Args:
        folder: local path or fsspec URL; created if it does not exist.
        state: trained tensors to save instead of the model's own (such as an average, or gathered ones).
        training: JSON-able record of how it was trained (threat model, method, data, seed); without it, the data that
            the model remembers (`AdaptedModel.record`), so that class names and crop are kept.

    Raises:
        UserError: `load` would not bring this model back, as it was changed after it was created; nothing is written.
    """
    if not isinstance(model, AdaptedModel):
        raise UserError(
            f"save_adapter: must be a model of create_model or load, got {type(model).__name__}; give the one that it "
            "wraps"
        )
    model.check_savable(state)
    if training is None:
        training = {key: value for key, value in model.record.content.items() if key == "data"}
    tensors = save_safetensors(adapter_state(model, state))
    description = {
        "format_version": FORMAT_VERSION,
        "adapter": dataclasses.asdict(model.spec),
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
    write_anywhere(folder, files, "save_adapter")


def read_adapter(folder: str) -> tuple[AdapterDescription, dict[str, Tensor]]:
    """Read and verify the description and tensors of an adapter.

    Raises:
        UserError: a file is missing or damaged, or has an unsupported format version.
    """
    filesystem, path = open_anywhere(folder, "adapter")
    folder = redacted(folder)
    files = {}
    for name in (DESCRIPTION, TENSORS):
        try:
            files[name] = filesystem.cat_file(f"{path}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"adapter: {folder} has no {name}; give a folder that save_adapter wrote") from None
        except Exception as error:  # each store has its own exceptions
            raise UserError(f"adapter: {classify_error(error, f'{folder}/{name}')}") from None
    try:
        description = json.loads(files[DESCRIPTION])
        version = description["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"adapter: {folder}/{DESCRIPTION} is damaged; it must be JSON written by save_adapter"
        ) from None
    if version != FORMAT_VERSION:
        raise UserError(f"adapter: {folder} has format version {version}; this program reads {FORMAT_VERSION}")
    if description.get("checksum") != _checksum(description):
        raise UserError(f"adapter: {folder}/{DESCRIPTION} is damaged: its checksum does not match")
    if hashlib.sha256(files[TENSORS]).hexdigest() != description["sha256"]:
        raise UserError(f"adapter: {folder}/{TENSORS} is damaged: its sha256 does not match {DESCRIPTION}")
    try:
        return AdapterDescription.of(description), load_safetensors(files[TENSORS])
    except (KeyError, TypeError) as error:
        raise UserError(f"adapter: {folder}/{DESCRIPTION} has a missing or unknown field ({error})") from None
    except SafetensorError as error:
        raise UserError(f"adapter: {folder}/{TENSORS} is damaged ({error})") from None


def copy_adapter(source: str, folder: str) -> None:
    """Copy the adapter in `source` to the local `folder`, byte for byte.

    Raises:
        UserError: see `read_adapter`.
    """
    read_adapter(source)
    filesystem, path = fsspec.core.url_to_fs(source)
    os.makedirs(folder, exist_ok=True)
    for name in (DESCRIPTION, TENSORS):
        filesystem.get_file(f"{path}/{name}", os.path.join(folder, name))


def _check_family(folder: str, family: Mapping[str, Any] | None) -> None:
    """Reject an adapter of an unregistered family. A module named in a file is never imported automatically."""
    if family is not None and family["name"] not in FAMILIES:
        plugin = family["plugin"]
        raise UserError(
            f"adapter: {folder} is of the family {family['name']}, which is not registered; "
            f"import {plugin or 'the module that registers it'}, or list it or its .py file under plugins:"
        )


def load(folder: str, *, checkpoint_path: str | None = None, precision: Precision = "fp32") -> AdaptedModel:
    """Load an adapted model: build the backbone from timm or `checkpoint_path`, verify it, and load the adapter.

    Args:
        folder: folder written by `save_adapter`, local path or fsspec URL.
        checkpoint_path: location of the backbone's weights, if it has changed since training.
        precision: see `ModelSettings.precision`.

    Raises:
        UserError: missing or damaged files, an unsupported version, a different backbone or different shapes.
    """
    description, state = read_adapter(folder)
    info, spec = described(folder, description)
    whole_model = spec.finetune == "full"  # its tensors replace the backbone's, which need not be fetched
    if whole_model:
        bare = dataclasses.replace(info, checkpoint=None, checkpoint_key=None, pretrained=False, classes=None)
        model = build(bare, spec, precision=precision)
        whole_model = model.statistics().keys() <= state.keys()
    if not whole_model:
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


def described(folder: str, description: AdapterDescription) -> tuple[BackboneInfo, AdapterSpec]:
    """The backbone and the adapter spec of a description.

    Raises:
        UserError: a family that is not registered.
    """
    _check_family(folder, description.content.get("family"))
    return description.backbone, description.spec


def _key_in(moved_to: str | None, key: str | None) -> str | None:
    """The set of weights to take: a safetensors file in place of the original checkpoint holds that set alone."""
    local = moved_to is not None and "://" not in moved_to
    return None if local and key is not None and read_header(str(moved_to)) is not None else key


def build(
    info: BackboneInfo, spec: AdapterSpec, *, checkpoint_path: str | None = None, precision: Precision = "fp32"
) -> AdaptedModel:
    """Build the backbone with a freshly initialised adapter; the fingerprint is not verified.

    Args:
        checkpoint_path: location of the backbone's weights, if it has changed since training.

    Raises:
        UserError: a description with values that no setting allows.
    """
    try:
        model = ModelSettings(
            backbone=info.name,
            checkpoint_path=checkpoint_path or info.checkpoint,
            checkpoint_key=_key_in(checkpoint_path, info.checkpoint_key),
            pretrained=info.pretrained,
            num_classes=None if info.classes is not None else info.num_classes,
            class_indices=None if info.classes is None else list(info.classes),
            image_size=info.image_size,
            mean=info.mean,
            std=info.std,
            model_kwargs=info.architecture,
            precision=precision,
        )
        adapter = AdapterSettings(
            rank=spec.rank,
            alpha=spec.alpha,
            components=spec.placement,
            qkv=spec.qkv,
            patch_norm_eps=spec.patch_norm_eps,
            head=spec.head,
        )
    except ValidationError as error:  # a file of another version, or made by hand
        raise UserError(f"adapter: {explain(error)}") from None
    return build_adapted(model, adapter, spec.finetune, seed=spec.seed)


def check_backbone(folder: str, description: AdapterDescription, actual: BackboneInfo) -> None:
    """Check that the weights of a backbone are those that an adapter belongs to.

    Args:
        actual: the backbone that was built.

    Raises:
        UserError: the fingerprints differ.
    """
    info, then = description.backbone, f"timm {description.content.get('timm')}"
    now = f"timm {timm.__version__} and torch {torch.__version__}"
    if actual.sha256 != info.sha256 and not info.pretrained:
        raise UserError(
            f"adapter: {folder} belongs to random weights with fingerprint {str(info.sha256)[:12]}, but seed "
            f"{info.seed} gives {str(actual.sha256)[:12]} with {now}; use the versions it was saved with ({then}), or "
            "start from weights in a file"
        )
    if actual.sha256 != info.sha256:
        raise UserError(
            f"adapter: {folder} belongs to {info.name} with fingerprint {str(info.sha256)[:12]}, "
            f"but these weights have {str(actual.sha256)[:12]}; give the backbone it was trained on"
        )
    if description.spec.head != "trained" and info.head_sha256 not in (None, actual.head_sha256):
        raise UserError(
            f"adapter: {folder} belongs to an untrained head that seed {info.seed} does not give with {now}; use the "
            f"versions it was saved with ({then}), or train the head (adapter.head=trained)"
        )


def merge(model: AdaptedModel) -> NoReturn:
    """Not supported: LN depends on the input, so that B A LN(x) is not a matrix that could be added to W.

    Raises:
        UserError: always.
    """
    raise UserError(
        "an LNLoRA branch cannot be merged into W: B A LN(x) divides by the deviation of x, so it is not linear in x; "
        "keep the branches beside the frozen layers"
    )
