"""Adapt a backbone: decide what trains, derive the rank from the trainable fraction, put branches in place, show that
they are called. Every adapted model is made here, whether its backbone was built or given."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.rng import base_key
from fulllora_dist.models.adapted_model import WITH_BRANCHES, AdaptedModel, AdapterSpec
from fulllora_dist.models.as_built import attributes
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.families import Family
from fulllora_dist.models.families.family import check_forward
from fulllora_dist.models.families.target_modules import TargetModules
from fulllora_dist.models.lnlora import LNLoRABranch, LNLoRASplit, attach
from fulllora_dist.models.original import Original
from fulllora_dist.models.placement import FUSED, Adapted, PlacementReport, Site
from fulllora_dist.models.precision import compute_in_bf16
from fulllora_dist.models.settings import COMPONENTS, AdapterSettings, Finetune, Head, Precision

TOKEN_NORM_EPS = 1e-6
LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm, timm.layers.RmsNorm)
"""What `finetune: layernorm` and `adapter.train_norms` train: timm's RmsNorm stands in for LayerNorm in AIMv2, Sapiens2
and others."""


def _branch_sizes(family: Family, site: Site, layer: nn.Module, adapter: AdapterSettings) -> dict[str, tuple[int, int]]:
    """{branch name: (d_in, d_out)} of one layer; the name is "" for a single branch."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    d_in, d_out = weight[0].numel(), weight.shape[0]
    names = family.branches(site.component, adapter.components, adapter.qkv)
    return {name: (d_in, d_out // len(FUSED[site.component]) if name else d_out) for name in names}


def _resolve_head(head: Head, finetune: Finetune, own_classes: bool) -> Literal["frozen", "trained", "adapted"]:
    if finetune in ("full", "head"):
        if head not in ("auto", "trained"):
            raise UserError(
                f"adapter.head: {head} contradicts finetune: {finetune}, which trains the head; leave it out"
            )
        return "trained"
    if head == "adapted" and finetune not in WITH_BRANCHES:
        raise UserError(f"adapter.head: adapted needs branches; finetune: {finetune} has none")
    if head == "auto":
        return "frozen" if own_classes else "trained"
    return head


def _check_branches(finetune: Finetune, adapter: AdapterSettings) -> None:
    """Check that nothing is asked of branches where there are none."""
    if finetune in WITH_BRANCHES:
        return
    if adapter.blocks is not None:
        raise UserError(f"adapter.blocks: says which blocks get branches; finetune: {finetune} has none; leave it out")
    if adapter.train_norms:
        instead = "leave it out" if finetune != "head" else "set finetune=layernorm to train the norms alone"
        raise UserError(f"adapter.train_norms: trains norms beside branches; finetune: {finetune} has none; {instead}")


def _in_blocks(family: Family, sites: list[Site], blocks: tuple[int, ...] | None, name: str) -> list[Site]:
    """The sites in these blocks, and those outside of all blocks."""
    if blocks is None:
        return sites
    depths = family.depths(sites)
    last = max(depths.values(), default=-1)
    if blocks[-1] > last:
        raise UserError(f"adapter.blocks: must be from 0 to {last}, the blocks of {name}, got {blocks[-1]}")
    return [site for site in sites if depths.get(site.path, blocks[0]) in blocks]


def _own_trained(backbone: nn.Module, finetune: Finetune, head: str, norms: bool, sites: Iterable[Site]) -> set[str]:
    """Names of the backbone's own trainable tensors."""
    heads = {site.path for site in sites if site.component == "head"}
    trained: set[str] = set()
    for name, module in backbone.named_modules():
        own = {f"{name}.{n}".removeprefix(".") for n, _ in module.named_parameters(recurse=False)}
        is_norm = norms and isinstance(module, LAYER_NORMS)
        if finetune == "full" or is_norm or (head == "trained" and name in heads):
            trained |= own
    return trained


def _largest_rank(sizes: list[tuple[int, int]], fixed: int, total: int, norm: bool, fraction: float) -> int:
    """The largest rank whose trainable parameters, head included, stay within `fraction` of backbone + head."""
    per_rank = sum(d_in + d_out for d_in, d_out in sizes)
    norms = 2 * sum(d_in for d_in, _ in sizes) if norm else 0
    rank = int((fraction * total - fixed - norms) // per_rank)
    if rank < 1:
        least = (fixed + norms + per_rank) / total
        raise UserError(
            f"adapter.trainable_fraction: must be at least {math.ceil(10_000 * least) / 10_000:g} for rank 1 with "
            f"these components and this head, got {fraction:g}; or set adapter.rank=1"
        )
    return rank


def adapt_backbone(
    backbone: nn.Module,
    info: BackboneInfo,
    family: Family,
    adapter: AdapterSettings,
    finetune: Finetune,
    *,
    seed: int = 0,
    precision: Precision = "fp32",
    before_pass: Mapping[str, Mapping[str, Any]] | None = None,
) -> AdaptedModel:
    """Adapt a backbone in place.

    Args:
        info, family: of the backbone.
        seed: of the branches' A.
        before_pass: the backbone's `attributes`, where a pass through it has been made since.

    Raises:
        UserError: see `create_model`; the backbone is as it was.
    """
    name, components, qkv, rank, alpha = info.name, adapter.components, adapter.qkv, adapter.rank, adapter.alpha
    if qkv == "shared" and 0 < len(set(FUSED["qkv"]) & set(components)) < 3:
        raise UserError(
            "adapter.qkv: a shared branch adapts q, k and v together; put all three in adapter.components, or set "
            "adapter.qkv=separate"
        )
    _check_branches(finetune, adapter)
    sites = _in_blocks(family, family.sites(backbone, name), adapter.blocks, name)
    resolved_head = _resolve_head(adapter.head, finetune, info.own_classes)
    if resolved_head != "frozen" and finetune != "full" and all(site.component != "head" for site in sites):
        raise UserError(
            f"adapter.head: {name} has no linear layer whose output is its logits, which could be {resolved_head}; "
            "leave it out"
        )
    total = sum(p.numel() for p in backbone.parameters())
    norms = finetune == "layernorm" or adapter.train_norms
    trained = _own_trained(backbone, finetune, resolved_head, norms, sites)
    own = {n: p.numel() for n, p in backbone.named_parameters() if n in trained}
    normless = norms and not any(isinstance(module, LAYER_NORMS) for module in backbone.modules())
    if normless and adapter.train_norms:
        raise UserError(f"adapter.train_norms: {name} has no LayerNorm; leave it out")
    if normless or (finetune not in WITH_BRANCHES and not own):
        raise UserError(f"finetune: {finetune} has nothing to train in {name}; use fulllora, lora or full")

    plan: list[tuple[Site, dict[str, tuple[int, int]]]] = []
    if finetune in WITH_BRANCHES:
        for site in sites:
            if site.component != "head" or resolved_head == "adapted":
                sizes = _branch_sizes(family, site, backbone.get_submodule(site.path), adapter)
                plan += [(site, sizes)] if sizes else []
        if not plan:
            present = {part for site in sites for part in FUSED.get(site.component, (site.component,))}
            raise UserError(
                f"adapter.components: must include a component of {name}, got {', '.join(components) or 'none'}; "
                f"choose from {', '.join(c for c in COMPONENTS if c in present)}"
            )
        every = [size for _, sizes in plan for size in sizes.values()]
        if rank is not None and rank > (widest := max(map(max, every))):
            raise UserError(f"adapter.rank: must be at most {widest}, the width of the widest layer, got {rank}")
        if rank is None:
            rank = _largest_rank(every, sum(own.values()), total, finetune == "fulllora", adapter.trainable_fraction)
        alpha = float(rank) if alpha is None else alpha
    else:
        rank = alpha = None

    targets = family.targets if isinstance(family, TargetModules) else None
    spec = AdapterSpec(
        finetune, rank, alpha, components, qkv, adapter.patch_norm_eps, resolved_head, seed, targets,
        adapter.blocks, adapter.train_norms,
    )  # fmt: skip
    original = Original.of(backbone, () if finetune == "full" else trained, before_pass or attributes(backbone))
    try:
        for parameter_name, parameter in backbone.named_parameters():
            parameter.requires_grad_(parameter_name in trained)
        adapted = [_adapt(backbone, family, site, sizes, spec) for site, sizes in plan]
        check_forward(backbone, [site for site, _ in plan], name, info.image_size, info.num_classes)
    except BaseException:  # a forward of the user's may raise anything
        original.restore(backbone)
        raise
    report = _report(backbone, adapted, own, total)
    if precision == "bf16":
        compute_in_bf16(family.modules(backbone))
    return AdaptedModel(backbone, family, info, spec, report, precision, original).eval()


def _adapt(
    backbone: nn.Module, family: Family, site: Site, sizes: dict[str, tuple[int, int]], spec: AdapterSpec
) -> Adapted:
    assert spec.rank is not None
    assert spec.alpha is not None
    layer: Any = backbone.get_submodule(site.path)
    device = layer.weight.device
    pixels = site.component == "patch_embed" or isinstance(layer, nn.Conv2d)
    eps = spec.patch_norm_eps if pixels else TOKEN_NORM_EPS
    branches: dict[str, LNLoRABranch] = {}
    for name, (d_in, d_out) in sizes.items():
        part = LNLoRABranch(d_in, d_out, spec.rank, spec.alpha, norm=spec.finetune == "fulllora", eps=eps)
        if device.type != "meta":
            generator = torch.Generator().manual_seed(base_key(spec.seed, f"{site.path}.{name}", 0) >> 1)
            part.reset_parameters(generator)
        branches[name] = part.to(device)
    branch: nn.Module = branches[""] if "" in branches else LNLoRASplit(branches, FUSED[site.component])
    attach_at(backbone, family, site, branch)
    count = sum(p.numel() for p in branch.parameters())
    return Adapted(site, tuple(branches), count)


def attach_at(backbone: nn.Module, family: Family, site: Site, branch: nn.Module) -> None:
    """Attach `branch` to the layer of a site, which has no branch yet."""
    layer: Any = backbone.get_submodule(site.path)
    around: Any = backbone.get_submodule(site.path.rpartition(".")[0])
    calling = family.calling.get(type(around)) if site.component == "qkv" else None
    if calling is not None and around.q_bias is not None:
        attach(layer, branch, around, calling)
    else:
        attach(layer, branch)


def _report(backbone: nn.Module, adapted: list[Adapted], own: dict[str, int], total: int) -> PlacementReport:
    with_branch = {a.site.path for a in adapted}
    frozen = [
        (name, type(module).__name__)
        for name, module in backbone.named_modules()
        if ".lnlora" not in name
        and name not in with_branch
        and any(not p.requires_grad for p in module.parameters(recurse=False))
    ]
    trainable = sum(own.values()) + sum(a.parameters for a in adapted)
    return PlacementReport(tuple(adapted), tuple(own.items()), tuple(frozen), trainable, total)
