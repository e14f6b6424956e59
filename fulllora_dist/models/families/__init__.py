"""Families of models that can be adapted, each in a file here or in a module listed under `plugins`."""

import importlib
import pkgutil

from torch import nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.families.family import FAMILIES, Family, register_family

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["FAMILIES", "Family", "family_of", "has_family", "register_family"]


def has_family(module: nn.Module) -> bool:
    """Whether a module is a model of a registered family."""
    return any(type(module) in family.models for family in FAMILIES.values())


def family_of(backbone: nn.Module, name: str) -> Family:
    """The family of a model.

    Raises:
        UserError: the model belongs to no family.
    """
    family = next((family for family in FAMILIES.values() if type(backbone) in family.models), None)
    if family is None:
        known = (model.__name__ for family in FAMILIES.values() for model in family.models)
        raise UserError(
            f"model.backbone: {name} has the model class {type(backbone).__name__}, where no branch is known to act; "
            f"supported: {', '.join(known)}, and what a module under plugins: registers"
        )
    return family
