"""Count the FLOPs and the memory of a pass on the meta device, where nothing is computed."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fulllora_dist.models.adapted_model import AdaptedModel
from fulllora_dist.models.precision import multiplies_in_full_fp32
from fulllora_dist.models.settings import Precision

ATTENTION = torch.ops.aten._scaled_dot_product_efficient_attention


def _addmm(_: Tensor, left: Tensor, right: Tensor, **__: object) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


def _attention_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: object, **___: object) -> int:
    """Without the scores, which the kernel computes again: that is no work of the model's."""
    return 4 * q.shape[:3].numel() * k.shape[2] * (q.shape[3] + v.shape[3])


FORMULAS = flop_registry | {
    torch.ops.aten.addmm_: _addmm,  # of the branches, low_rank_linear.py
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
}


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
    if "MIG" in words or (precision == "fp32" and not multiplies_in_full_fp32()):
        return None
    known = [name for name in _PEAKS if {*name.split()} <= {*words}]
    if not known:
        return None
    bf16, fp32 = _PEAKS[max(known, key=len)]
    return bf16 if precision == "bf16" else fp32


class PassCost(NamedTuple):
    """Cost of a forward and backward pass for one image, a multiply-add counted as two FLOPs.

    Attributes:
        forward_flops: of the forward pass.
        flops: of both.
        saved_bytes: what is alive between them: what autograd keeps, and logits.
        peak_bytes: the most that is alive at once, gradients included; the model's own tensors are in neither.
        operations: that write memory, of the whole pass whatever its images: what a device is asked to start.
    """

    forward_flops: int
    flops: int
    saved_bytes: int
    peak_bytes: int
    operations: int = 0


def pass_cost(model: AdaptedModel, size: int, images: int = 1, attack: bool = False, pixels: bool = True) -> PassCost:
    """Count a forward and backward pass of an image of `size` pixels a side: in the backward pass the gradients of the
    pixels and of the parameters that require one. Attention is taken for one kernel that keeps no scores.

    Args:
        model: on any device; its tensors are not touched.
        images: in one pass; what does not grow with them (gradients of the parameters) is divided among them.
        attack: without gradients of parameters.
        pixels: with the gradient of the pixels, which a weight step makes in few methods (`moves_pixels`).
    """
    tensors = {name: t.detach().to("meta") for name, t in model.named_buffers()}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach().to("meta").requires_grad_(parameter.requires_grad and not attack)
    with _Counter(tensors.values()) as counter, _attention_as_one_kernel():
        whole = {f"model.{name}": tensor for name, tensor in tensors.items()}
        forward, saved = torch.func.functional_call(_Pass(model), whole, (images, size, pixels, counter))
    an_image = [n // images for n in (forward, counter.flops, saved, counter.peak)]
    return PassCost(an_image[0], an_image[1], an_image[2], an_image[3], counter.operations)


class _Pass(nn.Module):
    """Forward and backward as one module: what checkpointing computes again needs the same tensors."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: int, size: int, pixels: bool, counter: "_Counter") -> tuple[int, int]:
        """FLOPs of the forward pass, and bytes that are alive after it."""
        x = torch.empty(images, 3, size, size, device="meta", requires_grad=pixels)
        loss = F.cross_entropy(self.model(x), torch.zeros(images, dtype=torch.int64, device="meta"))
        between = counter.flops, counter.now
        loss.backward()
        return between


class OperationFlops(TorchDispatchMode):
    """Adds up the FLOPs of the operations that run inside, by torch's formulas, in `flops`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := FORMULAS.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _Counter(OperationFlops):
    """Also the bytes of the storages that are alive, without the model's `own` tensors: now and at most."""

    def __init__(self, own: Iterable[Tensor]):
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._alive: dict[int, object] = {_identity(tensor): tensor for tensor in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        before = self.now
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and (key := _identity(tensor)) not in self._alive:
                storage = tensor.untyped_storage()
                self._alive[key] = weakref.ref(storage, partial(self._freed, key, storage.nbytes()))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        self.operations += self.now > before or func._schema.is_mutable
        return result

    def _freed(self, key: int, size: int, _: object) -> None:
        del self._alive[key]
        self.now -= size


@contextmanager
def _attention_as_one_kernel() -> Iterator[None]:
    """What every device does without a mask; the meta device alone takes attention apart, and keeps the scores."""
    apart = F.scaled_dot_product_attention

    def as_one(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
        if attn_mask is not None or args or options.get("is_causal") or q.ndim != 4:
            return apart(q, k, v, attn_mask, *args, **options)
        return ATTENTION(q, k, v, None, True, options.get("dropout_p", 0.0))[0]

    # a mode would not reach what checkpointing computes again
    F.scaled_dot_product_attention = as_one  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = apart


def _identity(tensor: Tensor) -> int:
    """Of a tensor's storage, also on the meta device."""
    return tensor.untyped_storage()._cdata
