"""Training methods by name, each in a file here or in a module listed under `plugins` (docs/extending.md).

Their settings are in `settings.py`; the methods themselves need torch, and are imported on first use of a name below.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fulllora_dist.methods.base import METHODS, Method, MethodSettings, register_method

__all__ = ["METHODS", "Method", "MethodSettings", "register_method"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return getattr(importlib.import_module(f"{__name__}.base"), name)
