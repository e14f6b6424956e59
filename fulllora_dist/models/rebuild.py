"""Build the backbone and the empty adapter of a description, and check that the backbone is the one it belongs to."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import timm
import torch
from pydantic import ValidationError
from torch import nn

from fulllora_dist.core.errors import SharedUserError, UserError
from fulllora_dist.core.messages import redacted
from fulllora_dist.core.settings import explain
from fulllora_dist.models.adapt import adapt_given, build_adapted
from fulllora_dist.models.adapted_model import AdaptedModel, AdapterSpec
from fulllora_dist.models.adapter_description import AdapterDescription
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.checkpoint_header import read_header
from fulllora_dist.models.families import FAMILIES
from fulllora_dist.models.families.target_modules import BY_TARGET
from fulllora_dist.models.given_module import check_given, class_name
from fulllora_dist.models.settings import AdapterSettings, ModelSettings, Precision
from fulllora_dist.models.weights import fingerprint


def _check_family(folder: str, family: Mapping[str, Any] | None) -> None:
    """Reject an adapter of an unregistered family. A module named in a file is never imported automatically."""
    if family is not None and family["name"] not in (*FAMILIES, BY_TARGET):
        plugin = family["plugin"]
        raise UserError(
            f"adapter: {folder} is of the family {family['name']}, which is not registered; "
            f"import {plugin or 'the module that registers it'}, or list it or its .py file under plugins:"
        )


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
    if info.module is not None:
        raise UserError(
            f"adapter: it belongs to {info.name}, a module that adapt was given; give it: load(..., backbone=module)"
        )
    model, adapter = settings_of(info, spec, checkpoint_path=checkpoint_path, precision=precision)
    return build_adapted(model, adapter, spec.finetune, seed=spec.seed)


def build_onto(
    module: nn.Module,
    folder: str,
    description: AdapterDescription,
    spec: AdapterSpec,
    *,
    precision: Precision = "fp32",
) -> AdaptedModel:
    """Adapt the module that an adapter belongs to, in place, with a freshly initialised adapter.

    Args:
        spec: the description's, or another for the same backbone.

    Raises:
        UserError: another module, which is then as it was.
    """
    check_given(module)
    info = description.backbone
    # by its own name: a class of a notebook or script, __main__.Net, may lie in a file by now
    if info.module is not None and info.module.rpartition(".")[2] != type(module).__name__:
        raise UserError(f"backbone: must be a {info.module} for the adapter {folder}, got a {class_name(module)}")

    whole = description.spec.finetune == "full"  # its own tensors replace the module's
    head_apart = info.module is not None and info.head_sha256 is not None

    def check(actual: BackboneInfo) -> None:
        if not head_apart:  # the fingerprint is of all weights
            actual = replace(actual, sha256=fingerprint(module.state_dict()))
        if not whole:
            check_backbone(folder, description, actual)

    settings, adapter = settings_of(info, spec, precision=precision)
    model = adapt_given(module, settings, adapter, spec.finetune, spec.target_modules, seed=spec.seed, check=check)
    head_sha256 = model.info.head_sha256 if head_apart and not whole else info.head_sha256
    model.info = replace(info, head_sha256=head_sha256)
    return model


def settings_of(
    info: BackboneInfo, spec: AdapterSpec, *, checkpoint_path: str | None = None, precision: Precision = "fp32"
) -> tuple[ModelSettings, AdapterSettings]:
    """The settings that a description was made with."""
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
            blocks=spec.blocks,
            train_norms=spec.train_norms,
        )
    except ValidationError as error:  # a file of another version, or made by hand
        raise UserError(f"adapter: {explain(error)}") from None
    return model, adapter


def check_model(settings: ModelSettings, info: BackboneInfo, adapter: str) -> None:
    """Check that a config agrees with an adapter's backbone, as its settings would have no effect otherwise.

    Args:
        settings: of the config.
        info: the adapter's backbone; a module that `adapt` was given has no settings to compare.

    Raises:
        SharedUserError: the first setting that differs.
    """
    if info.module is not None:
        return
    arch, _, tag = settings.backbone.partition(".")
    its_arch, _, its_tag = info.name.partition(".")
    same = arch == its_arch and (not tag or not its_tag or tag == its_tag)
    others = {name: name for name in ("num_classes", "image_size", "mean", "std")}
    others |= {"class_indices": "classes", "model_kwargs": "architecture"}
    pairs = {"backbone": (settings.backbone, settings.backbone if same else info.name)}
    pairs |= {
        key: (getattr(settings, key), getattr(info, its)) for key, its in others.items() if getattr(settings, key)
    }
    for key, (ours, its) in pairs.items():
        if (list(ours) if isinstance(ours, tuple) else ours) != (list(its) if isinstance(its, tuple) else its):
            raise SharedUserError(
                f"model.{key}: must be {its} for the adapter {redacted(adapter)}, got {ours}; use the config that it "
                "was trained with"
            )


def check_weights(folder: str, info: BackboneInfo, checkpoint_path: str | None) -> None:
    """Check that the weights of an adapter's backbone are still in the file that it was trained on.

    Args:
        checkpoint_path: where they are now, which is then looked at when it is read; None for that file.

    Raises:
        UserError: there is no such local file.
    """
    if checkpoint_path is not None or info.checkpoint is None or "://" in info.checkpoint:
        return
    if not os.path.exists(os.path.expanduser(info.checkpoint)):
        raise UserError(
            f"adapter: {folder} was trained on the weights {info.checkpoint}, which are not there; give "
            "load(..., checkpoint_path=FILE); on the command line model.checkpoint_path=FILE (evaluate) or "
            "--checkpoint FILE (adapters), in MLflow's models FULLLORA_CHECKPOINT=FILE"
        )


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
    another_head = description.spec.head != "trained" and info.head_sha256 not in (None, actual.head_sha256)
    if another_head and info.module is not None:
        raise UserError(
            f"adapter: {folder} belongs to {info.name} with another head, which it has not trained; give the backbone "
            "with the head that it had"
        )
    if another_head:
        raise UserError(
            f"adapter: {folder} belongs to an untrained head that seed {info.seed} does not give with {now}; use the "
            f"versions it was saved with ({then}), or train the head (adapter.head=trained)"
        )
