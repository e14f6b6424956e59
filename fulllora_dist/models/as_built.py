"""What a backbone was built as, so that an adapter is saved only where `load` brings the same model back.

An adapter holds the trained tensors; everything else is built anew from its description and the backbone's weights. So
all frozen tensors must still be those that the model was built with, and the modules too. Hooks are not looked at.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fulllora_dist.attacks.arguments import dtype_name
from fulllora_dist.core.errors import UserError
from fulllora_dist.models.weights import fingerprint

_MAY_CHANGE = {
    *(
        "training",
        "grad_checkpointing",
        "gradient_checkpointing",
        "fused_attn",
        "p",
        "drop_prob",
        "drop_rate",
        "inplace",
    )
}
"""Attributes of modules that do not change the logits in evaluation mode."""
_PLAIN = (bool, int, float, str)

_OF_VALUES = "train what finetune trains; finetune='full' saves all tensors"
_REMEDIES = (
    "load builds it as create_model did; change it by model_kwargs there",
    "load builds the model as create_model did; change it by model_kwargs there",
    "create the model in the right shape, and keep it in the dtype that create_model gave it",
    f"give weights by checkpoint_path instead of load_state_dict, and {_OF_VALUES}",
)
""": of changed modules, names, kinds and values."""
_REMEDIES_OF_GIVEN = (
    *(3 * ("change the module before adapt, or change it back",)),
    f"change the module before adapt, and {_OF_VALUES}",
)


def _tensors(backbone: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also those that no state dict holds."""
    return {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}


def attributes(backbone: nn.Module) -> dict[str, dict[str, Any]]:
    """{path: plain attributes} of all modules, such as eps, stride or scale."""
    return {path: _attributes(module) for path, module in backbone.named_modules()}


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in _MAY_CHANGE
        and (isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(v, _PLAIN) for v in value)))
    }


def _kept(before: Mapping[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Those of a module's attributes that a forward pass has left as they were."""
    return {name: value for name, value in after.items() if name in before and before[name] == value}


@dataclass(frozen=True)
class AsBuilt:
    """A record of a backbone as it was built.

    Attributes:
        tensors: {name: (dtype, shape)} of all parameters and buffers.
        fingerprints: {name: fingerprint} of those that an adapter does not hold; empty on the meta device.
        modules: {path: (class, plain attributes)}, less those that a forward pass changes by itself.
    """

    tensors: Mapping[str, tuple[torch.dtype, torch.Size]]
    fingerprints: Mapping[str, str]
    modules: Mapping[str, tuple[type, Mapping[str, Any]]]

    @classmethod
    def of(cls, backbone: nn.Module, held: Collection[str], before_pass: Mapping[str, Mapping[str, Any]]) -> "AsBuilt":
        """Record a backbone.

        Args:
            held: names of the tensors that an adapter holds.
            before_pass: its `attributes` before the passes with which it was adapted; a counter of calls or a cached
                size differs by now.
        """
        tensors = _tensors(backbone)
        on_meta = any(tensor.is_meta for tensor in tensors.values())
        return cls(
            {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()},
            {} if on_meta else {n: fingerprint({n: t}) for n, t in tensors.items() if n not in held},
            {
                path: (type(module), _kept(before_pass[path], now) if path in before_pass else now)
                for path, module in backbone.named_modules()
                for now in [_attributes(module)]
            },
        )

    def check(self, backbone: nn.Module, given: bool = False) -> None:
        """Check that everything but the values of the tensors that an adapter holds is as it was built.

        Tensors that ZeRO-3 has partitioned are passed over: the engine owns them.

        Args:
            given: whether `adapt` was given the backbone, which create_model would not build.

        Raises:
            UserError: something changed; the message names the first change, and what to do instead.
        """
        changed = (self._changed_modules, self._changed_names, self._changed_kinds, self._changed_values)
        for what, remedy in zip(changed, _REMEDIES_OF_GIVEN if given else _REMEDIES, strict=True):
            changes = list(what(backbone))
            if changes:
                more = f" (and {len(changes) - 1} more such changes)" if len(changes) > 1 else ""
                raise UserError(f"save_adapter: {changes[0]}{more}, which an adapter does not hold; {remedy}")

    def _changed_modules(self, backbone: nn.Module) -> Iterator[str]:
        now: dict[str, nn.Module] = dict(backbone.named_modules())
        for path in [*(p for p in self.modules if p not in now), *(p for p in now if p not in self.modules)]:
            yield f"the module {path} was {'removed' if path in self.modules else 'added'} after the model was created"
        for path, (kind, attributes) in self.modules.items():
            module = now.get(path)
            if module is None:
                continue
            if type(module) is not kind:
                yield f"the module {path} was a {kind.__name__} and is a {type(module).__name__}"
            if "forward" in vars(module):
                yield f"the forward of {path or 'the backbone'} was replaced"
            current = _attributes(module)
            for name, value in attributes.items():
                if name in current and current[name] != value:
                    yield f"{path}.{name} was {value!r} and is {current[name]!r}".removeprefix(".")

    def _changed_names(self, backbone: nn.Module) -> Iterator[str]:
        now = _tensors(backbone)
        for name in [*(n for n in self.tensors if n not in now), *(n for n in now if n not in self.tensors)]:
            yield f"the tensor {name} was {'removed' if name in self.tensors else 'added'} after the model was created"

    def _own(self, backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
        persistent = backbone.state_dict(keep_vars=True)
        for name, tensor in _tensors(backbone).items():
            of_another_size = (
                name not in persistent and tensor.shape != self.tensors[name][1]
            )  # made in the forward pass
            if not of_another_size and not hasattr(tensor, "ds_tensor"):
                yield name, tensor

    def _changed_kinds(self, backbone: nn.Module) -> Iterator[str]:
        for name, tensor in self._own(backbone):
            dtype, shape = self.tensors[name]
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                was, now = f"{dtype_name(dtype)} {list(shape)}", f"{dtype_name(tensor)} {list(tensor.shape)}"
                yield f"{name} was {was} and is {now}"

    def _changed_values(self, backbone: nn.Module) -> Iterator[str]:
        for name, tensor in self._own(backbone):
            if name in self.fingerprints and fingerprint({name: tensor}) != self.fingerprints[name]:
                yield f"the values of {name}, which is frozen, changed after the model was created"
