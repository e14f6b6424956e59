"""What enters `evaluate` from a notebook: images of a transform of one's own, and what a model computes in, which is
measured."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fulllora_dist.attacks.arguments import check_images, check_range, dtype_name, pixel_range
from fulllora_dist.attacks.pgd import attack_mode
from fulllora_dist.data.batch import Batch
from fulllora_dist.evaluation.images import EvalImages


class CheckedImages:
    """Images that are looked at as they are read, on the host, as a transform of one's own may normalise them."""

    def __init__(self, images: EvalImages):
        self._images = images
        self.batches, self.index = images.batches, images.index
        self.digest, self.settings = images.digest, images.settings

    def read(self, ids: np.ndarray) -> Batch:
        """Raises UserError: floats outside [0, 1]."""
        batch = self._images.read(ids)
        if batch.images.dtype != torch.uint8:
            check_images(batch.images, "data")
            check_range(*pixel_range(batch.images), "data")
        return batch


class _Dtypes(TorchDispatchMode):
    """Collects the floating dtypes that operations within return, those under autocast included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.seen |= {t.dtype for t in tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()}
        return results


def outputs_of(model: nn.Module, pixels: Tensor) -> int:
    """How many logits the model has for images [B, C, H, W]."""
    with torch.no_grad(), attack_mode(model):
        return model(pixels).shape[1]


def measured_precision(model: nn.Module, images: EvalImages, device: torch.device) -> str:
    """The roughest dtype of the model, e.g. "fp32": of its parameters, and of its results at one image, as it may
    compute in less than it keeps."""
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
    pixels = images.read(images.batches[0][:1]).to(device).pixels()
    with torch.no_grad(), attack_mode(model):
        model(pixels)  # the first pass of an adapted model looks at the pixels, too
        with _Dtypes() as dtypes:
            model(pixels)
    seen = dtypes.seen | {p.dtype for p in model.parameters() if p.is_floating_point()}
    roughest = dtype_name(max(seen or {pixels.dtype}, key=lambda dtype: torch.finfo(dtype).eps))
    return short.get(roughest, roughest)
