"""What adapting changes of a module, as it was before: classes of layers, flags, and values of what is trained."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Original:
    """A module before it was adapted.

    Attributes:
        classes: {path: class} of all modules.
        training: {path: training flag}.
        requires_grad: {parameter: flag}.
        trained: {parameter: copy on the CPU} of the module's own tensors that are trained; empty on the meta device,
            and where the whole module is trained, which would need memory for a second one.
        attributes: see `as_built.attributes`.
    """

    classes: dict[str, type[nn.Module]]
    training: dict[str, bool]
    requires_grad: dict[str, bool]
    trained: dict[str, Tensor]
    attributes: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, module: nn.Module, trained: Collection[str], attributes: Mapping[str, Mapping[str, Any]]) -> "Original":
        """Record a module.

        Args:
            trained: names of the parameters whose values are copied.
            attributes: of its modules before any pass.
        """
        parameters = dict(module.named_parameters())
        return cls(
            {path: type(part) for path, part in module.named_modules()},
            {path: part.training for path, part in module.named_modules()},
            {name: parameter.requires_grad for name, parameter in parameters.items()},
            {
                name: parameter.detach().cpu().clone()
                for name, parameter in parameters.items()
                if name in trained and not parameter.is_meta
            },
            attributes,
        )

    def restore(self, module: nn.Module) -> None:
        """Take all branches off, and give classes and flags back; values stay."""
        for path, kind in self.classes.items():
            part = module.get_submodule(path)
            if type(part) is not kind:
                part.__class__ = kind
            if "lnlora" in part._modules:
                vars(part).pop("attention", None)  # of a fused projection with outer biases, see `attach`
                del part.lnlora
            part.training = self.training[path]
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self.requires_grad[name])
