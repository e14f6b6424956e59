"""LNLoRA: a low-rank branch behind a learnable LayerNorm, beside a frozen layer.

    y = W x + b + (alpha / r) B A LN(x)        (FullLoRA, arXiv 2401.01752)

W and b are frozen and keep timm's names; the branch is the layer's child `lnlora`. B starts at zero, so the adapted
layer equals the frozen one exactly at first. Without LN the branch is plain LoRA (arXiv 2106.09685).

A branch holds parameters and folds them into the matrices that a layer multiplies with; the layer multiplies
(`low_rank_linear.py`, which also says why no normalised copy of x is made).

Shapes in comments: B images, N tokens of each, D their width, P values of a patch, r the rank (docs/architecture.md).
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.models.low_rank_linear import LowRank, stack


class FoldedLayerNorm(nn.Module):
    """Weight and bias of a LayerNorm, applied to the matrix behind it instead of to the activations.

    It is a module with its own forward, because ZeRO-3 gathers a module's parameters when that module is called.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, dim] -> (A * weight with centred rows [r, dim], A bias [r])."""
        scaled = matrix * self.weight
        # no product, which autocast would round
        return scaled - scaled.mean(dim=1, keepdim=True), (matrix * self.bias).sum(dim=1)


class Folding(nn.Module):
    """What the child `lnlora` of a layer is: called with the dtype of the activations, it returns the matrices of its
    branches, or None if all are disabled.

    They are made anew in every call, except between `hold` and `release`: the weights do not change within an attack.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[tuple, LowRank] | None = None

    def hold(self) -> bool:
        """Keep what is made from now on, until `release`. False if it is kept already."""
        begins = self._held is None
        self._held = {} if self._held is None else self._held
        return begins

    def release(self) -> None:
        self._held = None

    def forward(self, dtype: torch.dtype, even_disabled: bool = False) -> LowRank | None:
        if not even_disabled and not any(self.enabled()):
            return None
        # compiled, folding is part of the graph; an inference tensor could not be used outside inference mode
        if torch.compiler.is_compiling() or self._held is None or torch.is_inference_mode_enabled():
            return self.fold(dtype)
        key = (dtype, *self.enabled())
        if key not in self._held:
            self._held[key] = self.fold(dtype)
        return self._held[key]

    def enabled(self) -> tuple[bool, ...]:
        """Which branches are enabled."""
        raise NotImplementedError

    def fold(self, dtype: torch.dtype) -> LowRank:
        """The matrices; zero instead of B where a branch is disabled."""
        raise NotImplementedError


class LNLoRABranch(Folding):
    """(alpha / r) B A LN(x), added to the frozen layer's output.

    Parameters are fp32 for any dtype of the activations; they are folded in fp32 and cast once per call.

    Attributes:
        on: whether the branch is enabled; see `branches.disable_branches`.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, norm: bool, eps: float):
        super().__init__()
        self.scale = alpha / rank
        self.eps = eps
        self.on = True
        self.norm = FoldedLayerNorm(d_in) if norm else None
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, rank))

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        """Initialise A like LoRA (Kaiming uniform with a = sqrt(5), i.e. U(+-1/sqrt(d_in))) and B with zeros."""
        bound = 1 / math.sqrt(self.A.shape[1])
        with torch.no_grad():
            self.A.uniform_(-bound, bound, generator=generator)
            self.B.zero_()

    def enabled(self) -> tuple[bool, ...]:
        return (self.on,)

    def fold(self, dtype: torch.dtype) -> LowRank:
        up = (self.B * self.scale if self.on else torch.zeros_like(self.B)).t().contiguous()
        if self.norm is None:
            return LowRank(self.A, None, None, (0,), (up,)).to(dtype)
        down, shift = self.norm(self.A)
        return LowRank(down, shift, self.eps, (0,), (up,)).to(dtype)


class LNLoRASplit(Folding):
    """Separate branches for q, k and v on a fused projection; parts without a branch are left unchanged.

    Args:
        branches: branches by the name of their part.
        parts: names of the equal parts of the projection's outputs, in order.
    """

    def __init__(self, branches: Mapping[str, LNLoRABranch], parts: Sequence[str]):
        super().__init__()
        self.parts = tuple(parts)
        for name, branch in branches.items():
            self.add_module(name, branch)

    def enabled(self) -> tuple[bool, ...]:
        return tuple(branch.on for branch in self.children())  # type: ignore[misc]

    def fold(self, dtype: torch.dtype) -> LowRank:
        branches = {name: branch(dtype, even_disabled=True) for name, branch in self.named_children()}
        first = [self.parts.index(name) * branch.ups[0].shape[1] for name, branch in branches.items()]
        return stack(list(branches.values()), first)


class LNLoRALinear(nn.Linear):
    """A linear layer with a branch. Weight and bias are the frozen layer's own parameters."""

    lnlora: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.with_bias(x, self.bias)

    def with_bias(self, x: Tensor, bias: Tensor | None) -> Tensor:
        low_rank = self.lnlora(x.dtype)
        return F.linear(x, self.weight, bias) if low_rank is None else low_rank.linear(x, self.weight, bias)


class LNLoRAOuterBiasLinear(LNLoRALinear):
    """A fused qkv projection whose bias is stored in the surrounding attention, as q_bias, k_bias and v_bias.

    timm then computes `F.linear(x, self.qkv.weight, cat(biases))` itself and never calls `qkv`. Here the layer does
    so in the same single operation, so that the output is bit for bit the same while B is zero.
    """

    attention: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        # read from the registries, as the attributes are hidden, see `attach`
        own, buffers = self.attention._parameters, self.attention._buffers
        bias = torch.cat([own["q_bias"], buffers["k_bias"], own["v_bias"]])  # type: ignore[list-item]
        return self.with_bias(x, bias)


class LNLoRAConv2d(nn.Conv2d):
    """A convolution (the patch embedding) with a branch over each flattened patch [in_channels * kh * kw].

    The frozen output is the convolution's, bit for bit; its gradient, like the branch's, is that of a linear layer on
    the flattened patches, which is several times faster on a CPU.
    """

    lnlora: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        # disabled, the branch is zero: the gradient then rounds as with B zero, and not as a convolution's
        low_rank = self.lnlora(x.dtype, even_disabled=True)
        if low_rank is None:
            return super().forward(x)
        with torch.no_grad():
            y = super().forward(x)  # [B, D, rows, columns]
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)  # type: ignore[arg-type]
        frozen = y.flatten(2).transpose(1, 2).flatten(0, 1)  # [B N, D]
        tokens = low_rank.linear(patches.transpose(1, 2), self.weight.flatten(1), self.bias, frozen)  # [B, N, D]
        # in the memory layout of y, so that later sums over channels round as in the bare model
        return tokens.transpose(1, 2).contiguous().view_as(y)


def _keep_when_absent(branch: nn.Module, state_dict: dict, prefix: str, *_: object) -> None:
    """Let a backbone's checkpoint, which has no branches, load strictly and leave the branches unchanged.

    A checkpoint with only some of a branch's tensors is still rejected.
    """
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update({prefix + key: value for key, value in branch.state_dict().items()})


def attach(
    layer: nn.Linear | nn.Conv2d, branch: nn.Module, attention: nn.Module | None = None, calling: type | None = None
) -> None:
    """Attach `branch` to a linear layer or convolution in place; parameters, keys and hooks stay the same.

    Args:
        attention, calling: a module that reads `layer.weight` with its own q_bias, k_bias and v_bias instead of calling
            the layer, and a subclass that calls it (with the attribute `q_bias` None, which makes timm call `qkv`).
    """
    assert type(layer) in (nn.Linear, nn.Conv2d), f"{type(layer).__name__} may never call its own forward"
    if attention is not None and calling is not None:
        attention.__class__ = calling
        layer.__class__ = LNLoRAOuterBiasLinear
        layer.__dict__["attention"] = attention  # bypasses nn.Module's registry: a parent must not be a child
    else:
        layer.__class__ = LNLoRALinear if isinstance(layer, nn.Linear) else LNLoRAConv2d
    branch.register_load_state_dict_pre_hook(_keep_when_absent)
    layer.lnlora = branch
