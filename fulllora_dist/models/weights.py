"""A backbone's weights: read from a file or the hub, named by a fingerprint, loaded into a timm model."""

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


_UNSIGNED = "?***"  # what `redacted` leaves of a query


def read_weights(path: str) -> dict[str, Tensor]:
    """Tensors of a .safetensors or .pth file at a local path or fsspec URL. Nothing is unpickled beyond tensors.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors.
    """
    url, path = path, redacted(path)
    try:
        refuse_credentials(url)
    except UserError as error:
        raise UserError(f"model.checkpoint_path: {error}") from None
    if url.endswith(_UNSIGNED):
        raise UserError(f"model.checkpoint_path: the signature of {path} was not kept; give checkpoint_path")
    try:
        with fsspec.open(url, "rb") as file:
            if (url.partition("?")[0] if "://" in url else url).endswith(".safetensors"):
                return load_safetensors(file.read())
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"model.checkpoint_path: {path} does not exist; give a .safetensors or .pth file") from None
    except SafetensorError as error:
        raise UserError(f"model.checkpoint_path: {path} is not a complete safetensors file ({error})") from None
    except Exception as error:  # torch.load raises whatever the damaged bytes lead to
        reason = redacted(error).split("\n")[0]
        raise UserError(f"model.checkpoint_path: {path} does not load with weights_only=True ({reason})") from None
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.checkpoint_path: {path} holds more than tensors; save the state dict alone")
    return state


def download(name: str) -> dict[str, Tensor]:
    """Weights of a tag from the Hugging Face hub, through timm."""
    from timm.models import load_state_dict_from_hf

    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UserError(f"model.backbone: {name} has no weights on the hub; set model.checkpoint_path to a file")
    location = config.hf_hub_id if "/" in config.hf_hub_id else f"timm/{config.hf_hub_id}"
    try:
        filename = {"filename": config.hf_hub_filename} if config.hf_hub_filename else {}
        return load_state_dict_from_hf(location, **filename, weights_only=True)
    except Exception as error:  # hub, proxy and disk errors have no common class
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"model.backbone: the weights of {name} could not be had from the hub ({reason}); "
            "set model.checkpoint_path to a local file"
        ) from None


def _fit_head(
    weights: dict[str, Tensor], heads: list[str], classes: Sequence[int] | None, num_classes: int | None
) -> tuple[dict[str, Tensor], int | None]:
    """The weights with the head's rows of `classes` alone, or without the head where it does not fit.

    Returns the weights and how many classes the head that is left has.
    """
    own = next((len(weights[f"{head}.weight"]) for head in heads if f"{head}.weight" in weights), None)
    if classes is not None:
        if own is None or max(classes) >= own or min(classes) < 0:
            raise UserError(
                f"model.class_indices: the checkpoint's head has {own or 'no'} classes; give indices below that"
            )
        rows = torch.tensor(classes)
        weights = {k: v[rows] if k.rpartition(".")[0] in heads else v for k, v in weights.items()}
        own = len(classes)
    if num_classes is not None and own != num_classes:
        weights = {k: v for k, v in weights.items() if k.rpartition(".")[0] not in heads}
        own = None
    return weights, own


def _converted(family: Family, weights: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The weights under the model's own keys, position embeddings and bias tables resampled to its grid."""
    try:
        return family.converted(weights, backbone)
    except UserError:
        raise
    except (AttributeError, KeyError, ValueError, AssertionError) as error:  # a filter's, over another model's keys
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
    """Fill the backbone; True where the head is the checkpoint's own."""
    try:
        converted = _converted(family, weights, backbone)
        fitted, own = _fit_head(converted, heads, classes, num_classes)
        result = backbone.load_state_dict(fitted, strict=False)
    except RuntimeError as error:  # names are right and shapes are not
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.checkpoint_path: {source} does not fit the backbone ({reason}); give the weights of this very model"
        ) from None
    missing = [key for key in result.missing_keys if own is not None or key.rpartition(".")[0] not in heads]
    if missing or result.unexpected_keys:
        wrong = missing[:1] or result.unexpected_keys[:1]
        raise UserError(
            f"model.checkpoint_path: {source} does not fit the backbone ({len(missing)} tensors missing, "
            f"{len(result.unexpected_keys)} too many, e.g. {wrong[0]}); give the weights of this very model"
        )
    return own is not None
