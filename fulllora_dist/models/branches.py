"""Single branches of an adapted model: where each stands, how large it is beside W, and the model without it."""

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
    """One branch, beside the weight that it adds to.

    Attributes:
        name: in the timm model, e.g. "blocks.0.attn.qkv.lnlora.q".
        component: of `COMPONENTS`, "head", or of `FUSED` where q, k and v share one branch.
        block: e.g. "blocks.0"; outside the blocks "patch_embed", "head" and so on.
        module: the branch itself.
        layer: what it stands beside.
        rows: the outputs of the layer that it adds to: all, or of a fused projection those of its component.
    """

    name: str
    component: str
    block: str
    module: LNLoRABranch
    layer: nn.Module
    rows: slice

    @property
    def weight(self) -> Tensor:
        """The frozen weight that it stands beside, [d_out, d_in]; a convolution's kernels are flattened."""
        whole: Tensor = self.layer.weight  # type: ignore[assignment]
        return whole.detach()[self.rows].flatten(1)

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
        """The norm of (alpha / r) B A relative to that of W; None where W is zero."""
        whole = self.weight_norm()
        return self.norm() / whole if whole else None


def by_place(sizes: Iterable[tuple[str, str, float | None]]) -> dict[tuple[str, ...], float | None]:
    """(block, component, norm relative to W) -> {(block, component): norm}; where a block has a component twice, the
    larger one."""
    found: dict[tuple[str, ...], float | None] = {}
    for *place, size in sizes:
        known = (found.get(tuple(place)), size)
        found[tuple(place)] = max((value for value in known if value is not None), default=None)
    return found


def branches_of(model: AdaptedModel) -> list[Branch]:
    """All branches, in forward order, the heads' last.

    Raises:
        SharedUserError: the model was finetuned in a way that has none.
    """
    if model.spec.finetune not in WITH_BRANCHES:
        raise SharedUserError(
            f"adapter: finetune: {model.spec.finetune} has no branches; give an adapter of finetune: "
            f"{' or '.join(WITH_BRANCHES)}"
        )
    found = []
    for adapted in model.report.adapted:
        path, component = adapted.site.path, adapted.site.component
        for part in adapted.branches:
            name = f"{path}.lnlora.{part}".removesuffix(".")
            module = model.backbone.get_submodule(name)
            assert isinstance(module, LNLoRABranch)
            size = len(module.B)
            first = size * FUSED[component].index(part) if part else 0
            layer, block = model.backbone.get_submodule(path), model.family.block_of(path)
            found.append(Branch(name, part or component, block, module, layer, slice(first, first + size)))
    return found


@contextmanager
def disable_adapter(branches: Iterable[Branch]) -> Iterator[None]:
    """Inside, these branches add nothing: the model computes what it would with their B zero, bit for bit.

    No tensor is touched, so that the model is afterwards as it was. Those that were off already stay off.
    """
    modules = [branch.module for branch in branches if branch.module.on]
    for module in modules:
        module.on = False
    try:
        yield
    finally:
        for module in modules:
            module.on = True
