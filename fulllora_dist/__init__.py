"""FullLoRA adversarial finetuning of pretrained Vision Transformers.

import fulllora_dist as fd
model = fd.create_model("vit_base_patch16_224.augreg2_in21k_ft_in1k")   # pixels in [0, 1] -> logits
model = fd.adapt(vit, target_modules=["q_proj", "v_proj"], mean=..., std=...)  # or a module of one's own
x_adv = fd.pgd(model, x, y, eps=4 / 255, steps=10, step_size=1 / 255)
method, engine = fd.method("trades", eps=4 / 255), fd.LocalEngine(model, optimizer)
metrics = method.step(engine, fd.Batch.of(x, y), step)         # in a loop of one's own
fd.save_adapter(model, "adapter/")
model = fd.load("adapter/")                                    # or "models:/NAME@champion"
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulllora_dist.attacks.pgd import pgd
    from fulllora_dist.core.errors import UserError
    from fulllora_dist.data.batch import Batch
    from fulllora_dist.evaluation.function import evaluate
    from fulllora_dist.methods.own_loop import LocalEngine, method
    from fulllora_dist.models.adapt import adapt, create_model
    from fulllora_dist.models.adapted_model import AdaptedModel
    from fulllora_dist.models.adapter_file import adapter_state_dict, save_adapter
    from fulllora_dist.models.peft_format import load_peft, save_peft
    from fulllora_dist.models.unload import disable_adapter, merge, unload
    from fulllora_dist.registry.address import MultiAdapter, load

__version__ = "0.1.0"
__all__ = [
    "AdaptedModel",
    "Batch",
    "LocalEngine",
    "MultiAdapter",
    "UserError",
    "adapt",
    "adapter_state_dict",
    "create_model",
    "disable_adapter",
    "evaluate",
    "load",
    "load_peft",
    "merge",
    "method",
    "pgd",
    "save_adapter",
    "save_peft",
    "unload",
]

_HOMES = {
    "AdaptedModel": "models.adapted_model",
    "Batch": "data.batch",
    "LocalEngine": "methods.own_loop",
    "MultiAdapter": "registry.address",
    "UserError": "core.errors",
    "adapt": "models.adapt",
    "adapter_state_dict": "models.adapter_file",
    "create_model": "models.adapt",
    "disable_adapter": "models.unload",
    "evaluate": "evaluation.function",
    "load": "registry.address",
    "load_peft": "models.peft_format",
    "merge": "models.unload",
    "method": "methods.own_loop",
    "pgd": "attacks.pgd",
    "save_adapter": "models.adapter_file",
    "save_peft": "models.peft_format",
    "unload": "models.unload",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `import fulllora_dist` alone stays fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
