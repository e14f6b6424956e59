"""What torch offers against results that differ from run to run on a GPU (`run.deterministic`)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Deterministic kernels alone within the context, if `on`; what has none raises torch's RuntimeError.

    Flash attention's backward has an order without atomics, which torch then takes; the memory-efficient and cuDNN's
    have none, so that what flash attention does not take goes to plain products.
    """
    if not on:
        yield
        return
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    kernels = cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(), cudnn.deterministic, cudnn.benchmark
    workspace = os.environ.get(_WORKSPACE)
    os.environ.setdefault(_WORKSPACE, ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    cuda.enable_mem_efficient_sdp(False)
    cuda.enable_cudnn_sdp(False)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cuda.enable_mem_efficient_sdp(kernels[0])
        cuda.enable_cudnn_sdp(kernels[1])
        cudnn.deterministic, cudnn.benchmark = kernels[2:]
        if workspace is None:
            os.environ.pop(_WORKSPACE, None)
