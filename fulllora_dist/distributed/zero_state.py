"""Read and write the training state at any ZeRO stage: fp32 masters, AdamW moments, and the model's own parameters.

All access to the internals of DeepSpeed's optimizers is here. At stage 0 the optimizer updates the parameters
themselves, at 1 and 2 flat partitions of this rank; at 3 the parameters are partitioned too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fulllora_dist.distributed.comm import Comm
from fulllora_dist.models.adapted_model import AdaptedModel

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainableState:
    """The training state, independent of the number of ranks and the ZeRO stage.

    Attributes:
        updates: optimizer updates made.
        tensors: {"master" | "exp_avg" | "exp_avg_sq" | "ema": {timm name: fp32, full shape, host}}; missing moments
            are zero.
        skipped: updates skipped because loss or gradient was not finite.
    """

    updates: int
    tensors: dict[str, dict[str, Tensor]]
    skipped: int = 0

    @classmethod
    def of_named(cls, tensors: Mapping[str, Tensor], updates: int, skipped: int) -> "TrainableState":
        """Build the state from the tensors of a checkpoint, see `named`; other kinds of tensors are kept too."""
        kinds: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            kinds.setdefault(kind, {})[rest] = tensor
        return cls(updates, kinds, skipped)

    def named(self) -> dict[str, Tensor]:
        """The tensors under their names in a checkpoint, `<kind>/<name>`."""
        return {f"{kind}/{name}": tensor for kind, named in self.tensors.items() for name, tensor in named.items()}


class ZeroState:
    """Master weights and moments of a DeepSpeed engine.

    Args:
        engine: the DeepSpeed engine, before its first step.
        model: the wrapped model.
        stage: ZeRO stage, 0 to 3.
    """

    def __init__(self, engine: Any, model: AdaptedModel, stage: int, comm: Comm):
        self._optimizer, self._model, self._stage, self._comm = engine.optimizer, model, stage, comm
        self.named = model.trainable()
        if stage == 3:
            self._clear_padding()
        self._prepare_moments()

    def masters(self) -> dict[str, Tensor]:
        """Master weights in full shape, on the device. A collective at stage 3."""
        if self._stage < 3:  # trainable parameters are fp32, so they equal the masters
            return {name: p.detach() for name, p in self.named.items()}
        return self._whole(self._flat_masters())

    def moments(self, key: str) -> dict[str, Tensor]:
        """One of `MOMENTS` in full shape, on the device. A collective from stage 1 on."""
        state = self._inner_optimizer().state
        if self._stage == 0:
            return {name: state[p][key] for name, p in self.named.items()}
        return self._whole([state[flat][key] for flat in self._flat_masters()])

    def finite_here(self) -> bool:
        """Whether the master weights that this rank updates are finite."""
        return bool(torch.stack([flat.isfinite().all() for flat in self._flat_masters()]).all())

    def load(self, state: TrainableState) -> None:
        """Set masters, moments and AdamW's step count. A collective."""
        device = self._comm.device
        masters = {name: tensor.to(device) for name, tensor in state.tensors["master"].items()}
        self.show(masters)
        if self._stage > 0:
            for name, parameter in self.named.items():
                self._set_master(parameter, masters[name])
        for flat in self._flat_masters():
            self._inner_optimizer().state[flat]["step"].fill_(float(state.updates))
        for key in MOMENTS:
            moments = state.tensors.get(key) or {name: torch.zeros_like(t) for name, t in masters.items()}
            for name, parameter in self.named.items():
                self._set_moment(parameter, key, moments[name].to(device))

    def show(self, tensors: Mapping[str, Tensor]) -> None:
        """Let the model compute with these tensors. From stage 1 on the optimizer's masters stay unchanged; at stage 0
        the caller must restore them before the next update."""
        if self._stage < 3:
            self._model.load_trainable(tensors)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self.named.values()), modifier_rank=0):
            self._model.load_trainable(tensors)

    def _prepare_moments(self) -> None:
        """Initialise the optimizer's moments with zeros.

        They cannot be left to the first step: DeepSpeed links the optimizer's state to the parameters after the first
        *group* has stepped, and the second group's state is then never linked.
        """
        inner = self._inner_optimizer()
        for flat in self._flat_masters():
            inner.state[flat] = {
                "step": torch.tensor(0.0, dtype=torch.float32),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        if self._stage in (1, 2):
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _clear_padding(self) -> None:
        """Zero what pads the partitions at ZeRO-3: DeepSpeed leaves it as it finds the memory, which may hold NaN."""
        for flat, group in zip(self._flat_masters(), self._optimizer.fp16_groups, strict=True):
            first = 0
            for p in group:
                size = p.partition_numel()
                own = min(max(p.ds_numel - self._comm.rank * size, 0), size)
                flat.data[first + own : first + size] = 0
                first += size

    def _inner_optimizer(self) -> Any:
        return self._optimizer if self._stage == 0 else self._optimizer.optimizer

    def _flat_masters(self) -> list[Tensor]:
        """The tensors that the inner optimizer updates: parameters at stage 0, else flat partitions of this rank."""
        if self._stage == 0:
            return list(self.named.values())
        zero = self._optimizer
        return list(zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat)

    def _whole(self, parts: list[Tensor]) -> dict[str, Tensor]:
        """The tensors in full shape, on the device, of which `parts` are this rank's flat partitions. One collective a
        partition; DeepSpeed's own functions make one a tensor."""
        name_of, zero, found = {id(p): name for name, p in self.named.items()}, self._optimizer, {}
        for i, part in enumerate(parts):
            own = part.to(self._comm.device)
            whole = own.new_empty(self._comm.world, own.numel())  # [ranks, values of a partition]
            dist.all_gather_into_tensor(whole.view(-1), own)
            first = 0
            for p in zero.bit16_groups[i] if self._stage < 3 else zero.fp16_groups[i]:
                if self._stage < 3:  # parameters are views into one flat tensor, which the ranks cut
                    first = p.storage_offset() - zero.bit16_groups_flat[i].storage_offset()
                    found[name_of[id(p)]] = whole.view(-1)[first : first + p.numel()].view(p.shape)
                else:  # the ranks cut each parameter and pad the last part
                    size = p.partition_numel()
                    values = whole[:, first : first + size].flatten()
                    found[name_of[id(p)]] = values[: p.ds_numel].view(p.ds_shape)
                    first += size
        return {name: found[name] for name in self.named}

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self._stage == 0:
            self._optimizer.state[parameter][key].copy_(value)
        elif self._stage < 3:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value, key)
        else:
            from deepspeed.utils import safe_set_local_optimizer_state

            safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)

    def _set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a master weight at ZeRO 1 to 3, where it is a separate tensor from the model's parameter."""
        if self._stage < 3:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)
        else:
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(parameter, self._own_part(parameter, value))

    def _own_part(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """This rank's partition of a full tensor at ZeRO-3."""
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        flat = F.pad(value.flatten(), (0, size * self._comm.world - value.numel()))  # DeepSpeed pads the last part
        return flat[self._comm.rank * size :][:size]
