"""Adapters by their address: a folder, an fsspec URL, or a version of MLflow's model registry."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import as_text
from fulllora_dist.models import multi_adapter
from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.adapter_file import load as load_folder
from fulllora_dist.models.settings import Precision


def in_mlflow(address: str | os.PathLike[str]) -> bool:
    """Whether it is an address of MLflow: models:/NAME@ALIAS, models:/NAME/VERSION, models:/m-ID, runs:/ID/PATH."""
    return str(address).startswith(("models:", "runs:"))


def resolved(address: str, uri: str | None = None) -> str:
    """An address without an alias, which may move: models:/NAME@champion -> models:/NAME/3. Others are unchanged."""
    if not in_mlflow(address):
        return address
    from fulllora_dist.registry.registry import Registry  # mlflow takes a second to import

    registry = Registry(uri)
    return registry.find(address).address if address.startswith("models:") and "@" in address else address


@contextmanager
def local_folder(address: str | os.PathLike[str], uri: str | None = None) -> Iterator[str]:
    """The adapter's folder; one in MLflow is downloaded for the duration of the context. Errors name the address.

    Args:
        address, uri: see `load`.
    """
    text: str = as_text(address)
    if not in_mlflow(text):
        yield text
        return
    from fulllora_dist.registry.registry import Registry  # mlflow takes a second to import

    with tempfile.TemporaryDirectory(prefix="adapter-") as temporary:
        folder = Registry(uri).fetch(text, temporary)
        try:
            yield folder
        except UserError as error:
            raise UserError(str(error).replace(folder, text)) from error


def load(
    address: str | os.PathLike[str],
    *,
    checkpoint_path: str | os.PathLike[str] | None = None,
    backbone: nn.Module | None = None,
    precision: Precision = "fp32",
    uri: str | None = None,
) -> AdaptedModel:
    """The adapted model of an adapter: its backbone is built from timm or `checkpoint_path`, and checked.

    Args:
        address: what `save_adapter` wrote, a local path or fsspec URL; or an address of MLflow:
            "models:/NAME@champion", "models:/NAME/3", "runs:/ID/adapter".
        checkpoint_path: the backbone's weights, if they have moved since training.
        backbone: the module that the adapter belongs to, which is adapted in place; needed where `adapt` was given one.
        precision: see `create_model`.
        uri: MLflow's tracking store, which becomes its `set_tracking_uri`; None takes the one that is set
            (MLFLOW_TRACKING_URI).

    Raises:
        UserError: missing or damaged files, an unknown version or alias, another backbone, other shapes.

    Example:
        model = fd.load("models:/imagenet-vit-l@champion")
        model = fd.load("adapter/", backbone=vit)
    """
    with local_folder(address, uri) as folder:
        return load_folder(folder, checkpoint_path=as_text(checkpoint_path), backbone=backbone, precision=precision)


class MultiAdapter(multi_adapter.MultiAdapter):
    """Several adapters on one backbone, each by its address; see `models.multi_adapter`.

    Args:
        adapters: {name: address}; see `load`.
        checkpoint_path, backbone, precision, uri: see `load`.

    Raises:
        UserError: adapters of different backbones, one that is a whole model (finetune: full); as for `load`.

    Example:
        model = fd.MultiAdapter({"linf": "adapters/linf", "l2": "adapters/l2"})
        logits = model(x, "linf")
        logits = model(x, ["linf", "l2", None, "l2"])  # for each of four images
    """

    def __init__(
        self,
        adapters: Mapping[str, str | os.PathLike[str]],
        *,
        checkpoint_path: str | os.PathLike[str] | None = None,
        backbone: nn.Module | None = None,
        precision: Precision = "fp32",
        uri: str | None = None,
    ):
        fetch = partial(local_folder, uri=uri)
        super().__init__(
            adapters,
            checkpoint_path=as_text(checkpoint_path),
            backbone=backbone,
            precision=precision,
            local_folder=fetch,
        )
