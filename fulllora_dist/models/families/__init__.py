"""The families of models that can be adapted, one file each. `register_family` adds one, from anywhere."""

from torch import nn

from fulllora_dist.errors import UserError
from fulllora_dist.models.families.beit import BEIT
from fulllora_dist.models.families.cait import CAIT
from fulllora_dist.models.families.convit import CONVIT
from fulllora_dist.models.families.eva import EVA
from fulllora_dist.models.families.family import Family
from fulllora_dist.models.families.swin import SWIN, SWIN_V2
from fulllora_dist.models.families.vit import VIT
from fulllora_dist.models.families.xcit import XCIT

__all__ = ["FAMILIES", "Family", "family_of", "register_family"]

FAMILIES: dict[str, Family] = {}
"""By name."""


def register_family(family: Family) -> Family:
    """Make the models of a family known to `create_model`, training and evaluation.

    Raises:
        UserError: the name or a model class is another family's.
    """
    for other in FAMILIES.values():
        if taken := set(other.models) & set(family.models):
            raise UserError(f"family {family.name}: {taken.pop().__name__} belongs to the family {other.name}")
    if family.name in FAMILIES:
        raise UserError(f"family {family.name}: another family has this name; take a name of its own")
    FAMILIES[family.name] = family
    return family


for _family in (VIT, SWIN, SWIN_V2, BEIT, EVA, CAIT, XCIT, CONVIT):
    register_family(_family)


def family_of(backbone: nn.Module, name: str) -> Family:
    """The family of a model.

    Raises:
        UserError: it belongs to none.
    """
    found = next((family for family in FAMILIES.values() if type(backbone) in family.models), None)
    if found is None:
        known = (model.__name__ for family in FAMILIES.values() for model in family.models)
        raise UserError(
            f"model.backbone: {name} has the model class {type(backbone).__name__}, where no branch is known to act; "
            f"supported: {', '.join(known)}, and what a module under plugins: registers"
        )
    return found
