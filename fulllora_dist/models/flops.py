"""Count the FLOPs of a pass and the bytes that autograd saves for it, on the meta device, where nothing is computed."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.settings import Precision


def _flops_in_place(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    return 2 * left[0] * left[1] * right[1]


IN_PLACE = {torch.ops.aten.addmm_: _flops_in_place}
"""The operation of the branches (low_rank_linear.py) that torch's counter does not know."""


_PEAKS: dict[str, tuple[float | None, float]] = {
    "B200": (2250e12, 75e12),
    "GH200": (990e12, 67e12),
    "H200": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    "A100": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "A30": (165e12, 10.3e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "V100": (None, 15.7e12),
    "MI300X": (1307e12, 163.4e12),
}
"""Dense peak FLOP/s in (bf16, fp32 without TF32) by the words of the device's name, from the makers' data sheets."""


def peak_flops(device: str, precision: Precision) -> float | None:
    """Peak FLOP/s of a device by its name, e.g. "NVIDIA H100 80GB HBM3"; None where it is not known.

    Args:
        precision: of the blocks. fp32 is known only without TF32.
    """
    words = device.replace("-", " ").split()
    if "MIG" in words or (precision == "fp32" and torch.get_float32_matmul_precision() != "highest"):
        return None
    known = [name for name in _PEAKS if {*name.split()} <= {*words}]
    if not known:
        return None
    bf16, fp32 = _PEAKS[max(known, key=len)]
    return bf16 if precision == "bf16" else fp32


class PassCost(NamedTuple):
    """Cost of a forward and backward pass for one image; `flops` is the sum of both, a multiply-add counted as two."""

    forward_flops: int
    flops: int
    saved_bytes: int


def pass_cost(model: AdaptedModel, size: int, attack: bool = False) -> PassCost:
    """Count a forward and backward pass of an image of `size` pixels a side: in the backward pass the gradients of the
    pixels and of the parameters that require one.

    Args:
        model: on any device; its tensors are not touched.
        attack: without gradients of parameters.
    """
    tensors = {name: t.detach().to("meta") for name, t in model.named_buffers()}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach().to("meta").requires_grad_(parameter.requires_grad and not attack)
    pixels = torch.empty(1, 3, size, size, device="meta", requires_grad=True)
    saved = _SavedBytes(list(tensors.values()))
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as flops:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            logits = torch.func.functional_call(model, tensors, pixels)
            loss = F.cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device="meta"))
        forward = flops.get_total_flops()
        loss.backward()
    return PassCost(forward, flops.get_total_flops(), saved.total)


class OperationFlops(TorchDispatchMode):
    """Adds up the FLOPs of the operations that run inside, by torch's formulas, in `flops`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in IN_PLACE:
            self.flops += IN_PLACE[packet](*(arg.shape for arg in args))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


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
