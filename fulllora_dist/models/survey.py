"""Which models of timm can be adapted, and what an adapter of a given budget is there, counted on the meta device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import timm
import torch

from fulllora_dist.errors import UserError
from fulllora_dist.models.finetune import create_model

MODULES = (
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "deit",
    "swin_transformer",
    "swin_transformer_v2",
    "swin_transformer_v2_cr",
    "beit",
    "eva",
    "cait",
    "xcit",
    "convit",
)
"""Modules of timm with plain or windowed transformers of pictures."""


@dataclass(frozen=True)
class Backbone:
    """A model that is supported, with an adapter of the default budget and placement and a frozen head.

    Attributes:
        name: timm's architecture.
        family: its family's name.
        image_size: side in pixels.
        parameters: of backbone and head.
        rank: of every branch.
        trainable: parameters of the adapter.
        branches: how many there are.
        layers: (component, inputs, outputs) of every adapted layer; what sizes are told apart by.
    """

    name: str
    family: str
    image_size: int
    parameters: int
    rank: int
    trainable: int
    branches: int
    layers: tuple[tuple[str, int, int], ...]

    @property
    def share(self) -> float:
        """Trainable parameters / parameters."""
        return self.trainable / self.parameters


@dataclass(frozen=True)
class Refusal:
    """A model that is not supported, and the line that says why."""

    name: str
    reason: str


def architectures() -> list[str]:
    """timm's architectures of `MODULES`."""
    return sorted({name for module in MODULES for name in timm.list_models(module=module)})


def examine(name: str, budget: float = 0.05) -> Backbone | Refusal:
    """What an adapter of `budget` is for a timm architecture, or why there is none. No weights are fetched."""
    try:
        with torch.device("meta"):
            model = create_model(name, pretrained=False, head="frozen", budget=budget)
    except UserError as error:
        return Refusal(name, str(error))
    layers = []
    for adapted in model.report.adapted:
        weight = model.backbone.get_parameter(f"{adapted.site.path}.weight")
        layers.append((adapted.site.component, weight[0].numel(), len(weight)))
    return Backbone(
        name=name,
        family=model.family.name,
        image_size=model.info.image_size,
        parameters=model.report.total,
        rank=model.spec.rank or 0,
        trainable=model.report.trainable,
        branches=sum(len(adapted.branches) for adapted in model.report.adapted),
        layers=tuple(layers),
    )


def sizes(backbones: Iterable[Backbone]) -> list[list[Backbone]]:
    """Backbones grouped by family and adapted layers, small ones first; in each group the shortest name is first."""
    groups: dict[tuple, list[Backbone]] = {}
    for backbone in sorted(backbones, key=lambda b: (len(b.name), b.name)):
        groups.setdefault((backbone.family, backbone.layers), []).append(backbone)
    return sorted(groups.values(), key=lambda group: (group[0].family, group[0].parameters, group[0].name))


def row(group: Sequence[Backbone]) -> str:
    """One line of the table: a size, by its shortest name."""
    first = group[0]
    also = f" (+{len(group) - 1})" if len(group) > 1 else ""
    return (
        f"| `{first.name}`{also} | {first.image_size} | {first.parameters / 1e6:.1f} M | {first.rank} | "
        f"{first.trainable / 1e6:.2f} M | {first.share:.2%} | {first.branches} |"
    )


def page(found: Iterable[Backbone | Refusal]) -> str:
    """The tables of docs/backbones.md."""
    examined = list(found)
    groups = sizes(b for b in examined if isinstance(b, Backbone))
    lines = []
    for family in dict.fromkeys(group[0].family for group in groups):
        lines += [
            f"### {family}",
            "",
            "| timm architecture | pixels | parameters | rank | trainable | share | branches |",
            "|---|---|---|---|---|---|---|",
            *(row(group) for group in groups if group[0].family == family),
            "",
        ]
    lines += ["## Refused", "", "| architecture | why |", "|---|---|"]
    refusals = [r for r in examined if isinstance(r, Refusal)]
    for refusal in refusals:
        reason = refusal.reason.partition("; supported")[0].removeprefix(f"model.backbone: {refusal.name} ")
        lines.append(f"| `{refusal.name}` | {reason} |")
    return "\n".join([*lines, ""])
