"""Training methods by name, each in a file here or in a module listed under `plugins` (docs/extending.md)."""

import importlib
import pkgutil

from fulllora_dist.methods.base import METHODS, Method, MethodSettings, register_method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _name in sorted(METHODS):
    METHODS[_name] = METHODS.pop(_name)

__all__ = ["METHODS", "Method", "MethodSettings", "register_method"]
