"""A family for any module: its layers are named by `target_modules`, as in peft, and shown to act by a pass.

Before anything is attached, a pass on a grey image finds which layers are called, whether the logits depend on their
outputs, and which linear layer is the head: the one whose output the logits are.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fulllora_dist.attacks.pgd import evaluating
from fulllora_dist.attacks.victim import logits_of
from fulllora_dist.core.errors import UserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.core.suggest import suggestion
from fulllora_dist.models.families.family import CONTAINERS, LAYERS, Family, check_plain, noting_calls
from fulllora_dist.models.placement import Site

ALL_LINEAR = "all-linear"
BY_TARGET = "target_modules"
""": the name of the family in adapter files."""


@dataclass(frozen=True)
class Pass:
    """What a pass through a module shows.

    Attributes:
        num_classes: number of logits.
        called: layers that are called, with gradients and without.
        acting: layers on whose output the logits depend.
        head: the linear layer whose output the logits are; None if there is none.
    """

    num_classes: int
    called: frozenset[str]
    acting: frozenset[str]
    head: str | None

    @classmethod
    def through(cls, module: nn.Module, name: str, image_size: int) -> "Pass":
        """Pass a grey image through a module, which is left as it was.

        Raises:
            UserError: it fails, or returns no logits.
        """
        layers = {path: layer for path, layer in module.named_modules() if isinstance(layer, LAYERS)}
        tensor = next(module.parameters())
        pixels = torch.zeros(1, 3, image_size, image_size, dtype=tensor.dtype, device=tensor.device)
        try:
            with evaluating(module):
                with torch.no_grad(), noting_calls(layers) as plain:
                    logits = logits_of(module(pixels))
                heads = [path for path, output in plain.items() if output is logits]
                with torch.enable_grad(), noting_calls(layers, grad=True) as called:
                    logits = logits_of(module(pixels))
                acting = frozenset[str]()
                if logits.requires_grad:
                    gradients = torch.autograd.grad(logits.sum(), list(called.values()), allow_unused=True)
                    acting = frozenset(path for path, grad in zip(called, gradients, strict=True) if grad is not None)
        except UserError:
            raise
        except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ArithmeticError) as error:
            raise UserError(
                f"image_size: {name} fails on an image of 3 x {image_size} x {image_size} ({one_line(error)}); give "
                "the size that it is made for"
            ) from None
        if logits.ndim != 2 or len(logits) != 1 or logits.shape[1] < 2:
            raise UserError(f"module: {name} must return logits [1, classes] for one image, got {list(logits.shape)}")
        return cls(logits.shape[1], frozenset(plain.keys() & called.keys()), acting, heads[-1] if heads else None)


@dataclass(frozen=True)
class TargetModules(Family):
    """A module whose layers are named by the user.

    Attributes:
        targets: as they were given; None where nothing but the module's own tensors is trained.
        paths: the layers that get a branch.
        head: the layer whose output the logits are.
    """

    targets: str | tuple[str, ...] | None = None
    paths: tuple[str, ...] = ()
    head: str | None = None

    @classmethod
    def of(cls, module: nn.Module, targets: str | Sequence[str] | None, name: str, shown: Pass) -> "TargetModules":
        """Find the layers.

        Args:
            targets: names or ends of names of layers, a regular expression for whole names, or "all-linear".

        Raises:
            UserError: a target that matches nothing, or something that cannot have a branch, or whose branch would
                have no effect.
        """
        paths = () if targets is None else _matching(module, targets, name, shown.head)
        try:
            for path in paths:
                _check(module, path, shown)
        except UserError as error:
            if targets != ALL_LINEAR:
                raise
            raise UserError(_instead(module, shown, str(error).removesuffix("; leave it out"))) from None
        if targets == ALL_LINEAR and not paths:
            raise UserError(_instead(module, shown, f"target_modules: {name} has no linear layers but its head"))
        return cls(
            name=BY_TARGET,
            models=(type(module),),
            parts={},
            blocks=tuple(dict.fromkeys(block for path in paths if (block := _block(module, path)))),
            checkpointing=False,
            targets=targets if targets is None or isinstance(targets, str) else tuple(targets),
            paths=paths,
            head=shown.head,
        )

    def sites(self, backbone: nn.Module, name: str) -> list[Site]:
        layers = [Site(path, self._component(path)) for path in self.paths]
        return layers if self.head is None or self.head in self.paths else [*layers, Site(self.head, "head")]

    def _component(self, path: str) -> str:
        """Its name in reports: "head" is the layer whose output the logits are, whatever others are called."""
        if path == self.head:
            return "head"
        return "inner_head" if path == "head" else _label(path)

    def branches(self, component: str, placement: Sequence[str], qkv: str) -> tuple[str, ...]:
        return ("",)


def _label(path: str) -> str:
    """The end of a path by which layers of all blocks are named alike, e.g. "query" or "mlp.0"."""
    names = path.split(".")
    short = names[-1].isdigit() or names[-1] == "head"
    return ".".join(names[-2:] if short else names[-1:])


def _layers(module: nn.Module) -> list[str]:
    return [path for path, part in module.named_modules() if isinstance(part, LAYERS)]


def labels(module: nn.Module) -> list[str]:
    """Names of a module's linear layers and convolutions, each once for all blocks."""
    return list(dict.fromkeys(map(_label, _layers(module))))


def _block(module: nn.Module, path: str) -> str | None:
    """The outermost entry of a container around a layer."""
    names = path.split(".")
    above = (".".join(names[:i]) for i in range(1, len(names)))
    return next((p for p in above if isinstance(module.get_submodule(p.rpartition(".")[0]), CONTAINERS)), None)


def _matching(module: nn.Module, targets: str | Sequence[str], name: str, head: str | None) -> tuple[str, ...]:
    layers = _layers(module)
    known = ", ".join(labels(module))
    if targets == ALL_LINEAR:
        return tuple(p for p in layers if p != head and isinstance(module.get_submodule(p), nn.Linear))
    paths = [path for path, _ in module.named_modules() if path]
    if isinstance(targets, str):
        try:
            found = [path for path in paths if re.fullmatch(targets, path)]
        except re.error as error:
            raise UserError(f"target_modules: {targets!r} is not a regular expression ({error})") from None
        if not found:
            raise UserError(
                f"target_modules: the pattern {targets!r} matches no whole name of a module of {name}, such as "
                f"{layers[0] if layers else 'none'}; give a list for ends of names: {known}"
            )
        return tuple(found)
    if not targets or not all(isinstance(target, str) and target for target in targets):
        raise UserError(f"target_modules: must be names of layers of {name}, got {targets!r}; its layers: {known}")
    for target in targets:
        if not any(_ends(path, target) for path in paths):
            raise UserError(
                f"target_modules: {target!r} matches no module of {name}; {suggestion(target, known.split(', '))}"
            )
    return tuple(path for path in paths if any(_ends(path, target) for target in targets))


def _instead(module: nn.Module, shown: Pass, reason: str) -> str:
    """What to give in place of "all-linear": ends of names that are of layers with an effect alone."""
    layers = _layers(module)
    good = [path for path in layers if path != shown.head and _can(module, path, shown)]
    bad = [path for path in layers if path not in good]
    names = [name for name in dict.fromkeys(map(_label, good)) if not any(_ends(path, name) for path in bad)]
    return f"{reason}; in place of {ALL_LINEAR!r} give a list of layers: {names}" if names else reason


def _can(module: nn.Module, path: str, shown: Pass) -> bool:
    try:
        _check(module, path, shown)
    except UserError:
        return False
    return True


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _check(module: nn.Module, path: str, shown: Pass) -> None:
    """Check that a branch can be put beside a layer, and acts."""
    layer, around = module.get_submodule(path), module.get_submodule(path.rpartition(".")[0])
    if not isinstance(layer, LAYERS):
        inner = [f"{path}.{p}" for p, part in layer.named_modules() if isinstance(part, LAYERS)]
        raise UserError(
            f"target_modules: {path} is a {type(layer).__name__}; name linear layers or convolutions"
            + (f", such as {inner[0]}" if inner else "")
        )
    if isinstance(around, nn.MultiheadAttention):
        raise UserError(
            f"target_modules: {path} is never called: nn.MultiheadAttention hands its weight to "
            "F.multi_head_attention_forward, so that a branch beside it would have no effect; leave it out"
        )
    if path not in shown.called:
        raise UserError(
            f"target_modules: {path} is never called in a forward pass in evaluation mode, so that a branch beside it "
            "would have no effect; leave it out"
        )
    if path not in shown.acting:
        raise UserError(
            f"target_modules: the logits do not depend on the output of {path}, so that a branch beside it would have "
            "no effect; leave it out"
        )
    check_plain(path, layer, "target_modules:")
