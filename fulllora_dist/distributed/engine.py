"""DeepSpeed behind two doors: `attack_view` for attacks, `step` for weights.

An attack through the DeepSpeed engine raises at ZeRO 0 to 2 and silently changes the result at 3; through the module
it is exact at every stage and communicates nothing at 0 to 2. So attacks get the module, and only the weight step goes
through the engine. Nothing of DeepSpeed is seen outside this folder.
"""

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from fulllora_dist.core.errors import UserError
from fulllora_dist.data.batch import Batch
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.settings import DistributedSettings, OptimSettings
from fulllora_dist.models.finetune import AdaptedModel

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(update: int, total: int, settings: OptimSettings) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `min_lr`, at optimizer update 0 .. total - 1."""
    warmup = int(settings.warmup_ratio * total)
    if update < warmup:
        return settings.lr * (update + 1) / warmup
    progress = (update - warmup) / max(1, total - warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def check_batch(settings: OptimSettings, accumulation: int, world: int) -> int:
    """Images a micro-batch and rank.

    Raises:
        UserError: the batch does not divide.
    """
    parts = world * accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"optim.batch_size: {settings.batch_size} does not divide by {world} ranks x "
            f"distributed.gradient_accumulation_steps {accumulation}; take a multiple of {parts}"
        )
    return settings.batch_size // parts


def deepspeed_settings(
    optim: OptimSettings, settings: DistributedSettings, extra: dict[str, Any], world: int, trainable: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours; `extra` is the config's own `deepspeed` block.

    Computing in bf16 is the model's own matter (`models/precision.py`): to DeepSpeed everything that trains is fp32.

    Args:
        trainable: number of parameters that train. DeepSpeed allocates its whole gradient bucket, 5e8 numbers (2 GB)
            unless told, in every weight step, however few there are.
    """
    zero = {"stage": settings.zero_stage, "reduce_bucket_size": min(trainable, 500_000_000)}
    zero |= extra.get("zero_optimization", {})
    return {
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        **extra,
        "zero_optimization": zero,
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": check_batch(optim, settings.gradient_accumulation_steps, world),
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "gradient_clipping": optim.grad_clip,
    }


@dataclass
class TrainableState:
    """The state of everything that trains, bound to no number of ranks and no ZeRO stage.

    Attributes:
        updates: optimizer updates made.
        tensors: {"master" | "exp_avg" | "exp_avg_sq" | "ema": {name in the timm model: fp32, full shape, host}}.
        skipped: updates that were not made, as their loss or gradient was not finite.
    """

    updates: int
    tensors: dict[str, dict[str, Tensor]]
    skipped: int = 0


class Engine:
    """The adapted model under DeepSpeed.

    Args:
        model: on any device; it is moved to the rank's.
        total_updates: length of the learning rate schedule.
        state: where to go on from; its masters are loaded before DeepSpeed takes the parameters over.

    Attributes:
        updates: optimizer updates made: the place in the learning rate schedule.
        skipped: updates that were not made, as the loss or gradient of a rank was not finite; all skip together.
        skipped_in_a_row: the last of them, since one was made.
        lr_scale: factor of the whole learning rate schedule.
    """

    def __init__(
        self,
        model: AdaptedModel,
        optim: OptimSettings,
        settings: DistributedSettings,
        extra: dict[str, Any],
        ranks: Comm,
        total_updates: int,
        state: TrainableState | None = None,
    ):
        model.set_activation_checkpointing(settings.activation_checkpointing != "off")  # refused here, not in a step
        if state is not None:
            model.load_trainable(state.tensors["master"])
        self.model = model.to(ranks.device)
        self.model.train()
        self.ranks = ranks
        self.updates = state.updates if state is not None else 0
        self.skipped = state.skipped if state is not None else 0
        self.skipped_in_a_row = 0
        self.lr_scale = 1.0
        self.total_updates = total_updates
        self._optim = optim
        self._stage = settings.zero_stage
        self._accumulation = settings.gradient_accumulation_steps
        self._checkpointing = settings.activation_checkpointing
        timm.layers.set_reentrant_ckpt(False)  # TIMM_REENTRANT_CKPT would silently drop gradients of frozen inputs
        self._named = model.trainable()
        self._engine = _start_deepspeed(model, self._optimizer(), settings, optim, extra, ranks)
        self._set_checkpointing(self._checkpointing == "all")
        self._ema: dict[str, Tensor] = {}
        self._prepare_moments()
        if state is not None:
            self._load_moments(state)
        self._begin_average(state)

    def restore(self, state: TrainableState) -> None:
        """Go back to `state` in place, and be from then on what an engine that was made from it is. A collective."""
        self.updates, self.skipped, self.skipped_in_a_row = state.updates, state.skipped, 0
        own = self._on_device(state.tensors["master"])
        self._show(own)
        if self._stage > 0:
            for name, parameter in self._named.items():
                self._set_master(parameter, own[name])
        self._load_moments(state)
        self._begin_average(state)

    @property
    def attack_view(self) -> AdaptedModel:
        """The model for attacks: no hook of the engine, no gradient of a parameter, no collective below ZeRO-3."""
        return self.model

    @property
    def classes(self) -> int:
        """Outputs of the model."""
        return self.model.info.num_classes

    def __call__(self, pixels: Tensor) -> Tensor:
        """Logits of a weight step."""
        if pixels.requires_grad:  # Free's perturbation would keep a NaN for good
            pixels.register_hook(lambda gradient: gradient.nan_to_num(0, 0, 0))
        if self._checkpointing != "weight_step":
            return self._engine(pixels)
        self._set_checkpointing(True)
        try:
            return self._engine(pixels)
        finally:
            self._set_checkpointing(False)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the adapter, averaged over micro-batches and ranks, and of a leaf behind the pixels.

        Those of the leaf are zero where they are not finite. A loss that is not finite makes the adapter's NaN, so that
        one look at the averaged gradient tells every rank of it; a finite one is multiplied by exactly 1.
        """
        self._engine.backward(loss * (1 + 0 * loss.detach()))

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """The micro-batches of one optimizer update, which is made after the last one's backward, or skipped."""
        rate = self.lr_scale * learning_rate(self.updates, self.total_updates, self._optim)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        for micro in batch.split(self._accumulation):
            yield micro
            made = self._step()
        if not made:
            self.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.updates += 1
        self.skipped_in_a_row = 0
        if self._ema:
            self._average()

    def _step(self) -> bool:
        """DeepSpeed's step, which is the update after the last micro-batch; whether nothing was skipped.

        At ZeRO 1 to 3 DeepSpeed skips an update whose gradient has no finite norm. At 0 it would make it; there the
        averaged gradient is the same on every rank.
        """
        optimizer = self._engine.optimizer
        if self._stage > 0:
            self._engine.step()
            return not optimizer.overflow
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return True
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if not finite:
            optimizer.step = lambda: None
        self._engine.step()
        if not finite:
            del optimizer.step  # the class's own is in force again
        return finite

    def gradient_norm(self) -> float | None:
        """Norm of the last update's whole gradient before clipping; None where it was skipped, and at ZeRO-0, where
        DeepSpeed keeps none."""
        if self.skipped_in_a_row:
            return None
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def learning_rate(self) -> float:
        """Of the last update."""
        return float(self._engine.optimizer.param_groups[0]["lr"])

    def state(self) -> TrainableState:
        """Consolidated state on the host of every rank. A collective: every rank must call it."""
        tensors = {"master": self._full_masters()}
        for key in MOMENTS:
            tensors[key] = {name: self._moment(p, key) for name, p in self._named.items()}
        if self._ema:
            tensors["ema"] = self._ema
        host = {kind: {n: t.detach().cpu().float().clone() for n, t in ts.items()} for kind, ts in tensors.items()}
        return TrainableState(self.updates, host, self.skipped)

    def adapter(self) -> dict[str, Tensor]:
        """What to save and evaluate: the average where one is kept, else the parameters. A collective."""
        tensors = self._ema or self._full_masters()
        return {name: t.detach().cpu().float().clone() for name, t in tensors.items()}

    @property
    def keeps_average(self) -> bool:
        """Whether `adapter` is an average of the parameters (optim.ema_decay)."""
        return bool(self._ema)

    @contextmanager
    def as_saved(self) -> Iterator[AdaptedModel]:
        """The model with the tensors of `adapter`; afterwards, bit for bit, with its own. A collective."""
        if not self._ema:
            yield self.model
            return
        own = {name: tensor.clone() for name, tensor in self._full_masters().items()}
        self._show(self._ema)
        try:
            yield self.model
        finally:
            self._show(own)

    # -- parameters and optimizer state at any stage --------------------------------------------------------------

    def _optimizer(self) -> torch.optim.Optimizer:
        decayed = [p for p in self._named.values() if p.ndim > 1]
        plain = [p for p in self._named.values() if p.ndim <= 1]
        groups = [
            {"params": parameters, "weight_decay": decay}
            for parameters, decay in ((decayed, self._optim.weight_decay), (plain, 0.0))
            if parameters
        ]
        return torch.optim.AdamW(groups, lr=self._optim.lr, betas=self._optim.betas)

    def _full_masters(self) -> dict[str, Tensor]:
        if self._stage < 3:  # everything that trains is fp32, so the parameters are the masters
            return {name: p.detach() for name, p in self._named.items()}
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p) for name, p in self._named.items()}

    def _show(self, tensors: dict[str, Tensor]) -> None:
        """Compute with these; the masters that the optimizer steps are others, or set back before it does."""
        if self._stage < 3:
            self.model.load_trainable(tensors)
            return
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(self._named.values()), modifier_rank=0):
            self.model.load_trainable(tensors)

    def _moment(self, parameter: torch.nn.Parameter, key: str) -> Tensor:
        if self._stage == 0:
            return self._engine.optimizer.state[parameter][key]
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)

    def _prepare_moments(self) -> None:
        """Give the optimizer the moments it holds before its first update: zeros.

        They are not left to the first step: DeepSpeed links the optimizer's state to the parameters after the first
        *group* has stepped, and the second group's is then missing for good.
        """
        inner = self._inner_optimizer()
        for flat in self._flat_masters():
            inner.state[flat] = {
                "step": torch.tensor(0.0, dtype=torch.float32),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_moments(self, state: TrainableState) -> None:
        """The moments that the optimizer holds after `state.updates` updates."""
        inner = self._inner_optimizer()
        for flat in self._flat_masters():
            inner.state[flat]["step"].fill_(float(state.updates))
        for key in MOMENTS:
            moments = self._on_device(state.tensors[key])
            for name, parameter in self._named.items():
                self._set_moment(parameter, key, moments[name])

    def _begin_average(self, state: TrainableState | None) -> None:
        """The average where one is kept: the state's, else the parameters as they are."""
        if self._optim.ema_decay:
            source = state.tensors["ema"] if state is not None and "ema" in state.tensors else self._full_masters()
            self._ema = {n: t.to(self.ranks.device, torch.float32, copy=True) for n, t in source.items()}

    def _on_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.ranks.device) for name, tensor in tensors.items()}

    def _inner_optimizer(self) -> Any:
        return self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer

    def _flat_masters(self) -> list[Tensor]:
        """The tensors that the inner optimizer steps: parameters at stage 0, flat partitions of this rank above."""
        zero = self._engine.optimizer
        if self._stage == 0:
            return list(self._named.values())
        return list(zero.single_partition_of_fp32_groups if self._stage < 3 else zero.fp32_partitioned_groups_flat)

    def _set_moment(self, parameter: torch.nn.Parameter, key: str, value: Tensor) -> None:
        if self._stage == 0:
            self._engine.optimizer.state[parameter][key].copy_(value)
        elif self._stage < 3:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(parameter, value, key)
        else:
            from deepspeed.utils import safe_set_local_optimizer_state

            safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)

    def _set_master(self, parameter: torch.nn.Parameter, value: Tensor) -> None:
        """What the optimizer steps, at ZeRO 1 to 3, where it is another tensor than what the model computes with."""
        if self._stage < 3:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)
        else:
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(parameter, self._own_part(parameter, value))

    def _own_part(self, parameter: torch.nn.Parameter, value: Tensor) -> Tensor:
        """This rank's part of a tensor of full shape at ZeRO-3."""
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        flat = F.pad(value.flatten(), (0, size * self.ranks.world - value.numel()))  # DeepSpeed pads the last part
        return flat[self.ranks.rank * size :][:size]

    def _average(self) -> None:
        """ema <- decay ema + (1 - decay) master; the decay rises from 0 so that the start is forgotten."""
        decay = min(self._optim.ema_decay, self.updates / (self.updates + 10))
        for name, master in self._full_masters().items():
            self._ema[name].lerp_(master.float(), 1 - decay)

    def _set_checkpointing(self, enabled: bool) -> None:
        self.model.set_activation_checkpointing(enabled)


def _start_deepspeed(
    model: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    settings: DistributedSettings,
    optim: OptimSettings,
    extra: dict[str, Any],
    ranks: Comm,
) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    # on the CPU DeepSpeed would compile a shared-memory all-reduce at first use: 80 s and a C++ compiler for a few MB
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed's calls of torch's older names: a line for every collective of every step
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_settings(optim, settings, extra, ranks.world, model.report.trainable),
            dist_init_required=False,
        )
    except (DeepSpeedConfigError, ValidationError) as error:
        raise UserError(f"deepspeed: {' '.join(str(error).split())[:300]}") from None
    ranks.limit_waiting()
    return engine
