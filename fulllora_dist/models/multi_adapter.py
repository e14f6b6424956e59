"""Several adapters on one frozen backbone in memory, chosen by call and by sample.

Beside each adapted layer stands a switch with the branches of all adapters. A batch goes through the frozen layers
once; at a switch, the rows of each adapter get its branch and the rows of none get nothing. Tensors of the backbone
that an adapter trained itself (a head, LayerNorm) take the place of the backbone's in the same way, by a forward hook.
The backbone's own tensors are never written.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fulllora_dist.core.errors import UserError
from fulllora_dist.models.adapt import attach_at
from fulllora_dist.models.adapted_model import AdaptedModel, AdapterSpec
from fulllora_dist.models.adapter_file import build, check_backbone, described, read_adapter
from fulllora_dist.models.adapter_switch import AdapterSwitch, Choice, OwnTensors, choosing
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.placement import Site
from fulllora_dist.models.settings import Precision

_SAME = ("name", "architecture", "image_size", "mean", "std", "num_classes", "classes", "sha256")


class MultiAdapter(nn.Module):
    """pixels [B, 3, H, W] in [0, 1], fp32, and the choice of adapters -> logits [B, classes], fp32.

    A batch under one adapter gives bit for bit what that adapter gives when it is loaded alone (so its tensors require
    gradients, as there: torch chooses its kernels by that, too); a batch under several gives it up to float rounding,
    as its branches meet smaller batches. Calls in several threads do not meet.

    Args:
        adapters: {name of one's own: folder}; see `load_folder`.
        checkpoint_path: where the backbone's weights lie now, if not where they were at training.
        precision: see `create_model`.
        local_folder: makes the folder of each address, where they are no folders themselves.

    Attributes:
        info: what the backbone is.

    Raises:
        UserError: adapters of different backbones, one that is a whole model (finetune: full); as for `load`.
    """

    def __init__(
        self,
        adapters: Mapping[str, str],
        *,
        checkpoint_path: str | None = None,
        precision: Precision = "fp32",
        local_folder: Callable[[str], AbstractContextManager[str]] = nullcontext,
    ):
        super().__init__()
        if not adapters:
            raise UserError("adapters: there is none; give {name: folder} of one at least")
        self._local_folder = local_folder
        self._specs: dict[str, AdapterSpec] = {}
        self._own: dict[str, OwnTensors] = {}
        self.own = nn.ModuleList()
        for name, where in adapters.items():
            if not self._specs:
                self._begin(where, checkpoint_path, precision)
            self.add(name, where)

    def _begin(self, where: str, checkpoint_path: str | None, precision: Precision) -> None:
        """The backbone of the first adapter, with its head as it came, and nothing beside it."""
        with self._local_folder(where) as folder:
            description, _ = read_adapter(folder)
            info, spec = described(folder, description)
            _check_shares(where, spec)
            self._seed = spec.seed
            bare = replace(spec, finetune="head", head="trained", rank=None, alpha=None)
            base = build(info, bare, checkpoint_path=checkpoint_path, precision=precision)
            check_backbone(folder, info, base.info)
        self._base: AdaptedModel = base.requires_grad_(False)
        self.info: BackboneInfo = base.info

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names, in the order in which they were added."""
        return tuple(self._specs)

    def add(self, name: str, where: str) -> None:
        """One more adapter.

        Raises:
            UserError: a name that is taken, another backbone; as for `load`.
        """
        if name in self._specs or not name or "." in name:
            raise UserError(f"adapters: the name {name!r} is taken, empty or has a dot; choose another one")
        with self._local_folder(where) as folder:
            description, state = read_adapter(folder)
            info, spec = described(folder, description)
            _check_shares(where, spec)
            self._check_same(where, info, spec)
            with torch.device("meta"):
                planned = build(info, spec)
        self._place(name, planned, state)
        self._specs[name] = spec

    def _check_same(self, where: str, info: BackboneInfo, spec: AdapterSpec) -> None:
        for key in _SAME:
            mine, theirs = getattr(self.info, key), getattr(info, key)
            if _plain(mine) != _plain(theirs):
                shown = (str(value)[:40] for value in (theirs, mine))
                raise UserError("adapter: {} has the backbone's {} {}, the others' is {}".format(where, key, *shown))
        if not info.own_classes and spec.head != "trained" and spec.seed != self._seed:
            raise UserError(
                f"adapter: {where} keeps a head that was drawn from seed {spec.seed}, the first adapter's is of seed "
                f"{self._seed}; adapters with trained heads can share a backbone"
            )

    def _place(self, name: str, planned: AdaptedModel, state: Mapping[str, Tensor]) -> None:
        """The adapter's tensors into switches and beside modules."""
        _check_tensors(planned, state)
        left = dict(state)
        device = self._base.mean.device
        for adapted in planned.report.adapted:
            path = f"{adapted.site.path}.lnlora"
            branch: nn.Module = planned.backbone.get_submodule(path)
            branch = branch.to_empty(device=device)
            own = {key: left.pop(f"{path}.{key}") for key in branch.state_dict()}
            branch.load_state_dict(own)
            self._switch(adapted.site).branches[name] = branch.train(self.training)
        by_module: dict[str, dict[str, Tensor]] = {}
        for key, tensor in left.items():
            path, _, parameter = key.rpartition(".")
            by_module.setdefault(path, {})[parameter] = tensor.to(device)
        for path, tensors in by_module.items():
            self._own_tensors(path).add(name, tensors)

    def _switch(self, site: Site) -> AdapterSwitch:
        layer: Any = self._base.backbone.get_submodule(site.path)
        if not hasattr(layer, "lnlora"):
            attach_at(self._base.backbone, self._base.family, site, AdapterSwitch())
        return layer.lnlora

    def _own_tensors(self, path: str) -> OwnTensors:
        if path not in self._own:
            self._own[path] = own = OwnTensors()
            self.own.append(own)
            self._base.backbone.get_submodule(path).register_forward_hook(own.hook)
        return self._own[path]

    def remove(self, name: str) -> None:
        """Forget an adapter and its memory.

        Raises:
            UserError: there is none of that name.
        """
        self._check_known([name])
        del self._specs[name]
        holders = [m.branches for m in self.modules() if isinstance(m, AdapterSwitch)]
        for holder in [*holders, *(own.tensors for own in self._own.values())]:
            if name in holder:
                del holder[name]

    def _check_known(self, names: Sequence[str | None]) -> None:
        for name in names:
            if name is not None and name not in self._specs:
                raise UserError(f"adapter: there is no {name!r}; there are: {', '.join(self._specs)}")

    def forward(self, pixels: Tensor, adapter: str | Sequence[str | None] | None = None) -> Tensor:
        """Logits.

        Args:
            adapter: for all samples, or one for each; None is the bare backbone.

        Raises:
            UserError: an adapter that there is not, a list of another length than the batch.
        """
        with choosing(self._choice(adapter, pixels)):
            return self._base(pixels)

    def _choice(self, adapter: str | Sequence[str | None] | None, pixels: Tensor) -> Choice:
        names = [adapter] if adapter is None or isinstance(adapter, str) else list(adapter)
        self._check_known(names)
        if adapter is not None and not isinstance(adapter, str) and len(names) != len(pixels):
            raise UserError(f"adapter: {len(names)} names for {len(pixels)} samples; one for each is right")
        different = list(dict.fromkeys(names))
        if len(different) == 1:
            return Choice(different[0])
        places = [[i for i, name in enumerate(names) if name == one] for one in different]
        parts = [(one, torch.tensor(place, device=pixels.device)) for one, place in zip(different, places, strict=True)]
        return Choice(None, tuple(parts), len(names))

    def select(self, adapter: str | Sequence[str | None] | None) -> "SelectedAdapter":
        """The model under that choice, as attacks and evaluations take it. It shares all memory with this one."""
        return SelectedAdapter(self, adapter)


class SelectedAdapter(nn.Module):
    """pixels [B, 3, H, W] in [0, 1] -> logits [B, classes], under a fixed choice of adapters."""

    def __init__(self, several: MultiAdapter, adapter: str | Sequence[str | None] | None):
        super().__init__()
        self.several, self.adapter = several, adapter

    def forward(self, pixels: Tensor) -> Tensor:
        return self.several(pixels, self.adapter)


def _plain(value: Any) -> Any:
    """Tuples are lists in JSON."""
    return list(value) if isinstance(value, tuple) else value


def _check_shares(where: str, spec: AdapterSpec) -> None:
    if spec.finetune == "full":
        raise UserError(f"adapter: {where} is a whole model (finetune: full), which shares no backbone; load it alone")


def _check_tensors(planned: AdaptedModel, state: Mapping[str, Tensor]) -> None:
    expected = {name: tuple(parameter.shape) for name, parameter in planned.trainable().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(f"adapter: {name} is {found.get(name)}, the model's is {expected.get(name)}")
