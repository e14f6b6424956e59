"""LNLoRA: a low-rank branch behind a learnable LayerNorm, beside a frozen layer.

    y = W x + b + (alpha / r) B A LN(x)        (FullLoRA, arXiv 2401.01752)

W and b are frozen and keep timm's names; the branch is the layer's child `lnlora`. B starts at zero, so the adapted
layer equals the frozen one exactly at first. Without LN the branch is plain LoRA (arXiv 2106.09685).

The learnable affine of LN is folded into A: A (w * x_hat + c) = (A * w) x_hat + A c. So q, k and v share one
normalised input x_hat, and no normalised-and-scaled copy of the activations is kept for backward.

Shapes in comments: B images, N tokens of each, D their width, P values of a patch, r the rank (docs/architecture.md).
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QKV = ("q", "k", "v")


class FoldedLayerNorm(nn.Module):
    """Weight and bias of a LayerNorm, applied to the matrix behind it instead of to the activations.

    It is a module with its own forward, because ZeRO-3 gathers a module's parameters when that module is called.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """A [r, dim] -> (A * weight [r, dim], A bias [r])."""
        return matrix * self.weight, matrix @ self.bias


def standardise(x: Tensor, eps: float) -> Tensor:
    """Apply LN without its affine, over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class LNLoRABranch(nn.Module):
    """(alpha / r) B A LN(x), added to the frozen layer's output.

    Parameters are fp32 for any dtype of the activations; they are folded in fp32 and cast once per call.

    Attributes:
        on: whether the branch is enabled; see `branches.disable_adapter`.
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

    def forward(self, x: Tensor, y: Tensor, standardised: bool = False) -> Tensor:
        """Compute y + (alpha / r) B A LN(x).

        Args:
            x: [..., d_in], the frozen layer's input.
            y: [..., d_out], its output, of the same dtype.
            standardised: whether x is already standardised.
        """
        if not self.on:
            return y
        if self.norm is None:
            down, shift = self.A, None
        else:
            x = x if standardised else standardise(x, self.eps)
            down, shift = self.norm(self.A)
            shift = shift.to(x.dtype)
        hidden = F.linear(x, down.to(x.dtype), shift).flatten(0, -2)  # [B N, r]
        up = (self.B * self.scale).to(x.dtype)  # [d_out, r]
        return torch.addmm(y.flatten(0, -2), hidden, up.t()).view_as(y)


class LNLoRASplit(nn.Module):
    """Separate branches for q, k and v on a fused projection; parts without a branch are left unchanged.

    Args:
        branches: branches by the name of their part.
        parts: names of the equal parts of the projection's outputs, in order.
    """

    def __init__(self, branches: Mapping[str, LNLoRABranch], parts: Sequence[str] = QKV):
        super().__init__()
        self.parts = tuple(parts)
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., d], y [..., parts * d_out] -> [..., parts * d_out]."""
        branches: dict[str, LNLoRABranch] = dict(self.named_children())  # type: ignore[arg-type]
        first = next(iter(branches.values()))
        if first.norm is not None:
            x = standardise(x, first.eps)
        parts = y.split(y.shape[-1] // len(self.parts), dim=-1)  # each [..., d_out]
        return torch.cat(
            [
                branches[n](x, part, standardised=True) if n in branches else part
                for n, part in zip(self.parts, parts, strict=True)
            ],
            dim=-1,
        )


class LNLoRALinear(nn.Linear):
    """A linear layer with a branch. Weight and bias are the frozen layer's own parameters."""

    lnlora: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.lnlora(x, F.linear(x, self.weight, self.bias))


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
        return self.lnlora(x, F.linear(x, self.weight, bias))


class LNLoRAConv2d(nn.Conv2d):
    """A convolution (the patch embedding) with a branch over each flattened patch [in_channels * kh * kw]."""

    lnlora: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # [B, D, rows, columns]
        patches = F.unfold(x, self.kernel_size, self.dilation, self.padding, self.stride)  # type: ignore[arg-type]
        tokens = self.lnlora(patches.transpose(1, 2), y.flatten(2).transpose(1, 2))  # [B, N, P] and [B, N, D]
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
