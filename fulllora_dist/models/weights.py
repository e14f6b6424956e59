"""Weights of a backbone, from the hub (`hub.py`) or a file (`checkpoint_file.py`), fingerprinted and loaded into a timm
model."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.models.families import Family


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


def _fit_head(
    weights: dict[str, Tensor], heads: list[str], classes: Sequence[int] | None, num_classes: int | None
) -> tuple[dict[str, Tensor], int | None]:
    """Keep only the rows `classes` of the head, or remove the head if it does not fit.

    Returns the weights, and the number of classes of the head that remains, None if it was removed.
    """
    own = next((len(weights[f"{head}.weight"]) for head in heads if f"{head}.weight" in weights), None)
    if classes is not None:
        if own is None or max(classes) >= own:
            raise UserError(
                f"model.class_indices: must be below the number of classes of the checkpoint's head, {own or 0}, got "
                f"{max(classes)}"
            )
        rows = torch.tensor(classes)
        weights = {k: v[rows] if k.rpartition(".")[0] in heads else v for k, v in weights.items()}
        own = len(classes)
    if num_classes is not None and own != num_classes:
        weights = {k: v for k, v in weights.items() if k.rpartition(".")[0] not in heads}
        own = None
    return weights, own


def load_into(
    backbone: nn.Module,
    family: Family,
    heads: list[str],
    weights: dict[str, Tensor],
    classes: Sequence[int] | None,
    num_classes: int | None,
    source: str,
) -> bool:
    """Load weights into the backbone. Returns whether the head is the checkpoint's own.

    Raises:
        UserError: tensors are missing, unexpected, or of another shape or kind; the message counts and names them.
    """
    try:
        converted = family.converted(weights, backbone)
        fitted, own = _fit_head(converted, heads, classes, num_classes)
    except UserError:
        raise
    except (RuntimeError, AttributeError, KeyError, ValueError, AssertionError) as error:
        # from timm's filter, on weights of another model
        raise _misfit(source, _differences(backbone, weights, heads) or one_line(error)) from None
    if differences := _differences(backbone, fitted, [] if own is not None else heads):
        raise _misfit(source, differences)
    if own is None and num_classes is None:
        raise UserError(
            f"model.checkpoint_path: {source} has no head ({', '.join(heads)}), and so no number of classes; "
            "set model.num_classes to start a new one"
        )
    backbone.load_state_dict(fitted, strict=False)
    return own is not None


def _misfit(source: str, differences: str) -> UserError:
    return UserError(
        f"model.checkpoint_path: {source} does not fit the backbone ({differences}); give weights of the same model"
    )


def _differences(backbone: nn.Module, weights: Mapping[str, Tensor], may_lack: Sequence[str]) -> str:
    """Count and name what differs between weights and a model; "" if nothing does."""
    own: dict[str, Tensor] = backbone.state_dict()
    missing = [name for name in own if name not in weights and name.rpartition(".")[0] not in may_lack]
    unexpected = sorted(weights.keys() - own.keys())  # safetensors reads names in any order
    both = [name for name in own if name in weights]
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(own[name].shape)}"
        for name in both
        if weights[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} is {str(weights[name].dtype).removeprefix('torch.')}"
        for name in both
        if own[name].is_floating_point() and not weights[name].is_floating_point()
    ]
    found = {"tensors missing": missing, "unexpected": unexpected}
    found |= {"of another shape": shapes, "not floating-point": kinds}
    return "; ".join(f"{len(names)} {what}, e.g. {names[0]}" for what, names in found.items() if names)
