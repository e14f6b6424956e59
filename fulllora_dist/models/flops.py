"""Count the FLOPs of a pass and the bytes that autograd saves for it, on the meta device, where nothing is computed."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fulllora_dist.models.adapted_model import AdaptedModel


def _flops_in_place(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: _flops_in_place}
"""The operation of the branches (low_rank_linear.py) that torch's counter does not know."""


class PassCost(NamedTuple):
    """Cost of a forward and backward pass for one image; `flops` is the sum of both, a multiply-add counted as two."""

    forward_flops: int
    flops: int
    saved_bytes: int


def pass_cost(model: AdaptedModel, size: int) -> PassCost:
    """Count a forward and backward pass of an image of `size` pixels a side: in the backward pass the gradients of the
    pixels and of the parameters that require one.

    Args:
        model: on any device; its tensors are not touched.
    """
    tensors = {name: t.detach().to("meta") for name, t in model.named_buffers()}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach().to("meta").requires_grad_(parameter.requires_grad)
    pixels = torch.empty(1, 3, size, size, device="meta", requires_grad=True)
    saved = _SavedBytes(list(tensors.values()))
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as flops:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            logits = torch.func.functional_call(model, tensors, pixels)
            loss = F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device="meta"))
        forward = flops.get_total_flops()
        loss.backward()
    return PassCost(forward, flops.get_total_flops(), saved.total)


class _SavedBytes:
    """Bytes that autograd saves for the backward pass; counts each storage once, without the model's `own` tensors."""

    def __init__(self, own: list[Tensor]):
        self._own = {_identity(tensor) for tensor in own}
        self._seen: dict[int, int] = {}
        self._kept: list[Tensor] = []  # a freed storage could pass its identity on to another

    def pack(self, tensor: Tensor) -> Tensor:
        key = _identity(tensor)
        if key not in self._own:
            self._seen[key] = tensor.untyped_storage().nbytes()
            self._kept.append(tensor)
        return tensor

    @property
    def total(self) -> int:
        return sum(self._seen.values())


def _identity(tensor: Tensor) -> int:
    """Of a tensor's storage, also on the meta device."""
    return tensor.untyped_storage()._cdata
