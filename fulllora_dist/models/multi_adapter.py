"""Several adapters on one frozen backbone in memory, selected per call or per sample.

Each adapted layer has a switch with the branches of all adapters. A batch passes through the frozen layers once; at a
switch, each sample gets the branch of its adapter, if any. Tensors of the backbone that an adapter trained itself (a
head, LayerNorm) replace the backbone's in the same way, with a forward hook. The backbone's own tensors are never
changed.
"""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fulllora_dist.core.errors import UserError
from fulllora_dist.core.settings import as_text
from fulllora_dist.models.adapt import adapt_given
from fulllora_dist.models.adapted_model import AdaptedModel, AdapterSpec, check_tensors
from fulllora_dist.models.adapter_file import read_adapter
from fulllora_dist.models.adapter_switch import AdapterSwitch, Choice, OwnTensors, choosing
from fulllora_dist.models.attaching import attach_at
from fulllora_dist.models.backbone import BackboneInfo
from fulllora_dist.models.placement import Site
from fulllora_dist.models.precision import compute_in_bf16
from fulllora_dist.models.rebuild import build, build_onto, check_backbone, check_weights, described, settings_of
from fulllora_dist.models.settings import Precision
from fulllora_dist.models.training_record import TrainingRecord

_SAME = ("name", "architecture", "image_size", "mean", "std", "num_classes", "classes", "sha256")


class MultiAdapter(nn.Module):
    """pixels [B, 3, H, W] in [0, 1], fp32, and a choice of adapters -> logits [B, classes], fp32.

    A batch with a single adapter gives bit for bit the logits of that adapter loaded alone. (So its tensors require
    gradients, as there: torch's choice of kernels depends on it.) In bf16 this excepts adapters that train LayerNorms:
    alone they compute under autocast, and here in blocks that are stored in bf16. With several adapters the logits
    agree up to rounding, as the branches process smaller batches. Calls from several threads are independent.

    Args:
        adapters: {name: folder}, with names of your choice.
        checkpoint_path: location of the backbone's weights, if it has changed since training.
        backbone: the module that the adapters belong to, which is changed in place; needed where `adapt` was given one.
        precision: see `ModelSettings.precision`.
        local_folder: context manager that turns an address into a local folder, if the addresses are not folders.

    Attributes:
        info: description of the backbone.
        records: {name: what is known of the adapter's training}.

    Raises:
        UserError: adapters of different backbones, a whole model (finetune: full); as for `load`.
    """

    def __init__(
        self,
        adapters: Mapping[str, str | os.PathLike[str]],
        *,
        checkpoint_path: str | None = None,
        backbone: nn.Module | None = None,
        precision: Precision = "fp32",
        local_folder: Callable[[str], AbstractContextManager[str]] = nullcontext,
    ):
        super().__init__()
        if not isinstance(adapters, Mapping) or not adapters:
            raise UserError(f"adapters: must be {{name: folder, ...}} with at least one, got {adapters!r}")
        self._local_folder = local_folder
        self._precision = precision
        self._shape: nn.Module | None = None  # of a backbone that was given, on the meta device
        self._specs: dict[str, AdapterSpec] = {}
        self.records: dict[str, TrainingRecord] = {}
        self._own: dict[str, OwnTensors] = {}
        self.own = nn.ModuleList()
        self._hooks: list[RemovableHandle] = []
        first, *_ = adapters.values()
        self._begin(as_text(first), checkpoint_path, backbone)
        try:
            for name, where in adapters.items():
                self.add(name, where)
        except BaseException:  # a backbone that was given is left as it was
            for hook in self._hooks:
                hook.remove()
            self._base.original.restore(self._base.backbone)
            raise
        if precision == "bf16":  # now that nothing of the blocks requires gradients, and nothing is taken back
            compute_in_bf16(self._base.family.modules(self._base.backbone))
            self._base.precision = precision

    def _begin(self, where: str, checkpoint_path: str | None, backbone: nn.Module | None) -> None:
        """Build the backbone of the first adapter in fp32, with its original head and without branches."""
        with self._local_folder(where) as folder:
            description, _ = read_adapter(folder)
            info, spec = described(folder, description)
            _check_shares(where, spec)
            self._seed = spec.seed
            bare = AdapterSpec(
                "full", None, None, spec.placement, spec.qkv, spec.patch_norm_eps, head="trained", seed=spec.seed
            )
            if backbone is not None:
                self._shape = on_meta(backbone)
                base = build_onto(backbone, folder, description, bare)
            else:
                check_weights(folder, info, checkpoint_path)
                base = build(info, bare, checkpoint_path=checkpoint_path)
                check_backbone(folder, description, base.info)
        self._base: AdaptedModel = base.requires_grad_(False)
        self.info: BackboneInfo = base.info

    @property
    def pixels_checked(self) -> bool:
        """See `AdaptedModel`: one look for all adapters."""
        return self._base.pixels_checked

    @pixels_checked.setter
    def pixels_checked(self, checked: bool) -> None:
        self._base.pixels_checked = checked

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they were added."""
        return tuple(self._specs)

    def add(self, name: str, address: str | os.PathLike[str]) -> None:
        """Add an adapter.

        Raises:
            UserError: a name that is taken, a different backbone; as for `load`.
        """
        if name in self._specs or not name or "." in name:
            raise UserError(f"adapters: the name {name!r} is taken, empty or has a dot; choose another one")
        where = as_text(address)
        with self._local_folder(where) as folder:
            description, state = read_adapter(folder)
            info, spec = described(folder, description)
            _check_shares(where, spec)
            self._check_same(where, info, spec)
            if self._shape is not None:
                settings, adapter = settings_of(info, spec, precision=self._precision)
                module = copy.deepcopy(self._shape)
                planned = adapt_given(module, settings, adapter, spec.finetune, spec.target_modules, seed=spec.seed)
            else:
                with torch.device("meta"):
                    planned = build(info, spec, precision=self._precision)
        self._place(name, planned, state)
        self._specs[name] = spec
        self.records[name] = TrainingRecord(description.training)

    def _check_same(self, where: str, info: BackboneInfo, spec: AdapterSpec) -> None:
        for key in _SAME:
            expected, actual = getattr(self.info, key), getattr(info, key)
            if expected != actual:
                shown = (str(value)[:40] for value in (expected, actual))
                raise UserError("adapter: {} must have the backbone's {} {}, got {}".format(where, key, *shown))
        another_head = info.head_sha256 not in (None, self.info.head_sha256)
        if info.module is not None:
            if spec.head != "trained" and another_head:
                raise UserError(
                    f"adapter: {where} has not trained its head, and must have been made with the backbone's"
                )
            return
        another_head |= spec.seed != self._seed
        if not info.own_classes and spec.head != "trained" and another_head:
            raise UserError(
                f"adapter: {where} must have an untrained head from seed {self._seed}, as the first adapter, got seed "
                f"{spec.seed}; only adapters with trained heads can share a backbone across seeds"
            )

    def _place(self, name: str, planned: AdaptedModel, state: Mapping[str, Tensor]) -> None:
        """Put the adapter's tensors into switches and forward hooks."""
        check_tensors(planned.held(), state)
        remaining = dict(state)
        device = self._base.mean.device
        for adapted in planned.report.adapted:
            path = f"{adapted.site.path}.lnlora"
            branch: nn.Module = planned.backbone.get_submodule(path)
            branch = branch.to_empty(device=device)
            own = {key: remaining.pop(f"{path}.{key}") for key in branch.state_dict()}
            branch.load_state_dict(own)
            self._switch(adapted.site).branches[name] = branch.train(self.training)
        by_module: dict[str, dict[str, Tensor]] = {}
        for key, tensor in remaining.items():
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
            self._hooks.append(self._base.backbone.get_submodule(path).register_forward_hook(own.hook))
        return self._own[path]

    def remove(self, name: str) -> None:
        """Remove an adapter and free its memory.

        Raises:
            UserError: there is no adapter of that name.
        """
        self._check_known([name])
        del self._specs[name], self.records[name]
        holders = [m.branches for m in self.modules() if isinstance(m, AdapterSwitch)]
        for holder in [*holders, *(own.tensors for own in self._own.values())]:
            if name in holder:
                del holder[name]

    def _check_known(self, names: Sequence[str | None]) -> None:
        for name in names:
            if name is not None and name not in self._specs:
                raise UserError(f"adapter: there is no {name!r}; there are: {', '.join(self._specs)}")

    def forward(self, pixels: Tensor, adapter: str | Sequence[str | None] | None = None) -> Tensor:
        """Compute logits.

        Args:
            adapter: one name for all samples, or a list with one per sample; None is the bare backbone.

        Raises:
            UserError: an unknown adapter, or a list whose length differs from the batch size.
        """
        with choosing(self._choice(adapter, pixels)):
            return self._base(pixels)

    def check_choice(self, adapter: str | Sequence[str | None] | None) -> list[str | None]:
        """The names of a choice. Raises UserError: it is none, or there is no such adapter."""
        if not isinstance(adapter, str | Sequence | None):
            raise UserError(f"adapter: must be a name, a list of one name per sample, or None, got {adapter!r}")
        names = [adapter] if adapter is None or isinstance(adapter, str) else list(adapter)
        self._check_known(names)
        return names

    def _choice(self, adapter: str | Sequence[str | None] | None, pixels: Tensor) -> Choice:
        names = self.check_choice(adapter)
        if adapter is not None and not isinstance(adapter, str) and len(names) != len(pixels):
            raise UserError(f"adapter: must be one name per sample, got {len(names)} names for {len(pixels)} samples")
        different = list(dict.fromkeys(names))
        if len(different) == 1:
            return Choice(different[0])
        places = [[i for i, name in enumerate(names) if name == one] for one in different]
        parts = [(one, torch.tensor(place, device=pixels.device)) for one, place in zip(different, places, strict=True)]
        return Choice(None, tuple(parts), len(names))

    def select(self, adapter: str | Sequence[str | None] | None) -> "SelectedAdapter":
        """The model with a fixed choice of adapters, for attacks and evaluation. It shares all memory with this one."""
        return SelectedAdapter(self, adapter)


class SelectedAdapter(nn.Module):
    """pixels [B, 3, H, W] in [0, 1] -> logits [B, classes], with a fixed choice of adapters."""

    def __init__(self, several: MultiAdapter, adapter: str | Sequence[str | None] | None):
        super().__init__()
        several.check_choice(adapter)
        self.several, self.adapter = several, adapter

    @property
    def pixels_checked(self) -> bool:
        """See `MultiAdapter`."""
        return self.several.pixels_checked

    @pixels_checked.setter
    def pixels_checked(self, checked: bool) -> None:
        self.several.pixels_checked = checked

    @property
    def record(self) -> TrainingRecord:
        """Of the adapter; empty where several are chosen, or none."""
        return self.several.records[self.adapter] if isinstance(self.adapter, str) else TrainingRecord()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.several(pixels, self.adapter)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy without memory for its tensors."""
    made: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    made |= {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, made)


def _check_shares(where: str, spec: AdapterSpec) -> None:
    if spec.finetune == "full":
        raise UserError(
            f"adapter: {where} is a whole model (finetune: full) and cannot share a backbone; load it alone"
        )
