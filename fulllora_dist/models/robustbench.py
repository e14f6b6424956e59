"""An adapted model in the format of RobustBench's model zoo: its weights, and the entry that loads them."""

import dataclasses
import io
import pprint
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fulllora_dist.core.atomic import atomic_write
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapted_model import AdaptedModel, AdapterSpec
from fulllora_dist.models.adapter_description import backbone_content
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.rebuild import build

_LOADER = '''"""{name}, an entry of robustbench/model_zoo/imagenet.py; its weights are {name}.pt. {about}."""

from fulllora_dist.models.robustbench import network
from robustbench.model_zoo.architectures.utils_architectures import normalize_model

BACKBONE = {backbone}
ADAPTER = {adapter}
ENTRY = {{
    "model": lambda: normalize_model(network(BACKBONE, ADAPTER), {mean}, {std}),
    "gdrive_id": "{name}",  # of the uploaded file; one that is there already is not fetched
}}
'''


def export_robustbench(model: AdaptedModel, folder: str | Path, name: str) -> tuple[Path, Path]:
    """Write NAME.pt, the state of the whole network, and NAME.py, a dozen lines with `ENTRY` for the model zoo.

    Args:
        folder: made where there is none.
        name: in the model zoo, such as Mine2026FullLoRA.

    Returns:
        The two files.

    Raises:
        UserError: a name that RobustBench would not load, or files that exist; a model that the file would not build:
            one of `adapt`, in bf16, or changed after it was created.

    Example:
        export_robustbench(fd.load("runs/large/adapter"), "models/imagenet/Linf", "Mine2026FullLoRA")
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or "Standard" in name:
        raise UserError(
            "name must be letters, digits, _ and -, without 'Standard', of which RobustBench loads no file; got "
            f"{name!r}"
        )
    if model.info.module is not None:
        raise UserError(
            f"export_robustbench: {model.info.name} is a module that adapt was given, which the file could not build; "
            "make the model with create_model"
        )
    if model.precision != "fp32":
        raise UserError(
            f"export_robustbench: precision: {model.precision} has rounded the blocks; save the adapter, and load it "
            "with precision='fp32'"
        )
    model.check_savable()
    weights, loader = (Path(folder) / f"{name}{ending}" for ending in (".pt", ".py"))
    for path in (weights, loader):
        if path.exists():
            raise UserError(f"{path} exists; give another name or folder")
    written = io.BytesIO()
    torch.save({"state_dict": {key: value.cpu() for key, value in model.backbone.state_dict().items()}}, written)
    threat = model.record.threat
    text = _LOADER.format(
        name=name,
        about=f"{model.info.name}, {model.spec.finetune}" + (f", {threat[0]} {threat[1]:.4g}" if threat else ""),
        backbone=pprint.pformat(backbone_content(_unweighted(model.info)), sort_dicts=False, width=110),
        adapter=pprint.pformat(dataclasses.asdict(model.spec), sort_dicts=False, width=110),
        mean=tuple(model.info.mean),
        std=tuple(model.info.std),
    )
    weights.parent.mkdir(parents=True, exist_ok=True)
    for path, content in ((weights, written.getvalue()), (loader, text.encode())):
        with atomic_write(path) as file:
            file.write(content)
    return weights, loader


def network(backbone: Mapping[str, Any], adapter: Mapping[str, Any]) -> nn.Module:
    """The network that the exported weights are of, with random ones: normalised pixels [B, 3, H, W] -> logits.

    Args:
        backbone, adapter: as an exported file has them.
    """
    return build(BackboneInfo(**backbone), AdapterSpec(**adapter)).backbone.eval()


def _unweighted(info: BackboneInfo) -> BackboneInfo:
    return dataclasses.replace(
        info, checkpoint=None, checkpoint_key=None, pretrained=False, classes=None, own_classes=False
    )
