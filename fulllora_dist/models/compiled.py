"""Compile the blocks of a model one by one: all of a kind share what is compiled, so that it takes seconds of each kind
of pass (attack, weight step, guard) and image size, and not of each block."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fulllora_dist.models.adapted_model import AdaptedModel

KINDS = 32
"""Compilations of a block before the rest runs uncompiled."""


def why_not_compiled(device: torch.device) -> str | None:
    """Why blocks cannot be compiled on this machine; None if they can."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler})"


def compile_blocks(model: AdaptedModel) -> None:
    """Compile each block for each shape that it is called with, when it is first called so.

    The next start finds what was compiled in $TORCHINDUCTOR_CACHE_DIR, by default in the machine's temporary folder.
    """
    torch._dynamo.config.recompile_limit = max(KINDS, torch._dynamo.config.recompile_limit)
    for block in model.family.modules(model.backbone):
        block.compile(dynamic=False)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run uncompiled within the context: an attack that drops images would compile each number of them."""
    if not any(module._compiled_call_impl for module in model.modules()):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
