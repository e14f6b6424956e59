"""The definition of a model family: which layers are which components, and which modules are its blocks.

The whole model is traversed: the family must list every module that contains linear layers or convolutions, and every
such layer, with its component or with None to leave it frozen. So an unknown variant is rejected, instead of getting
branches that are never called.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fulllora_dist.attacks.pgd import evaluating
from fulllora_dist.attacks.victim import logits_in
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.models.placement import FUSED, Site
from fulllora_dist.models.settings import COMPONENTS

Parts = Mapping[type[nn.Module], Mapping[str, str | None]]
Weights = dict[str, Tensor]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LAYERS = (nn.Linear, _ConvNd)


def _matches(pattern: str, path: str) -> bool:
    """Whether a dotted path matches a pattern, in which `*` matches one name."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), path) is not None


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: name of the family, shown in messages and stored in adapter files.
        models: the model classes; subclasses are not included.
        parts: {class: {layer: component}} of every module that contains layers, including the models. A layer is given
            by its path below the module, through containers (nn.Sequential and the like), with `*` for any one name.
            The component is one of `COMPONENTS` or `FUSED`, or "head"; None leaves the layer frozen. A class without
            layers of its own, such as a block, has {}.
        blocks: paths of the modules between the patch embedding and the final norm, in the same notation, which
            compute in bf16 if enabled: each must take activations as positional arguments and return one tensor.
        calling: {attention: subclass} if timm reads `self.qkv.weight` instead of calling `self.qkv`; see `attach`.
        checkpointing: whether the models have `set_grad_checkpointing`.
        convert: converts a checkpoint with other keys or for another image size for `load_state_dict`. None uses the
            `checkpoint_filter_fn` of the model's module, if any.
        any_size: whether the models support images of any size without timm's `dynamic_img_size`.
        plugin: for a family outside this package, the module to import: `__name__` in that module.
    """

    name: str
    models: tuple[type[nn.Module], ...]
    parts: Parts
    blocks: tuple[str, ...]
    calling: Mapping[type[nn.Module], type[nn.Module]] = field(default_factory=dict)
    checkpointing: bool = True
    convert: Callable[[Weights, nn.Module], Weights] | None = None
    any_size: bool = False
    plugin: str | None = None

    def __post_init__(self) -> None:
        known = {*COMPONENTS, *FUSED, "head", None}
        for part, layers in self.parts.items():
            for layer, component in layers.items():
                if component not in known:
                    raise UserError(
                        f"family {self.name}: {part.__name__}.{layer} has the unknown component {component!r}; "
                        f"known: {', '.join(filter(None, [*COMPONENTS, *FUSED, 'head']))}, None"
                    )

    def sites(self, backbone: nn.Module, name: str) -> list[Site]:
        """The layers that may get a branch, in forward order, the heads last.

        Raises:
            UserError: a module or layer that is unknown to this family.
        """
        sites: list[Site] = []
        for path, module in backbone.named_modules():
            if isinstance(module, LAYERS):
                sites += self._site(backbone, name, path, module)
            elif (
                not isinstance(module, CONTAINERS)
                and type(module) not in self.parts
                and any(isinstance(m, LAYERS) for m in module.modules())
            ):
                raise UserError(
                    f"model.backbone: {name} has the part {path} of class {type(module).__name__}, where no branch is "
                    f"known to act; supported: {', '.join(dict.fromkeys(part.__name__ for part in self.parts))}"
                )
        return sites

    def _site(self, backbone: nn.Module, name: str, path: str, layer: nn.Module) -> list[Site]:
        owner, below = path, ""
        while not below or isinstance(backbone.get_submodule(owner), CONTAINERS):
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
        check_plain(path, layer, f"model.backbone: {name} has the layer")
        return [Site(path, component)]

    def branches(self, component: str, placement: Sequence[str], qkv: str) -> tuple[str, ...]:
        """Names of the branches of a layer: those of its parts for a fused projection, "" for one of the whole layer.

        Args:
            placement: the components that get a branch.
            qkv: "separate" or "shared".
        """
        parts = FUSED.get(component, (component,))
        wanted = tuple(part for part in parts if part == "head" or part in placement)
        return wanted if len(parts) > 1 and qkv == "separate" else ("",) * bool(wanted)

    def modules(self, backbone: nn.Module) -> list[nn.Module]:
        """The blocks, in forward order."""
        return [m for path, m in backbone.named_modules() if any(_matches(pattern, path) for pattern in self.blocks)]

    def block_of(self, path: str) -> str:
        """The path of the block that contains a layer; outside the blocks, the first name of the layer's path."""
        names = path.split(".")
        above = (".".join(names[: i + 1]) for i in range(len(names)))
        return next((p for p in above if any(_matches(pattern, p) for pattern in self.blocks)), names[0])

    def depths(self, sites: Sequence[Site]) -> dict[str, int]:
        """{layer: number of its block, from 0 and through all stages}, without layers outside of the blocks.

        Patch merging, which is no block of a stage, has the number of the block behind it.
        """
        depths: dict[str, int] = {}
        before: list[str] = []
        for site in sites:
            block = self.block_of(site.path)
            if not any(_matches(pattern, block) for pattern in self.blocks):
                continue
            if site.component != "reduction" and block not in before:
                before.append(block)
            depths[site.path] = len(before) - (site.component != "reduction")
        return depths

    def converted(self, weights: Weights, backbone: nn.Module) -> Weights:
        """Convert a checkpoint of this family for `load_state_dict` of `backbone`."""
        convert = self.convert or getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        return weights if convert is None else convert(weights, backbone)


FAMILIES: dict[str, Family] = {}
"""All families by name."""


def register_family(family: Family) -> Family:
    """Register a family, so that `create_model`, training and evaluation support its models.

    A family with the same name and `plugin` is replaced, as its module was reloaded.

    Raises:
        UserError: the name or a model class belongs to another family.
    """
    for other in FAMILIES.values():
        if other.name != family.name and (taken := set(other.models) & set(family.models)):
            raise UserError(f"family {family.name}: {taken.pop().__name__} belongs to the family {other.name}")
    known = FAMILIES.get(family.name)
    if known is not None and (family.plugin is None or known.plugin != family.plugin):
        raise UserError(
            f"family {family.name}: another family has this name; choose a different one, or set plugin=__name__ "
            "in a module that is reloaded"
        )
    FAMILIES[family.name] = family
    return family


def check_plain(path: str, layer: nn.Module, what: str) -> None:
    """Check that a branch can be put beside a layer.

    Args:
        what: of the message, before the path.

    Raises:
        UserError: it is another class, or has another kind of padding, or groups.
    """
    if type(layer) is nn.Linear or (
        type(layer) is nn.Conv2d
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    ):
        return
    raise UserError(
        f"{what} {path}, beside which no branch can be put: {layer}; supported: nn.Linear, and nn.Conv2d with zero "
        "padding and without groups"
    )


@contextmanager
def noting_calls(modules: Mapping[str, nn.Module], grad: bool = False) -> Iterator[dict[str, Any]]:
    """{name: output} of those modules that are called within the context.

    By their `forward`: where a module has hooks, torch leaves the fused operation of nn.TransformerEncoderLayer that it
    takes without, and in which no layer is called.

    Args:
        grad: outputs are part of the graph, for `torch.autograd.grad`.
    """
    outputs: dict[str, Any] = {}

    def noting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = outputs[name] = forward(*args, **kwargs)
            if not grad:
                return output
            return (output if output.requires_grad else output.requires_grad_()).clone()  # it may be changed in place

        return call

    own = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = noting(name, module.forward)
        yield outputs
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)
            if (forward := own[name]) is not None:
                module.forward = forward


def check_forward(backbone: nn.Module, sites: list[Site], name: str, image_size: int, num_classes: int) -> None:
    """Check in a forward pass on a grey image that a model returns logits and calls each branch.

    Raises:
        UserError: the pass fails, returns something else, or does not call a branch, whose layer the message names.
    """
    branches = {site.path: backbone.get_submodule(f"{site.path}.lnlora") for site in sites}
    weight = next(backbone.parameters())
    try:
        with torch.no_grad(), evaluating(backbone), noting_calls(branches) as called:
            output = backbone(torch.zeros(1, 3, image_size, image_size, dtype=weight.dtype, device=weight.device))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"model.image_size: {name} fails on an image of 3 x {image_size} x {image_size} ({one_line(error)}); use "
            "the size that it is made for, and remove arguments that change its input from model.model_kwargs"
        ) from None
    logits = logits_in(output)
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (1, num_classes):
        raise UserError(
            f"model.model_kwargs: {name} must return logits {(1, num_classes)} for one image, got "
            f"{shape or type(output).__name__}; remove arguments that change its output, such as global_pool"
        )
    if idle := [path for path in branches if path not in called]:
        raise UserError(
            f"model.backbone: {name} never calls {idle[0]} ({len(idle)} such layers), so that its branch would have no "
            "effect; its family must give a subclass that calls it (`calling`), or None as its component"
        )
