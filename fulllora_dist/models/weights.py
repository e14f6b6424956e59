"""Weights of a backbone: read from a file or the hub, fingerprinted, and loaded into a timm model."""

import hashlib
from collections.abc import Mapping, Sequence

import fsspec
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.families import Family
from fulllora_dist.storage.urls import redacted, refuse_credentials


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors in name order.

    The same weights have the same fingerprint in a safetensors file, in a .pth and on the hub.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_UNSIGNED = "?***"  # the query of a URL after `redacted`


def read_weights(path: str) -> dict[str, Tensor]:
    """Read the tensors of a .safetensors or .pth file at a local path or fsspec URL. Only tensors are unpickled.

    Raises:
        UserError: the file is missing, damaged, or contains anything but tensors.
    """
    url, path = path, redacted(path)
    try:
        refuse_credentials(url)
    except UserError as error:
        raise UserError(f"model.checkpoint_path: {error}") from None
    if url.endswith(_UNSIGNED):
        raise UserError(
            f"model.checkpoint_path: {path} was saved without its signature; set it to a readable path or URL"
        )
    try:
        with fsspec.open(url, "rb") as file:
            if (url.partition("?")[0] if "://" in url else url).endswith(".safetensors"):
                return load_safetensors(file.read())
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"model.checkpoint_path: {path} does not exist; give a .safetensors or .pth file") from None
    except SafetensorError as error:
        raise UserError(f"model.checkpoint_path: {path} is not a complete safetensors file ({error})") from None
    except Exception as error:  # torch.load may raise anything on damaged files
        reason = redacted(error).split("\n")[0]
        raise UserError(f"model.checkpoint_path: {path} does not load with weights_only=True ({reason})") from None
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.checkpoint_path: {path} must contain only tensors; save the state dict alone")
    return state


def download(name: str) -> dict[str, Tensor]:
    """Download the weights of a tag from the Hugging Face hub, through timm.

    Raises:
        UserError: the tag has no weights on the hub, or they cannot be downloaded.
    """
    from huggingface_hub.utils import logging as hub_logging
    from timm.models import load_state_dict_from_hf

    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UserError(f"model.backbone: {name} has no weights on the hub; set model.checkpoint_path to a file")
    location = config.hf_hub_id if "/" in config.hf_hub_id else f"timm/{config.hf_hub_id}"
    try:
        hub_logging.set_verbosity_error()  # a line a retry, to no use: the last error is told below
        filename = {"filename": config.hf_hub_filename} if config.hf_hub_filename else {}
        return load_state_dict_from_hf(location, **filename, weights_only=True)
    except Exception as error:  # hub, proxy and disk errors have no common class
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"model.backbone: cannot download the weights of {name} from the hub ({reason}); "
            "set model.checkpoint_path to a local file"
        ) from None


def _fit_head(
    weights: dict[str, Tensor], heads: list[str], classes: Sequence[int] | None, num_classes: int | None
) -> tuple[dict[str, Tensor], int | None]:
    """Keep only the rows `classes` of the head, or remove the head if it does not fit.

    Returns the weights, and the number of classes of the head that remains, None if it was removed.
    """
    own = next((len(weights[f"{head}.weight"]) for head in heads if f"{head}.weight" in weights), None)
    if classes is not None:
        if own is None or max(classes) >= own or min(classes) < 0:
            raise UserError(
                f"model.class_indices: must be below the number of classes of the checkpoint's head, {own or 0}, got "
                f"{min(classes) if min(classes) < 0 else max(classes)}"
            )
        rows = torch.tensor(classes)
        weights = {k: v[rows] if k.rpartition(".")[0] in heads else v for k, v in weights.items()}
        own = len(classes)
    if num_classes is not None and own != num_classes:
        weights = {k: v for k, v in weights.items() if k.rpartition(".")[0] not in heads}
        own = None
    return weights, own


def _converted(family: Family, weights: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Convert weights to the model's keys, and resample position embeddings and bias tables to its grid."""
    try:
        return family.converted(weights, backbone)
    except UserError:
        raise
    except (
        AttributeError,
        KeyError,
        ValueError,
        AssertionError,
    ) as error:  # from timm's filter, on keys of another model
        raise RuntimeError(str(error)) from None


def load_into(
    backbone: nn.Module,
    family: Family,
    heads: list[str],
    weights: dict[str, Tensor],
    classes: Sequence[int] | None,
    num_classes: int | None,
    source: str,
) -> bool:
    """Load weights into the backbone. Returns whether the head is the checkpoint's own."""
    try:
        converted = _converted(family, weights, backbone)
        fitted, own = _fit_head(converted, heads, classes, num_classes)
        result = backbone.load_state_dict(fitted, strict=False)
    except RuntimeError as error:  # names match, but shapes differ
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.checkpoint_path: {source} does not fit the backbone ({reason}); give weights of the same model"
        ) from None
    missing = [key for key in result.missing_keys if own is not None or key.rpartition(".")[0] not in heads]
    if missing or result.unexpected_keys:
        wrong = missing[:1] or result.unexpected_keys[:1]
        raise UserError(
            f"model.checkpoint_path: {source} does not fit the backbone ({len(missing)} tensors missing, "
            f"{len(result.unexpected_keys)} unexpected, e.g. {wrong[0]}); give weights of the same model"
        )
    return own is not None
