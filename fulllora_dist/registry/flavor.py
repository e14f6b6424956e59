"""An adapter as an MLflow model: a flavor of its own, and pyfunc through `loader_module`. No pickle, no backbone in it.

The folder of a model is that of an adapter (adapter.safetensors and adapter.json, see `models/adapter_file.py`) with
MLmodel, requirements and a model card beside them, so that whatever reads adapters reads models too.
"""

import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from mlflow import pyfunc
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME, ModelInfo
from mlflow.types import Schema, TensorSpec

from fulllora_dist.core.errors import UserError
from fulllora_dist.evaluation.trained import transform_of
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_file import copy_adapter, load, read_adapter, save_adapter
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.settings import Precision
from fulllora_dist.registry.address import load as load_address
from fulllora_dist.registry.card import model_card

FLAVOR_NAME = "fulllora_dist"
CARD = "README.md"
REQUIREMENTS = "requirements.txt"
CHECKPOINT = "FULLLORA_CHECKPOINT"
"""Environment variable: path of the backbone's weights for a served model."""
_NEEDED = ("fulllora-dist", "mlflow", "torch", "timm", "safetensors", "numpy")
_CONDA, _PYTHON = "conda.yaml", "python_env.yaml"
_BATCH = 64  # images of one pyfunc pass


def requirements() -> list[str]:
    """What a model needs, pinned to the installed versions. MLflow's own inference takes seconds and misses timm."""
    return [f"{name}=={version(name).partition('+')[0]}" for name in _NEEDED]


def signature(backbone: BackboneInfo) -> ModelSignature:
    """uint8 pixels [-1, H, W, 3] -> fp32 class scores (logits) [-1, classes]."""
    side = backbone.image_size
    return ModelSignature(
        Schema([TensorSpec(np.dtype(np.uint8), (-1, side, side, 3))]),
        Schema([TensorSpec(np.dtype(np.float32), (-1, backbone.num_classes))]),
    )


def save_model(
    adapter: AdaptedModel | str,
    path: str,
    *,
    evaluation: Mapping[str, Any] | None = None,
    name: str | None = None,
    mlflow_model: Model | None = None,
) -> None:
    """Write an adapter as an MLflow model.

    Args:
        adapter: the adapted model, or what `save_adapter` wrote.
        path: local folder; empty or not yet there.
        evaluation: in the form of evaluation.json, for the model card.
        name: of the registered model, for the model card.
        mlflow_model: what MLflow's `Model.log` hands over.

    Raises:
        UserError: a damaged adapter, a folder that is not empty.
    """
    if os.path.isdir(path) and os.listdir(path):
        raise UserError(f"{path} is not empty; choose another folder for the model")
    if isinstance(adapter, AdaptedModel):
        save_adapter(adapter, path)
    else:
        copy_adapter(adapter, path)
    description, _ = read_adapter(path)
    backbone = description.backbone
    model = mlflow_model or Model()
    model.signature = signature(backbone)
    model.metadata = {
        "adapter_sha256": description.sha256,
        "backbone": backbone.name,
        "backbone_sha256": backbone.sha256,
        "classes": list(description.data.classes) if description.data else [],
        "pictures": asdict(transform_of(backbone, description.data)),
    }
    model.add_flavor(FLAVOR_NAME, version=version("fulllora-dist"), finetune=description.spec.finetune)
    pyfunc.add_to_model(model, __name__, conda_env=_CONDA, python_env=_PYTHON)
    folder = Path(path)
    (folder / CARD).write_text(model_card(description, evaluation, name))
    _write_environment(folder)
    model.save(str(folder / MLMODEL_FILE_NAME))


def _write_environment(folder: Path) -> None:
    pinned, python = requirements(), platform.python_version()
    (folder / REQUIREMENTS).write_text("\n".join(pinned) + "\n")
    conda = {"channels": ["conda-forge"], "dependencies": [f"python={python}", "pip", {"pip": pinned}]}
    (folder / _CONDA).write_text(yaml.safe_dump(conda, sort_keys=False))
    virtualenv = {"python": python, "dependencies": [f"-r {REQUIREMENTS}"]}
    (folder / _PYTHON).write_text(yaml.safe_dump(virtualenv, sort_keys=False))


def log_model(
    adapter: AdaptedModel | str,
    name: str = "adapter",
    *,
    evaluation: Mapping[str, Any] | None = None,
    registered_model_name: str | None = None,
    run_id: str | None = None,
) -> ModelInfo:
    """Log an adapter to the active run (or `run_id`), as MLflow's own flavors do. Each call logs another model, unlike
    `publish`.

    Args:
        adapter, evaluation: see `save_model`.
        name: of the logged model.
        registered_model_name: where it becomes another version.
    """
    return Model.log(
        artifact_path=None,
        name=name,
        flavor=sys.modules[__name__],
        registered_model_name=registered_model_name,
        run_id=run_id,
        adapter=adapter,
        evaluation=evaluation,
    )


def load_model(model_uri: str, *, checkpoint: str | None = None, precision: Precision = "fp32") -> AdaptedModel:
    """The adapted model of an MLflow model: see `fulllora_dist.load`."""
    return load_address(model_uri, checkpoint_path=checkpoint, precision=precision)


class PixelModel:
    """What `mlflow.pyfunc.load_model` wraps: uint8 pixels [N, H, W, 3] -> fp32 logits [N, classes].

    The images are of the model's own size; [0, 1] and the backbone's normalisation happen inside.
    """

    def __init__(self, model: AdaptedModel):
        self._model = model
        self._device = next(model.parameters()).device

    def predict(self, pixels: np.ndarray, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """Logits; `params` is not used."""
        side = self._model.info.image_size
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (side, side, 3):
            raise UserError(f"pixels must be uint8 [N, {side}, {side}, 3], got {pixels.dtype} {list(pixels.shape)}")
        outputs = [np.empty((0, self._model.info.num_classes), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(pixels), _BATCH):
                part = torch.from_numpy(np.ascontiguousarray(pixels[start : start + _BATCH])).to(self._device)
                outputs.append(self._model(part.permute(0, 3, 1, 2).contiguous().float() / 255).cpu().numpy())
        return np.concatenate(outputs)


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> PixelModel:
    """Called by MLflow. `model_config={"checkpoint": ...}`, or else FULLLORA_CHECKPOINT, is the path of the backbone's
    weights, if they have moved since training; MLFLOW_DEFAULT_PREDICTION_DEVICE is the device."""
    settings = dict(model_config or {})
    model = load(path, checkpoint_path=settings.get("checkpoint") or os.environ.get(CHECKPOINT))
    device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return PixelModel(model.to(device))
