"""What a family of models says about itself: which layers are key components, and which modules are its blocks.

A model is walked as a whole: every module that holds linear layers or convolutions must be one that its family names,
and every such layer must be named there too, with the component that it is or with None to leave it frozen. So a
variant that nobody has looked at is refused by name, instead of having branches that are never called.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.placement import FUSED, Site
from fulllora_dist.models.settings import COMPONENTS

Parts = Mapping[type[nn.Module], Mapping[str, str | None]]
Weights = dict[str, Tensor]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LAYERS = (nn.Linear, _ConvNd)


def _matches(pattern: str, path: str) -> bool:
    """Whether a dotted path is that of a pattern, in which `*` stands for one name."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), path) is not None


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: of the family, for people and for adapter files.
        models: its model classes. A subclass is another model.
        parts: {class: {layer: component}} of every module that holds layers, the models included. A layer is named by
            its path below the module, containers (nn.Sequential and the like) counted, `*` for any one name. The
            component is one of `COMPONENTS`, or `FUSED`, or "head"; None leaves the layer frozen. A class without
            layers of its own, such as a block, has {}.
        blocks: paths of the modules between the patch embedding and the final norm, in the same notation. In bf16 they
            compute in bf16: each must take its activations as positional arguments and return one tensor.
        calling: {attention: subclass} where timm reads `self.qkv.weight` instead of calling `self.qkv`; see `attach`.
        checkpointing: whether the models have `set_grad_checkpointing`.
        convert: a checkpoint under other keys or of another image size -> what `load_state_dict` takes. None: the
            `checkpoint_filter_fn` of the model's module, where it has one.
        any_size: whether the models take images of any size as they are, without timm's `dynamic_img_size`.
        prepare: what is done to a new model before anything is adapted.
        plugin: the module to import for a family from outside this package, `__name__` in that module.
    """

    name: str
    models: tuple[type[nn.Module], ...]
    parts: Parts
    blocks: tuple[str, ...]
    calling: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)
    checkpointing: bool = True
    convert: Callable[[Weights, nn.Module], Weights] | None = None
    any_size: bool = False
    prepare: Callable[[nn.Module], None] | None = None
    plugin: str | None = None

    def __post_init__(self) -> None:
        known = {*COMPONENTS, *FUSED, "head", None}
        for part, layers in self.parts.items():
            for layer, component in layers.items():
                if component not in known:
                    raise UserError(
                        f"family {self.name}: {part.__name__}.{layer} is said to be {component!r}; "
                        f"known: {', '.join(filter(None, [*COMPONENTS, *FUSED, 'head']))}, None"
                    )

    def sites(self, backbone: nn.Module, name: str) -> list[Site]:
        """The layers that may get a branch, in forward order, the heads last.

        Raises:
            UserError: a module or layer that this family does not know.
        """
        found: list[Site] = []
        for path, module in backbone.named_modules():
            if isinstance(module, _LAYERS):
                found += self._site(backbone, name, path, module)
            elif (
                not isinstance(module, _CONTAINERS)
                and type(module) not in self.parts
                and any(isinstance(m, _LAYERS) for m in module.modules())
            ):
                raise UserError(
                    f"model.backbone: {name} has the part {path} of class {type(module).__name__}, where no branch is "
                    f"known to act; supported: {', '.join(dict.fromkeys(part.__name__ for part in self.parts))}"
                )
        return found

    def _site(self, backbone: nn.Module, name: str, path: str, layer: nn.Module) -> list[Site]:
        owner, below = path, ""
        while not below or isinstance(backbone.get_submodule(owner), _CONTAINERS):
            owner, _, last = owner.rpartition(".")
            below = f"{last}.{below}".removesuffix(".")
        layers = self.parts[type(backbone.get_submodule(owner))]
        pattern = next((p for p in layers if _matches(p, below)), None)
        if pattern is None:
            raise UserError(
                f"model.backbone: {name} has the layer {path}, which is not known to the family {self.name}; "
                f"supported: {', '.join(layers)}"
            )
        component = layers[pattern]
        if component is None:
            return []
        plain = type(layer) in (nn.Linear, nn.Conv2d)
        if not plain or (
            isinstance(layer, nn.Conv2d)
            and (layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str))
        ):
            raise UserError(
                f"model.backbone: {name} has the layer {path}, beside which no branch can be put: {layer}; "
                "supported: nn.Linear, and nn.Conv2d with zero padding and without groups"
            )
        return [Site(path, component)]

    def modules(self, backbone: nn.Module) -> list[nn.Module]:
        """The blocks, in forward order."""
        return [m for path, m in backbone.named_modules() if any(_matches(pattern, path) for pattern in self.blocks)]

    def block_of(self, path: str) -> str:
        """The block that holds a layer, by its path; outside the blocks the first name of the layer's."""
        names = path.split(".")
        above = (".".join(names[: i + 1]) for i in range(len(names)))
        return next((p for p in above if any(_matches(pattern, p) for pattern in self.blocks)), names[0])

    def converted(self, weights: Weights, backbone: nn.Module) -> Weights:
        """A checkpoint of this family as `load_state_dict` of `backbone` takes it."""
        convert = self.convert or getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        return weights if convert is None else convert(weights, backbone)


FAMILIES: dict[str, Family] = {}
"""By name."""


def register_family(family: Family) -> Family:
    """Make the models of a family known to `create_model`, training and evaluation.

    The same name from the same `plugin` replaces the family: its module was loaded again.

    Raises:
        UserError: the name or a model class is another family's.
    """
    for other in FAMILIES.values():
        if other.name != family.name and (taken := set(other.models) & set(family.models)):
            raise UserError(f"family {family.name}: {taken.pop().__name__} belongs to the family {other.name}")
    known = FAMILIES.get(family.name)
    if known is not None and (family.plugin is None or known.plugin != family.plugin):
        raise UserError(
            f"family {family.name}: another family has this name; take a name of its own, or say plugin=__name__ "
            "in a module that is loaded again"
        )
    FAMILIES[family.name] = family
    return family


def check_forward(backbone: nn.Module, sites: list[Site], name: str, image_size: int, num_classes: int) -> None:
    """One forward pass on a grey image: it gives logits, and calls each branch, which would silently never act else.

    Raises:
        UserError: it fails, gives something else, or does not call a layer, which is named.
    """
    called: set[str] = set()
    handles = [
        backbone.get_submodule(f"{site.path}.lnlora").register_forward_pre_hook(
            lambda *_, path=site.path: called.add(path)
        )
        for site in sites
    ]
    training = [(module, module.training) for module in backbone.modules()]
    weight = next(backbone.parameters())
    try:
        backbone.eval()
        with torch.no_grad():
            logits = backbone(torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"model.image_size: {name} fails on an image of 3 x {image_size} x {image_size} ({reason}); take the size "
            "that it is made for, and leave out of model.model_kwargs what changes its input"
        ) from None
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training:
            module.training = mode
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (1, num_classes):
        raise UserError(
            f"model.model_kwargs: {name} gives {shape or type(logits).__name__} for one image instead of logits "
            f"{(1, num_classes)}; leave out what changes its output, such as global_pool"
        )
    if idle := [site.path for site in sites if site.path not in called]:
        raise UserError(
            f"model.backbone: {name} never calls {idle[0]} ({len(idle)} such layers), so that a branch beside it would "
            "not act; its family must name a subclass that calls it (`calling`), or None"
        )
