"""Which layers of a timm model get a branch.

A family is a function that lists the model's key components. A model of no known family is refused by name: several
timm models read `self.qkv.weight` directly, so that a branch beside `qkv` would silently never be called.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from fulllora_dist.errors import UserError

Component = Literal["patch_embed", "q", "k", "v", "proj", "fc1", "fc2"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
"""Names a placement is written in. q, k and v are thirds of a fused `qkv`."""


@dataclass(frozen=True)
class Site:
    """A layer that may get a branch.

    Attributes:
        path: the layer's name in the timm model, e.g. "blocks.0.attn.qkv".
        component: one of `COMPONENTS`, or "qkv" for a fused projection, or "head".
    """

    path: str
    component: str


_BLOCK_LAYERS = {
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "fc1",
    "mlp.fc1_g": "fc1",
    "mlp.fc1_x": "fc1",
    "mlp.fc2": "fc2",
}


def _class(module: nn.Module) -> str:
    return type(module).__name__


def find_sites(backbone: nn.Module, name: str) -> list[Site]:
    """The key components of a ViT or DeiT in forward order, its heads last.

    Raises:
        UserError: the model, or a part of it, is of no known family.
    """
    parts: list[tuple[str, nn.Module, tuple[str, ...]]] = [
        ("model", backbone, ("VisionTransformer", "VisionTransformerDistilled"))
    ]
    if _class(backbone) in parts[0][2]:
        parts.append(("patch embedding", backbone.get_submodule("patch_embed"), ("PatchEmbed",)))
        for block in backbone.get_submodule("blocks").children():
            parts.append(("block", block, ("Block",)))
            if _class(block) == "Block":
                parts.append(("attention", block.get_submodule("attn"), ("Attention",)))
                parts.append(("MLP", block.get_submodule("mlp"), ("Mlp", "GluMlp", "SwiGLU")))
    for what, module, known in parts:
        if _class(module) not in known:
            raise UserError(
                f"model.backbone: {name} has the {what} {_class(module)}, where no branch is known to act; "
                f"supported: {', '.join(known)}"
            )
    names = dict(backbone.named_modules())
    paths = [Site("patch_embed.proj", "patch_embed")]
    for i in range(len(backbone.get_submodule("blocks"))):  # type: ignore[arg-type]
        paths += [Site(f"blocks.{i}.{layer}", component) for layer, component in _BLOCK_LAYERS.items()]
    paths += [Site("head", "head"), Site("head_dist", "head")]
    return [s for s in paths if isinstance(names.get(s.path), (nn.Linear, nn.Conv2d))]


@dataclass(frozen=True)
class Adapted:
    """One adapted layer: its site, the names of its branches and their trainable parameters."""

    site: Site
    branches: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class PlacementReport:
    """What finetuning trains and what it leaves.

    Attributes:
        adapted: layers with branches.
        trained: (path, parameters) of the backbone's own tensors that train.
        left: (path, class) of layers with weights that stay as they are.
        trainable: number of trainable parameters, head counted.
        total: parameters of backbone and head, without branches.
    """

    adapted: tuple[Adapted, ...]
    trained: tuple[tuple[str, int], ...]
    left: tuple[tuple[str, str], ...]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """All trainable parameters / (backbone + head)."""
        return self.trainable / self.total

    def __str__(self) -> str:
        by_component: dict[str, list[Adapted]] = {}
        for adapted in self.adapted:
            by_component.setdefault(adapted.site.component, []).append(adapted)
        lines = [
            f"  {component}: {len(group)} layers, {sum(len(a.branches) for a in group)} branches, "
            f"{sum(a.parameters for a in group):,} parameters"
            for component, group in by_component.items()
        ]
        if self.trained:
            lines.append(f"  own tensors trained: {len(self.trained)}, {sum(n for _, n in self.trained):,} parameters")
        kinds: dict[str, int] = {}
        for _, kind in self.left:
            kinds[kind] = kinds.get(kind, 0) + 1
        lines.append("  left frozen: " + (", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "nothing"))
        lines.append(f"  trainable: {self.trainable:,} of {self.total:,} = {self.share:.2%}")
        return "\n".join(lines)
