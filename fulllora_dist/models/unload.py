"""Take an adapter off a model: for a while, for good, or merged into the weights."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapted_model import WITH_BRANCHES, AdaptedModel
from fulllora_dist.models.branches import Branch, branches_of, disable_branches


@contextmanager
def disable_adapter(model: AdaptedModel) -> Iterator[None]:
    """The backbone as it was before it was adapted, within the context: pixels in [0, 1] -> its own logits.

    Branches are disabled, and a trained head or LayerNorms have their first values. No tensor is copied over, so that
    training continues afterwards as if nothing had been.

    Raises:
        UserError: no adapted model, one that is trained as a whole (finetune: full), or without its adapter.

    Example:
        with fd.disable_adapter(model):
            clean = model(x)
    """
    _check("disable_adapter", model)
    own = {name: model.backbone.get_parameter(name) for name in model.original.trained}
    trained = {name: parameter.data for name, parameter in own.items()}
    with ExitStack() as stack:
        if model.spec.finetune in WITH_BRANCHES:
            stack.enter_context(disable_branches(branches_of(model)))
        try:
            for name, parameter in own.items():
                parameter.data = model.original.trained[name].to(parameter.data)
            yield
        finally:
            for name, parameter in own.items():
                parameter.data = trained[name]


def unload(model: AdaptedModel) -> nn.Module:
    """Take the adapter off the backbone, in place.

    Returns:
        The module as it was before it was adapted: the same tensors, classes, and flags of training and gradients. It
        takes normalised images, as before.

    Raises:
        UserError: as for `disable_adapter`; blocks that precision: bf16 has rounded.

    Example:
        vit = fd.unload(model)
        logits = vit((x - mean) / std)
    """
    _check("unload", model)
    _check_precise("unload", model)
    backbone = model.backbone
    with torch.no_grad():
        for name, value in model.original.trained.items():
            backbone.get_parameter(name).copy_(value)
    model.original.restore(backbone)
    model.taken_off = "unload"
    return backbone


def merge(model: AdaptedModel) -> nn.Module:
    """Add the branches of plain LoRA to the weights beside which they are, in place: W becomes W + (alpha / r) B A.

    Returns:
        The module without branches, whose logits are equal up to rounding. It takes normalised images, as before;
        `model` continues to take pixels in [0, 1]. A trained head and trained norms stay trained.

    Raises:
        UserError: branches with LN, which no matrix can replace; no branches; blocks that precision: bf16 has rounded.

    Example:
        model = fd.adapt(vit, finetune="lora", rank=8)
        vit = fd.merge(model)
    """
    if isinstance(model, AdaptedModel) and model.spec.finetune == "fulllora":
        raise UserError(
            "merge: an LNLoRA branch cannot be merged into W: B A LN(x) divides by the deviation of x, so it is not "
            "linear in x; keep the branches beside the frozen layers, or train plain LoRA (finetune='lora')"
        )
    _check("merge", model, whole=True)
    _check_precise("merge", model)
    branches = branches_of(model)
    _check_own_weights(model.backbone, branches)
    model.original.restore(model.backbone)
    model.taken_off = "merge"
    with torch.no_grad():
        for branch in branches:
            weight: Tensor = branch.layer.weight  # type: ignore[assignment]
            rows = weight[branch.rows]
            rows.copy_(rows.double() + branch.update().view_as(rows))
    return model.backbone


def _check_own_weights(backbone: nn.Module, branches: Iterable[Branch]) -> None:
    """Raises UserError: another module has the weight of a layer with a branch, and would get its update too."""
    holders: dict[int, list[str]] = {}  # by the address of the tensor
    for path, module in backbone.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter.data_ptr(), []).append(path)
    for branch in branches:
        weight: Tensor = branch.layer.weight  # type: ignore[assignment]
        if len(shared := holders[weight.data_ptr()]) > 1:
            raise UserError(
                f"merge: {' and '.join(shared)} share a weight, which cannot take a branch of one of them; keep the "
                "branches"
            )


def _check(what: str, model: Any, whole: bool = False) -> None:
    if not isinstance(model, AdaptedModel):
        raise UserError(
            f"{what}: must be a model of create_model, adapt or load, got {type(model).__name__}; give the one that it "
            "wraps"
        )
    model.check_adapted(what)
    if model.spec.finetune == "full" and not whole:
        raise UserError(
            f"{what}: finetune: full has trained the backbone itself, and there is no copy of what it was; load it anew"
        )


def _check_precise(what: str, model: AdaptedModel) -> None:
    if model.precision != "fp32":
        raise UserError(
            f"{what}: precision: {model.precision} has rounded the blocks; save the adapter, and load it with "
            "precision='fp32'"
        )
