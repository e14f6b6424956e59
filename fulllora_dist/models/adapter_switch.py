"""Selection of an adapter for each sample of a forward pass, and the modules that apply it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call


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

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [N, ..., d_in], y [N, ..., d_out] -> [N, ..., d_out]."""
        choice = current_choice.get()
        if not choice.parts:
            alone = choice.whole
            return y if alone is None or alone not in self.branches else self.branches[alone](x, y)
        for name, samples in choice.parts:
            if name is not None and name in self.branches:
                rows = choice.rows(samples, len(x))
                y = y.index_copy(0, rows, self.branches[name](x[rows], y[rows]))
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
            return output if alone is None or alone not in self.tensors else self._call(alone, module, args)
        for name, samples in choice.parts:
            if name is not None and name in self.tensors:
                rows = choice.rows(samples, len(output))
                part = self._call(name, module, tuple(a[rows] if isinstance(a, Tensor) else a for a in args))
                output = output.index_copy(0, rows, part)
        return output

    def _call(self, name: str, module: nn.Module, args: tuple) -> Tensor:
        with choosing(Choice(name, inside=True)):
            return functional_call(module, dict(self.tensors[name].named_parameters()), args)
