"""A frozen linear layer and its low-rank branches as one operation, without a normalised copy of the input.

    y = W x + b + U (rstd(x) C x + s)

LN commutes with the matrix behind it. With the rows of A scaled by LN's weight w and centred, C = A w - mean(A w),

    A (w * x_hat + c) = rstd(x) C x + A c,       x_hat = (x - mean(x)) rstd(x)

because C takes the mean of x away by itself. So neither forward nor backward makes or keeps x_hat, the branches of q, k
and v share one rstd, and with s = A c and U = (alpha / r) B the formula of `lnlora.py` comes out.

Shapes: M tokens of all images, d_in and d_out the layer's widths, r the rank of a branch, k the sum of the ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class LowRank(NamedTuple):
    """What the branches of a layer multiply with.

    Attributes:
        down: C, [k, d_in], of all branches below each other; A itself without LN.
        shift: s, [k]; None without LN.
        eps: of LN; None without LN.
        first: for each branch the first output of the layer that it adds to.
        ups: for each branch U^T, [r, its outputs], contiguous, as is fastest in both directions.
    """

    down: Tensor
    shift: Tensor | None
    eps: float | None
    first: tuple[int, ...]
    ups: tuple[Tensor, ...]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Tensor | None = None) -> Tensor:
        """The layer's output with its branches, [..., d_out].

        Args:
            x: [..., d_in].
            weight: [d_out, d_in].
            bias: [d_out].
            frozen: [M, d_out], the layer's output without branches where another operation computes it; overwritten.
        """
        if _autocast_available(x) and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias, frozen = (t if t is None else t.to(dtype) for t in (x, weight, bias, frozen))  # type: ignore
            with torch.autocast(x.device.type, enabled=False):
                return self.to(dtype).linear(x, weight, bias, frozen)
        y = _LowRankLinear.apply(x.flatten(0, -2), weight, bias, frozen, *self[:4], *self.ups)
        return y.view(*x.shape[:-1], len(weight))

    def to(self, dtype: torch.dtype) -> "LowRank":
        """For activations of this dtype."""
        return self._replace(down=self.down.to(dtype), ups=tuple(up.to(dtype) for up in self.ups))


def stack(parts: Sequence[LowRank], first: Sequence[int]) -> LowRank:
    """Branches of one layer, each with the first output that it adds to, as one."""
    shifts = [part.shift for part in parts if part.shift is not None]
    return LowRank(
        torch.cat([part.down for part in parts]),
        torch.cat(shifts) if shifts else None,
        parts[0].eps,
        tuple(first),
        tuple(up for part in parts for up in part.ups),
    )


class _LowRankLinear(torch.autograd.Function):
    """x [M, d_in] -> y [M, d_out].

    The branches are added to y in place, and so are their gradients to that of the frozen layer, which saves a copy of
    each. Gradients that nobody asks for are not computed: an attack asks for that of x alone.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Tensor | None,
        down: Tensor, shift: Tensor | None, eps: float | None, first: Sequence[int], *ups: Tensor,
    ) -> Tensor:  # fmt: skip
        y = F.linear(x, weight, bias) if frozen is None else frozen
        hidden = F.linear(x, down)  # [M, k]
        mean = rstd = None
        if shift is not None:
            mean, rstd = _statistics(x, eps)
            hidden = torch.addcmul(shift, hidden, rstd).to(x.dtype)
        parts = hidden.split([len(up) for up in ups], dim=1)  # each [M, r]
        for start, part, up in zip(first, parts, ups, strict=True):
            y[:, start : start + up.shape[1]].addmm_(part, up)
        ctx.save_for_backward(x, weight, down, shift, mean, rstd, hidden, *ups)
        ctx.first = first
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not _autocast_available(grad):
            return _gradients(ctx, grad)
        with torch.autocast(grad.device.type, enabled=False):  # as in forward, wherever backward is called
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, down, shift, mean, rstd, hidden, *ups = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _, wants_down, wants_shift, _, _, *wants_up = ctx.needs_input_grad
    outputs = [grad[:, start : start + up.shape[1]] for start, up in zip(ctx.first, ups, strict=True)]
    parts = hidden.split([len(up) for up in ups], dim=1)
    grad_ups = [part.t() @ out if wants else None for part, out, wants in zip(parts, outputs, wants_up, strict=True)]
    grad_hidden = torch.cat([F.linear(out, up) for out, up in zip(outputs, ups, strict=True)], dim=1)  # [M, k]
    scaled = grad_hidden if rstd is None else (grad_hidden * rstd).to(x.dtype)
    grad_x = None
    if wants_x:
        grad_x = grad @ weight
        if rstd is None:
            grad_x.addmm_(scaled, down)
        else:
            # rstd depends on x too: - (x - mean) rstd^2 <grad_hidden, hidden - shift> / d_in; a row of ones in the
            # product adds the mean
            along = (grad_hidden * (hidden - shift)).sum(dim=1, keepdim=True, dtype=rstd.dtype)
            along = along * rstd.square() / x.shape[1]
            grad_x.addmm_(
                torch.cat([scaled, (along * mean).to(x.dtype)], dim=1),
                torch.cat([down, down.new_ones(1, down.shape[1])]),
            )
            grad_x.addcmul_(x, along.to(x.dtype), value=-1)
    return (
        grad_x,
        grad.t() @ x if wants_weight else None,
        grad.sum(dim=0) if wants_bias else None,
        None,
        scaled.t() @ x if wants_down else None,
        grad_hidden.sum(dim=0) if wants_shift else None,
        None,
        None,
        *grad_ups,
    )


def _statistics(x: Tensor, eps: float | None) -> tuple[Tensor, Tensor]:
    """mean and rstd of every token, [M, 1], in fp32 for narrower x.

    As E[x^2] - mean^2: two fast reductions where `var_mean` is several times slower on a CPU. Its relative error is
    (mean / deviation)^2 roundings, far below the noise of a step for activations of a ViT.
    """
    assert eps is not None
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = x.mean(dim=1, keepdim=True, dtype=dtype)
    square = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).square_().div_(x.shape[1])
    return mean, square.addcmul_(mean, mean, value=-1).clamp_(min=0).add_(eps).rsqrt_()


def _autocast_available(x: Tensor) -> bool:
    """False for tensors without data (device meta)."""
    return torch.amp.is_autocast_available(x.device.type)
