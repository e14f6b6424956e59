"""Floating-point operations of a training, counted on its own model and methods."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fulllora_dist.config.schema import Config
from fulllora_dist.data.batch import Batch
from fulllora_dist.models.adapted_model import WITH_BRANCHES, AdaptedModel
from fulllora_dist.training.build import build_model
from fulllora_dist.training.phases import build_phases

_COUNTED = 2  # images; what a batch costs is proportional


class _Counter(TorchDispatchMode):
    """Sums the operations of everything that runs within."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet is torch.ops.aten.addmm_:  # of the branches, in place, which torch's registry does not have
            self.total += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


class _Engine:
    """The two doors of a method over the plain model, which takes no step."""

    def __init__(self, model: AdaptedModel):
        self.attack_view, self.classes = model, model.info.num_classes

    def __call__(self, pixels: Tensor) -> Tensor:
        return self.attack_view(pixels)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        yield batch


def training_work(config: Config, images: int) -> dict[str, int]:
    """{"batches", "updates", "flops"} of a whole training, attack and weight steps.

    Args:
        config: of the training; the model's weights are not read.
        images: in the training data.
    """
    classes = config.model.class_indices
    random: dict[str, Any] = {
        "pretrained": False,
        "checkpoint_path": None,
        "checkpoint_key": None,
        "class_indices": None,
    }
    random |= {"num_classes": len(classes) if classes else config.model.num_classes, "precision": "fp32"}
    # the checkpoint's own head is frozen by default, but a random model has none
    frozen = config.adapter.head == "auto" and config.finetune in WITH_BRANCHES and config.model.num_classes is None
    head = "frozen" if frozen else config.adapter.head
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update=random),
            "adapter": config.adapter.model_copy(update={"head": head, "init_from": None}),
        }
    )
    model, total = build_model(config).train(), 0
    phases = build_phases(config, steps_per_epoch=images // config.optim.batch_size)
    for phase in phases.phases:
        size = phase.image_size or model.info.image_size
        pixels = torch.zeros(_COUNTED, 3, size, size, dtype=torch.uint8)
        batch = Batch(pixels, torch.arange(_COUNTED), torch.arange(_COUNTED), torch.ones(_COUNTED, dtype=torch.bool))
        # the fused attention of CPUs is one operation, which torch's registry does not have
        with sdpa_kernel(SDPBackend.MATH), _Counter() as counter:
            phase.method.step(_Engine(model), batch, phase.first)
        total += counter.total // _COUNTED * config.optim.batch_size * (phase.end - phase.first)
    return {"batches": phases.total_steps, "updates": phases.total_updates, "flops": total}
