"""Layers that get a branch (as defined in `families/`), and the report of what is trained."""

from dataclasses import dataclass

from fulllora_dist.models.settings import Component

FUSED: dict[str, tuple[Component, ...]] = {"qkv": ("q", "k", "v"), "qk": ("q", "k"), "kv": ("k", "v")}
"""Fused projections, whose outputs are several components of equal size."""


@dataclass(frozen=True)
class Site:
    """A layer that may get a branch.

    Attributes:
        path: the layer's name in the timm model, e.g. "blocks.0.attn.qkv".
        component: one of `COMPONENTS`, or of `FUSED`, or "head".
    """

    path: str
    component: str


@dataclass(frozen=True)
class Adapted:
    """One adapted layer: its site, the names of its branches and their trainable parameters."""

    site: Site
    branches: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class PlacementReport:
    """The layers and parameters that finetuning trains or leaves frozen.

    Attributes:
        adapted: layers with branches.
        trained: (path, parameters) of the backbone's own tensors that are trained.
        left: (path, class) of layers with frozen weights and no branch.
        trainable: number of trainable parameters, head included.
        total: number of parameters of backbone and head, without branches.
    """

    adapted: tuple[Adapted, ...]
    trained: tuple[tuple[str, int], ...]
    left: tuple[tuple[str, str], ...]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Trainable parameters as a fraction of backbone + head."""
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
