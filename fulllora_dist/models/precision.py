"""bf16 compute with fp32 master weights, without a second copy of any tensor.

The patch embedding, the position embedding, the final norm and the head compute in fp32; the blocks compute in bf16.
bf16 numbers near 1 are about 1/255 apart, as are pixels: a perturbation in bf16 would be lost before the patch
embedding.

- Frozen blocks are stored in bf16, except for BatchNorm and its statistics. Branches keep fp32 parameters, which are
  the optimizer's masters, and cast their folded matrices to the activations' dtype (`lnlora.py`).
- If parameters of the blocks themselves are trained (`full`, `layernorm`, `adapter.train_norms`), they stay in fp32 and
  the blocks run under autocast.

DeepSpeed's `bf16.enabled` is not used: it casts every parameter, the patch embedding and the adapters included.
"""

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device computes products of bf16 numbers itself. An x86 CPU without AVX512-BF16 or AMX converts them
    to fp32 and back; of other CPUs it is not known, and taken for granted."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _set_cudnn(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed


_OLD: tuple[tuple[Callable[[], Any], Callable[[Any], None], Any], ...] = (
    (lambda: torch.backends.cudnn.allow_tf32, _set_cudnn, False),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
)
"""torch's old settings of TF32: (read, set, value for full fp32). Reading one raises where a new setting contradicts
it; so both kinds are set alike, as code in a model may read the old ones, e.g. `torch.backends.cudnn.flags`."""


def _new() -> tuple[Any, ...]:
    """What has torch's new setting, `fp32_precision`, those first from which others inherit; none before torch 2.9."""
    every: Any = torch.backends
    if not hasattr(every.cuda.matmul, "fp32_precision"):
        return ()
    cudnn, mkldnn = every.cudnn, every.mkldnn
    return every, cudnn, every.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn


@contextmanager
def in_full_fp32() -> Iterator[None]:
    """Disable TF32 within the context, which would round the inputs of products to 10 bits, and bf16 in its place on
    CPUs."""
    old = []
    for read, put, full in _OLD:
        with suppress(RuntimeError):  # contradicted, and so of no effect
            old.append((put, read(), full))
    new: list[tuple[Any, str]] = []
    try:
        for place in _new():
            new.append((place, place.fp32_precision))
            place.fp32_precision = "none"  # so that the following ones show their own values
        for put, _, full in old:
            put(full)
        for place, _ in new:
            place.fp32_precision = "ieee"
        yield
    finally:
        for put, value, _ in old:  # first, as they change new ones
            put(value)
        for place, value in new:
            place.fp32_precision = value


def convolve_in_full_fp32() -> None:
    """Disable TF32 in convolutions from now on."""
    _set_cudnn(False)
    if _new():  # where they might inherit TF32 by now
        cudnn: Any = torch.backends.cudnn
        cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"


def multiplies_in_full_fp32() -> bool:
    """Whether matrix products on GPUs are without TF32."""
    if _new():
        return torch.backends.cuda.matmul.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


def _cast_input(dtype: torch.dtype):
    def hook(_: nn.Module, args: tuple) -> tuple:
        return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    return hook


def _cast_output(dtype: torch.dtype):
    def hook(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        return output.to(dtype)

    return hook


def _autocast_block(block: nn.Module) -> None:
    """Run `block` under bf16 autocast, which ends also if the block raises."""
    entered: list[torch.autocast] = []

    def enter(_: nn.Module, args: tuple) -> None:
        context = torch.autocast(args[0].device.type, torch.bfloat16)
        context.__enter__()
        entered.append(context)

    def leave(_: nn.Module, __: tuple, output: Tensor | None) -> None:
        entered.pop().__exit__(None, None, None)

    block.register_forward_pre_hook(enter)
    block.register_forward_hook(leave, always_call=True)


def compute_in_bf16(blocks: Sequence[nn.Module]) -> None:
    """Make the blocks of an adapted model compute in bf16; everything before and after them stays in fp32.

    Args:
        blocks: the blocks in forward order, see `Family.modules`.
    """
    within = [
        module
        for block in blocks
        for name, module in block.named_modules()
        if "lnlora" not in name.split(".") and not isinstance(module, _BatchNorm)
    ]
    if any(p.requires_grad for module in within for p in module.parameters(recurse=False)):
        for block in blocks:
            _autocast_block(block)
    else:
        for module in within:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(torch.bfloat16)
    for block in blocks:  # every block, as some models add fp32 tokens between blocks
        block.register_forward_pre_hook(_cast_input(torch.bfloat16))
    blocks[-1].register_forward_hook(_cast_output(torch.float32))
