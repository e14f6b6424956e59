"""The DeepSpeed engine: attacks use the bare module (`attack_view`), weight steps the engine (`accumulate`, the call).

An attack through the DeepSpeed engine raises an error at ZeRO 0 to 2 and silently changes the result at 3; through the
module it is exact at every stage and needs no communication at 0 to 2. So attacks get the module, and only the weight
step goes through the engine. DeepSpeed is not used outside this folder; its private attributes are accessed in
`zero_state.py`.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import timm
import torch
from pydantic import ValidationError
from torch import Tensor

from fulllora_dist.core.errors import SharedUserError
from fulllora_dist.core.messages import one_line
from fulllora_dist.data.batch import Batch
from fulllora_dist.distributed.comm import Comm
from fulllora_dist.distributed.schedule import check_batch, learning_rate
from fulllora_dist.distributed.settings import DistributedSettings, OptimSettings
from fulllora_dist.distributed.zero_state import MOMENTS, TrainableState, ZeroState
from fulllora_dist.models.adapted_model import AdaptedModel


def deepspeed_settings(
    optim: OptimSettings, settings: DistributedSettings, extra: dict[str, Any], world: int, trainable: int
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from our settings.

    bf16 is handled by the model (`models/precision.py`): for DeepSpeed all trainable parameters are fp32.

    Args:
        extra: the `deepspeed` section of the config.
        trainable: number of trainable parameters, which limits the gradient bucket: by default DeepSpeed allocates 5e8
            numbers (2 GB) in every weight step, however few there are.
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


class Engine:
    """The adapted model under DeepSpeed.

    Args:
        model: on any device; moved to the device of the rank.
        extra: the `deepspeed` section of the config.
        total_updates: length of the learning rate schedule.

    Attributes:
        updates: number of optimizer updates made, the position in the learning rate schedule.
        skipped: number of updates skipped because loss or gradient of a rank was not finite; all ranks skip together.
        skipped_in_a_row: number of updates skipped since the last one made.
        lr_scale: factor of the learning rate schedule.
        on_part: called with the name of each part of a step that begins: "weight_step"; "communication" for what is
            left of it after the backward pass; "attack" for what is outside of the engine.
    """

    def __init__(
        self,
        model: AdaptedModel,
        optim: OptimSettings,
        settings: DistributedSettings,
        extra: dict[str, Any],
        comm: Comm,
        total_updates: int,
    ):
        model.set_activation_checkpointing(settings.activation_checkpointing != "off")  # fail here, not in a step
        self.model = model.to(comm.device)
        self.model.train()
        self.model.pixels_checked = True  # a run's own decoder made them, and a step is not to wait for the device
        self.comm = comm
        self.updates = self.skipped = self.skipped_in_a_row = 0
        self.lr_scale = 1.0
        self.on_part: Callable[[str], None] = lambda part: None
        self.total_updates = total_updates
        self._optim = optim
        self._stage = settings.zero_stage
        self._accumulation = settings.gradient_accumulation_steps
        self._checkpointing = settings.activation_checkpointing
        timm.layers.set_reentrant_ckpt(False)  # TIMM_REENTRANT_CKPT would silently drop gradients of frozen inputs
        self._engine = _start_deepspeed(model, settings, optim, extra, comm)
        self._engine.allreduce_gradients = self._as_communication(self._engine.allreduce_gradients)
        self._zero = ZeroState(self._engine, model, self._stage, comm)
        self.model.set_activation_checkpointing(self._checkpointing == "all")
        self._ema = self._average_from(self._zero.masters()) if optim.ema_decay else {}

    def restore(self, state: TrainableState) -> None:
        """Load `state`: on a start from an adapter, on resume, and after a collapse. A collective."""
        self.updates, self.skipped, self.skipped_in_a_row = state.updates, state.skipped, 0
        self._zero.load(state)
        if self._optim.ema_decay:
            self._ema = self._average_from(state.tensors.get("ema", state.tensors["master"]))

    @property
    def attack_view(self) -> AdaptedModel:
        """The model for attacks: no engine hooks, no parameter gradients, no collectives below ZeRO-3."""
        return self.model

    @property
    def classes(self) -> int:
        """Number of model outputs."""
        return self.model.info.num_classes

    def __call__(self, pixels: Tensor) -> Tensor:
        """Compute the logits of a weight step."""
        self.on_part("weight_step")
        if pixels.requires_grad:  # Free's perturbation would keep a NaN forever
            pixels.register_hook(lambda gradient: gradient.nan_to_num(0, 0, 0))
        if self._checkpointing != "weight_step":
            return self._engine(pixels)
        self.model.set_activation_checkpointing(True)
        try:
            return self._engine(pixels)
        finally:
            self.model.set_activation_checkpointing(False)

    def backward(self, loss: Tensor) -> None:
        """Compute gradients of the adapter, averaged over micro-batches and ranks, and of the pixels if they need one.

        Non-finite values in the pixel gradient are set to zero. A non-finite loss makes the adapter's gradient NaN, so
        that every rank sees it in the averaged gradient; a finite loss is multiplied by exactly 1.
        """
        self._engine.backward(loss * (1 + 0 * loss.detach()))

    def accumulate(self, batch: Batch) -> Iterator[Batch]:
        """Yield the micro-batches of one optimizer update, which is made or skipped after the last backward pass."""
        rate = self.lr_scale * learning_rate(self.updates, self.total_updates, self._optim)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        for micro in batch.split(self._accumulation):
            yield micro
            updated = self._step()
            self.on_part("attack")
        if not updated:
            self.skipped += 1
            self.skipped_in_a_row += 1
            return
        self.updates += 1
        self.skipped_in_a_row = 0
        if self._ema:
            self._average()

    def _as_communication(self, reduce: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            self.on_part("communication")
            reduce()
            self.on_part("weight_step")

        return timed

    def _step(self) -> bool:
        """Call DeepSpeed's step, which updates after the last micro-batch. Returns False if it skipped the update.

        At ZeRO 1 to 3 DeepSpeed skips an update if the gradient norm is not finite. At 0 it does not, so that it is
        skipped here; there the averaged gradient is the same on every rank.
        """
        optimizer = self._engine.optimizer
        if self._stage > 0:
            self._engine.step()
            return not optimizer.overflow
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return True
        gradients = [p.grad for p in self._zero.named.values() if p.grad is not None]
        finite = bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if not finite:
            optimizer.step = lambda: None
        self._engine.step()
        if not finite:
            del optimizer.step  # restores the method of the class
        return finite

    def gradient_norm(self) -> float | None:
        """Global gradient norm of the last update before clipping; None if it was skipped, and at ZeRO-0, where
        DeepSpeed does not keep it."""
        if self.skipped_in_a_row:
            return None
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last update."""
        return float(self._engine.optimizer.param_groups[0]["lr"])

    def state(self) -> TrainableState | None:
        """The consolidated training state, on the host of rank 0; None on the other ranks. A collective: every rank
        must call it."""
        kinds: dict[str, Callable[[], Mapping[str, Tensor]]] = {"master": self._zero.masters}
        kinds |= {key: partial(self._zero.moments, key) for key in MOMENTS}
        if self._ema:
            kinds["ema"] = lambda: self._ema
        tensors = {}
        for kind, collect in kinds.items():  # one after the other: each may take the device's memory of the adapter
            whole = collect()
            if self.comm.is_main:
                tensors[kind] = _on_host(whole)
        return TrainableState(self.updates, tensors, self.skipped) if self.comm.is_main else None

    def is_finite(self) -> bool:
        """Whether all parameters of the adapter are finite, the same on every rank. A collective."""
        return not self.comm.max_each([not self._zero.finite_here()])[0]

    def adapter(self) -> dict[str, Tensor]:
        """The tensors to save and evaluate, on the host of every rank: the moving average if there is one, else the
        parameters. A collective."""
        return _on_host(self._ema or self._zero.masters())

    @property
    def keeps_average(self) -> bool:
        """Whether `adapter` is a moving average of the parameters (optim.ema_decay)."""
        return bool(self._ema)

    @contextmanager
    def as_saved(self) -> Iterator[AdaptedModel]:
        """The model with the tensors of `adapter`; on exit its own are restored bit for bit. A collective."""
        if not self._ema:
            yield self.model
            return
        own = {name: tensor.clone() for name, tensor in self._zero.masters().items()}
        self._zero.show(self._ema)
        try:
            yield self.model
        finally:
            self._zero.show(own)

    def _average_from(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.to(self.comm.device, torch.float32, copy=True) for name, t in tensors.items()}

    def _average(self) -> None:
        """ema <- decay ema + (1 - decay) master; the decay rises from 0 so that the initial values are forgotten."""
        decay = min(self._optim.ema_decay, self.updates / (self.updates + 10))
        masters = self._zero.masters()
        average = [self._ema[name] for name in masters]
        torch._foreach_lerp_(average, [master.float() for master in masters.values()], 1 - decay)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fp32 copies of one's own on the host, with one copy from the device."""
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(t.shape).clone() for (name, t), part in zip(tensors.items(), parts, strict=True)}


def _adamw(model: AdaptedModel, optim: OptimSettings) -> torch.optim.Optimizer:
    """AdamW. Norms, biases and what timm exempts (class token, position embedding, bias tables) are not decayed."""
    exempt: set[str] = getattr(model.backbone, "no_weight_decay", set)()
    groups: dict[bool, list[Tensor]] = {}
    for name, parameter in model.trainable().items():
        groups.setdefault(parameter.ndim > 1 and name not in exempt, []).append(parameter)
    parameters = [{"params": group, "weight_decay": optim.weight_decay * decays} for decays, group in groups.items()]
    return torch.optim.AdamW(parameters, lr=optim.lr, betas=optim.betas)


def _start_deepspeed(
    model: AdaptedModel,
    settings: DistributedSettings,
    optim: OptimSettings,
    extra: dict[str, Any],
    comm: Comm,
) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", comm.device.type)
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfigError

    # on the CPU DeepSpeed would compile a shared-memory all-reduce on first use, which takes 80 s and a C++ compiler
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed calls deprecated functions of torch in every collective of every step
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    try:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_adamw(model, optim),
            config=deepspeed_settings(optim, settings, extra, comm.world, model.report.trainable),
            dist_init_required=False,
        )
    except (DeepSpeedConfigError, ValidationError) as error:
        raise SharedUserError(f"deepspeed: {one_line(error, 300)}") from None
    comm.limit_waiting()
    return engine
