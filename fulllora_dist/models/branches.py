"""Individual branches of an adapted model: their place, their size relative to W, and how to disable them."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fulllora_dist.core.errors import SharedUserError
from fulllora_dist.models.adapted_model import WITH_BRANCHES, AdaptedModel
from fulllora_dist.models.lnlora import LNLoRABranch
from fulllora_dist.models.placement import FUSED


@dataclass(frozen=True, eq=False)
class Branch:
    """A branch and the frozen layer that it belongs to.

    Attributes:
        name: name in the timm model, e.g. "blocks.0.attn.qkv.lnlora.q".
        component: one of `COMPONENTS`, "head", or one of `FUSED` if q, k and v share a branch.
        block: e.g. "blocks.0"; outside the blocks "patch_embed", "head" and so on.
        module: the branch itself.
        layer: the frozen layer.
        rows: the outputs of the layer that it adds to: all, or those of its component in a fused projection.
    """

    name: str
    component: str
    block: str
    module: LNLoRABranch
    layer: nn.Module
    rows: slice

    @property
    def weight(self) -> Tensor:
        """The frozen weight that the branch adds to, [d_out, d_in]; a convolution's kernels are flattened."""
        whole: Tensor = self.layer.weight  # type: ignore[assignment]
        return whole.detach()[self.rows].flatten(1)

    def update(self) -> Tensor:
        """(alpha / r) B A in float64, [d_out, d_in]: what a branch without LN adds to the weight."""
        return self.module.scale * (self.module.B.detach().double() @ self.module.A.detach().double())

    def norm(self) -> float:
        """The Frobenius norm of (alpha / r) B A, computed in float64.

        With B = Q R it is that of R A, [r, d_in]: B A is never formed, and nothing is squared that could cancel.
        """
        triangle = torch.linalg.qr(self.module.B.detach().double(), mode="r").R
        product = triangle @ self.module.A.detach().double()
        return self.module.scale * torch.linalg.matrix_norm(product).item()

    def weight_norm(self) -> float:
        """The Frobenius norm of the frozen weight, computed in float64."""
        return torch.linalg.matrix_norm(self.weight.double()).item()

    def relative(self) -> float | None:
        """The norm of (alpha / r) B A relative to that of W; None if W is zero."""
        whole = self.weight_norm()
        return self.norm() / whole if whole else None


def by_place(sizes: Iterable[tuple[str, str, float | None]]) -> dict[tuple[str, ...], float | None]:
    """(block, component, norm relative to W) -> {(block, component): norm}; the larger norm if a block has a component
    twice."""
    norms: dict[tuple[str, ...], float | None] = {}
    for *place, size in sizes:
        known = (norms.get(tuple(place)), size)
        norms[tuple(place)] = max((value for value in known if value is not None), default=None)
    return norms


def branches_of(model: AdaptedModel) -> list[Branch]:
    """All branches of a model, in forward order, those of the heads last.

    Raises:
        SharedUserError: the model was finetuned in a way that has no branches.
        UserError: they were taken off.
    """
    model.check_adapted("adapter")
    if model.spec.finetune not in WITH_BRANCHES:
        raise SharedUserError(
            f"adapter: finetune: {model.spec.finetune} has no branches; give an adapter of finetune: "
            f"{' or '.join(WITH_BRANCHES)}"
        )
    branches = []
    for adapted in model.report.adapted:
        path, component = adapted.site.path, adapted.site.component
        for part in adapted.branches:
            name = f"{path}.lnlora.{part}".removesuffix(".")
            module = model.backbone.get_submodule(name)
            assert isinstance(module, LNLoRABranch)
            size = len(module.B)
            first = size * FUSED[component].index(part) if part else 0
            layer, block = model.backbone.get_submodule(path), model.family.block_of(path)
            branches.append(Branch(name, part or component, block, module, layer, slice(first, first + size)))
    return branches


@contextmanager
def disable_branches(branches: Iterable[Branch]) -> Iterator[None]:
    """Disable branches within the context: the model computes bit for bit what it would with their B zero.

    No tensor is changed. Branches that were already disabled stay disabled.
    """
    modules = [branch.module for branch in branches if branch.module.on]
    for module in modules:
        module.on = False
    try:
        yield
    finally:
        for module in modules:
            module.on = True
