"""Selection of an adapter for each sample of a forward pass, and the modules that apply it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fulllora_dist.models.low_rank_linear import LowRank


@dataclass(frozen=True)
class Choice:
    """The selected adapters of a forward pass.

    Attributes:
        whole: the adapter of all samples, if `parts` is empty.
        parts: ((adapter, int64 sample indices), ...) in a batch of `batch` samples.
        inside: whether this is within a module that already uses the adapter's own tensors.
    """

    whole: str | None
    parts: tuple[tuple[str | None, Tensor], ...] = ()
    batch: int = 0
    inside: bool = False

    def rows(self, samples: Tensor, total: int) -> Tensor:
        """Row indices of these samples; each has total / batch consecutive rows (the windows of Swin)."""
        each, rest = divmod(total, self.batch)
        assert rest == 0, f"{total} rows for {self.batch} samples"
        if each == 1:
            return samples
        return (samples[:, None] * each + torch.arange(each, device=samples.device)).flatten()


NO_ADAPTER = Choice(None)


current_choice: ContextVar[Choice] = ContextVar("adapter", default=NO_ADAPTER)  # of this thread


@contextmanager
def choosing(choice: Choice) -> Iterator[None]:
    token = current_choice.set(choice)
    try:
        yield
    finally:
        current_choice.reset(token)


class AdapterSwitch(nn.Module):
    """The branches of several adapters on one layer, in place of a single branch."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict()

    def forward(self, dtype: torch.dtype, even_disabled: bool = False) -> "LowRank | Mixed | None":
        choice = current_choice.get()
        if not choice.parts:
            return self._branch(choice.whole, dtype)
        return Mixed(choice, [self._branch(name, dtype) for name, _ in choice.parts])

    def _branch(self, name: str | None, dtype: torch.dtype) -> LowRank | None:
        return self.branches[name](dtype) if name is not None and name in self.branches else None


@dataclass(frozen=True)
class Mixed:
    """The branches of a layer for a batch of several adapters, in the order of `choice.parts`."""

    choice: Choice
    branches: Sequence[LowRank | None]

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: Tensor | None = None) -> Tensor:
        """As `LowRank.linear`; every sample passes through the frozen layer once."""
        y: Tensor | None = None
        for (_, samples), low_rank in zip(self.choice.parts, self.branches, strict=True):
            rows = self.choice.rows(samples, len(x))
            own = None if frozen is None else frozen.view(len(x), -1, len(weight))[rows].flatten(0, 1)
            if low_rank is not None:
                part = low_rank.linear(x[rows], weight, bias, own)
            else:
                part = F.linear(x[rows], weight, bias) if own is None else own.view(*x[rows].shape[:-1], -1)
            if y is None:
                y = part.new_empty(*x.shape[:-1], len(weight))  # of the dtype that autocast gives the parts
            y = y.index_copy(0, rows, part)
        assert y is not None
        return y


class OwnTensors(nn.Module):
    """The tensors with which several adapters replace a module's own, applied by a forward hook of that module."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ModuleDict()

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.tensors[name] = nn.ParameterDict({key: nn.Parameter(value.clone()) for key, value in tensors.items()})

    def hook(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        choice = current_choice.get()
        if choice.inside:
            return output
        if not choice.parts:
            alone = choice.whole
            return output if alone is None or alone not in self.tensors else self._call(alone, module, args, output)
        for name, samples in choice.parts:
            if name is not None and name in self.tensors:
                rows = choice.rows(samples, len(output))
                part = self._call(name, module, tuple(a[rows] if isinstance(a, Tensor) else a for a in args), output)
                output = output.index_copy(0, rows, part)
        return output

    def _call(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """In the dtype of the adapter's tensors, which are fp32 in blocks in bf16, too; the result as `output`."""
        own: dict[str, Tensor] = dict(self.tensors[name].named_parameters())
        dtype = next(iter(own.values())).dtype
        args = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        with choosing(Choice(name, inside=True)):
            return functional_call(module, own, args).to(output.dtype)
