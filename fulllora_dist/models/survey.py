"""Survey of the timm models that can be adapted, and the size of their adapters, counted on the meta device."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import timm
import torch

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapt import create_model

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
"""Modules of timm with plain or windowed vision transformers."""


NEW_CLASSES = 1000
"""Number of classes of the new head if timm's default tag has none."""


@dataclass(frozen=True)
class Backbone:
    """A supported model with an adapter on the default components.

    Attributes:
        name: timm's architecture.
        family: name of the family.
        image_size: side in pixels.
        parameters: number of parameters of backbone and head.
        rank: rank of every branch.
        trainable: number of parameters of the adapter, including a new head.
        branches: number of branches.
        new_head: whether the default tag has no classifier, so that a new head of `NEW_CLASSES` is trained; else its
            head is frozen.
    """

    name: str
    family: str
    image_size: int
    parameters: int
    rank: int
    trainable: int
    branches: int
    new_head: bool

    @property
    def cells(self) -> str:
        """The columns of its table row after the name."""
        return (
            f"{self.image_size} | {self.parameters / 1e6:.1f} M | {self.rank} | {self.trainable / 1e6:.2f} M | "
            f"{self.trainable / self.parameters:.2%} | {self.branches} | {'new' if self.new_head else 'frozen'} |"
        )


@dataclass(frozen=True)
class Refusal:
    """An unsupported model and the reason."""

    name: str
    reason: str


def architectures() -> list[str]:
    """All architectures of timm in `MODULES`."""
    return sorted({name for module in MODULES for name in timm.list_models(module=module)})


def examine(name: str, trainable_fraction: float = 0.05) -> Backbone | Refusal:
    """Measure an adapter with that `trainable_fraction` on a timm architecture, without downloading weights."""
    tag = timm.models.get_pretrained_cfg(name)
    new_head = tag is not None and tag.num_classes == 0
    try:
        with torch.device("meta"):
            model = create_model(
                name,
                pretrained=False,
                num_classes=NEW_CLASSES if new_head else None,
                head="trained" if new_head else "frozen",
                trainable_fraction=trainable_fraction,
            )
    except UserError as error:
        return Refusal(name, str(error))
    return Backbone(
        name=name,
        family=model.family.name,
        image_size=model.info.image_size,
        parameters=model.report.total,
        rank=model.spec.rank or 0,
        trainable=model.report.trainable,
        branches=sum(len(adapted.branches) for adapted in model.report.adapted),
        new_head=new_head,
    )


def rows(backbones: Iterable[Backbone]) -> list[list[Backbone]]:
    """Group backbones with identical table columns, ordered by family and size."""
    groups: dict[tuple[str, str], list[Backbone]] = {}
    for backbone in sorted(backbones, key=lambda b: (b.family, b.parameters, len(b.name), b.name)):
        groups.setdefault((backbone.family, backbone.cells), []).append(backbone)
    return list(groups.values())


def row(group: Sequence[Backbone]) -> str:
    """The table row of a group of backbones."""
    return f"| {', '.join(f'`{backbone.name}`' for backbone in group)} | {group[0].cells}"


def page(found: Iterable[Backbone | Refusal]) -> str:
    """Write the tables of docs/backbones.md."""
    examined = list(found)
    groups = rows(b for b in examined if isinstance(b, Backbone))
    lines = [f"Counted with timm {timm.__version__}.", ""]
    for family in dict.fromkeys(group[0].family for group in groups):
        lines += [
            f"### {family}",
            "",
            "| timm architecture | pixels | parameters | rank | trainable | share | branches | head |",
            "|---|---|---|---|---|---|---|---|",
            *(row(group) for group in groups if group[0].family == family),
            "",
        ]
    lines += ["## Refused", "", "| architecture | why |", "|---|---|"]
    refusals = [r for r in examined if isinstance(r, Refusal)]
    for refusal in refusals:
        reason = refusal.reason.partition("; supported")[0].removeprefix(f"model.backbone: {refusal.name} ")
        lines.append(f"| `{refusal.name}` | {reason} |")
    return "\n".join([*lines, ""])
